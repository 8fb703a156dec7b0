import shutil
from fnmatch import fnmatch

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from dkto.models import make_policy, write_weights
from dkto.models.hub import PUBLISHED, lora_file, unet_folder
from dkto.models.system import System, draw, noise_generator


def picture(system):
    return np.asarray(draw(system.load(), ["a picture 0"], [noise_generator(0, 0, 0)], system)[0]).astype(int)


@pytest.fixture(scope="module")
def changed(tiny_pipeline, tmp_path_factory):
    """Another UNet for the tiny pipeline: as a folder, inside a whole pipeline, and as an adapter."""
    folder = tmp_path_factory.mktemp("changed")
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_pipeline)
    with torch.no_grad():
        for parameter in pipeline.unet.parameters():
            parameter.mul_(1.2)
    pipeline.save_pretrained(folder / "pipeline")
    pipeline.unet.save_pretrained(folder / "released" / "unet")
    pair = make_policy(StableDiffusionPipeline.from_pretrained(tiny_pipeline).unet, 2, seed=0)
    with torch.no_grad():
        for parameter in pair.trainable().values():
            parameter.normal_(0, 0.5)
    write_weights(pair, folder / "lora")
    return folder


def test_a_unet_folder_equals_the_whole_pipeline_that_holds_it(changed, tiny_pipeline):
    base = System(model=str(tiny_pipeline), steps=2)
    whole = picture(System(model=str(changed / "pipeline"), steps=2))
    for unet in ("released", "released/unet", "pipeline"):
        assert (picture(System(model=str(tiny_pipeline), unet=str(changed / unet), steps=2)) == whole).all()
    assert (picture(base) != whole).any()


def test_an_adapter_loads_as_folder_or_file_under_any_name(changed, tiny_pipeline, tmp_path):
    folder = changed / "lora"
    shutil.copy(folder / "pytorch_lora_weights.safetensors", tmp_path / "mine.safetensors")
    drawn = [
        picture(System(model=str(tiny_pipeline), lora=str(lora), steps=2))
        for lora in (folder, folder / "pytorch_lora_weights.safetensors", tmp_path, tmp_path / "mine.safetensors")
    ]
    assert all((one == drawn[0]).all() for one in drawn)
    assert (drawn[0] != picture(System(model=str(tiny_pipeline), steps=2))).any()


def test_of_a_hub_repository_the_unet_alone_is_fetched(monkeypatch, changed):
    asked = []

    def download(source, allow_patterns):
        asked.extend(allow_patterns)
        return str(changed / "pipeline")

    monkeypatch.setattr("dkto.models.base.snapshot_download", download)
    assert unet_folder("owner/name") == changed / "pipeline" / "unet"
    files = ("unet/diffusion_pytorch_model.safetensors", "diffusion_pytorch_model-00001-of-00002.safetensors")
    others = ("vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors")
    others += ("unet/diffusion_pytorch_model.fp16.safetensors",)
    fetched = {name: any(fnmatch(name, pattern) for pattern in asked) for name in (*files, *others)}
    assert fetched == dict.fromkeys(files, True) | dict.fromkeys(others, False)


def test_the_negative_prompt_matters_only_with_guidance(tiny_pipeline):
    for guidance, differs in ((1.0, False), (6.0, True)):
        plain, against = (
            picture(System(model=str(tiny_pipeline), steps=2, guidance=guidance, negative_prompt=words))
            for words in ("", "bad image")
        )
        assert (plain != against).any() == differs


def test_published_checkpoints_are_systems_whose_base_can_be_a_local_copy():
    assert set(PUBLISHED) == {"base", "dpo", "kto", "alignprop"}
    system = System.published("dpo", model="/models/sd15", steps=25)
    assert (system.model, system.unet, system.steps) == ("/models/sd15", "mhdang/dpo-sd1.5-text2image-v1", 25)
    assert System.published("alignprop").lora == "mihirpd/alignprop-trl-aesthetics"
    with pytest.raises(KeyError, match="no published checkpoint 'sft'; known: base, dpo, kto, alignprop"):
        System.published("sft")


def test_what_is_no_checkpoint_is_named(tmp_path, changed):
    with pytest.raises(FileNotFoundError, match="unet 'no/where' is neither a folder that exists nor a hub id"):
        unet_folder("no/where")
    with pytest.raises(FileNotFoundError, match="lora 'no/where' is neither a folder that exists nor a hub id"):
        lora_file("no/where")
    with pytest.raises(FileNotFoundError, match=r"lora '.*typo\.safetensors' does not exist"):
        lora_file("typo.safetensors")
    with pytest.raises(FileNotFoundError, match=r"unet 'runs/a/unet' does not exist, and is no hub id"):
        unet_folder("runs/a/unet")
    with pytest.raises(ValueError, match=r"unet must be a folder or a hub id, got the file '.*config\.json'"):
        unet_folder(changed / "released" / "unet" / "config.json")
    with pytest.raises(ValueError, match="holds no UNet2DConditionModel"):
        unet_folder(changed / "pipeline" / "vae")
    shutil.copytree(changed / "released", tmp_path / "pickled")
    weights = tmp_path / "pickled" / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(ValueError, match=r"must hold model weights as \.safetensors, found no .*; pickles are not"):
        unet_folder(tmp_path / "pickled")
    (tmp_path / "x.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"lora must be a \.safetensors file, got x\.bin; pickles are not loaded"):
        lora_file(tmp_path / "x.bin")
    with pytest.raises(ValueError, match=r"or one other \.safetensors file, found none"):
        lora_file(tmp_path)
    for name in ("a", "b"):
        (tmp_path / f"{name}.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"found a\.safetensors, b\.safetensors"):
        lora_file(tmp_path)
