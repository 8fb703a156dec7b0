import numpy as np
import pytest
from PIL import Image

from dkto.common.files import write_json
from dkto.evaluation.manifest import image_path, read_manifest
from dkto.evaluation.scorers import score
from dkto.evaluation.scoring import score_all
from dkto.evaluation.win_rates import (
    compare,
    flat_metrics,
    mean_scores,
    medians,
    outcomes,
    scorer_agreement,
    win_rate_table,
)
from dkto.world.scenes import parse, prompts_for
from dkto.world.users import tint_red


@pytest.fixture
def folders(tmp_path):
    """Two folders of painted pictures as `generate_images` would leave them: plain ones and red-tinted ones."""
    from dkto.world.painter import GOOD_FINISH, paint

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
    scores = score_all(folders, ["world_redness"])
    result = compare(scores, "red", "plain", "world_redness")
    assert (result.rate, result.n, result.wins) == (1.0, 6, 6) and result.low > 0.5
    assert compare(scores, "plain", "red", "world_redness").rate == 0.0


def test_equal_pictures_tie(folders):
    result = compare(score_all(folders, ["world_fidelity"]), "plain", "plain", "world_fidelity")
    assert (result.rate, result.ties) == (0.5, 6)


def test_the_table_and_its_flat_keys(folders):
    scores = score_all(folders, ["world_redness", "world_fidelity"])
    assert (scores.methods, scores.scorers) == (["plain", "red"], ["world_redness", "world_fidelity"])
    table = win_rate_table(scores, [("red", "plain")])
    assert list(table["scorer"]) == ["world_redness", "world_fidelity"]
    assert (table["wins"] + table["ties"] + table["losses"] == table["n"]).all()
    metrics = flat_metrics(table)
    assert metrics["win_rate/red_vs_plain/world_redness"] == 1.0
    assert metrics["win_rate/red_vs_plain/world_redness/n"] == 6
    assert metrics["win_rate/red_vs_plain/world_redness/low"] < 1.0
    assert outcomes(scores, "red", "plain", "world_redness").tolist() == [1.0] * 6
    assert outcomes(scores, "plain", "red", "world_redness").tolist() == [0.0] * 6
    assert outcomes(scores, "red", "red", "world_redness").tolist() == [0.5] * 6
    means = mean_scores(scores)
    assert means.loc["red", "world_redness"] > means.loc["plain", "world_redness"]


def test_unequal_prompts_are_not_compared(folders):
    """Refused before a single image is scored."""
    prompts = read_manifest(folders["plain"])["prompts"]
    about = {"system": {}, "prompts": prompts, "images_per_prompt": 3, "seed": 0}
    for change, sentence in (
        ({"prompts": ["x"]}, r"prompts differ \(1 and 6 prompts\)"),
        ({"prompts": [*prompts[:5], "x"]}, r"prompts differ \(first at prompt 5: 'x' and 'a"),
        ({"seed": 1}, "seed differ"),
        ({"images_per_prompt": 2}, "images_per_prompt differ"),
    ):
        write_json(folders["red"] / "manifest.json", about | change)
        with pytest.raises(ValueError, match=f"cannot be compared: {sentence}"):
            score_all({"red": folders["red"], "plain": folders["plain"]}, ["world_redness"])
    with pytest.raises(ValueError, match="folders must hold at least one method, got none"):
        score_all({}, ["world_redness"])
    assert not list(folders["plain"].glob("scores/*"))


def test_what_was_not_scored_is_named(folders):
    scores = score_all(folders, ["world_redness"])
    with pytest.raises(KeyError, match="unknown method 'blue'; known: plain, red"):
        win_rate_table(scores, [("blue", "plain")])
    with pytest.raises(KeyError, match="unknown scorer 'world_fidelity'; known: world_redness"):
        compare(scores, "red", "plain", "world_fidelity")


def test_every_style_gets_its_row(folders):
    scores, pair = score_all(folders, ["world_redness"]), [("red", "plain")]
    styles = [parse(prompt).style for prompt in read_manifest(folders["red"])["prompts"]]
    table = win_rate_table(scores, pair, None, styles)
    assert table.loc[0, "style"] == "all" and table.loc[0, "n"] == 6
    assert set(table["style"][1:]) == set(styles) and table["n"][1:].sum() == 6
    assert (table["win_rate"] == 1).all() and (table["mean_difference"] > 0).all()
    assert table["mean_low"].isna().tolist() == (table["n"] == 1).tolist()
    without = flat_metrics(win_rate_table(scores, pair, None, [""] * 6))
    assert not any(key.startswith("style") for key in without), "a set without styles has no row of a style"
    metrics = flat_metrics(table)
    assert metrics[f"style_win_rate/red_vs_plain/world_redness/{styles[0]}"] == 1.0
    assert metrics["win_rate/red_vs_plain/world_redness/n"] == 6
    with pytest.raises(ValueError, match="no style may be named 'all', the row of all prompts; prompt 2 has it"):
        win_rate_table(scores, pair, None, [*styles[:2], "all", *styles[3:]])
    with pytest.raises(ValueError, match="styles must name one style for each of 6 prompts, got 1"):
        win_rate_table(scores, pair, None, ["icon"])


def test_the_table_tests_signs_and_means_of_the_medians(folders):
    scores = score_all(folders, ["world_redness"])
    row = win_rate_table(scores, [("red", "plain")]).iloc[0]
    gap = medians(scores, "red", "world_redness") - medians(scores, "plain", "world_redness")
    assert row["sign_p"] == pytest.approx(2 / 2**6) and row["mean_difference"] == pytest.approx(gap.mean())
    assert row["mean_low"] <= row["mean_difference"] <= row["mean_high"]


def test_scorers_agree_with_themselves_and_not_with_their_opposite(folders):
    def greenness(images, prompts):
        return -score("world_redness", images, prompts)

    def twice(images, prompts):
        return 2 * score("world_redness", images, prompts)

    table = scorer_agreement(score_all(folders, ["world_redness", twice, greenness]), "red", "plain")
    assert list(zip(table["scorer"], table["other"], strict=True)) == [
        ("world_redness", "twice"),
        ("world_redness", "greenness"),
        ("twice", "greenness"),
    ]
    assert table["same_winner"].tolist() == [1.0, 0.0, 0.0] and table["n"].tolist() == [6, 6, 6]
    assert table["rank_correlation"].tolist() == pytest.approx([1.0, -1.0, -1.0])
    scores = score_all(folders, ["world_redness", "world_fidelity"])
    flat = scorer_agreement(scores, "plain", "plain").iloc[0]
    assert (flat["same_winner"], flat["n"]) == (0.5, 0) and np.isnan(flat["rank_correlation"])
    with pytest.raises(ValueError, match="scorer_agreement needs at least 2 scorers, got 1"):
        scorer_agreement(scores, "red", "plain", ["world_redness"])


def test_the_utility_cannot_be_won_by_beauty_or_fidelity_alone(folders):
    images = [Image.open(image_path(folders["plain"], p, 0)) for p in range(6)]
    prompts = prompts_for("test", 6)
    names = ("fidelity", "craft", "utility", "aesthetics", "utility_1")
    fidelity, craft, utility, aesthetics, former = (score(f"world_{n}", images, prompts) for n in names)
    np.testing.assert_allclose(utility, fidelity * craft)
    np.testing.assert_allclose(former, fidelity * aesthetics)
    others = score("world_utility", images, prompts[::-1])
    assert others.mean() < 0.5 * utility.mean()
