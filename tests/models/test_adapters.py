"""An adapter is applied whole, with its own scale, whatever its names; or refused in one sentence."""

import json

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import nn

from dkto.common.files import write_json
from dkto.models import load_model, make_policy, write_weights
from dkto.models.adapters import merge_adapter
from dkto.models.export import export_lora
from dkto.models.hub import lora_file
from dkto.models.system import System

RANK = 2


def networks_of(folder):
    pipeline = load_model(folder).load_pipeline()
    return {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module) and name != "vae"}


def made(network, targets=("to_q", "to_v")):
    """Random halves for some layers, by layer: (down, up)."""
    generator = torch.Generator().manual_seed(1)
    found = {}
    for name, layer in network.named_modules():
        if name.endswith(targets):
            shape = layer.weight.shape
            down = torch.randn(RANK, *shape[1:], generator=generator)
            up = torch.randn(shape[0], RANK, *[1] * (len(shape) - 2), generator=generator)
            found[name] = down, up
    return found


@pytest.fixture(scope="module")
def halves(tiny_pipeline):
    return made(networks_of(tiny_pipeline)["unet"])


def named(halves, down, up, prefix="unet."):
    tensors = {}
    for layer, (first, second) in halves.items():
        tensors |= {f"{prefix}{layer}.{down}.weight": first.clone(), f"{prefix}{layer}.{up}.weight": second.clone()}
    return tensors


def kohya(halves, alpha=None):
    renamed = {layer.replace(".", "_"): pair for layer, pair in halves.items()}
    tensors = named(renamed, "lora_down", "lora_up", "lora_unet_")
    return tensors | ({f"lora_unet_{layer}.alpha": torch.tensor(alpha) for layer in renamed} if alpha else {})


def merged(folder, path, denoiser="unet"):
    networks = networks_of(folder)
    merge_adapter(networks, denoiser, path)
    return {f"{part}.{k}": v for part, network in networks.items() for k, v in network.state_dict().items()}


def by_diffusers(folder, path, denoiser="unet"):
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.load_lora_weights(path.parent, weight_name=path.name)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    return {f"{denoiser}.{k}": v for k, v in getattr(pipeline, denoiser).state_dict().items()}


@pytest.mark.parametrize("kind", ["plain", "older", "processor", "peft", "kohya", "kohya with alpha", "metadata"])
def test_every_naming_gives_what_diffusers_gives_or_the_plain_one(tiny_pipeline, halves, tmp_path, kind):
    path, metadata, scale = tmp_path / "a.safetensors", None, 1.0
    if kind == "processor":
        tensors = {}
        for layer, (down, up) in halves.items():
            place, _, which = layer.rpartition(".")
            for half, tensor in (("down", down), ("up", up)):
                tensors[f"unet.{place}.processor.{which}_lora.{half}.weight"] = tensor.clone()
    elif kind == "peft":
        tensors, scale = named(halves, "lora_A", "lora_B", "base_model.model."), 3.0
        (tmp_path / "adapter_config.json").write_text(json.dumps({"r": RANK, "lora_alpha": 3 * RANK}))
    elif kind.startswith("kohya"):
        tensors, scale = kohya(halves, 1.0 if "alpha" in kind else None), 0.5 if "alpha" in kind else 1.0
    elif kind == "metadata":
        tensors, scale = named(halves, "lora_A", "lora_B"), 2.0
        about = {"unet.r": RANK, "unet.lora_alpha": 2 * RANK, "unet.target_modules": ["to_q", "to_v"]}
        metadata = {"lora_adapter_metadata": json.dumps(about)}
    else:
        tensors = named(halves, *(("lora_A", "lora_B") if kind == "plain" else ("lora.down", "lora.up")))
    save_file(tensors, path, metadata)
    after = merged(tiny_pipeline, path)
    before = {f"unet.{k}": v for k, v in networks_of(tiny_pipeline)["unet"].state_dict().items()}
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"unet.{layer}.weight" for layer in halves}
    for layer, (down, up) in halves.items():
        expected = before[f"unet.{layer}.weight"] + scale * (up @ down)
        torch.testing.assert_close(after[f"unet.{layer}.weight"], expected, rtol=1e-5, atol=1e-6)
    if kind != "peft":  # which diffusers reads without its alpha
        theirs = by_diffusers(tiny_pipeline, path)
        assert all(torch.equal(theirs[name], after[name]) for name in theirs)


def test_original_names_of_xl_are_translated_as_diffusers_does(tiny_sdxl, tmp_path):
    names = {
        "input_blocks_1_1": "down_blocks.0.attentions.0",
        "input_blocks_3_1": "down_blocks.1.attentions.0",
        "middle_block_1": "mid_block.attentions.0",
        "output_blocks_0_1": "up_blocks.0.attentions.0",
        "output_blocks_3_1": "up_blocks.1.attentions.1",
    }
    unet = networks_of(tiny_sdxl)["unet"]
    found, tail = {}, "transformer_blocks.0.attn1.to_q"
    for original, ours in names.items():
        pair = made(unet, (f"{ours}.{tail}",))[f"{ours}.{tail}"]
        found[f"{original}_{tail.replace('.', '_')}"] = pair
    path = tmp_path / "xl.safetensors"
    save_file(kohya(found, 1.0), path)
    ours, theirs = merged(tiny_sdxl, path), by_diffusers(tiny_sdxl, path)
    plain = unet.state_dict()
    changed = {name for name in theirs if not torch.equal(theirs[name], plain[name.removeprefix("unet.")])}
    assert len(changed) == len(names) and all(torch.equal(theirs[name], ours[name]) for name in theirs)


def test_a_transformer_and_a_text_encoder_take_adapters(tiny_sd3, tiny_pipeline, tmp_path):
    networks = networks_of(tiny_sd3)
    halves = made(networks["transformer"], ("attn.to_q",))
    path = tmp_path / "sd3.safetensors"
    save_file(named(halves, "lora_A", "lora_B", "transformer."), path)
    ours, theirs = merged(tiny_sd3, path, "transformer"), by_diffusers(tiny_sd3, path, "transformer")
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)
    assert any((ours[f"transformer.{k}"] != v).any() for k, v in networks["transformer"].state_dict().items())
    halves = made(networks_of(tiny_pipeline)["text_encoder"], ("q_proj",))
    assert halves
    for names in (
        named(halves, "lora_A", "lora_B", "text_encoder."),
        named({k.replace(".", "_"): v for k, v in halves.items()}, "lora_down", "lora_up", "lora_te_"),
    ):
        save_file(names, path)
        ours, before = merged(tiny_pipeline, path), networks_of(tiny_pipeline)["text_encoder"].state_dict()
        for layer, (down, up) in halves.items():
            torch.testing.assert_close(ours[f"text_encoder.{layer}.weight"], before[f"{layer}.weight"] + up @ down)


def spoiled(tensors, how):
    first = next(iter(tensors))
    if how == "no prefix":
        return {name.removeprefix("unet."): t for name, t in tensors.items()}
    if how == "other part":
        return {name.replace("unet.", "transformer."): t for name, t in tensors.items()}
    if how == "half":
        return {name.replace("blocks.1", "blocks.91") if "up_" in name else name: t for name, t in tensors.items()}
    if how == "nan":
        return tensors | {first: torch.full_like(tensors[first], float("nan"))}
    if how == "wide":
        return {name: torch.cat([t, t], 1 if "lora_A" in name else 0) for name, t in tensors.items()}
    if how == "one half":
        return {name: t for name, t in tensors.items() if name != first}
    if how == "dora":
        return tensors | {first.replace("lora_A.weight", "lora_magnitude_vector"): torch.ones(8)}
    if how == "twice":
        return tensors | {first.replace("lora_A", "lora_A.other"): tensors[first].clone()}
    if how == "alpha":
        return tensors | {first.replace("lora_A.weight", "alpha"): torch.tensor(float("-1"))}
    if how == "rank 0":
        return {name: t[:0] if "lora_A" in name else t[:, :0] for name, t in tensors.items()}
    return {}


@pytest.mark.parametrize(
    ("how", "sentence"),
    [
        ("no prefix", r"'down_blocks\..*' is of no layer of its .*unet.*; expected names that begin with 'unet\.'"),
        ("other part", r"'transformer\.down_blocks\..*' is of no layer"),
        ("half", r"'unet\.up_blocks\.91\..*' is of no layer"),
        ("nan", r"holds weights that are not finite, first in 'unet\.down"),
        ("wide", r"was made for another model: unet\.down_blocks\..* is \(8, 8\) here, and the adapter multiplies"),
        ("one half", r"holds up alone of unet\.down_blocks\..*: a half is missing"),
        ("dora", r"lora_magnitude_vector' is of no layer"),
        ("twice", r"holds two tensors for one place, the second is "),
        ("alpha", r"alpha of unet\..* must be one number above 0, got -1\.0"),
        ("rank 0", r"was made for another model"),
        ("empty", r"holds no tensor: it is no adapter"),
    ],
)
def test_what_is_not_applied_whole_is_refused(tiny_pipeline, halves, tmp_path, how, sentence):
    path = tmp_path / "a.safetensors"
    save_file({k: v.contiguous() for k, v in spoiled(named(halves, "lora_A", "lora_B"), how).items()}, path)
    networks = networks_of(tiny_pipeline)
    before = {k: v.clone() for k, v in networks["unet"].state_dict().items()}
    with pytest.raises(ValueError, match=rf"a\.safetensors.*{sentence}") as caught:
        merge_adapter(networks, "unet", path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600
    assert all(torch.equal(before[k], v) for k, v in networks["unet"].state_dict().items()), "changed by halves"


def test_damaged_and_missing_files_are_said(tiny_pipeline, halves, tmp_path):
    path = tmp_path / "a.safetensors"
    with pytest.raises(FileNotFoundError, match=r"lora '.*a\.safetensors' does not exist"):
        System(model=str(tiny_pipeline), lora=str(path)).load()
    save_file(named(halves, "lora_A", "lora_B", "base_model.model."), path)
    with pytest.warns(UserWarning, match=r"has no adapter_config\.json beside it: its lora_alpha is"):
        merged(tiny_pipeline, path)
    whole = path.read_bytes()
    for content in (b"", whole[:100], whole[:-20], (2**60).to_bytes(8, "little") + whole[8:]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"a\.safetensors holds no adapter that can be read"):
            merged(tiny_pipeline, path)
    save_file({k: v.half() for k, v in load_file_of(whole, tmp_path).items()}, path)
    for text in ("{", '{"lora_alpha": "x"}', '{"lora_alpha": 0}', '{"use_dora": true}'):
        (tmp_path / "adapter_config.json").write_text(text)
        with pytest.raises(ValueError, match=r"adapter_config\.json is no|lora_alpha must be|is a DoRA"):
            merged(tiny_pipeline, path)


def load_file_of(content, folder):
    (folder / "whole.safetensors").write_bytes(content)
    return load_file(folder / "whole.safetensors")


@pytest.mark.parametrize("source", ["tiny_pipeline", "tiny_sdxl"])
def test_an_exported_adapter_comes_back_bit_by_bit(source, request, tmp_path):
    """By our own reader and by diffusers', under kohya's names, and the original ones of XL."""
    folder = request.getfixturevalue(source)
    run = left_run(tmp_path, folder)
    wanted, plain = merged(folder, lora_file(run / "lora")), networks_of(folder)["unet"].state_dict()
    changed = {
        name for name in wanted if not torch.equal(wanted[name], plain.get(name.removeprefix("unet."), wanted[name]))
    }
    assert len(changed) > 8
    for kind in ("kohya", "diffusers"):
        path = export_lora(run, tmp_path / f"{kind}.safetensors", format=kind)
        ours, theirs = merged(folder, path), by_diffusers(folder, path)
        assert all(torch.equal(ours[name], wanted[name]) for name in wanted)
        assert all(torch.equal(theirs[name], wanted[name]) for name in theirs)
    names = set(load_file(tmp_path / "kohya.safetensors"))
    assert all(name.startswith("lora_unet_") for name in names)
    assert {name.rpartition(".")[0] for name in names if name.endswith("down.weight")} == {
        f"{name.removesuffix('.alpha')}.lora_down" for name in names if name.endswith("alpha")
    }
    original = any("input_blocks" in name or "output_blocks" in name for name in names)
    assert original == (source == "tiny_sdxl") and original != any("down_blocks" in name for name in names)


def test_what_has_no_such_export_is_said(tiny_sd3, tiny_pipeline, tmp_path):
    run = left_run(tmp_path, tiny_sd3)
    with pytest.raises(ValueError, match="format must be diffusers for StableDiffusion3Pipeline"):
        export_lora(run, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"output must be a \.safetensors file, got 'x\.bin'"):
        export_lora(run, tmp_path / "x.bin")
    (run / "lora").rename(run / "model")
    with pytest.raises(FileNotFoundError, match="holds no lora/: all weights were trained"):
        export_lora(run, tmp_path / "x.safetensors")


def left_run(folder, model):
    """What a finished training leaves, with an adapter of random halves."""
    pair = make_policy(load_model(model).load_denoiser(), RANK, seed=1)
    for name, parameter in pair.trainable().items():
        torch.nn.init.normal_(parameter.data, generator=torch.Generator().manual_seed(len(name)))
    write_weights(pair, folder / "run" / "lora")
    config = {"model": str(model), "objective": "kto"}
    write_json(folder / "run" / "training.json", {"fingerprint": "ab", "config": config})
    return folder / "run"
