import numpy as np
import pandas as pd
import pytest
from PIL import Image

from dkto.embedded.scenes import prompts_for
from dkto.embedded.users import tint_red
from dkto.evaluate import compare, flat_metrics, mean_scores, score_images, win_rate_table
from dkto.generate import image_path
from dkto.records import write_json
from dkto.scorers import SCORERS, get_scorer, score


@pytest.fixture
def folders(tmp_path):
    """Two folders of painted pictures as `generate_images` would leave them: plain ones and red-tinted ones."""
    from dkto.embedded.painter import GOOD_FINISH, paint
    from dkto.embedded.scenes import parse

    prompts, rng = prompts_for("test", 6), np.random.default_rng(0)
    found = {}
    pictures = [[Image.fromarray(paint(parse(p), GOOD_FINISH, rng)) for _ in range(3)] for p in prompts]
    for name, change in (("plain", lambda i: i), ("red", tint_red)):
        folder = tmp_path / name
        folder.mkdir()
        write_json(folder / "manifest.json", {"system": {}, "prompts": prompts, "images_per_prompt": 3, "seed": 0})
        for p, images in enumerate(pictures):
            for i, image in enumerate(images):
                change(image).save(image_path(folder, p, i))
        found[name] = folder
    return found


def test_the_redder_pictures_win_under_redness(folders):
    result = compare(folders["red"], folders["plain"], "world_redness")
    assert (result.rate, result.n, result.wins) == (1.0, 6, 6) and result.low > 0.5
    assert compare(folders["plain"], folders["red"], "world_redness").rate == 0.0


def test_equal_pictures_tie(folders):
    result = compare(folders["plain"], folders["plain"], "world_fidelity")
    assert (result.rate, result.ties) == (0.5, 6)


def test_scores_are_files_and_only_missing_ones_are_computed(folders, monkeypatch):
    first = score_images(folders["red"], "world_redness")
    assert first.shape == (6, 3)
    stored = pd.read_parquet(folders["red"] / "scores" / "world_redness.parquet")
    assert list(stored.columns) == ["prompt", "image", "score"] and len(stored) == 18
    monkeypatch.setitem(SCORERS, "world_redness", lambda images, prompts: 1 / 0)
    assert (score_images(folders["red"], "world_redness") == first).all()


def test_the_table_and_its_flat_keys(folders):
    table = win_rate_table(folders, "red", ["plain"], ["world_redness", "world_fidelity"])
    assert list(table["scorer"]) == ["world_redness", "world_fidelity"]
    assert (table["wins"] + table["ties"] + table["losses"] == table["n"]).all()
    metrics = flat_metrics(table)
    assert metrics["win_rate/red_vs_plain/world_redness"] == 1.0
    assert metrics["win_rate/red_vs_plain/world_redness/n"] == 6
    assert metrics["win_rate/red_vs_plain/world_redness/low"] < 1.0
    means = mean_scores(folders, ["world_redness"])
    assert means.loc["red", "world_redness"] > means.loc["plain", "world_redness"]


def test_a_missing_image_is_named_and_nothing_is_stored(folders):
    image_path(folders["red"], 2, 1).unlink()
    with pytest.raises(FileNotFoundError, match=r"p00002-s1\.png does not exist"):
        score_images(folders["red"], "world_redness")
    assert not (folders["red"] / "scores").exists()


def test_unequal_prompts_are_not_compared(folders):
    write_json(folders["red"] / "manifest.json", {"system": {}, "prompts": ["x"], "images_per_prompt": 3, "seed": 0})
    with pytest.raises(ValueError, match="cannot be compared: prompts differ"):
        compare(folders["red"], folders["plain"], "world_redness")


def test_unknown_scorers_get_the_nearest():
    with pytest.raises(KeyError, match=r"unknown scorer 'world_rednes'; did you mean 'world_redness'\? known: "):
        get_scorer("world_rednes")


@pytest.mark.parametrize(
    ("scorer", "sentence"),
    [
        (lambda images, prompts: [1.0, float("nan")], "not finite for image 1"),
        (lambda images, prompts: [1.0], r"must return 2 scores, got shape \(1,\)"),
    ],
)
def test_scorers_that_misbehave_are_named(monkeypatch, scorer, sentence):
    monkeypatch.setitem(SCORERS, "broken", scorer)
    images = [Image.new("RGB", (64, 64))] * 2
    with pytest.raises(ValueError, match=f"scorer broken .*{sentence}"):
        score("broken", images, ["a", "b"])
    with pytest.raises(ValueError, match="one prompt per image, got 2 images and 1 prompts"):
        score("broken", images, ["a"])


def test_the_utility_cannot_be_won_by_beauty_or_fidelity_alone(folders):
    images = [Image.open(image_path(folders["plain"], p, 0)) for p in range(6)]
    prompts = prompts_for("test", 6)
    fidelity, aesthetics, utility = (
        score(f"world_{n}", images, prompts) for n in ("fidelity", "aesthetics", "utility")
    )
    np.testing.assert_allclose(utility, fidelity * aesthetics)
    others = score("world_utility", images, prompts[::-1])
    assert others.mean() < 0.5 * utility.mean()
