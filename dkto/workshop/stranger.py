"""Trainings of *teach your taste* that a stranger judges: `python -m dkto.workshop.stranger FOLDER`.

Each training judges 40 images by a card of `dkto.world.stranger.CARDS`, tunes with `SETTINGS`, and draws
other prompts before and after. The stranger sees these images alone. The same trainings with shuffled likes are the
control, in which a guess is right one time in six.
"""

import sys
from pathlib import Path

import numpy as np

from dkto.common.ends import guarded
from dkto.common.files import read_json, write_json
from dkto.data.encode import prepare_feedback
from dkto.data.feedback import make_feedback
from dkto.data.images import load_image
from dkto.evaluation.generate import generate_images
from dkto.evaluation.manifest import image_path
from dkto.evaluation.metrics import wilson_interval
from dkto.models.system import System
from dkto.training import TrainConfig, run_training
from dkto.world.scenes import open_prompts
from dkto.world.stranger import CARDS, SETTINGS, guess_taste, likes_by_card

ROOT = Path(__file__).parents[2]
JUDGED, HELD_OUT = 40, 24  # images
TRAININGS = tuple((card, n // len(CARDS)) for n, card in enumerate([*CARDS, *CARDS][:10]))  # card and seed


def teach(folder: Path, card: str, seed: int = 0, *, shuffled: bool = False, **settings) -> list[str]:
    """Teach one card's taste and let the stranger guess; returns the cards, the guess first.

    Args:
        folder: images and the training land here; pools and base images are shared by the trainings of a seed.
        card: a key of `CARDS`.
        seed: of the pool, of the training, and of the noise of the images before and after.
        shuffled: whether the likes are dealt to the images at random.
        settings: fields of `TrainConfig` other than those of `SETTINGS`.
    """
    shown, held = open_prompts()

    def drawn(system: System, prompts: list[str], name: str, noise: int) -> list:
        place = generate_images(system, prompts, folder / name, images_per_prompt=1, seed=noise, num_processes=0)
        return [image_path(place, number, 0) for number in range(len(prompts))]

    asked = [shown[number % len(shown)] for number in range(JUDGED)]
    pool = drawn(System(), asked, f"pool-{seed}", seed)
    likes = make_feedback(pool, asked, likes_by_card(card, [load_image(path) for path in pool]).tolist())
    run = folder / f"{card.replace(' ', '_')}-{seed}{'-shuffled' if shuffled else ''}"
    prepared = prepare_feedback(likes.shuffled_likes(seed) if shuffled else likes, run / "prepared", "small-world")
    run_training(TrainConfig(prepared, run / "run", seed=seed, **(SETTINGS | settings)))
    others = [held[number % len(held)] for number in range(HELD_OUT)]
    before = drawn(System(), others, f"before-{seed}", 1000 + seed)
    after = drawn(System.of_run(run / "run"), others, f"{run.name}/after", 1000 + seed)
    return list(guess_taste(*([np.asarray(load_image(path)) for path in side] for side in (before, after))).index)


def measure(folder: Path) -> dict[str, list[str]]:
    """The guesses of all `TRAININGS` and of their controls, kept in `guesses.json` as they are made."""
    folder.mkdir(parents=True, exist_ok=True)
    kept = folder / "guesses.json"
    guesses = read_json(kept, "guesses of the stranger", []) if kept.exists() else {}
    for shuffled in (False, True):
        for card, seed in TRAININGS:
            name = f"{card}, seed {seed}{', shuffled' if shuffled else ''}"
            if name not in guesses:
                guesses[name] = teach(folder, card, seed, shuffled=shuffled)
                write_json(kept, guesses)
        right, all_of = named(guesses, shuffled)
        low, high = wilson_interval(right, all_of)
        print(f"{'shuffled likes' if shuffled else 'likes'}: {right} of {all_of} named [{low:.0%}, {high:.0%}]")
    return guesses


def named(guesses: dict[str, list[str]], shuffled: bool = False) -> tuple[int, int]:
    """How often the first guess is the card, and of how many trainings, with likes as given or shuffled."""
    first = [
        name.startswith(f"{found[0]},") for name, found in guesses.items() if name.endswith("shuffled") == shuffled
    ]
    return sum(first), len(first)


def _main() -> None:
    measure(Path(sys.argv[1]))


if __name__ == "__main__":
    sys.exit(guarded(_main, "dkto"))
