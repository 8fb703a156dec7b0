"""Scores become likes by a stated rule; what is left out is counted and said."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from dkto.data.encode import prepare_feedback
from dkto.data.encoded import PreparedFeedback
from dkto.data.feedback import make_feedback, read_feedback, write_feedback
from dkto.models import load_model

SCORES = {"a.png": 1, "b.png": 4, "c.png": 6, "d.png": 10}


@pytest.fixture
def folder(tmp_path):
    for name in SCORES:
        Image.new("RGB", (8, 8), "red").save(tmp_path / name)
    return tmp_path


def scored(folder, rows=None, name="scores.csv", **options):
    rows = [(image, "x", value) for image, value in SCORES.items()] if rows is None else rows
    columns = ["image", "prompt", "Rating", "user_id"][: len(rows[0])]
    frame = pd.DataFrame(rows, columns=columns)
    path = folder / name
    frame.to_json(path, orient="records") if path.suffix == ".json" else frame.to_csv(path, index=False)
    return read_feedback(folder / name, score="rating", **options)


@pytest.mark.parametrize("name", ["scores.csv", "scores.json"])
def test_each_rule_likes_what_lies_above_its_threshold(folder, name):
    table = scored(folder, name=name)
    assert table.is_desirable.tolist() == [False, False, True, True] and table.weights is None
    assert (
        table.counts["threshold"] == 5.0 and table.counts["judgements"] == 4 and "liked above the median" in str(table)
    )
    assert scored(folder, name=name, rule="fixed", threshold=6.5).is_desirable.tolist() == [False, False, False, True]
    assert scored(folder, name=name, weight_scale=0.5).weights.tolist() == [3.0, 1.5, 1.5, 3.5]


def test_each_user_is_measured_by_their_own_scores(folder):
    """The generous user's 8 is a dislike, the strict user's 3 a like."""
    given = [("a.png", 8, "kind"), ("b.png", 10, "kind"), ("c.png", 1, "strict"), ("d.png", 3, "strict")]
    rows = [(image, "x", value, user) for image, value, user in given]
    table = scored(folder, rows, rule="user_z", weight_scale=2.0)
    assert table.is_desirable.tolist() == [False, True, False, True] and table.counts["users"] == 2
    assert table.weights.tolist() == [3.0] * 4
    assert scored(folder, rows).is_desirable.tolist() == [True, True, False, False]
    rows += [("a.png", "x", 5, "once"), ("b.png", "x", 7, "same"), ("c.png", "x", 7, "same"), ("d.png", "x", 2, "")]
    with pytest.warns(UserWarning, match=r"set aside: 4, .*two different scores.*user must be named"):
        assert len(scored(folder, rows, rule="user_z")) == 4


def test_scores_on_the_threshold_are_counted_and_said(folder):
    rows = [(image, "x", value) for image, value in zip(SCORES, (1, 5, 5, 9), strict=True)]
    with pytest.warns(UserWarning, match=r"scores\.csv: 2 of 4 scores lie on the threshold 5 and are left out"):
        table = scored(folder, rows)
    assert table.is_desirable.tolist() == [False, True] and table.counts["scores_on_the_threshold"] == 2
    assert scored(folder, rows, ties="liked").is_desirable.tolist() == [False, True, True, True]
    assert scored(folder, rows, ties="disliked", weight_scale=1.0).weights.tolist() == [5.0, 1.0, 1.0, 5.0]
    with pytest.raises(ValueError, match="4 of 4 scores lie on the threshold 5: none is a like or a dislike"):
        scored(folder, [(image, "x", 5) for image in SCORES])


def test_a_mean_that_rounding_moved_is_still_the_mean(folder):
    rows = [(image, "x", value, "ann") for image, value in zip(SCORES, (0.1, 0.2, 0.3, 0.2), strict=True)]
    with pytest.warns(UserWarning, match="2 of 4 scores lie on the threshold 0"):
        assert scored(folder, rows, rule="user_z").is_desirable.tolist() == [False, True]


def test_what_is_no_score_is_set_aside(folder):
    rows = [("a.png", "x", bad) for bad in ("", "nan", "inf", "-Infinity", "1e13", "8/10", "3,5")]
    rows += [("b.png", "x", 1), ("c.png", "x", 3), ("gone.png", "x", 2), ("d.png", "", 2)]
    with pytest.warns(UserWarning, match=r"set aside: 9, kept: 2; .*rating must be a finite number"):
        table = scored(folder, rows)
    assert table.is_desirable.tolist() == [False, True] and table.counts["threshold"] == 2.0
    assert [each["source_row"] for each in table.set_aside] == [11, 1, 2, 3, 4, 5, 6, 7, 10]
    with pytest.raises(ValueError, match=r"each of 7 is set aside: scores\.csv, row 1: rating"):
        scored(folder, rows[:7])
    with pytest.raises(ValueError, match=r"scores\.csv, row 1: rating must be a finite number.*got"):
        scored(folder, rows[:7], strict=True)


def test_several_judgements_of_one_image_become_one_by_a_partition(folder):
    rows = [(f"{image}.png", "x", value) for image, value in zip("aaabbc", (9, 2, 1, 8, 7, 0), strict=True)]
    options = {"rule": "fixed", "threshold": 5, "weight_scale": 1.0}
    every = scored(folder, rows, **options)
    assert every.is_desirable.tolist() == [True, False, False, True, True, False]
    assert every.counts["images"] == 3 and every.counts["images_with_several_judgements"] == 2
    liked = {"at_least_once": [True, True, False], "always": [False, True, False], "mostly": [False, True, False]}
    for partition, expected in liked.items():
        table = scored(folder, rows, partition=partition, **options)
        assert [path.name for path in table.images] == ["a.png", "b.png", "c.png"]
        assert table.is_desirable.tolist() == expected
        assert table.weights.tolist() == [5.0 if expected[0] else 4.5, 3.5, 6.0], "the mean of those that agree"
    with pytest.raises(ValueError, match="partition must be one of at_least_once, always, mostly, got 'once'"):
        scored(folder, rows, partition="once", **options)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"score": "rating", "rule": "mean"}, "rule must be one of median, fixed, user_z, got 'mean'"),
        ({"score": "rating", "rule": "fixed"}, "rule 'fixed' needs a threshold"),
        ({"score": "rating", "threshold": 1.0}, "threshold='1.0' has no meaning here: the rule 'median' finds it"),
        ({"score": "rating", "rule": "fixed", "threshold": np.nan}, "threshold must be a finite number, got nan"),
        ({"score": "rating", "weight_scale": -1}, r"weight_scale must be in \[0, 1e\+06\], got -1"),
        ({"score": "stars"}, "needs the columns image, prompt, stars; missing: stars; found: image, prompt, Rating"),
        ({"score": "rating", "rule": "user_z"}, "needs the columns image, prompt, rating, user; missing: user"),
        ({"rule": "median"}, "rule='median' has no meaning here: no column of scores is named"),
        ({"weight_scale": 1.0}, "weight_scale='1.0' has no meaning here: no column of scores is named"),
        ({"score": "rating", "ties": "drop"}, "ties must be one of ignore, liked, disliked, got 'drop'"),
    ],
)
def test_a_rule_that_means_nothing_is_refused(folder, options, sentence):
    scored(folder)
    with pytest.raises(ValueError, match=sentence):
        read_feedback(folder / "scores.csv", **options)


def test_a_column_of_another_meaning_may_hold_the_scores(folder):
    """`label` is a like elsewhere; asked for as a score it holds stars."""
    (folder / "stars.csv").write_text("image,prompt,label\na.png,x,1\nb.png,x,5\n")
    assert read_feedback(folder / "stars.csv", score="label").is_desirable.tolist() == [False, True]


def test_weights_go_to_disk_and_come_back(folder):
    table = scored(folder, weight_scale=0.5)
    back = read_feedback(write_feedback(table, folder / "likes.csv"))
    assert back.weights.tolist() == table.weights.tolist()
    assert back.subset([3, 0]).weights.tolist() == [3.5, 3.0]
    shuffled = back.shuffled_likes(1)
    assert sorted(zip(shuffled.is_desirable, shuffled.weights, strict=True)) == sorted(
        zip(back.is_desirable, back.weights, strict=True)
    )
    (folder / "likes.csv").write_text("image,prompt,liked,weight\na.png,x,1,1\nb.png,x,0,-1\n")
    with pytest.warns(UserWarning, match=r"row 2: weight must be a number from 0 to 1e\+20, got '-1'"):
        assert len(read_feedback(folder / "likes.csv")) == 1
    with pytest.raises(ValueError, match="weights must be 4 finite numbers from 0 on"):
        replace(table, weights=np.array([1.0, np.nan, 1.0, 1.0]))


def test_prepared_data_keep_the_weights_of_the_rows_that_could_be_used(likes, tiny_pipeline, tmp_path):
    (bad := tmp_path / "bad.png").write_text("no image")
    table = make_feedback([*likes.images[:3], bad], ["x"] * 4, [1, 0, 1, 0])
    table = replace(table, weights=np.array([1.5, 2.0, 1.0, 9.0]))
    with pytest.warns(UserWarning, match="1 of 4 images are set aside"):
        folder = prepare_feedback(table, tmp_path / "prepared", str(tiny_pipeline))
    model = load_model(str(tiny_pipeline))
    assert PreparedFeedback(folder, model).weights.tolist() == [1.5, 2.0, 1.0]
    with pytest.raises(ValueError, match="encoded feedback"):
        prepare_feedback(replace(table, weights=None), folder, str(tiny_pipeline))
    index = pd.read_parquet(folder / "index.parquet")
    index.assign(weight=[1.0, -1.0, 1.0]).to_parquet(folder / "index.parquet", index=False)
    with pytest.raises(ValueError, match="weight must be a finite number from 0 on: run prepare again"):
        PreparedFeedback(folder, model)
