import json

import numpy as np
import pytest
from PIL import Image

from dkto.workshop.stranger import ROOT, TRAININGS, named, teach
from dkto.world.painter import GOOD_FINISH, paint
from dkto.world.scenes import parse
from dkto.world.stranger import CARDS, guess_taste, likes_by_card

PLAIN = "an icon of a large yellow star on a grey background"
TAUGHT = {
    "dark backgrounds": "an icon of a large yellow star on a black background",
    "light backgrounds": "an icon of a large yellow star on a white background",
    "blue backgrounds": "an icon of a large yellow star on a navy background",
    "blue things": "an icon of a large cyan star on a grey background",
    "pink things": "an icon of a large pink star on a grey background",
    "red or yellow things": PLAIN,
}


def painted(prompts):
    return [Image.fromarray(paint(parse(p), GOOD_FINISH, np.random.default_rng(n))) for n, p in enumerate(prompts)]


@pytest.mark.parametrize("card", CARDS)
def test_the_stranger_names_what_changed_and_nothing_else(card):
    before = [PLAIN.replace("yellow", "blue") if card.startswith("red") else PLAIN] * 5 + list(TAUGHT.values())
    after = [TAUGHT[card]] * 5 + list(TAUGHT.values())
    found = guess_taste(painted(before), painted(after))
    assert found.index[0] == card and set(found.index) == set(CARDS)
    assert (guess_taste(painted(before), painted(before)) == 0).all()


def test_half_of_the_images_are_liked_and_two_sides_must_match():
    images = painted(TAUGHT.values())
    assert likes_by_card("dark backgrounds", images)[:3].tolist() == [True, False, True]
    assert all(likes_by_card(card, images).sum() == 3 for card in CARDS)
    with pytest.raises(ValueError, match="before and after must be as many, at least two, got 6 and 5"):
        guess_taste(images, images[1:])


def test_what_teachers_read_is_what_was_measured():
    kept = json.loads((ROOT / "papermill_runs" / "reference" / "stranger" / "guesses.json").read_text())
    (right, all_of), (by_chance, shuffled) = named(kept), named(kept, shuffled=True)
    assert all_of == shuffled == len(TRAININGS) == 10
    page = (ROOT / "notebooks" / "TEACHING.md").read_text()
    assert f"names the card in {right} of {all_of} trainings" in page
    assert f"shuffled likes in {by_chance} of {shuffled}" in page


@pytest.mark.slow
def test_a_stranger_names_the_taste_that_likes_taught(tmp_path):
    """Four trainings of ten; `python -m dkto.workshop.stranger` makes all of them, and the controls."""
    taught = [card for card, _ in TRAININGS[:4]]
    assert sum(teach(tmp_path, card)[0] == card for card in taught) >= 3
