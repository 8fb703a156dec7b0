"""The published scorers: names and shapes of the full-size models, the arithmetic of small ones of their classes."""

import json
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import published_models as published
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from skimage import data
from transformers import BertTokenizer, CLIPConfig, CLIPModel

from dkto.common.files import file_sha256
from dkto.evaluation.scorers import PUBLISHED_SCORERS, SCORERS, check_scorers, get_pixel_scorer, score
from dkto.evaluation.scorers.clip import HPS, CLIPScore, LaionAesthetics, PickScore
from dkto.evaluation.scorers.image_reward import ImageReward, ImageRewardModel, image_reward_to_blip
from dkto.evaluation.scorers.network import _load, aesthetics_head
from dkto.evaluation.scorers.open_clip import VIT_H_14, open_clip_to_clip
from dkto.evaluation.scorers.preprocess import cropped_image, normalise, padded_pixels, to_pixels
from dkto.workshop.tokenizer import build_tokenizer

PROMPTS = ["a red star", "a green ring on a white background", "a toy"]
SIDE, PATCH = 28, 7
TINY_CLIP = {
    "projection_dim": 16,
    "text_config": {
        "hidden_size": 24,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "max_position_embeddings": 24,
        "hidden_act": "gelu",
    },
    "vision_config": {
        "hidden_size": 32,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": SIDE,
        "patch_size": PATCH,
        "hidden_act": "gelu",
    },
}


@pytest.fixture(autouse=True)
def weights(tmp_path, monkeypatch):
    """Weights are looked for in a folder of the test's own, and nothing stays loaded."""
    monkeypatch.setenv("DKTO_WEIGHTS", str(tmp_path / "weights"))
    yield tmp_path / "weights"
    _load.cache_clear()


@pytest.fixture(scope="module")
def photographs():
    return [Image.fromarray(getattr(data, name)()) for name in ("astronaut", "coffee", "chelsea")]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return build_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def tiny_config(tokenizer):
    tokens = {"vocab_size": len(tokenizer), "bos_token_id": tokenizer.bos_token_id}
    tokens |= {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    return {**TINY_CLIP, "text_config": {**TINY_CLIP["text_config"], **tokens}}


@pytest.fixture(scope="module")
def tiny_clip(tokenizer, tmp_path_factory):
    """A CLIPModel of a few thousand weights with its tokenizer, in transformers' layout."""
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(1)
    model = CLIPModel(CLIPConfig(**tiny_config(tokenizer)))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    torch.nn.init.constant_(model.logit_scale, 1.5)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_folder_of_half_precision_alone_is_loaded(tiny_clip, tmp_path, photographs):
    folder = shutil.copytree(tiny_clip, tmp_path / "half")
    halves = {name: value.half() for name, value in load_file(folder / "model.safetensors").items()}
    (folder / "model.safetensors").unlink()
    save_file(halves, folder / "model.fp16.safetensors", {"format": "pt"})
    whole, half = (score(CLIPScore(model=str(path)), photographs, PROMPTS) for path in (tiny_clip, folder))
    assert np.allclose(whole, half, atol=2e-3) and not np.array_equal(whole, half)


def logits(folder, tokenizer, photographs):
    """exp(logit_scale) x cosine by transformers' own forward pass, (3,)."""
    model = CLIPModel.from_pretrained(folder)
    tokens = tokenizer(PROMPTS, padding=True, return_tensors="pt")
    pixel_values = torch.stack([cropped_image(image, SIDE) for image in photographs])
    with torch.no_grad():
        return model(**tokens, pixel_values=pixel_values).logits_per_image.diagonal().numpy()


# --- the full-size models


def shapes(network):
    return {name: tuple(value.shape) for name, value in network.state_dict().items()}


def meta(names):
    return {name: torch.empty(shape, device="meta") for name, shape in names.items()}


def test_the_full_size_hps_takes_every_published_weight():
    with torch.device("meta"):
        model = CLIPModel(CLIPConfig(**VIT_H_14))
    mapped = open_clip_to_clip(meta(published.open_clip_names(**published.VIT_H_14)) | meta({"attn_mask": (77, 77)}))
    assert {name: tuple(value.shape) for name, value in mapped.items()} == shapes(model)
    assert sum(parameter.numel() for parameter in model.parameters()) == 986_109_441


@pytest.mark.parametrize(("size", "millions"), [("VIT_H_14", 986.109441), ("VIT_L_14", 427.616513)])
def test_full_size_clip_models_have_the_published_names(size, millions):
    about = getattr(published, size)
    towers = {
        "projection_dim": about["embedding"],
        "text_config": {
            "hidden_size": about["text_width"],
            "intermediate_size": 4 * about["text_width"],
            "num_hidden_layers": about["text_layers"],
            "num_attention_heads": about["text_width"] // 64,
        },
        "vision_config": {
            "hidden_size": about["width"],
            "intermediate_size": 4 * about["width"],
            "num_hidden_layers": about["layers"],
            "num_attention_heads": 16,
            "patch_size": 14,
        },
    }
    with torch.device("meta"):
        model = CLIPModel(CLIPConfig(**towers))
    assert shapes(model) == published.transformers_clip_names(**about)
    assert sum(parameter.numel() for parameter in model.parameters()) == round(millions * 1e6)


def test_the_full_size_image_reward_takes_every_published_weight():
    with torch.device("meta"):
        model = ImageRewardModel()
    mapped = image_reward_to_blip(meta(published.image_reward_names()))
    assert {name: tuple(value.shape) for name, value in mapped.items()} == shapes(model)


def test_the_full_size_aesthetics_head_has_the_published_names_and_size():
    found = {f"layers.{name}": shape for name, shape in shapes(aesthetics_head(768)).items()}
    assert found == published.head_names(768)
    bytes_of_weights = 4 * sum(parameter.numel() for parameter in aesthetics_head(768).parameters())
    assert 0 < 3_714_759 - bytes_of_weights < 8_000  # the published file, and its pickle's frame


@pytest.mark.parametrize("name", ["transformer.resblocks.0.attn.gate", "visual.attnpool.weight", "x"])
def test_foreign_open_clip_names_are_refused(name):
    with pytest.raises(ValueError, match="is not a weight of an open_clip model with a vision transformer"):
        open_clip_to_clip({name: torch.zeros(1)})


@pytest.mark.parametrize("name", ["blip.visual_encoder.blocks.0.attn.gate.weight", "norm.weight", "x"])
def test_foreign_image_reward_names_are_refused(name):
    with pytest.raises(ValueError, match="is not a weight of ImageReward"):
        image_reward_to_blip({name: torch.zeros(1)})


# --- the arithmetic


def save_converted(state, path):
    """A weights file and the note with its hash, as `convert` leaves them."""
    save_file(state, path)
    path.with_suffix(".json").write_text(json.dumps({"sha256": file_sha256(path)}))


def test_pickscore_is_transformers_own_logit(tiny_clip, tokenizer, photographs):
    scorer = PickScore(model=str(tiny_clip), tokenizer=str(tiny_clip), device="cpu")
    expected = logits(tiny_clip, tokenizer, photographs)
    np.testing.assert_allclose(score(scorer, photographs, PROMPTS), expected, rtol=1e-4, atol=1e-5)
    assert np.ptp(expected) > 0.05


@pytest.mark.parametrize("place", ["a folder", "the weights folder"])
@pytest.mark.parametrize("kind", ["pickscore", "clip", "laion"])
def test_a_model_that_was_trained_anew_in_its_folder_is_another_scorer(
    kind, place, tiny_clip, photographs, weights, tmp_path
):
    folder = Path(shutil.copytree(tiny_clip, (weights if place == "the weights folder" else tmp_path) / "me" / "model"))
    source = "me/model" if place == "the weights folder" else str(folder)
    save_converted(published.random_state(published.head_names(16)), tmp_path / "head.safetensors")
    scorer = {
        "pickscore": lambda: PickScore(model=source, tokenizer=source),
        "clip": lambda: CLIPScore(model=source),
        "laion": lambda: LaionAesthetics(str(tmp_path / "head.safetensors"), source),
    }[kind]()
    about, values = scorer.about, score(scorer, photographs, PROMPTS)
    assert about == scorer.about and (score(scorer, photographs, PROMPTS) == values).all()
    torch.manual_seed(2)
    state = {
        name: value + 0.3 * torch.randn_like(value) for name, value in load_file(folder / "model.safetensors").items()
    }
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    assert scorer.about != about
    assert (score(scorer, photographs, PROMPTS) != values).all(), "the network in memory is not the one on disk"


def test_of_a_hub_id_that_is_not_here_the_weights_are_not_known():
    assert PickScore().about["weights"] is None and LaionAesthetics().about["clip_weights"] is None
    assert HPS("hps_v2").about["sha256"] is None


def test_weights_under_other_names_are_not_filled_with_random_numbers(tiny_clip, tmp_path):
    folder = Path(shutil.copytree(tiny_clip, tmp_path / "model"))
    file = folder / "model.safetensors"
    state = {f"module.{name}": value.clone() for name, value in load_file(file).items()}
    save_file(state, file, {"format": "pt"})
    with pytest.raises(ValueError, match=rf"weights in .*model lack {len(state)} parameters of a CLIPModel, the first"):
        CLIPScore(model=str(folder)).network()


def test_clip_score_is_the_cosine(tiny_clip, tokenizer, photographs):
    scorer = CLIPScore("clip_tiny", str(tiny_clip), "cpu")
    expected = logits(tiny_clip, tokenizer, photographs) / np.exp(1.5)
    np.testing.assert_allclose(score(scorer, photographs, PROMPTS), expected, rtol=1e-4, atol=1e-5)


@pytest.fixture
def hps(tokenizer, tiny_clip, tmp_path, monkeypatch):
    """A small HPS and its weights under open_clip's names."""
    monkeypatch.setattr("dkto.evaluation.scorers.open_clip.VIT_H_14", tiny_config(tokenizer))
    about = {"width": 32, "layers": 2, "grid": 4, "patch": PATCH, "text_width": 24, "text_layers": 2}
    about |= {"vocabulary": len(tokenizer), "context": 24, "embedding": 16}
    state = published.random_state(published.open_clip_names(**about))
    save_converted(state, tmp_path / "hps.safetensors")
    return HPS("hps_v2_1", str(tmp_path / "hps.safetensors"), str(tiny_clip), "cpu"), state


def test_hps_cleans_prompts_as_open_clip_does(hps, photographs):
    """ftfy straightens quotes and mends wrong encodings, entities are resolved twice, and none of it is in CLIP's."""
    scorer, _ = hps
    raw, clean = (
        ["a &amp;amp;  red\u2019s star ", "caf\u00c3\u00a9 &lt;ring&gt;"],
        ["a &  red's star", "caf\u00e9 <ring>"],
    )
    pictures = photographs[:2]
    assert (score(scorer, pictures, raw) == score(scorer, pictures, clean)).all()
    plain = CLIPScore("clip_tiny", scorer.tokenizer, "cpu")
    assert (score(plain, pictures, raw) != score(plain, pictures, clean)).any()


def test_clip_score_reads_open_clips_release(hps, tokenizer, photographs):
    """Its own preprocessing, open_clip's weights."""
    scorer, state = hps
    clip = CLIPScore("clip_h14", scorer.tokenizer, "cpu", scorer.weights)
    tokens = tokenizer(PROMPTS, padding="max_length", max_length=24, return_tensors="pt").input_ids
    pixel_values = torch.stack([cropped_image(image, SIDE, rounded=True) for image in photographs])
    with torch.no_grad():
        expected = published.open_clip_cosine(
            state, pixel_values, tokens, heads=4, text_heads=3, end=tokenizer.eos_token_id
        )
    np.testing.assert_allclose(score(clip, photographs, PROMPTS), expected, rtol=1e-4, atol=1e-5)
    assert clip.about["weights"] == scorer.weights and clip.about["sha256"] == scorer.about["sha256"]
    wide = Image.fromarray(np.arange(640 * 427 * 3, dtype=np.uint32).reshape(427, 640, 3).astype(np.uint8))
    messy, plain = "Tom &amp;amp; Jerry\u2019s house", "Tom & Jerry's house"
    assert clip([wide], [messy]) == clip([wide], [plain]), "open_clip cleans prompts"
    assert (clip.prepare_image(wide, 32) == cropped_image(wide, 32, rounded=True)).all()
    with pytest.raises(ValueError, match="weights are the converted file of clip_h14, got scorer 'clip_l14'"):
        CLIPScore("clip_l14", weights=scorer.weights)


def test_hps_can_shrink_as_older_torchvision_did(hps, photographs):
    scorer, _ = hps
    older = replace(scorer, antialias=False)
    image = photographs[0]
    expected = F.interpolate(to_pixels(image)[None], (SIDE, SIDE), mode="bicubic", align_corners=False)[0]
    assert image.width == image.height
    torch.testing.assert_close(older.prepare_image(image, SIDE), normalise(expected))
    assert score(older, [image], ["a star"]) != score(scorer, [image], ["a star"])
    assert older.about != scorer.about, "scores of the two are never mixed"


def test_hps_is_open_clips_cosine_of_the_padded_picture(hps, tokenizer, photographs):
    scorer, state = hps
    tokens = tokenizer(PROMPTS, padding="max_length", max_length=24, return_tensors="pt").input_ids
    pixel_values = torch.cat([padded_pixels(to_pixels(image)[None], SIDE) for image in photographs])
    with torch.no_grad():
        expected = published.open_clip_cosine(
            state, pixel_values, tokens, heads=4, text_heads=3, end=tokenizer.eos_token_id
        )
    np.testing.assert_allclose(score(scorer, photographs, PROMPTS), expected, rtol=1e-4, atol=1e-5)
    assert np.ptp(expected.numpy()) > 0.05


def test_weights_of_another_shape_are_refused(hps, tmp_path):
    scorer, state = hps
    del state["visual.proj"]
    state["ln_final.weight"] = torch.zeros(3)
    save_converted(state, tmp_path / "hps.safetensors")
    sentence = r"hps\.safetensors does not fit CLIPModel: 2 of \d+ names differ, first text_model\.final_layer_norm"
    with pytest.raises(ValueError, match=sentence):
        scorer.network()


def test_laion_aesthetics_is_the_published_head_on_the_unit_embedding(tiny_clip, photographs, tmp_path):
    state = published.random_state(published.head_names(16))
    save_converted(state, tmp_path / "head.safetensors")
    scorer = LaionAesthetics(str(tmp_path / "head.safetensors"), str(tiny_clip), "cpu")
    model = CLIPModel.from_pretrained(tiny_clip)
    pixel_values = torch.stack([cropped_image(image, SIDE) for image in photographs])
    with torch.no_grad():
        values = model.visual_projection(model.vision_model(pixel_values).pooler_output).numpy()
    values = values / np.linalg.norm(values, axis=1, keepdims=True)
    for layer in (0, 2, 4, 6, 7):
        values = values @ state[f"layers.{layer}.weight"].numpy().T + state[f"layers.{layer}.bias"].numpy()
    found = score(scorer, photographs, PROMPTS)
    np.testing.assert_allclose(found, values[:, 0], rtol=1e-3, atol=1e-4)
    assert (found == score(scorer, photographs, PROMPTS[::-1])).all()


@pytest.fixture
def image_reward(tmp_path, monkeypatch):
    """A small ImageReward, its weights under the published names, and a BERT tokenizer of a few words."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "green", "star", "ring", "toy", "on", "white"]
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "vocab.txt").write_text("\n".join(words))
    small = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision = {**small, "image_size": SIDE, "patch_size": PATCH, "layer_norm_eps": 1e-6}
    text = {"vocab_size": 20, "hidden_size": 24, "encoder_hidden_size": 32, "intermediate_size": 96}
    text |= {"num_hidden_layers": 2, "num_attention_heads": 3, "max_position_embeddings": 40, "layer_norm_eps": 1e-12}
    monkeypatch.setattr("dkto.evaluation.scorers.image_reward.VISION", vision)
    monkeypatch.setattr("dkto.evaluation.scorers.image_reward.TEXT", text)
    names = published.image_reward_names(
        width=32, layers=2, grid=4, patch=PATCH, text_width=24, text_layers=2, vocabulary=20, positions=40
    )
    state = published.random_state(names)
    save_converted(state, tmp_path / "reward.safetensors")
    return ImageReward(str(tmp_path / "reward.safetensors"), str(tmp_path / "bert"), "cpu"), state, tmp_path / "bert"


def test_image_reward_is_the_published_computation(image_reward, photographs):
    scorer, state, bert = image_reward
    tokens = BertTokenizer.from_pretrained(bert)(PROMPTS, padding="max_length", max_length=35, return_tensors="pt")
    pixel_values = torch.stack([cropped_image(image, SIDE, rounded=True) for image in photographs])
    with torch.no_grad():
        expected = published.image_reward(
            state, pixel_values, tokens.input_ids, tokens.attention_mask, heads=4, text_heads=3
        )
    found = score(scorer, photographs, PROMPTS)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)
    assert np.abs(found - score(scorer, photographs, PROMPTS[::-1]))[0] > 1e-3


# --- one face


def test_pictures_in_batches_give_the_same_scores(tiny_clip, photographs, monkeypatch):
    scorer = CLIPScore("clip_tiny", str(tiny_clip), "cpu")
    whole = score(scorer, photographs * 2, PROMPTS * 2)
    monkeypatch.setattr("dkto.evaluation.scorers.network.BATCH_SIZE", 4)
    np.testing.assert_allclose(score(scorer, photographs * 2, PROMPTS * 2), whole, rtol=1e-4)
    assert score(scorer, [], []).shape == (0,)


@pytest.mark.parametrize("kind", ["pickscore", "hps", "image_reward"])
def test_pixels_give_the_pictures_scores_with_gradient(kind, tiny_clip, hps, image_reward, photographs):
    scorer = {
        "pickscore": PickScore(str(tiny_clip), str(tiny_clip), "cpu"),
        "hps": hps[0],
        "image_reward": image_reward[0],
    }[kind]
    for image, prompt in zip(photographs, PROMPTS, strict=True):
        pixels = to_pixels(image)[None].requires_grad_()
        value = get_pixel_scorer(scorer)(pixels, [prompt])
        value.sum().backward()
        assert pixels.grad.abs().sum() > 0
        exact = score(scorer, [image], [prompt])[0]
        assert value.item() == pytest.approx(exact, abs=1e-5 if kind == "hps" else 0.02 * max(1, abs(exact)))
    with pytest.raises(ValueError, match=r"pixels must have shape \(2, 3, H, W\), one image per prompt, got \(1, 3, "):
        scorer.score_pixels(pixels, PROMPTS[:2])


def test_rules_have_gradient_only_where_one_is_written():
    pixels = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)).mul(255).round().div(255)
    pixels.requires_grad_()
    values = get_pixel_scorer("world_redness")(pixels, ["", ""])
    values.sum().backward()
    images = [Image.fromarray(p.permute(1, 2, 0).mul(255).round().byte().numpy()) for p in pixels.detach()]
    np.testing.assert_allclose(values.detach(), score("world_redness", images, ["", ""]), atol=1e-6)
    assert pixels.grad.abs().sum() > 0
    with pytest.raises(ValueError, match=r"scorer world_fidelity has no gradient; those that have: .*pickscore"):
        get_pixel_scorer("world_fidelity")


@pytest.mark.parametrize("name", PUBLISHED_SCORERS)
def test_without_weights_one_sentence_says_what_to_do(name, weights):
    scorer = SCORERS[name]
    assert pickle.loads(pickle.dumps(scorer)) == scorer and scorer.about["scale"]
    with pytest.raises(FileNotFoundError) as caught:
        score(name, [Image.new("RGB", (8, 8))], ["a star"])
    sentence = str(caught.value)
    assert sentence.startswith(f"scorer {name} needs ") and str(weights) in sentence
    assert "hf download" in sentence or "python -m dkto.evaluation.scorers" in sentence


def test_missing_weights_are_said_before_pictures_are_drawn(hps, weights):
    check_scorers(["world_fidelity", hps[0]])
    with pytest.raises(FileNotFoundError, match="scorer pickscore needs the model"):
        check_scorers(["world_fidelity", "pickscore"])
    with pytest.raises(KeyError, match="unknown scorer 'pickscor'; did you mean 'pickscore'"):
        check_scorers(["pickscor"])
    check_scorers(["world_fidelity"], ["a sticker of a large red star on a navy background"])
    check_scorers(["world_redness"], ["a dog"])
    with pytest.raises(ValueError, match="scorer world_utility judges the small world alone: prompt 'a dog' is not"):
        check_scorers(["world_redness", "world_utility"], ["a dog"])


def test_models_are_found_in_the_weights_folder(tiny_clip, weights, photographs):
    (weights / "owner").mkdir(parents=True)
    (weights / "owner" / "tiny").symlink_to(tiny_clip)
    scorer = CLIPScore("clip_tiny", "owner/tiny", "cpu")
    assert (
        score(scorer, photographs, PROMPTS) == score(CLIPScore("x", str(tiny_clip), "cpu"), photographs, PROMPTS)
    ).all()
