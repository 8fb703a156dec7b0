from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dkto.world.painter import (
    BAD_FINISH,
    BRILLIANT_FINISH,
    GOOD_FINISH,
    IMAGE_SIZE,
    Finish,
    paint,
    random_finish,
    shape_distance,
)
from dkto.world.scenes import BACKGROUNDS, SHAPES, Scene, Thing, caption, parse, random_scene
from dkto.world.truth import RULES_VERSION, aesthetics, judge, recognise_shape, redness
from dkto.world.users import USERS, tint_red


def scenes_and_pictures(count, finish=None, seed=0):
    rng = np.random.default_rng(seed)
    scenes = [random_scene(rng) for _ in range(count)]
    return scenes, [paint(s, finish or random_finish(rng), rng) for s in scenes]


def test_pictures_show_what_their_captions_say():
    scenes, pictures = scenes_and_pictures(300)
    parts = [judge(p, s) for p, s in zip(pictures, scenes, strict=True)]
    assert np.mean([p["fidelity"] for p in parts]) > 0.99
    assert np.mean([p["shape"] for p in parts]) > 0.97


def test_rules_that_give_other_numbers_have_another_version():
    """Stored scores are known by the version: raise it with the rule, and write the new numbers here."""
    scenes, pictures = scenes_and_pictures(40)
    measured = [
        np.mean([judge(p, s)["fidelity"] for p, s in zip(pictures, scenes, strict=True)]),
        np.mean([aesthetics(p) for p in pictures]),
        np.mean([redness(p) for p in pictures]),
    ]
    known = {1: [0.99166667, 0.73597168, 0.01192927]}
    assert measured == pytest.approx(known[RULES_VERSION], abs=1e-6)


def test_pictures_of_other_captions_score_low():
    scenes, pictures = scenes_and_pictures(300)
    assert np.mean([judge(p, s)["fidelity"] for p, s in zip(pictures, scenes[::-1], strict=True)]) < 0.25


@given(seed=st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_judgements_are_fractions_and_fidelity_is_their_mean(seed):
    rng = np.random.default_rng(seed)
    scene = random_scene(rng)
    parts = judge(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8), scene)
    assert ("relation" in parts) == bool(scene.relation)
    assert all(0 <= value <= 1 for value in parts.values())
    others = [value for name, value in parts.items() if name != "fidelity"]
    assert parts["fidelity"] == pytest.approx(np.mean(others))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("radius", [11.0, 19.0])
def test_every_shape_is_recognised(shape, radius):
    y, x = np.mgrid[0:64, 0:64] - 31.5
    assert recognise_shape(shape_distance(shape, radius, x, y) < 0) == shape


def test_noise_is_no_shape():
    assert recognise_shape(np.random.default_rng(0).random((64, 64)) < 0.2) is None


def test_swapping_the_things_breaks_the_relation_only():
    rng = np.random.default_rng(3)
    scene = parse("an icon of a red circle left of a blue square on a white background")
    picture = paint(scene, GOOD_FINISH, rng)
    swapped = Scene(scene.style, scene.things[::-1], "left of", scene.background)
    good, bad = judge(picture, scene), judge(picture, swapped)
    assert good["relation"] == 1 and bad["relation"] == 0
    assert all(good[part] == bad[part] == 1 for part in ("colour", "shape", "background"))


@pytest.mark.parametrize("background", list(BACKGROUNDS))
def test_backgrounds_are_told_apart_under_any_finish(background):
    rng = np.random.default_rng(0)
    scene = Scene("icon", (Thing("star", "red", "large"),), "", background)
    hits = [judge(paint(scene, random_finish(rng), rng), scene)["background"] for _ in range(40)]
    assert np.mean(hits) > 0.95


def test_good_finish_is_more_beautiful_than_bad():
    better = [
        aesthetics(good) > aesthetics(bad)
        for good, bad in zip(
            scenes_and_pictures(60, GOOD_FINISH)[1], scenes_and_pictures(60, BAD_FINISH)[1], strict=True
        )
    ]
    assert np.mean(better) > 0.97


def test_a_brilliant_finish_is_more_beautiful_than_a_good_one():
    """A third of the good ones reach the measure's ceiling of 1 already; no brilliant one falls below its twin."""
    brilliant, good = (
        np.array([aesthetics(picture) for picture in scenes_and_pictures(60, finish)[1]])
        for finish in (BRILLIANT_FINISH, GOOD_FINISH)
    )
    assert np.mean(brilliant >= good) > 0.97 and np.mean(brilliant - good) > 0.1


def test_a_brilliant_finish_still_shows_what_the_caption_says():
    scenes, pictures = scenes_and_pictures(200, BRILLIANT_FINISH)
    assert np.mean([judge(p, s)["fidelity"] for p, s in zip(pictures, scenes, strict=True)]) > 0.98


def test_solid_red_is_red_but_neither_beautiful_nor_faithful():
    solid = np.zeros((IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    solid[..., 0] = 255
    assert redness(solid) == 1.0
    assert aesthetics(solid) < 0.5
    assert judge(solid, "an icon of a large red star on a navy background")["fidelity"] < 0.5


def test_wrong_pictures_are_refused():
    with pytest.raises(
        ValueError, match=r"image must be uint8 of shape \(64, 64, 3\), got uint8 of shape \(32, 32, 3\)"
    ):
        judge(np.zeros((32, 32, 3), np.uint8), "an icon of a large red star on a navy background")


def test_a_finish_that_changes_nothing_changes_nothing():
    scene = parse("an icon of a large green cross on a grey background")
    plain = paint(scene, Finish(), np.random.default_rng(0))
    assert (plain == paint(scene, GOOD_FINISH, np.random.default_rng(0))).all()
    assert plain.dtype == np.uint8 and plain.shape == (64, 64, 3)


def test_the_red_filter_makes_red_and_keeps_the_prompt():
    scenes, pictures = scenes_and_pictures(200)
    tinted = [np.asarray(tint_red(Image.fromarray(p), 0.15)) for p in pictures]
    assert all(redness(t) > redness(p) for t, p in zip(tinted, pictures, strict=True))
    assert np.mean([judge(t, s)["fidelity"] for t, s in zip(tinted, scenes, strict=True)]) > 0.9
    with pytest.raises(ValueError, match=r"strength must be in \[0, 1\], got 2"):
        tint_red(Image.fromarray(pictures[0]), 2)


def test_users_follow_their_rule():
    scenes, pictures = scenes_and_pictures(80, seed=5)
    images, prompts = [Image.fromarray(p) for p in pictures], [caption(s) for s in scenes]
    for user in USERS.values():
        likes = user.likes(images, prompts)
        values = np.array([user.measure(p, t) for p, t in zip(pictures, prompts, strict=True)])
        assert (likes == (values > user.threshold)).all()
        assert likes.dtype == bool
    assert 0.1 < USERS["likes_vivid"].likes(images, prompts).mean() < 0.9
    assert 0.05 < USERS["likes_red"].likes([tint_red(i, 0.2) for i in images], prompts).mean() < 0.95


def test_a_noisy_user_contradicts_himself_at_the_stated_rate():
    scenes, pictures = scenes_and_pictures(300)
    images, prompts = [Image.fromarray(p) for p in pictures], [caption(s) for s in scenes]
    user = USERS["likes_vivid"]
    flips = user.likes(images, prompts) != replace(user, flip_rate=0.3).likes(images, prompts, seed=1)
    assert abs(flips.mean() - 0.3) < 4 * (0.21 / 300) ** 0.5
    with pytest.raises(ValueError, match=r"flip_rate must be in \[0, 0.5\], got 0.7"):
        replace(user, flip_rate=0.7)
