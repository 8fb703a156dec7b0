"""A pool of pictures as Pick-a-Pic's and a simulated user who compares them.

The pictures of a prompt come mostly from elsewhere than the model that is tuned: painted in a brilliant, a middling or
a bad finish, true to the prompt or not, and some drawn by the base without guidance. (On a pool of the base's own
guided pictures even training without any preference wins: it bakes the guidance in.) The brilliant ones are finer than
what guidance alone makes of the base, as Pick-a-Pic's pictures of larger models are; where the best pictures are not,
likes hold nothing that a higher guidance scale does not give. The user compares two pictures of a prompt with
Bradley-Terry noise (paper eq. 4-5); comparisons become likes by the paper's rule (5.1.1).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image
from scipy.special import expit

from dkto.common.files import claim, write_atomically, write_png
from dkto.common.names import check_choice
from dkto.data.feedback import FeedbackTable, make_feedback
from dkto.data.images import load_image
from dkto.data.votes import likes_from_votes
from dkto.evaluation.generate import generate_images, image_path
from dkto.evaluation.scorers import score
from dkto.models.system import System
from dkto.world.painter import BAD_FINISH, BRILLIANT_FINISH, paint, random_finish
from dkto.world.scenes import Scene, changed, parse
from dkto.world.users import RED_TINT, USERS, check_flip_rate, tint_red

FINISHES = ("brilliant", "middling", "bad")
FINISH_SHARES = (0.2, 0.4, 0.4)
"""Of painted pictures, by finish. Equal shares were tried first and left after a look at validation prompts: KTO won
50 % [42, 59] of 140 over SFT on all pictures there, and 54 % [45, 62] with these, which does not tell them apart."""
TASTES = {
    "balanced": "world_utility",
    "likes_red": "world_redness",
    "likes_vivid": "world_aesthetics",
    "prompt_faithful": "world_fidelity",
}
"""Simulated users by name: the scorer that measures what each of them likes. `balanced` cannot be hacked: beauty
counts for him only where the prompt is followed, and up to a limit."""


def check_user(user: str, known: Iterable[str] = tuple(TASTES)) -> None:
    """Refuse a simulated user that there is none of.

    Raises:
        ValueError: for another name; the sentence lists those that are known.
    """
    check_choice("user", user, known)


@dataclass(frozen=True)
class Pool:
    """Pictures of training prompts, K of each.

    Attributes:
        folder: holds the pictures and `pool.parquet`.
        frame: columns image (path), prompt, finish ("brilliant", "middling", "bad"; "base" if it was drawn), faithful.
    """

    folder: Path
    frame: pd.DataFrame

    def __len__(self) -> int:
        return len(self.frame)


def unfaithful(scene: Scene, rng: np.random.Generator) -> Scene:
    """The scene with one thing wrong: the colour or the shape of its first thing, or the background."""
    return changed(scene, ("colour", "shape", "background")[rng.integers(3)], rng)


def make_pool(
    prompts: Sequence[str],
    folder: str | Path,
    *,
    pictures_per_prompt: int = 4,
    faithful_share: float = 0.7,
    finish_shares: Sequence[float] = FINISH_SHARES,
    base: System | None = None,
    seed: int = 0,
    num_processes: int = 1,
) -> Pool:
    """Paint a pool, with one picture of each prompt drawn by the base if there is one; what is on disk is kept.

    Args:
        prompts: captions of the small world.
        folder: pictures and `pool.parquet` land here.
        pictures_per_prompt: K >= 2.
        faithful_share: chance that a painted picture shows what the prompt says.
        finish_shares: chances of a brilliant, a middling and a bad finish.
        base: draws the last of each prompt's pictures; None paints them all.
        seed: of everything.
        num_processes: workers that draw.

    Raises:
        ValueError: if K is below 2, a share outside [0, 1], the three do not sum to 1, or the folder holds another
            pool.
    """
    if pictures_per_prompt < 2:
        raise ValueError(f"pictures_per_prompt must be at least 2, got {pictures_per_prompt}")
    if not 0 <= faithful_share <= 1:
        raise ValueError(f"faithful_share must be in [0, 1], got {faithful_share}")
    finish_shares = [float(share) for share in finish_shares]
    if len(finish_shares) != len(FINISHES) or min(finish_shares) < 0 or not np.isclose(sum(finish_shares), 1):
        raise ValueError(f"finish_shares must be {len(FINISHES)} chances that sum to 1, got {finish_shares}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    about = {"prompts": list(prompts), "pictures_per_prompt": pictures_per_prompt, "faithful_share": faithful_share}
    about |= {"finish_shares": finish_shares}
    claim(folder / "pool.json", {**about, "base": repr(base), "seed": seed}, "a pool")
    rows = []
    if base is not None:
        options = {"images_per_prompt": 1, "seed": seed, "num_processes": num_processes}
        drawn = generate_images(base, list(prompts), folder / "base", **options)
        rows += [(image_path(drawn, p, 0), prompt, "base", True) for p, prompt in enumerate(prompts)]
    (folder / "painted").mkdir(exist_ok=True)
    finishes = {"brilliant": BRILLIANT_FINISH, "bad": BAD_FINISH}
    for p, prompt in enumerate(prompts):
        for k in range(pictures_per_prompt - (base is not None)):
            rng = np.random.default_rng([seed, p, k])
            finish = str(rng.choice(FINISHES, p=finish_shares))
            faithful = bool(rng.random() < faithful_share)
            scene = parse(prompt) if faithful else unfaithful(parse(prompt), rng)
            path = image_path(folder / "painted", p, k)
            if not path.exists():
                picture = Image.fromarray(paint(scene, finishes.get(finish) or random_finish(rng), rng))
                write_png(path, picture)
            rows.append((path, prompt, finish, faithful))
    frame = pd.DataFrame(rows, columns=["image", "prompt", "finish", "faithful"])
    frame["image"] = frame["image"].map(lambda path: str(path.absolute()))
    write_atomically(folder / "pool.parquet", lambda part: frame.to_parquet(part, index=False))
    return Pool(folder, frame)


def compare_pool(
    pool: Pool,
    scorer: str,
    *,
    temperature: float = 0.1,
    comparisons: int | None = None,
    flip_rate: float = 0.0,
    seed: int = 0,
) -> pd.DataFrame:
    """What a simulated user answers when shown two pictures of a prompt at a time (Bradley-Terry, paper eq. 4).

        P(first preferred) = sigmoid((u_first - u_second) / temperature)

    As Pick-a-Pic was collected, the preferred picture stays and the next one takes the place of the other: K pictures
    make K - 1 comparisons, and only the few that ever won are liked "at least once" (26 % there).

    Args:
        pool: the pictures.
        scorer: measure u of what the user likes.
        temperature: > 0, in units of the measure; small is decided.
        comparisons: shown per prompt, in [1, K - 1]; None shows every picture.
        flip_rate: share of answers that contradict what the user meant, in [0, 0.5].
        seed: of the order and the answers.

    Returns:
        Votes as `dkto.data.votes.likes_from_votes` takes them: image_0, image_1, prompt, label_0.

    Raises:
        ValueError: if temperature, comparisons or flip_rate are out of range.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    check_flip_rate(flip_rate)
    frame = pool.frame
    values = score(scorer, [load_image(path) for path in frame["image"]], list(frame["prompt"]))
    rng, flips = np.random.default_rng([seed, 0]), np.random.default_rng([seed, 1])
    votes = []
    for prompt, rows in frame.groupby("prompt", sort=False).indices.items():
        shown = len(rows) - 1 if comparisons is None else comparisons
        if not 1 <= shown <= len(rows) - 1:
            raise ValueError(f"comparisons must be in [1, {len(rows) - 1}], got {comparisons}")
        champion, *challengers = rng.permutation(rows)[: shown + 1]
        for challenger in challengers:
            first, second = rng.permutation([champion, challenger])
            prefers_first = rng.random() < expit((values[first] - values[second]) / temperature)
            prefers_first ^= flips.random() < flip_rate
            votes.append((frame["image"][first], frame["image"][second], prompt, float(prefers_first)))
            champion = first if prefers_first else second
    return pd.DataFrame(votes, columns=["image_0", "image_1", "prompt", "label_0"])


def likes_of(votes: pd.DataFrame, partition: str = "at_least_once") -> FeedbackTable:
    """Each picture once, liked or not by a rule of `dkto.data.votes.PARTITIONS` (paper 5.1.1), with its comparisons."""
    likes = likes_from_votes(votes, partition)
    paths = tuple(Path(image) for image in likes.images)
    none = np.full(len(paths), -1)
    return FeedbackTable(paths, tuple(likes.prompts), likes.is_desirable, none, likes.pairs, likes.counts)


def tint_pool(
    prompts: Sequence[str],
    folder: str | Path,
    *,
    base: System,
    strength: float = RED_TINT,
    seed: int = 0,
    num_processes: int = 1,
) -> Pool:
    """A picture of each prompt drawn by the base, and the same one seen through a red filter (paper 6).

    Args:
        prompts: one picture each.
        folder: pictures and `pool.parquet` land here.
        base: draws them.
        strength: of the filter, in [0, 1].
        seed: of the starting noise.
        num_processes: workers that draw.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    claim(
        folder / "pool.json",
        {"prompts": list(prompts), "strength": strength, "base": repr(base), "seed": seed},
        "a pool",
    )
    options = {"images_per_prompt": 1, "seed": seed, "num_processes": num_processes}
    drawn = generate_images(base, list(prompts), folder / "base", **options)
    (folder / "tinted").mkdir(exist_ok=True)
    rows = []
    for p, prompt in enumerate(prompts):
        original, tinted = (image_path(place, p, 0).absolute() for place in (drawn, folder / "tinted"))
        if not tinted.exists():
            picture = tint_red(load_image(original), strength)
            write_png(tinted, picture)
        rows += [(str(original), prompt, "base", True), (str(tinted), prompt, "tinted", True)]
    frame = pd.DataFrame(rows, columns=["image", "prompt", "finish", "faithful"])
    write_atomically(folder / "pool.parquet", lambda part: frame.to_parquet(part, index=False))
    return Pool(folder, frame)


def ask(pool: Pool, user: str, *, flip_rate: float = 0.0, seed: int = 0) -> FeedbackTable:
    """Likes of single pictures by a user of `dkto.world.users.USERS` (paper 6).

    The user who likes red likes tinted pictures and dislikes the originals; the others like what lies above their
    threshold. Pictures of one prompt carry one pair number, so that every liked one stands against every disliked
    one for DPO.

    Args:
        pool: from `tint_pool` for likes_red, else from `make_pool`.
        user: name of the user.
        flip_rate: share of likes, and of comparisons, that contradict what he meant, in [0, 0.5].
        seed: of the contradictions.

    Raises:
        ValueError: if the user is unknown, the rate out of range, or the pool of likes_red has nothing tinted.
    """
    check_user(user, USERS)
    check_flip_rate(flip_rate)
    prompts = list(pool.frame["prompt"])
    if user == "likes_red":
        meant = (pool.frame["finish"] == "tinted").to_numpy()
        if not meant.any():
            raise ValueError("user likes_red looks at tinted pictures, but the pool holds none: make it with tint_pool")
    else:
        meant = USERS[user].likes([load_image(path) for path in pool.frame["image"]], prompts)
    clean = make_feedback(pool.frame["image"], prompts, meant, pd.factorize(pool.frame["prompt"])[0])
    return clean.flipped(flip_rate, seed)


def take_likes(table: FeedbackTable, count: int, seed: int = 0) -> FeedbackTable:
    """The first `count` single likes and dislikes, in a random order that smaller counts share.

    Raises:
        ValueError: if there are fewer.
    """
    if not 1 <= count <= len(table):
        raise ValueError(f"count must be in [1, {len(table)}], got {count}")
    return table.subset(np.random.default_rng(seed).permutation(len(table))[:count])


def shares(pool: Pool, likes: FeedbackTable) -> Mapping[str, float]:
    """Share of liked pictures by finish and faithfulness, to see what the user likes."""
    liked = pd.Series(likes.is_desirable, index=[str(path) for path in likes.images])
    frame = pool.frame.assign(liked=pool.frame["image"].map(liked)).dropna(subset="liked")
    frame["liked"] = frame["liked"].astype(float)
    found = {f"finish/{name}": float(v) for name, v in frame.groupby("finish")["liked"].mean().items()}
    names = {True: "faithful", False: "unfaithful"}
    return found | {names[bool(k)]: float(v) for k, v in frame.groupby("faithful")["liked"].mean().items()}
