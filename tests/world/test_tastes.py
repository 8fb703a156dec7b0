import numpy as np
import pytest
from PIL import Image

from dkto.evaluation.scorers import SCORERS, score
from dkto.paper.pool import TASTES
from dkto.world.craft import CRAFT_VERSION
from dkto.world.painter import GOOD_FINISH, Place, compose, paint, random_finish
from dkto.world.scenes import caption, open_prompts, parse, prompts_for, split_of
from dkto.world.tastes import blueness, cleanness, darkness, no_pink, no_white_rim
from dkto.world.users import USERS

STICKER = parse("a sticker of a large red star on a navy background")
PAINTING = parse("a painting of a large red star on a white background")
NEED_DISLIKES = [user for user in USERS.values() if user.provokes]


def shown(scene, **changes):
    return np.rint(compose(scene, [Place(32, 34, 18, 0.1)], **changes)).astype(np.uint8)


def test_each_measure_falls_with_what_the_user_dislikes():
    plain = shown(PAINTING)
    cloudy = np.clip(plain + 25 * np.sin(np.arange(64) / 5)[:, None, None], 0, 255).astype(np.uint8)
    assert cleanness(plain, PAINTING) > -1 > -4 > cleanness(cloudy, PAINTING)
    icon = parse("an icon of a large red star on a navy background")
    assert no_white_rim(shown(icon), icon) == 0 > -0.03 > no_white_rim(shown(STICKER), STICKER)
    pink = parse("an icon of a large pink star on a navy background")
    assert no_pink(shown(icon), icon) > -0.015 > -0.1 > no_pink(shown(pink), pink)
    assert darkness(shown(icon), icon) > 0.7 > 0.1 > darkness(plain, PAINTING)
    blue = parse("an icon of a large blue star on a white background")
    assert blueness(shown(blue), blue) > 0.5 > -0.5 > blueness(plain, PAINTING)


def test_a_taste_that_gives_other_numbers_has_another_version():
    """Stored scores are known by the version: raise it with the measure, and write the new numbers here."""
    scenes = [parse(prompt) for prompt in prompts_for("test", 32)]
    finishes = [random_finish(np.random.default_rng([3, n])) for n in range(32)]
    images = [paint(s, finishes[n], np.random.default_rng([4, n])) for n, s in enumerate(scenes)]
    measures = (cleanness, no_white_rim, no_pink, darkness, blueness)
    measured = [np.mean([measure(i, s) for i, s in zip(images, scenes, strict=True)]) for measure in measures]
    known = {1: [-0.340245, -0.013535, -0.026962, 0.597835, -0.051132]}
    assert measured == pytest.approx(known[CRAFT_VERSION], abs=1e-5)


def test_blueness_asks_what_pixels_there_are_and_not_where():
    """Many pixels of a flat image tie, and in which order a sort leaves them depends on the processor."""
    for n, scene in enumerate(map(parse, prompts_for("test", 16))):
        image = np.asarray(paint(scene, GOOD_FINISH, np.random.default_rng(n)))
        assert blueness(image[::-1, ::-1], scene) == pytest.approx(blueness(image, scene), abs=1e-9)


def test_a_white_rim_is_not_seen_on_white():
    scene = parse("a sticker of a large red star on a white background")
    assert no_white_rim(shown(scene), scene) == 0


@pytest.mark.parametrize("user", NEED_DISLIKES, ids=lambda user: user.name)
def test_a_taste_that_needs_dislikes_is_provoked_by_a_part_of_the_world(user):
    scenes = [parse(prompt) for prompt in prompts_for("train", 200)]
    share = np.mean([user.provokes(scene) for scene in scenes])
    assert 0.05 < share < 0.35
    only = prompts_for("test", 12, where=user.provokes)
    assert all(user.provokes(parse(prompt)) and split_of(prompt) == "test" for prompt in only)
    assert prompts_for("test", 12, 1, where=user.provokes) != only == prompts_for("test", 12, where=user.provokes)


def test_the_users_dislike_what_provokes_them():
    for name, scene in (
        ("no_outlines", STICKER),
        ("never_pink", parse("a toy of a small pink ring on a black background")),
    ):
        image, other = (
            paint(scene, GOOD_FINISH, np.random.default_rng(0)),
            parse("an icon of a large blue star on a navy background"),
        )
        assert USERS[name].provokes(scene) and not USERS[name].provokes(other)
        plain = Image.fromarray(paint(other, GOOD_FINISH, np.random.default_rng(0)))
        assert USERS[name].likes([Image.fromarray(image), plain], [caption(scene), caption(other)]).tolist() == [
            False,
            True,
        ]


def test_every_user_has_a_scorer_that_is_its_measure():
    scene = parse("a painting of a large pink star on a white background")
    image, prompt = Image.fromarray(shown(scene)), caption(scene)
    for name, user in USERS.items():
        assert TASTES[name] in SCORERS
        assert score(TASTES[name], [image], [prompt])[0] == pytest.approx(user.measure(np.asarray(image), prompt))


def test_open_prompts_are_24_in_two_parts_and_no_captions():
    likes, judged = open_prompts()
    assert (len(likes), len(judged), len({*likes, *judged})) == (16, 8, 24)
    with pytest.raises(ValueError, match="not a caption"):
        parse(likes[0])
