import json
import os
import runpy

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from dkto.common.files import write_json
from dkto.evaluation.manifest import image_path
from dkto.evaluation.scorers import SCORERS, describe, get_scorer, register_scorer, score, scorer_name
from dkto.evaluation.scoring import score_all, score_images


def brightness(images, prompts):
    """At the top level of a module, so that it can be sent to another process."""
    return [np.asarray(image).mean() for image in images]


def nan_at_nine(images, prompts):
    return [np.nan if value == 9 else value for value in brightness(images, prompts)]


class Counting:
    """A scorer with a model of its own, which counts its pictures and fails when it is told to."""

    name = "counting"

    def __init__(self, model="one", fail_at=None, value=np.nan):
        self.about, self.seen, self.fail_at, self.value = {"model": model}, 0, fail_at, value

    def __call__(self, images, prompts):
        values = []
        for _ in images:
            values.append(self.value if self.seen == self.fail_at else float(self.seen))
            self.seen += 1
        return values


@pytest.fixture
def folder(tmp_path):
    """Six prompts x 2 grey pictures as `generate_images` leaves them; picture k is k bright."""
    folder = tmp_path / "grey"
    folder.mkdir()
    about = {"system": {}, "prompts": [f"p{p}" for p in range(6)], "images_per_prompt": 2, "seed": 0}
    write_json(folder / "manifest.json", about)
    for k in range(12):
        Image.new("RGB", (4, 4), (k, k, k)).save(image_path(folder, k // 2, k % 2))
    return folder


def test_scores_have_one_row_per_prompt_and_do_not_depend_on_batches_or_processes(folder, tmp_path):
    expected = np.arange(12.0).reshape(6, 2)
    assert (score_images(folder, brightness, batch_size=5) == expected).all()
    stored = pd.read_parquet(folder / "scores" / "brightness.parquet")
    assert list(stored.columns) == ["prompt", "image", "score", "sha256"] and len(stored) == 12
    (folder / "scores" / "brightness.parquet").unlink()
    assert (score_images(folder, brightness, batch_size=3, num_processes=2) == expected).all()


def test_a_second_call_scores_only_what_is_missing_or_was_drawn_again(folder):
    counting = Counting()
    first = score_images(folder, counting)
    assert counting.seen == 12
    assert (score_images(folder, counting) == first).all() and counting.seen == 12
    Image.new("RGB", (4, 4), (99, 0, 0)).save(image_path(folder, 2, 1))
    again = score_images(folder, counting)
    assert counting.seen == 13 and again[2, 1] == 12.0
    assert (np.delete(again.ravel(), 5) == np.delete(first.ravel(), 5)).all()


def test_an_image_that_was_replaced_is_scored_again(folder):
    """Its size in bytes and its time are what they were; the time alone changes nothing."""
    paths = [image_path(folder, k // 2, k % 2) for k in range(12)]
    for k, path in enumerate(paths):
        path.write_bytes(path.read_bytes() + bytes(8) + bytes([k]))  # after the end of a PNG: not looked at
    first = score_images(folder, brightness)
    other, before = paths[7], paths[7].stat()
    other.write_bytes(paths[3].read_bytes().ljust(before.st_size, b"\0")[: before.st_size])
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert other.stat().st_size == before.st_size
    assert score_images(folder, brightness).ravel().tolist() == [*first.ravel()[:7], 3.0, *first.ravel()[8:]]
    counting = Counting()
    score_images(folder, counting)
    other.touch()
    score_images(folder, counting)
    assert counting.seen == 12


def test_scores_by_size_and_time_hold_only_where_the_image_is_gone(folder):
    """As version 0.1 kept them."""
    first = score_images(folder, brightness)
    path = folder / "scores" / "brightness.parquet"
    old = pd.read_parquet(path).drop(columns="sha256").assign(bytes=1, changed=2)
    old.assign(score=old["score"] + 100).to_parquet(path, index=False)
    image_path(folder, 0, 1).unlink()
    assert score_images(folder, brightness).ravel().tolist() == [first[0, 0], 101.0, *first.ravel()[2:]]


@pytest.mark.parametrize(
    "damage",
    [
        lambda path, frame: path.write_bytes(path.read_bytes()[:-30]),
        lambda path, frame: path.write_bytes(b""),
        lambda path, frame: frame.drop(columns="score").to_parquet(path),
        lambda path, frame: frame.assign(score="high").to_parquet(path),
        lambda path, frame: frame.assign(prompt=frame["prompt"] + 0.5).to_parquet(path),
        lambda path, frame: frame.assign(score=np.nan).to_parquet(path),
    ],
)
def test_a_damaged_file_of_scores_is_named(folder, damage):
    score_images(folder, brightness)
    path = folder / "scores" / "brightness.parquet"
    damage(path, pd.read_parquet(path))
    with pytest.raises(ValueError, match=r"brightness\.parquet holds .*: remove that file and its .json to score"):
        score_images(folder, brightness)


def test_what_was_scored_before_a_failure_is_kept(folder):
    with pytest.raises(ValueError, match=r"scorer counting must return finite values, got nan for .*p00004-s1\.png"):
        score_images(folder, Counting(fail_at=9), batch_size=4)
    assert len(pd.read_parquet(folder / "scores" / "counting.parquet")) == 11, "the others of its batch too"
    good = Counting()
    score_images(folder, good, batch_size=4)
    assert good.seen == 1


def test_a_failure_in_one_worker_keeps_what_the_others_scored(folder):
    with pytest.raises(ValueError, match=r"scorer nan_at_nine must return finite values, got nan for .*p00004-s1\.png"):
        score_images(folder, nan_at_nine, batch_size=3, num_processes=2)
    stored = pd.read_parquet(folder / "scores" / "nan_at_nine.parquet")["score"].tolist()
    assert set(range(9)) <= set(stored) and 9 not in stored and not np.isnan(stored).any()


def test_a_wrong_number_of_scores_is_refused_and_nothing_scored_is_lost(folder):
    class Short(Counting):
        def __call__(self, images, prompts):
            values = super().__call__(images, prompts)
            return values[:-1] if self.seen > 6 else values

    with pytest.raises(ValueError, match=r"scorer counting must return 6 scores, got shape \(5,\)"):
        score_images(folder, Short(), batch_size=6)
    assert len(pd.read_parquet(folder / "scores" / "counting.parquet")) == 6


def test_scores_of_another_model_are_not_mixed(folder):
    score_images(folder, Counting("one"))
    with pytest.raises(ValueError, match=r"scores of another counting \(model: 'one' stored, 'two' asked\)"):
        score_images(folder, Counting("two"))


def test_what_was_scored_can_be_read_where_the_weights_are_not_at_hand(folder):
    """Their hash is not known there (None); the model still must be the same, and what is known is kept."""
    there, here = Counting(), Counting()
    there.about, here.about = {"model": "one", "sha256": "ab"}, {"model": "one", "sha256": None}
    first = score_images(folder, there)
    assert (score_images(folder, here) == first).all() and here.seen == 0
    Image.new("RGB", (4, 4), (99, 0, 0)).save(image_path(folder, 0, 0))
    score_images(folder, here)
    assert here.seen == 1 and json.loads((folder / "scores" / "counting.json").read_text())["sha256"] == "ab"
    for about in ({"model": "two", "sha256": None}, {"model": "one"}, {"model": "one", "sha256": "cd"}):
        here.about = about
        with pytest.raises(ValueError, match="scores of another counting"):
            score_images(folder, here)


def test_a_batch_of_none_is_refused(folder):
    with pytest.raises(ValueError, match="batch_size must be 1 or above, got -1"):
        score_images(folder, brightness, batch_size=-1)
    with pytest.raises(ValueError, match=r"batch_size must be a whole number, got 1\.5"):
        score_images(folder, brightness, batch_size=1.5)
    with pytest.raises(ValueError, match="num_processes must be a whole number, got 'x'"):
        score_images(folder, brightness, num_processes="x")


def test_functions_without_a_file_are_told_apart_by_their_constants():
    def typed(text):
        found = {}
        exec(f"def mine(images, prompts):\n    {text}", found)
        return describe(found["mine"])["code"]

    body = "return [({} if p in {{'x', 'y'}} else 0.0) for p in prompts]"
    assert typed(body.format(1.0)) == typed(body.format(1.0)) != typed(body.format(2.0))


def test_an_edited_function_is_another_scorer_and_its_comments_are_not(folder, tmp_path):
    def mine(text):
        path = tmp_path / f"scorers_{len(list(tmp_path.glob('*.py')))}.py"
        path.write_text(f"def mine(images, prompts):\n{text}\n")
        return runpy.run_path(str(path))["mine"]

    first = mine("    return [1.0] * len(images)")
    assert (score_images(folder, first) == 1).all()
    assert (score_images(folder, mine("    # the same\n    return [1.0]   * len(images)")) == 1).all()
    with pytest.raises(ValueError, match=r"scores of another mine \(code: '\w+' stored, '\w+' asked\)"):
        score_images(folder, mine("    return [2.0] * len(images)"))


def test_functions_of_one_text_that_close_over_different_values_are_different_scorers(folder):
    def times(factor, shift=0.0):
        def made(images, prompts, *, shift=shift):
            return [factor * value + shift for value in brightness(images, prompts)]

        return made

    first = score_images(folder, times(1))
    assert (score_images(folder, times(1)) == first).all()
    for other in (times(100), times(1, shift=1.0)):
        with pytest.raises(ValueError, match=r"scores of another made \(code: "):
            score_images(folder, other)
    with pytest.raises(ValueError, match="scorer made closes over something that cannot be hashed"):
        score_images(folder, times(lambda value: value))


def test_a_scorer_whose_scores_could_not_be_known_again_is_refused(folder):
    class Silent:
        def __call__(self, images, prompts):
            return [0.0] * len(images)

    with pytest.raises(
        ValueError, match="scorer Silent needs an attribute `about`, a dict of what its values depend on"
    ):
        score_images(folder, Silent())
    score_images(folder, brightness)
    card = folder / "scores" / "brightness.json"
    for damage in (lambda: card.write_text("{"), card.unlink):
        damage()
        with pytest.raises(
            ValueError, match=r"brightness\.parquet holds scores, but brightness\.json does not say whose"
        ):
            score_images(folder, brightness)


def test_scores_of_former_prompts_do_not_pass_for_missing_pictures(folder):
    score_images(folder, brightness)
    manifest = json.loads((folder / "manifest.json").read_text())
    write_json(folder / "manifest.json", {**manifest, "prompts": [f"other {p}" for p in range(6)]})
    for path in folder.glob("*.png"):
        path.unlink()
    with pytest.raises(ValueError, match=r"brightness\.parquet holds scores of other images .*manifest\.json names"):
        score_images(folder, brightness)


def test_two_scorers_of_one_name_are_refused_and_one_given_twice_is_scored_once(folder):
    counting = Counting()
    assert score_all({"grey": folder}, [counting, counting]).keys() == {("grey", "counting")} and counting.seen == 12
    with pytest.raises(
        ValueError, match=r"two scorers are named 'counting': dkto\.evaluation\.scorers\.register_scorer gives one"
    ):
        score_all({"grey": folder}, [counting, Counting("two")])
    with pytest.raises(
        ValueError, match=r"name of a scorer must be letters.*got '<lambda>'; dkto\.evaluation\.scorers\.register_sc"
    ):
        score_images(folder, lambda images, prompts: [0.0] * len(images))


def test_processes_that_score_one_folder_keep_each_others_rows(folder):
    """Both read an empty folder; the one that ends last writes what the other has found as well."""

    class Interrupted(Counting):
        def __call__(self, images, prompts):
            if not self.seen:
                score_images(folder, Counting(), batch_size=4)  # another process, from beginning to end
            return [100 + value for value in super().__call__(images, prompts)]

    with pytest.raises(ValueError, match="must return finite values, got nan"):
        score_images(folder, Interrupted(fail_at=4), batch_size=4)
    stored = pd.read_parquet(folder / "scores" / "counting.parquet")["score"].tolist()
    assert stored == [100, 101, 102, 103, 4, 105, 106, 107, 8, 9, 10, 11]


def test_a_missing_image_is_named_before_anything_is_scored(folder):
    image_path(folder, 3, 0).unlink()
    counting = Counting()
    with pytest.raises(FileNotFoundError, match=r"image .*p00003-s0\.png does not exist"):
        score_images(folder, counting)
    assert counting.seen == 0 and not (folder / "scores").exists()


def test_scores_outlive_their_images(folder):
    """Tables can be made again where the pictures were too many to keep."""
    first = score_images(folder, brightness)
    for path in folder.glob("*.png"):
        path.unlink()
    assert (score_images(folder, brightness) == first).all()
    with pytest.raises(FileNotFoundError, match=r"p00000-s0\.png does not exist"):
        score_images(folder, "world_aesthetics")


def test_a_scorer_that_cannot_travel_is_refused_before_workers_start(folder):
    def local(images, prompts):
        return [0.0] * len(images)

    with pytest.raises(ValueError, match=r"cannot be sent to another process .*: use num_processes=1"):
        score_images(folder, local, num_processes=2, batch_size=4)


def test_several_methods_and_scorers_at_once(folder):
    counting = Counting()
    found = score_all({"a": folder, "b": folder}, ["world_aesthetics", counting])
    assert sorted(found) == [("a", "counting"), ("a", "world_aesthetics"), ("b", "counting"), ("b", "world_aesthetics")]
    assert found["a", "world_aesthetics"].shape == (6, 2)


def test_names_and_registration(monkeypatch):
    monkeypatch.setattr("dkto.evaluation.scorers.SCORERS", dict(SCORERS))
    register_scorer("bright", brightness)
    assert get_scorer("bright") is brightness and scorer_name(brightness) == "bright"
    register_scorer("bright", brightness)
    with pytest.raises(ValueError, match="a scorer named 'bright' exists already"):
        register_scorer("bright", lambda images, prompts: [])
    with pytest.raises(ValueError, match=r"name of a scorer must be letters.*got '\.\./x'"):
        register_scorer("../x", brightness)
    with pytest.raises(TypeError, match=r"scorer x must be callable with \(images, prompts\), got int"):
        register_scorer("x", 3)
    assert describe(Counting()) == {"model": "one"} and list(describe(brightness)) == ["code"]
    assert scorer_name(Counting()) == "counting"


def test_unknown_scorers_get_the_nearest():
    with pytest.raises(KeyError, match=r"unknown scorer 'world_rednes'; did you mean 'world_redness'\? known: "):
        get_scorer("world_rednes")


def test_one_prompt_per_image():
    images = [Image.new("RGB", (64, 64))] * 2
    with pytest.raises(ValueError, match="scorer brightness needs one prompt per image, got 2 images and 1 prompts"):
        score(brightness, images, ["a"])
