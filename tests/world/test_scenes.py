import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dkto.world.scenes import ATTRIBUTES, SPLITS, STYLES, caption, changed, parse, prompts_for, random_scene, split_of

PAIR = "an icon of a red star left of a blue ring on a grey background"
LONE = "a toy of a large red star on a navy background"


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


@pytest.mark.parametrize("attribute", ATTRIBUTES)
def test_one_attribute_is_changed_and_nothing_else(attribute):
    rng = np.random.default_rng(0)
    for prompt in (PAIR, LONE):
        scene = parse(prompt)
        other = changed(scene, attribute, rng)
        if other is None:
            assert (attribute, prompt) in {("size", PAIR), ("relation", LONE)}
            continue
        assert other != scene and parse(caption(other)) == other
        same = {
            "shape": [t.shape for t in scene.things] == [t.shape for t in other.things],
            "colour": [t.colour for t in scene.things] == [t.colour for t in other.things],
            "background": scene.background == other.background,
            "style": scene.style == other.style,
            "size": scene.things[0].size == other.things[0].size,
        }
        if attribute == "relation":
            assert other.things == scene.things[::-1] and other.relation == scene.relation
        else:
            assert [name for name, kept in same.items() if not kept] == [attribute]


def test_an_attribute_that_is_not_known_is_named():
    with pytest.raises(ValueError, match=r"attribute must be one of shape, colour, .*, size, got 'hue'"):
        changed(parse(PAIR), "hue", np.random.default_rng(0))


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
