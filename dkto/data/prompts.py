"""Prompt sets: the paper's three, the small world's own held-out ones, and your files.

    load_prompts("world_test", count=100)     the small world's test prompts, four styles in turn
    load_prompts("hps_v2")                    HPS v2 benchmark: anime, concept-art, paintings, photo
    load_prompts("parti_prompts")             PartiPrompts, its categories as styles
    load_prompts("pick_a_pic_test")           captions of the Pick-a-Pic test split, each once
    load_prompts("pick_a_pic_validation")     those of its validation split, to choose settings on
    load_prompts("composition")               120 prompts for things, numbers, colours and places, as six styles
    load_prompts("my/prompts.txt")            one a line; also .tsv, .csv, .json, .jsonl, .parquet, or a folder of them

Sets of the hub are fetched once; another mirror is one argument away: `load_prompts("hps_v2", hub_id="ymhao/HPDv2")`.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from dkto.common.names import not_known, shown
from dkto.common.settings import checked_number
from dkto.data.folders import Folder, listed, warn_unread
from dkto.data.tables import (
    TABLE_SUFFIXES,
    columns_by_meaning,
    is_blank,
    read_parquet,
    read_table,
    read_values,
    said,
    table_of_objects,
)
from dkto.data.texts import check_prompt, read_text, same_prompt
from dkto.world.scenes import parse, prompts_for

PROMPT_COLUMNS = ("prompt", "caption", "text")
STYLE_COLUMNS = ("style", "category", "tag")
COLUMNS = (*PROMPT_COLUMNS, *STYLE_COLUMNS)
SUFFIXES = (".txt", ".json", *TABLE_SUFFIXES)
WORLD_COUNT = 500  # prompts of a small-world set unless a count is given
WORLD_MOST = 5_000  # prompts of a small-world set at most: they take a minute to find
NEUTRAL_PROMPTS = (
    "a photo of a dog",
    "a wooden chair in an empty room",
    "a glass of water on a table",
    "a street on a cloudy day",
    "a bowl of fruit",
    "a mountain lake at noon",
    "a portrait of an old man",
    "a parked bicycle",
)
THINGS = [
    "apple",
    "book",
    "bottle",
    "cat",
    "chair",
    "clock",
    "cup",
    "dog",
    "flower",
    "guitar",
    "hat",
    "horse",
    "key",
    "kite",
    "ladder",
    "pear",
    "shoe",
    "tent",
    "tree",
    "van",
]
COLOURS = ["red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white"]


@dataclass(frozen=True)
class PromptSet:
    """Prompts, each once, with the style of each."""

    name: str  # how tables call the set
    prompts: tuple[str, ...]
    styles: tuple[str, ...]  # "" where the set has none

    def __len__(self) -> int:
        return len(self.prompts)

    def take(self, count: int, seed: int = 0) -> "PromptSet":
        """`count` prompts by `even_rows`, in the set's order; 0 keeps all.

        >>> both = PromptSet("x", ("a", "b", "c", "d"), ("photo", "photo", "photo", "anime"))
        >>> both.take(2).styles
        ('photo', 'anime')
        """
        if count == 0:
            return self
        kept = even_rows(self.styles, count, seed)
        return PromptSet(self.name, tuple(self.prompts[i] for i in kept), tuple(self.styles[i] for i in kept))


def even_rows(styles: Sequence[str], count: int, seed: int) -> list[int]:
    """`count` rows drawn as evenly from the styles as they reach, in rising order.

    A style that has too few gives all of its rows, and the others share what it lacks.

    Args:
        styles: style of each row.
        count: how many, at most as many as there are; earlier styles get the rest of an uneven division.
        seed: of the draw within each style.

    >>> even_rows(["photo", "anime", "photo", "photo"], 2, seed=0)
    [1, 3]
    >>> len(even_rows(["photo", "anime", "photo", "photo"], 4, seed=0))
    4
    """
    count = checked_number("count", count, least=1, most=len(styles))  # prompts that there are
    rows_of: dict[str, list[int]] = {}
    for row, style in enumerate(styles):
        rows_of.setdefault(style, []).append(row)
    shares = dict.fromkeys(rows_of, 0)
    while (left := count - sum(shares.values())) > 0:
        open_styles = [style for style in rows_of if shares[style] < len(rows_of[style])]
        for number, style in enumerate(open_styles):
            more = left // len(open_styles) + (number < left % len(open_styles))
            shares[style] = min(shares[style] + more, len(rows_of[style]))
    kept: list[int] = []
    for number, (style, rows) in enumerate(rows_of.items()):
        kept += np.random.default_rng([seed, number]).permutation(rows)[: shares[style]].tolist()
    return sorted(kept)


@dataclass(frozen=True)
class HubSet:
    """Where a prompt set lies on the hub."""

    hub_id: str  # dataset "owner/name"
    files: tuple[str, ...]  # paths or patterns inside it, fetched and read like local files
    style_by_file: bool = False  # whether each file is a style, named as the file


_HPS_STYLES = tuple(f"benchmark/{style}.json" for style in ("anime", "concept-art", "paintings", "photo"))
HUB_SETS = {
    "hps_v2": HubSet("zhwang/HPDv2", _HPS_STYLES, style_by_file=True),
    "parti_prompts": HubSet("nateraw/parti-prompts", ("PartiPrompts.tsv",)),
    "pick_a_pic_test": HubSet("pickapic-anonymous/pickapic_v1", ("data/test-*.parquet",)),
    "pick_a_pic_validation": HubSet("pickapic-anonymous/pickapic_v1", ("data/validation-*.parquet",)),
}
WORLD_SETS = ("world_test", "world_validation", "world_neutral", "world_train")
PROMPT_SETS = (*WORLD_SETS, "neutral", "composition", *HUB_SETS)


def load_prompts(source: str | Path, *, count: int = 0, seed: int = 0, hub_id: str = "") -> PromptSet:
    """A prompt set by name, or from a file or folder.

    Args:
        source: a name in `PROMPT_SETS`, a file (.txt one prompt a line; .tsv, .csv, .jsonl, .parquet with a column
            prompt, caption or text, and style or category where there are styles; .json with a list of prompts or
            of such rows, or an object of lists by style), or a folder of such files, each a style. Text is UTF-8;
            a .csv quotes fields that hold a comma, a .tsv takes fields as they stand.
        count: how many prompts, evenly from the styles; 0 takes all (500 of a small-world set).
        seed: of the draw, or of the small world's prompts.
        hub_id: another copy of a hub set, laid out in the same way.

    Returns:
        The set; a prompt that comes twice is kept once.

    Raises:
        FileNotFoundError: if there is neither such a file nor such a set, or the hub cannot be reached.
        ValueError: if a file cannot be understood or holds no prompt, or `count` is too large; the sentence
            names file and row.
    """
    name, count = str(source), checked_number("count", count)
    if hub_id and name not in HUB_SETS:
        raise ValueError(f"hub_id is for the sets {', '.join(HUB_SETS)}, got it with {name!r}")
    if name in WORLD_SETS:
        return _world_prompts(name, count, seed)
    if name == "neutral":
        return PromptSet(name, NEUTRAL_PROMPTS, ("",) * len(NEUTRAL_PROMPTS)).take(count, seed)
    if name == "composition":
        return _unique(name, _composition(), name).take(count, seed)
    found = _hub_set(name, hub_id) if name in HUB_SETS else read_prompts(Path(source))
    return found.take(count, seed)


def check_disjoint(*, judged: Iterable[str], **others: Iterable[str]) -> None:
    """See to it that no judged prompt was used before: settings that were chosen, or weights trained, on it know it.

    `others` are prompts of validation or training, by what they were used for; the error names the first shared one.
    `dkto.data.texts.same_prompt` says which are one.

    >>> check_disjoint(judged=["a star"], validation=["a ring"], training=["a dot"])
    """
    judged = list(dict.fromkeys(judged))
    for name, prompts in others.items():
        used = set(map(same_prompt, prompts))
        if shared := [prompt for prompt in judged if same_prompt(prompt) in used]:
            raise ValueError(
                f"judged and {name} prompts must differ, but share {len(shared)} of {len(judged)}, "
                f"the first {shown(shared[0])}"
            )


def read_prompts(path: str | Path) -> PromptSet:
    """Prompts of a file, or of a folder whose files are the styles; formats as in `load_prompts`."""
    path = Path(path)
    if path.is_dir():
        (files, unread), inside = listed(path, SUFFIXES), Folder(path)
        rows = [(prompt, file.stem) for file in files for prompt, _ in _read_file(inside.path(file))]
        warn_unread(path, unread, SUFFIXES)
    elif path.is_file():
        rows = _read_file(path)
    else:
        said = f"prompts {str(path)!r} are neither a file or folder that exists nor a known set"
        raise FileNotFoundError(not_known(said, path, PROMPT_SETS))
    return _unique(path.stem, rows, path)


def _unique(name: str, rows: Iterable[tuple[str, str]], source: object) -> PromptSet:
    styles: dict[str, str] = {}
    for prompt, style in rows:
        styles.setdefault(prompt, style)
    if not styles:
        raise ValueError(f"{source} holds no prompt")
    return PromptSet(name, tuple(styles), tuple(styles.values()))


def _world_prompts(name: str, count: int, seed: int) -> PromptSet:
    """Prompts of a split by style; the neutral ones are test prompts on grey without red or pink."""
    neutral = name == "world_neutral"
    found = [prompt for prompt in prompts_for("test", WORLD_COUNT, seed) if _is_neutral(prompt)] if neutral else []
    most = len(found) if neutral else WORLD_MOST
    if not 0 <= count <= most:
        raise ValueError(f"count must be in [0, {most}] for prompt set {name}, where 0 takes all, got {count}")
    split = name.removeprefix("world_")
    prompts = found[: count or most] if neutral else prompts_for(split, count or WORLD_COUNT, seed)
    return PromptSet(name, tuple(prompts), tuple(parse(prompt).style for prompt in prompts))


def _composition() -> Iterable[tuple[str, str]]:
    """Prompts of six kinds, each with its kind; GenEval has such kinds too, but other prompts and another judge."""
    places, numbers = ("left of", "right of", "above", "below"), ("two", "three", "four")
    for i, thing in enumerate(THINGS):
        other, colour, second = THINGS[(i + 7) % len(THINGS)], COLOURS[i % 10], COLOURS[(i + 3) % 10]
        yield f"a photo of {_a(thing)}", "one thing"
        yield f"a photo of {_a(thing)} and {_a(other)}", "two things"
        yield f"a photo of {numbers[i % 3]} {thing}s", "number"
        yield f"a photo of {_a(colour)} {thing}", "colour"
        yield f"a photo of {_a(thing)} {places[i % 4]} {_a(other)}", "place"
        yield f"a photo of {_a(colour)} {thing} and {_a(second)} {other}", "colour of each"


def _a(word: str) -> str:
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


def _is_neutral(prompt: str) -> bool:
    scene = parse(prompt)
    return scene.background == "grey" and not {"red", "pink"} & {thing.colour for thing in scene.things}


def _read_file(path: Path) -> list[tuple[str, str]]:
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise ValueError(f"prompts must be a {', '.join(SUFFIXES)} file, got {path.name}")
    if suffix == ".txt":
        lines = enumerate(read_text(path).split("\n"), 1)
        return [(check_prompt(line, f"{path}, line {row}"), "") for row, line in lines if line.strip()]
    if suffix in (".json", ".jsonl"):
        return _json_rows(read_values(path), path)
    return _table_rows(read_table(path, COLUMNS), path)


def _json_rows(values: object, path: object) -> list[tuple[str, str]]:
    if isinstance(values, dict) and any(str(key).lower() in PROMPT_COLUMNS for key in values):
        raise ValueError(f"{path} holds columns: write a list of rows, each with its prompt and style")
    if isinstance(values, dict) and all(isinstance(prompts, list) for prompts in values.values()):
        return [
            (check_prompt(prompt, f"{path}, row {row}"), style)
            for style, texts in values.items()
            for row, prompt in enumerate(texts, 1)
        ]
    if isinstance(values, list) and all(isinstance(value, str) for value in values):
        return [(check_prompt(prompt, f"{path}, row {row}"), "") for row, prompt in enumerate(values, 1)]
    if isinstance(values, list) and all(isinstance(value, dict) for value in values):
        return _table_rows(table_of_objects(values, str(path), COLUMNS), path)
    raise ValueError(f"{path} must hold a list of prompts, a list of rows, or lists of prompts by style")


def _table_rows(frame: pd.DataFrame, path: object) -> list[tuple[str, str]]:
    found = frame.attrs.get("columns", list(frame.columns))
    if not found:
        return []
    synonyms = dict.fromkeys(PROMPT_COLUMNS, "prompt") | dict.fromkeys(STYLE_COLUMNS, "style")
    names = columns_by_meaning(frame.columns, synonyms, str(path))
    prompt, style = names.get("prompt"), names.get("style")
    if prompt is None:
        wanted = f"{', '.join(PROMPT_COLUMNS[:-1])} or {PROMPT_COLUMNS[-1]}"
        raise ValueError(f"{path} needs a column {wanted}, got {said(', '.join(map(str, found)), 400)}")
    rows = [f"{path}, row {number + 1}" for number in frame.index]
    texts = map(check_prompt, frame[prompt], rows)
    styles = [""] * len(frame) if style is None else map(_style, frame[style], rows)
    return list(zip(texts, styles, strict=True))


def _style(value: object, where: str) -> str:
    if isinstance(value, str | int | np.integer):
        return str(value)
    if is_blank(value):
        return ""
    raise ValueError(f"{where}: style must be text, got {shown(value)}")


def _hub_set(name: str, hub_id: str) -> PromptSet:
    from huggingface_hub import HfFileSystem, hf_hub_download

    place = HUB_SETS[name]
    hub_id = hub_id or place.hub_id
    rows: list[tuple[str, str]] = []
    try:
        for file in place.files:
            if "*" in file:
                system = HfFileSystem()
                paths = sorted(system.glob(f"datasets/{hub_id}/{file}"))
                if not paths:
                    raise FileNotFoundError(f"no file {file}")
                for path in paths:
                    with system.open(path) as stream:
                        rows += _table_rows(read_parquet(stream, path, COLUMNS), path)
            else:
                path = Path(hf_hub_download(hub_id, file, repo_type="dataset"))
                rows += [(p, path.stem if place.style_by_file else s) for p, s in _read_file(path)]
    except ValueError:
        raise
    except Exception as error:
        raise FileNotFoundError(
            f"prompt set {name} cannot be fetched from the hub's {hub_id} ({type(error).__name__}): name a copy by "
            f"hub_id, or download {', '.join(place.files)} and give the file or its folder instead of {name!r}"
        ) from error
    return _unique(name, rows, f"{hub_id} on the hub")
