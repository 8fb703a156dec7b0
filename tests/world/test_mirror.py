import numpy as np
import pytest
from PIL import Image
from scipy.stats import fisher_exact

from dkto.world.mirror import SURE, mirror_sentences, taste_mirror, traits
from dkto.world.painter import GOOD_FINISH, paint
from dkto.world.scenes import caption, parse, prompts_for


@pytest.mark.parametrize("prompt", prompts_for("test", 12, two_things=0.0))
def test_pixels_show_what_an_open_prompt_leaves_open(prompt):
    scene = parse(prompt)
    image = Image.fromarray(paint(scene, GOOD_FINISH, np.random.default_rng(0)))
    (thing,) = scene.things
    stated = {f"style {scene.style}", f"shape {thing.shape}"}
    told = traits(image, caption(scene))
    assert told == stated | {f"colour {thing.colour}", f"size {thing.size}", f"background {scene.background}"}
    seen = traits(image, f"a {scene.style} of a {thing.shape}")
    assert {f"colour {thing.colour}, seen", f"background {scene.background}, seen", *stated} <= seen and len(seen) == 5


def test_prompts_of_another_world_give_their_long_words():
    found = traits(Image.new("RGB", (900, 600), (20, 22, 90)), "A cat, painted by the sea.")
    assert found == {"word painted", "background navy, seen"}


def test_counts_and_chance_are_of_both_classes():
    given = [{"a"}, {"a", "b"}, {"a"}, {"b"}, {"b"}, set()]
    mirror = taste_mirror(given, [True, True, True, False, False, False])
    assert mirror.loc["a", ["liked", "disliked", "of_liked", "of_disliked"]].tolist() == [3, 0, 3, 3]
    assert mirror.index[0] == "a" and mirror.loc["a", "p"] == pytest.approx(fisher_exact([[3, 0], [0, 3]]).pvalue)
    assert mirror_sentences(mirror) == [], "three of three are what chance does in one of ten"


def test_without_a_taste_few_mirrors_name_anything():
    rng = np.random.default_rng(0)
    given = [{f"{kind} {rng.integers(5)}" for kind in "abcde"} for _ in range(40)]
    named = [bool(mirror_sentences(taste_mirror(given, rng.permutation(40) < 20))) for _ in range(60)]
    assert np.mean(named) <= 2 * SURE
