"""A user study: two blinded images of a prompt, "Which image do you prefer given the prompt?" (paper 5.1.2, A.2).

    study/
      questions.json     prompts, styles, and for every judge the order of questions and which image is left
      images/q007-a.png  the two images of question 7; which method is "a" is random
      answers/ann.jsonl  one line per answer, only ever appended
      key.json           which method "a" and "b" are: not for judges

Each method is left in half of a judge's questions of every style. Judges come in pairs, of whom the second sees every
question mirrored. A judge may stop at any question and go on later. Sides and letters depend on a random number that
is stored only in `key.json`, so knowing the seed does not unblind the study. `questions.json` holds a hash of both
files, by which a changed value in one of them is noticed. `dkto.evaluation.study_answers` counts.
"""

import hashlib
import json
import re
import secrets
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from dkto.common.files import (
    Fields,
    append_record,
    check_fields,
    claim,
    read_json,
    refuse_leaving,
    refuse_other_than_file,
    write_json,
    write_png,
)
from dkto.common.json_text import parse_json
from dkto.common.names import shown as said
from dkto.common.settings import checked_number
from dkto.data.images import load_image
from dkto.data.prompts import even_rows
from dkto.evaluation.manifest import check_comparable, image_path

QUESTION = "Which image do you prefer given the prompt?"
SIDES = ("left", "right")
UNDONE = "undone"
DIGEST = "digest"  # in questions.json
JUDGE_NAME = r"[A-Za-z0-9_-]+"


def _are_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) for each in value)


def _is_text(value: object) -> bool:
    return isinstance(value, str)


QUESTIONS: Fields = {
    "question": (_is_text, "text"),
    "prompts": (_are_texts, "a list of texts"),
    "styles": (_are_texts, "a list of texts"),
    "judges": (lambda value: isinstance(value, dict), "an object of judges"),
}
KEY: Fields = {
    "methods": (lambda value: _are_texts(value) and len(set(value)) == len(value) == 2, "the names of two methods"),
    "prompts": (_are_texts, "a list of texts"),
    "a_is_ours": (lambda held: isinstance(held, list) and {type(each) for each in held} <= {bool}, "a list of bool"),
    "salt": (lambda value: type(value) is int and value >= 0, "a whole number"),
}


@dataclass(frozen=True)
class Pair:
    """What a judge sees of one question: the prompt and the two image files."""

    number: int
    prompt: str
    left: Path
    right: Path
    position: int  # how far the judge has come, counted from 1
    total: int


def make_study(
    folders: Mapping[str, str | Path],
    output_dir: str | Path,
    judges: Sequence[str],
    styles: Sequence[str],
    *,
    per_style: int = 25,
    chosen: Mapping[str, Sequence[int]] | None = None,
    seed: int = 0,
) -> Path:
    """Make a study of two methods from their folders of generated images.

    Args:
        folders: the two methods by name, ours first, drawn for the same prompts and noise.
        output_dir: folder for the study; a second call with the same arguments leaves its images as they are.
        judges: names of letters, digits, `_` and `-`; those that an existing study does not know yet join it.
        styles: (P,) style of each prompt, as `PromptSet.styles`.
        per_style: prompts of each style (25: with four styles the 100 of the protocol).
        chosen: by method, (P,) which image of each prompt is shown, such as the median one; the first unless given.
        seed: of the prompts drawn.

    Raises:
        ValueError: if a style has too few prompts, `chosen` names no image of a prompt, or the folder holds another
            study.
        FileNotFoundError: if an image is missing, or the key of the study that the folder holds.
    """
    if len(folders) != 2:
        raise ValueError(f"a study compares 2 methods, got {len(folders)}: {', '.join(folders)}")
    _check_judges(judges)
    manifest = check_comparable(folders)
    prompts = manifest["prompts"]
    if len(styles) != len(prompts):
        raise ValueError(f"styles must name one style for each of {len(prompts)} prompts, got {len(styles)}")
    styles = list(styles)
    per_style, seed = checked_number("per_style", per_style, least=1), checked_number("seed", seed, least=0)
    for style in dict.fromkeys(styles):
        if (count := styles.count(style)) < per_style:
            raise ValueError(f"there are {count} prompts of style {style!r}, but {per_style} are asked for (per_style)")
    if chosen is not None:
        _check_chosen(chosen, list(folders), manifest)
    rows = even_rows(styles, per_style * len(set(styles)), seed)
    output_dir, methods = Path(output_dir), list(folders)
    asked = {"prompts": [prompts[row] for row in rows], "styles": [styles[row] for row in rows]}
    shown = {name: [int(chosen[name][row]) if chosen else 0 for row in rows] for name in methods}
    about = {"methods": methods, "folders": [str(folders[name]) for name in methods], "shown": shown, "seed": seed}
    key, questions = output_dir / "key.json", output_dir / "questions.json"
    if key.exists():
        claim(key, {**about, **asked}, "a study")
    salt = read_key(output_dir)["salt"] if key.exists() or questions.exists() else secrets.randbits(64)
    a_is_ours = np.random.default_rng([salt, 1]).random(len(rows)) < 0.5
    if not questions.exists():
        for folder in (output_dir / "images", output_dir / "answers"):
            folder.mkdir(parents=True, exist_ok=True)
        for number, row in enumerate(rows):
            for letter in "ab":  # in this order, so that the age of a file says nothing
                name = methods[0 if (letter == "a") == a_is_ours[number] else 1]
                picture = load_image(image_path(Path(folders[name]), row, shown[name][number]))
                write_png(output_dir / _file(number, letter), picture)
        write_json(key, {**about, **asked, "salt": salt, "a_is_ours": a_is_ours.tolist()})
    known = read_questions(output_dir)["judges"] if questions.exists() else {}
    joined = [*known, *(judge for judge in judges if judge not in known)]
    plans = _plans(joined, asked["styles"], a_is_ours, salt)
    if plans != known:
        content = {"question": QUESTION, **asked, "judges": plans}
        write_json(questions, {**content, DIGEST: _digest(content, read_json(key, "key of a study"))})
    return output_dir


def _check_chosen(chosen: Mapping[str, Sequence[int]], methods: Sequence[str], manifest: dict) -> None:
    wanted, last = len(manifest["prompts"]), manifest["images_per_prompt"] - 1
    for name in methods:
        numbers = list(chosen.get(name, ()))
        if len(numbers) != wanted or not all(0 <= number <= last for number in numbers):
            raise ValueError(
                f"chosen[{name!r}] must name an image in [0, {last}] for each of {wanted} prompts, got {numbers!r:.80}"
            )


def _check_judges(judges: Sequence[str]) -> None:
    if not judges:
        raise ValueError("a study needs at least 1 judge, got none")
    for judge in judges:
        if not re.fullmatch(JUDGE_NAME, judge):
            raise ValueError(f"a judge's name must be letters, digits, '_' and '-', got {said(judge)}")
    twice = {judge for judge in judges if list(judges).count(judge) > 1}
    if twice:
        raise ValueError(f"every judge is named once, got {', '.join(sorted(twice))} more often")


def _file(number: int, letter: str) -> str:
    return f"images/q{number:03d}-{letter}.png"


def _digest(questions: dict, key: dict) -> str:
    """Of what both files hold; nobody finds the sides by it, for the key has a random number of 64 bits."""
    content = {name: value for name, value in questions.items() if name != DIGEST}
    return hashlib.sha256(json.dumps([content, key], sort_keys=True).encode()).hexdigest()[:32]


def _plans(judges: Sequence[str], styles: list[str], a_is_ours: np.ndarray, salt: int) -> dict[str, dict]:
    """Order of questions and the letter that is left, by judge; two judges in a row see mirrored sides."""
    plans = {}
    for index, judge in enumerate(judges):
        rng = np.random.default_rng([salt, 2, index // 2])
        ours_left = np.zeros(len(styles), bool)
        for style in dict.fromkeys(styles):
            of_style = np.array([number for number, other in enumerate(styles) if other == style])
            half = len(of_style) / 2 + rng.choice([-0.5, 0.5]) * (len(of_style) % 2)
            ours_left[rng.permutation(of_style)[: int(half)]] = True
        if index % 2:
            ours_left = ~ours_left
        order = np.random.default_rng([salt, 3, index]).permutation(len(styles))
        left = np.where(ours_left == a_is_ours, "a", "b")
        plans[judge] = {"order": order.tolist(), "left": left.tolist()}
    return plans


class StudySession:
    """One judge's way through a study; a new session goes on where the judge stopped.

    Raises:
        KeyError: if the study has no such judge; the sentence lists those it has.
        ValueError: if an answer on disk cannot be read, which the sentence names with its file and line, or if a file
            of the study is a link that leads out of its folder.
    """

    def __init__(self, study_dir: str | Path, judge: str) -> None:
        self.folder = Path(study_dir)
        self.about = read_questions(self.folder)
        if judge not in self.about["judges"]:
            raise KeyError(f"the study has no judge {said(judge)}; its judges: {', '.join(self.about['judges'])}")
        self.judge, self.plan = judge, self.about["judges"][judge]
        self.path = _inside(self.folder / "answers" / f"{judge}.jsonl", self.folder)
        self.lines = _read_answers(self.path, len(self.about["prompts"]))

    @property
    def question(self) -> str:
        """The question put for every pair."""
        return self.about["question"]

    @property
    def answers(self) -> dict[int, str]:
        """ "left" or "right" by question number; the last answer counts, an undone one does not."""
        last = {line["question"]: line["choice"] for line in self.lines}
        return {number: choice for number, choice in last.items() if choice != UNDONE}

    def next(self) -> Pair | None:
        """The next pair without an answer, or None when all have one."""
        answered = self.answers
        for number in self.plan["order"]:
            if number not in answered:
                letters = "ab" if self.plan["left"][number] == "a" else "ba"
                left, right = (_inside(self.folder / _file(number, letter), self.folder) for letter in letters)
                place = len(answered) + 1, len(self.plan["order"])
                return Pair(number, self.about["prompts"][number], left, right, *place)
        return None

    def answer(self, number: int, side: str) -> None:
        """Keep an answer, on disk before this returns; until the last one, a question may be answered again.

        Raises:
            ValueError: if there is no such question or side, or every question has its answer: the names may be known.
        """
        if number not in self.plan["order"]:
            raise ValueError(f"question must be in [0, {len(self.plan['order']) - 1}], got {said(number)}")
        if side not in SIDES:
            raise ValueError(f"side must be left or right, got {said(side)}")
        self._refuse_after_the_end()
        self._append(number, side)

    def undo(self) -> int | None:
        """Take back the last answer that counts; returns its question, or None if there is none.

        A ValueError once every question has its answer: the names may be known.
        """
        self._refuse_after_the_end()
        standing = self.answers
        for line in reversed(self.lines):
            if line["question"] in standing:
                self._append(line["question"], UNDONE)
                return line["question"]
        return None

    def _refuse_after_the_end(self) -> None:
        if len(self.answers) == (total := len(self.plan["order"])):
            raise ValueError(f"all {total} questions are answered and the names may be known: no answer changes now")

    def _append(self, number: int, choice: str) -> None:
        line = {"question": int(number), "choice": choice, "time": datetime.now(UTC).isoformat(timespec="seconds")}
        append_record(self.path, line)
        self.lines.append(line)


def read_questions(folder: Path) -> dict:
    """What a judge may know of a study: question, prompts, styles and each judge's order and sides."""
    missing = f"{folder} holds no study (questions.json is missing)"
    about = _read_part(folder / "questions.json", missing, QUESTIONS)
    count = len(about["prompts"])
    fields = {
        "order": (
            lambda held: _are_whole(held) and sorted(held) == list(range(count)),
            f"all of 0 to {count - 1} once",
        ),
        "left": (lambda held: _are_texts(held) and len(held) == count and {*held} <= {"a", "b"}, f"{count} of a and b"),
    }
    path = folder / "questions.json"
    if len(about["styles"]) != count:
        _refuse(path, f"styles must be one for each of {count} prompts, got {len(about['styles'])}")
    for judge, plan in about["judges"].items():
        if not re.fullmatch(JUDGE_NAME, judge):
            _refuse(path, f"a judge's name must be letters, digits, '_' and '-', got {said(judge)}")
        if not isinstance(plan, dict):
            _refuse(path, f"judge {judge} must have an order and sides, got {said(plan)}")
        try:
            check_fields(plan, fields, f"judge {judge}")
        except ValueError as error:
            _refuse(path, str(error))
    return about


def read_key(folder: Path) -> dict:
    """Which method is "a" and which is "b", question by question; a ValueError if it is of other questions."""
    missing = f"{folder} holds a study whose key.json is missing: put it back"
    key = _read_part(folder / "key.json", missing, KEY)
    if (count := len(key["a_is_ours"])) != len(key["prompts"]):
        _refuse(folder / "key.json", f"a_is_ours must be one for each of {len(key['prompts'])} prompts, got {count}")
    if not (folder / "questions.json").is_file():
        return key
    questions = read_questions(folder)
    if questions["prompts"] != key["prompts"]:
        _refuse(folder / "key.json", "its prompts are not those of questions.json")
    if DIGEST not in questions:
        text = f"{folder / 'questions.json'} has no {DIGEST}: whether its key.json was changed cannot be seen"
        warnings.warn(text, stacklevel=3)
    elif questions[DIGEST] != _digest(questions, key):
        _refuse(folder / "key.json", "a value in it or in questions.json was changed after they were written")
    return key


def _are_whole(value: object) -> bool:
    return isinstance(value, list) and {type(each) for each in value} <= {int}


def _read_part(path: Path, missing: str, fields: Fields) -> dict:
    if not path.is_file():
        raise FileNotFoundError(missing)
    try:
        found = read_json(_inside(path, path.parent), "part of a study")
        check_fields(found, fields, f"{path} is no part of a study")
    except ValueError as error:
        raise ValueError(f"{error}; put back the file that make_study wrote") from error
    return found


def _refuse(path: Path, why: str) -> None:
    raise ValueError(f"{path} is no part of a study: {why}; put back the file that make_study wrote")


def _inside(path: Path, folder: Path) -> Path:
    """The path, which no link may lead out of the study: what is read there is shown, what is written there kept."""
    refuse_leaving(path, folder, f"the study {folder}")
    return path


def _read_answers(path: Path, questions: int) -> list[dict]:
    """Every whole line; one that a kill cut short is passed over with a warning."""
    refuse_other_than_file(path, "record of answers")
    if not path.exists():
        return []
    found = []
    for number, text in enumerate(path.read_text(encoding="utf-8", errors="replace").split("\n"), 1):
        if not text.strip():
            continue
        try:
            line = parse_json(text)
        except ValueError:
            line = None
            if text.startswith("{") and not text.rstrip().endswith("}"):
                warnings.warn(f"{path}, line {number} was cut short and is left out: {said(text)}", stacklevel=2)
                continue
        asked = line.get("question") if isinstance(line, dict) else None
        if type(asked) is not int or not 0 <= asked < questions or line.get("choice") not in (*SIDES, UNDONE):
            raise ValueError(
                f"{path}, line {number}: expected a question in [0, {questions - 1}] and a choice of "
                f"{', '.join((*SIDES, UNDONE))}, got {said(text)}"
            )
        found.append(line)
    return found
