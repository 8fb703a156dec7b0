"""A pool of images as Pick-a-Pic's, and a simulated user who judges them.

A pool is a table: a row an image, with the columns image (path), prompt, finish ("plain", "middling", "bad"; "base"
if the base drew it; "tinted") and faithful.

The images of a prompt come mostly from elsewhere than the model that is tuned: painted in a plain, a middling or
a bad finish, true to the prompt or not, and one drawn by the base without guidance. (On a pool of the base's own
guided images even training without any preference wins: it bakes the guidance in.) The plain ones are better made than
anything that the base draws, as Pick-a-Pic's images of larger models are; without such images, likes hold nothing that
another guidance scale does not give. The user compares two images of a prompt with Bradley-Terry noise
(paper eq. 4-5); comparisons become likes by the paper's rule (5.1.1).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image
from scipy.special import expit

from dkto.common.files import claim, write_atomically, write_png
from dkto.common.names import check_choice
from dkto.common.settings import checked_number
from dkto.data.feedback import FeedbackTable, make_feedback
from dkto.data.images import load_image
from dkto.data.votes import likes_from_votes
from dkto.evaluation.generate import generate_images
from dkto.evaluation.manifest import image_path
from dkto.evaluation.scorers import score
from dkto.models.system import System
from dkto.world.painter import BAD_FINISH, GOOD_FINISH, paint, random_finish
from dkto.world.scenes import Scene, changed, parse
from dkto.world.users import USERS, tint_red

FINISH_SHARES = {"plain": 0.2, "middling": 0.4, "bad": 0.4}
"""Of painted images, by finish. Equal shares were tried first and left after a look at validation prompts: KTO won
50 % [42, 59] of 140 over SFT on all images there, and 54 % [45, 62] with these, which does not tell them apart."""
FAITHFUL_SHARE = 0.7  # chance that a painted image shows what the prompt says
TASTES = {
    "balanced": "world_utility",
    "likes_red": "world_redness",
    "likes_vivid": "world_aesthetics",
    "prompt_faithful": "world_fidelity",
    "clean_backgrounds": "world_clean",
    "no_outlines": "world_no_white_rim",
    "never_pink": "world_no_pink",
    "dark_backgrounds": "world_dark",
    "blue_things": "world_blue",
}
"""Simulated users by name: the scorer that measures what each of them likes. The measure of `balanced` is best at an
ideal image and not beyond it, and counts only where the prompt is followed: no filter pushes it further."""


def unfaithful(scene: Scene, rng: np.random.Generator) -> Scene:
    """The scene with one thing wrong: the colour or the shape of its first thing, or the background."""
    return changed(scene, ("colour", "shape", "background")[rng.integers(3)], rng)


def make_pool(
    prompts: Sequence[str],
    folder: str | Path,
    *,
    pictures_per_prompt: int = 4,
    base: System | None = None,
    seed: int = 0,
    num_processes: int = 1,
) -> pd.DataFrame:
    """Paint a pool, with one image of each prompt drawn by the base if there is one; what is on disk is kept.

    Args:
        prompts: captions of the small world.
        folder: images and `pool.parquet`, the table, land here.
        pictures_per_prompt: K >= 2.
        base: draws the last of each prompt's images; None paints them all.
        seed: of everything.
        num_processes: workers that draw.

    Raises:
        ValueError: if K is below 2, or the folder holds another pool.
    """
    pictures_per_prompt = checked_number("pictures_per_prompt", pictures_per_prompt, least=2)
    folder = Path(folder)
    about = {"pictures_per_prompt": pictures_per_prompt, "faithful_share": FAITHFUL_SHARE}
    drawn = _begin(folder, prompts, about | {"finish_shares": FINISH_SHARES}, base, seed, num_processes)
    rows = [(path, prompt, "base", True) for path, prompt in zip(drawn, prompts, strict=False)]
    (folder / "painted").mkdir(exist_ok=True)
    finishes = {"plain": GOOD_FINISH, "bad": BAD_FINISH}
    for p, prompt in enumerate(prompts):
        for k in range(pictures_per_prompt - (base is not None)):
            rng = np.random.default_rng([seed, p, k])
            finish = str(rng.choice(list(FINISH_SHARES), p=list(FINISH_SHARES.values())))
            faithful = bool(rng.random() < FAITHFUL_SHARE)
            scene = parse(prompt) if faithful else unfaithful(parse(prompt), rng)
            path = image_path(folder / "painted", p, k)
            if not path.exists():
                write_png(path, Image.fromarray(paint(scene, finishes.get(finish) or random_finish(rng), rng)))
            rows.append((path, prompt, finish, faithful))
    return _end(folder, rows)


def draw_pool(
    prompts: Sequence[str],
    folder: str | Path,
    *,
    base: System,
    tint: float = 0.0,
    seed: int = 0,
    num_processes: int = 1,
) -> pd.DataFrame:
    """An image of each prompt drawn by the base, and with a tint the same one seen through a red filter (paper 6).

    Images and `pool.parquet`, the table, land in the folder.
    """
    folder, rows = Path(folder), []
    drawn = _begin(folder, prompts, {"strength": tint}, base, seed, num_processes)
    if tint:
        (folder / "tinted").mkdir(exist_ok=True)
    for p, (original, prompt) in enumerate(zip(drawn, prompts, strict=True)):
        rows.append((original, prompt, "base", True))
        if tint:
            tinted = image_path(folder / "tinted", p, 0)
            if not tinted.exists():
                write_png(tinted, tint_red(load_image(original), tint))
            rows.append((tinted, prompt, "tinted", True))
    return _end(folder, rows)


def _begin(
    folder: Path, prompts: Sequence[str], about: Mapping, base: System | None, seed: int, num_processes: int
) -> list[Path]:
    """Claim the folder, and let the base, if there is one, draw an image of each prompt."""
    folder.mkdir(parents=True, exist_ok=True)
    claim(folder / "pool.json", {"prompts": list(prompts), **about, "base": repr(base), "seed": seed}, "a pool")
    if base is None:
        return []
    options = {"images_per_prompt": 1, "seed": seed, "num_processes": num_processes}
    drawn = generate_images(base, list(prompts), folder / "base", **options)
    return [image_path(drawn, p, 0) for p in range(len(prompts))]


def _end(folder: Path, rows: Sequence[tuple[Path, str, str, bool]]) -> pd.DataFrame:
    pool = pd.DataFrame(rows, columns=["image", "prompt", "finish", "faithful"])
    pool["image"] = pool["image"].map(lambda path: str(path.absolute()))
    write_atomically(folder / "pool.parquet", lambda part: pool.to_parquet(part, index=False))
    return pool


def compare_pool(pool: pd.DataFrame, scorer: str, *, temperature: float = 0.07, seed: int = 0) -> pd.DataFrame:
    """What a simulated user answers when shown two images of a prompt at a time (Bradley-Terry, paper eq. 4).

        P(first preferred) = sigmoid((u_first - u_second) / temperature)

    As Pick-a-Pic was collected, the preferred image stays and the next one takes the place of the other: K images
    make K - 1 comparisons, and only the few that ever won are liked "at least once" (26 % there).

    Args:
        pool: the images.
        scorer: measure u of what the user likes.
        temperature: > 0, in units of the measure; small is decided.
        seed: of the order and the answers.

    Returns:
        Votes as `dkto.data.votes.likes_from_votes` takes them: image_0, image_1, prompt, label_0.
    """
    temperature = checked_number("temperature", temperature, float, above=0)
    values = score(scorer, [load_image(path) for path in pool["image"]], list(pool["prompt"]))
    rng, votes = np.random.default_rng([seed, 0]), []
    for prompt, rows in pool.groupby("prompt", sort=False).indices.items():
        champion, *challengers = rng.permutation(rows)
        for challenger in challengers:
            first, second = rng.permutation([champion, challenger])
            prefers_first = rng.random() < expit((values[first] - values[second]) / temperature)
            votes.append((pool["image"][first], pool["image"][second], prompt, float(prefers_first)))
            champion = first if prefers_first else second
    return pd.DataFrame(votes, columns=["image_0", "image_1", "prompt", "label_0"])


def likes_of(votes: pd.DataFrame, partition: str = "at_least_once") -> FeedbackTable:
    """Each image once, liked or not by a rule of `dkto.data.votes.PARTITIONS` (paper 5.1.1), with its comparisons."""
    likes = likes_from_votes(votes, partition)
    paths = tuple(Path(image) for image in likes.images)
    none = np.full(len(paths), -1)
    return FeedbackTable(paths, tuple(likes.prompts), likes.is_desirable, none, likes.pairs, likes.counts)


def ask(pool: pd.DataFrame, user: str, *, flip_rate: float = 0.0, seed: int = 0) -> FeedbackTable:
    """Likes of single images by a user of `dkto.world.users.USERS` (paper 6).

    The user who likes red likes tinted images and dislikes the originals; the others like what lies above their
    threshold. Images of one prompt carry one pair number, so that every liked one is compared with every disliked
    one for DPO.

    Args:
        pool: from `draw_pool` for likes_red, else from `make_pool`.
        user: name of the user.
        flip_rate: share of likes, and of comparisons, that contradict what the user meant, in [0, 0.5].
        seed: of the contradictions.

    Raises:
        ValueError: if the user is unknown, the rate out of range, or the pool of likes_red has nothing tinted.
    """
    check_choice("user", user, USERS)
    prompts = list(pool["prompt"])
    if user == "likes_red":
        meant = (pool["finish"] == "tinted").to_numpy()
        if not meant.any():
            raise ValueError(
                "user likes_red looks at tinted images, but the pool holds none: call draw_pool with a tint"
            )
    else:
        meant = USERS[user].likes([load_image(path) for path in pool["image"]], prompts)
    return make_feedback(pool["image"], prompts, meant, pd.factorize(pool["prompt"])[0]).flipped(flip_rate, seed)


def take_likes(table: FeedbackTable, count: int, seed: int = 0) -> FeedbackTable:
    """The first `count` single likes and dislikes, in a random order that smaller counts share.

    Raises:
        ValueError: if there are fewer.
    """
    count = checked_number("count", count, least=1, most=len(table))
    return table.subset(np.random.default_rng(seed).permutation(len(table))[:count])


def shares(pool: pd.DataFrame, likes: FeedbackTable) -> dict[str, float]:
    """Share of liked images by finish and faithfulness, to see what the user likes."""
    liked = pd.Series(likes.is_desirable, index=[str(path) for path in likes.images], dtype=float)
    seen = pool.assign(liked=pool["image"].map(liked)).dropna(subset="liked")
    found = {f"finish/{name}": float(v) for name, v in seen.groupby("finish")["liked"].mean().items()}
    names = {True: "faithful", False: "unfaithful"}
    return found | {names[bool(k)]: float(v) for k, v in seen.groupby("faithful")["liked"].mean().items()}
