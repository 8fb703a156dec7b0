import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dkto.embedded.scenes import SPLITS, STYLES, caption, parse, prompts_for, random_scene, split_of


@given(seed=st.integers(0, 10**9))
@settings(max_examples=200)
def test_captions_read_back_as_their_scene(seed):
    scene = random_scene(np.random.default_rng(seed))
    assert parse(caption(scene)) == scene
    assert parse(f"  {caption(scene).upper()} ") == scene


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a dog",
        "an icon of a large red star",
        "an icon of a red star left of on a navy background",
        "a red star on a navy background",
    ],
)
def test_other_prompts_are_refused_with_an_example(text):
    with pytest.raises(ValueError, match="is not a caption of the small world; expected for example"):
        parse(text)


def test_splits_are_disjoint_and_styles_take_turns():
    prompts = {split: prompts_for(split, 80) for split in SPLITS}
    for split, texts in prompts.items():
        assert len(set(texts)) == 80
        assert {split_of(text) for text in texts} == {split}
        assert [parse(text).style for text in texts[:4]] == list(STYLES)
    assert not set(prompts["train"]) & set(prompts["test"])
    assert not set(prompts["validation"]) & set(prompts["test"])


def test_about_four_prompts_of_five_train():
    rng = np.random.default_rng(0)
    splits = [split_of(caption(random_scene(rng))) for _ in range(2000)]
    assert 0.75 < splits.count("train") / 2000 < 0.85


def test_prompts_depend_on_the_seed_and_nothing_else():
    assert prompts_for("test", 20, seed=1) == prompts_for("test", 20, seed=1)
    assert prompts_for("test", 20, seed=1) != prompts_for("test", 20, seed=2)


def test_unknown_split_and_too_many_prompts():
    with pytest.raises(ValueError, match="split must be one of train, validation, test, got 'dev'"):
        prompts_for("dev", 3)
    with pytest.raises(ValueError, match="fewer than 400 prompts"):
        prompts_for("validation", 400, two_things=0.0)
