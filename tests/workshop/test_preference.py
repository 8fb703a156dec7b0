"""The small world's learned scorers: how they are trained, and what the shipped ones can do."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from dkto.evaluation.scorers import SCORERS, get_pixel_scorer, score
from dkto.evaluation.scorers.network import ClipWithTokenizer
from dkto.evaluation.scorers.preprocess import to_pixels
from dkto.evaluation.scorers.world import WORLD_FOLDER, WorldCLIP, WorldPreference
from dkto.workshop.preference import (
    CHOICE_SHARPNESS,
    PaintedPairs,
    clip_loss,
    clip_pixels,
    new_clip,
    paint_pairs,
    preference_loss,
)
from dkto.workshop.scorers_card import PARTS, held_out_prompts, load_clip, measure_scorers, rate, train_scorers
from dkto.workshop.tokenizer import build_tokenizer
from dkto.world.painter import BAD_FINISH, GOOD_FINISH, paint
from dkto.world.scenes import caption, changed, parse, prompts_for, split_of
from dkto.world.truth import aesthetics, judge

PAIR = "an icon of a red star left of a blue ring on a grey background"
LONE = "a toy of a large red star on a navy background"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Both networks after a few steps, as the command makes them."""
    folder = tmp_path_factory.mktemp("scorers")
    sizes = {"pairs": 24, "test_pairs": 40, "clip_steps": 3, "preference_steps": 2}
    figures = train_scorers(folder / "run", folder / "out", **sizes, clip_batch=8, preference_batch=4)
    return folder, sizes, figures


# --- data


def test_a_pool_is_painted_once_and_judged_by_the_rules(tmp_path):
    prompts = prompts_for("train", 20)
    pairs = paint_pairs(tmp_path / "train", prompts, 0)
    assert pairs.images.shape == (20, 2, 64, 64, 3) and pairs.prompts == prompts
    for row, side in ((0, 0), (7, 1)):
        picture = np.array(pairs.images[row, side])
        expected = judge(picture, pairs.prompts[row])["fidelity"] * aesthetics(picture)
        assert pairs.utilities[row, side] == pytest.approx(expected)
    faithful = [text == prompt for texts, prompt in zip(pairs.captions, pairs.prompts, strict=True) for text in texts]
    assert 0.3 < np.mean(faithful) < 0.8
    stamp = (tmp_path / "train.npy").stat().st_mtime_ns
    again = paint_pairs(tmp_path / "train", prompts, 0)
    assert (tmp_path / "train.npy").stat().st_mtime_ns == stamp and (again.utilities == pairs.utilities).all()


def test_choices_are_bradley_terry_in_the_utility():
    gap = 0.2
    pairs = PaintedPairs(np.zeros((20_000, 2, 1)), [""] * 20_000, [], np.tile([0.3, 0.3 + gap], (20_000, 1)))
    expected = 1 / (1 + np.exp(-CHOICE_SHARPNESS * gap))
    assert pairs.choices(np.random.default_rng(0)).mean() == pytest.approx(expected, abs=0.01)


# --- losses


@pytest.fixture(scope="module")
def embed(tmp_path_factory):
    tokenizer = build_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    torch.manual_seed(0)
    return ClipWithTokenizer(new_clip(tokenizer), tokenizer)


def test_the_losses_are_those_of_clip_and_pickscore(embed):
    rng = np.random.default_rng(0)
    prompts = [PAIR, LONE]
    images = np.stack([[paint(parse(p), finish, rng) for finish in (GOOD_FINISH, BAD_FINISH)] for p in prompts])
    values = clip_pixels(images)
    with torch.no_grad():
        pictures, texts, scale = (
            embed.embed_images(values.flatten(0, 1)),
            embed.embed_prompts(prompts),
            embed.model.logit_scale,
        )
        logits = scale.exp() * pictures.unflatten(0, (2, 2)) @ texts[:, :, None]
        expected = -logits[..., 0].log_softmax(1)[[0, 1], [1, 0]].mean()
        found = preference_loss(embed, values, prompts, torch.tensor([1, 0]))
        torch.testing.assert_close(found, expected)
        square = scale.exp() * pictures[[0, 2]] @ texts.T
        both = [-square.log_softmax(d).diagonal().mean() for d in (1, 0)]
        torch.testing.assert_close(clip_loss(embed, values[:, 0], prompts, []), sum(both) / 2)
        harder = clip_loss(embed, values[:, 0], prompts, [caption(changed(parse(LONE), "shape", rng))])
    assert harder > sum(both) / 2


# --- training


def test_training_writes_both_networks_their_card_and_goes_on_where_it_stopped(trained, tmp_path):
    folder, sizes, figures = trained
    card = json.loads((folder / "out" / "card.json").read_text())
    about = [json.loads((folder / "run" / f"{name}.json").read_text())["prompts"] for name in ("train", "test")]
    assert [{split_of(prompt) for prompt in prompts} for prompts in about] == [{"train"}, {"test"}]
    assert card["figures"] == figures and card["pairs"] == 24 and set(card["sha256"]) == set(PARTS)
    assert "| choices/world_preference |" in (folder / "out" / "README.md").read_text()
    stamps = [(folder / "run" / f"{name}.pt").stat().st_mtime_ns for name in PARTS]
    again = train_scorers(folder / "run", tmp_path / "out", **sizes, clip_batch=8, preference_batch=4)
    assert [(folder / "run" / f"{name}.pt").stat().st_mtime_ns for name in PARTS] == stamps and again == figures


def test_a_stopped_training_ends_with_the_same_weights(tmp_path):
    sizes = {"pairs": 12, "test_pairs": 4, "preference_steps": 1, "clip_batch": 4, "preference_batch": 4}
    train_scorers(tmp_path / "whole", tmp_path / "a", clip_steps=4, **sizes)
    short = torch.load(tmp_path / "whole" / "clip.pt", weights_only=True)
    assert short["step"] == 4
    # a state after two steps of four, as a kill leaves it
    from dkto.workshop import preference

    real, calls = preference.clip_loss, []

    def stops(*arguments):
        calls.append(1)
        if len(calls) > 2:
            raise KeyboardInterrupt
        return real(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preference, "SAVE_SECONDS", -1.0)
        patch.setattr(preference, "clip_loss", stops)
        with pytest.raises(KeyboardInterrupt):
            train_scorers(tmp_path / "cut", tmp_path / "b", clip_steps=4, **sizes)
    assert torch.load(tmp_path / "cut" / "clip.pt", weights_only=True)["step"] == 2
    train_scorers(tmp_path / "cut", tmp_path / "b", clip_steps=4, **sizes)
    for name in PARTS:
        one, two = ((tmp_path / side / name / "model.safetensors").read_bytes() for side in "ab")
        assert one == two


# --- the scorers


def test_scorers_of_a_folder_are_its_networks(trained):
    folder = str(trained[0] / "out")
    rng = np.random.default_rng(0)
    images = [Image.fromarray(paint(parse(p), GOOD_FINISH, rng)) for p in (PAIR, LONE)]
    embed = load_clip(trained[0] / "out", "preference")
    with torch.no_grad():
        values = clip_pixels(np.stack([np.asarray(image) for image in images]))
        cosine = (embed.embed_images(values) * embed.embed_prompts([PAIR, LONE])).sum(-1)
    found = score(WorldPreference(folder, "cpu"), images, [PAIR, LONE])
    np.testing.assert_allclose(found, cosine * embed.model.logit_scale.exp(), rtol=1e-4)
    pixels = torch.stack([to_pixels(image) for image in images]).requires_grad_()
    values = WorldPreference(folder, "cpu").score_pixels(pixels, [PAIR, LONE])
    values.sum().backward()
    np.testing.assert_allclose(values.detach(), found, rtol=1e-3)
    assert pixels.grad.abs().sum() > 0
    assert WorldCLIP(folder).about != WorldPreference(folder).about


def test_weights_that_changed_or_are_missing_are_noticed(trained, tmp_path, monkeypatch):
    monkeypatch.setenv("DKTO_WEIGHTS", str(tmp_path))
    import shutil

    shutil.copytree(trained[0] / "out", tmp_path / "copy")
    (tmp_path / "copy" / "clip" / "model.safetensors").write_bytes(b"x")
    with pytest.raises(ValueError, match="is damaged or another file"):
        WorldCLIP(str(tmp_path / "copy")).network()
    with pytest.raises(FileNotFoundError, match=r"scorer world_clip needs its weights in .*dkto\.workshop pref"):
        score(WorldCLIP(str(tmp_path)), [Image.new("RGB", (64, 64))], [LONE])


# --- what ships


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    """Pairs of test prompts painted from another seed than the card's."""
    return paint_pairs(tmp_path_factory.mktemp("pairs") / "test", held_out_prompts(200), seed=7)


def test_the_shipped_scorers_are_small_and_hold_no_pickle():
    files = [path for path in WORLD_FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 3e6
    assert {path.suffix for path in files} <= {".json", ".txt", ".safetensors", ".md"}


def test_the_cards_accuracies_hold_on_pictures_it_never_saw(held_out):
    card = json.loads((WORLD_FOLDER / "card.json").read_text())["figures"]
    found = measure_scorers(*(load_clip(WORLD_FOLDER, name) for name in PARTS), held_out)
    for name, figure in card.items():
        assert found[name]["low"] <= figure["high"] and figure["low"] <= found[name]["high"], name
    assert found["choices/world_preference"]["low"] > found["choices/world_clip"]["rate"] > 0.5


def test_the_preference_model_sees_beauty_and_faithfulness():
    rng = np.random.default_rng(1)
    prompts = prompts_for("test", 40, seed=3)
    good = [Image.fromarray(paint(parse(p), GOOD_FINISH, rng)) for p in prompts]
    bad = [Image.fromarray(paint(parse(p), BAD_FINISH, rng)) for p in prompts]
    other = [Image.fromarray(paint(parse(p), GOOD_FINISH, rng)) for p in prompts[::-1]]
    ours, ugly, unfaithful = (score("world_preference", images, prompts) for images in (good, bad, other))
    assert rate(ours > ugly)["low"] > 0.8 and rate(ours > unfaithful)["low"] > 0.8
    assert rate(score("world_clip", good, prompts) > score("world_clip", other, prompts))["low"] > 0.8


def test_they_have_names_of_their_own():
    assert SCORERS["world_clip"].name == "world_clip" and get_pixel_scorer("world_preference")
    assert not {"clip", "pickscore"} & {name for name in SCORERS if name.startswith("world_")}
