"""Pictures to be judged, and likes kept as an append-only log: resume, undo, merge, export.

Each event holds session, time, event (like, dislike, skip, undo), prompt, seed, the image's path below
the log's folder and its SHA-256, so that a like stays with the picture it was given to.
"""

import json
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dkto.common.files import append_record, file_sha256
from dkto.common.names import check_choice
from dkto.data.feedback import FeedbackTable, make_feedback
from dkto.data.images import IMAGE_SUFFIXES
from dkto.evaluation.manifest import image_path, read_manifest

JUDGEMENTS = ("like", "dislike", "skip")


@dataclass(frozen=True)
class Picture:
    """One picture to be judged: its file, its prompt, and the seed it was drawn with where known."""

    image: Path
    prompt: str
    seed: int | None = None


def pictures_in(folder: str | Path) -> list[Picture]:
    """The pictures of a folder: as `dkto.evaluation.generate` wrote them, or any images with their prompt in a `.txt`.

    Raises:
        FileNotFoundError: if the folder does not exist, or a picture has no prompt.
        ValueError: if it holds no picture.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"folder {folder} does not exist")
    if (folder / "manifest.json").is_file():
        about = read_manifest(folder)
        keys = [(p, i) for p in range(len(about["prompts"])) for i in range(about["images_per_prompt"])]
        found = [Picture(image_path(folder, p, i), about["prompts"][p], about["seed"]) for p, i in keys]
        missing = [picture.image.name for picture in found if not picture.image.exists()]
        if missing:
            raise FileNotFoundError(f"{folder} is not complete ({missing[0]} is missing): draw the pictures again")
    else:
        found = []
        for path in sorted(p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES):
            text = path.with_suffix(".txt")
            if not text.is_file():
                raise FileNotFoundError(f"{path} has no prompt: expected it in {text.name} beside the image")
            found.append(Picture(path, text.read_text().strip()))
    if not found:
        raise ValueError(f"{folder} holds no picture")
    return found


def append_event(path: Path, session: str, **event) -> None:
    """Write one event with its session and UTC time; it is on disk when this returns."""
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    append_record(path, {"session": session, "time": now, **event})


def read_events(path: Path, session: str) -> list[dict]:
    """A session's events, oldest first; a crash's cut line is left out, one that is JSON but no event a ValueError."""
    events = []
    for number, line in enumerate(path.read_bytes().splitlines() if path.exists() else [], 1):
        try:
            event = json.loads(line)
        except ValueError:  # cut, also in the middle of a letter
            continue
        if not isinstance(event, dict) or not isinstance(event.get("session"), str):
            raise ValueError(f"{path}, line {number}: expected an object with a session, got {event!r}")
        events.append(event)
    return [event for event in events if event["session"] == session]


class LikeLog:
    """One session's judgements of a list of pictures, kept in a log.

    Args:
        pictures: what is judged; they must lie in the log's folder or below, so that the log can move with them.
        path: the log, .jsonl.
        session: a name; the same name goes on where it stopped.

    Raises:
        ValueError: if the session has no name, there is no picture, or one lies outside the log's folder.
        FileNotFoundError: if a picture does not exist.
    """

    def __init__(self, pictures: Sequence[Picture], path: str | Path, session: str) -> None:
        self.pictures = list(pictures)
        self.path, self.session = Path(path), session
        if not isinstance(session, str) or not session.strip():
            raise ValueError(f"session must be a name, got {session!r}")
        if not self.pictures:
            raise ValueError("pictures must hold at least one picture, got none")
        root = self.path.parent.resolve()
        for picture in self.pictures:
            if not picture.image.is_file():
                raise FileNotFoundError(f"picture {picture.image} does not exist")
            if not picture.image.resolve().is_relative_to(root):
                raise ValueError(f"picture {picture.image} must lie in the folder of the log, {root}")
        self._names = [str(p.image.resolve().relative_to(root)) for p in self.pictures]
        self._hashes = [file_sha256(p.image) for p in self.pictures]
        self._history: list[int] = []  # pictures in the order of their judgements
        self.judgements: dict[int, str] = {}
        number = {key: index for index, key in enumerate(zip(self._names, self._hashes, strict=True))}
        for event in read_events(self.path, session):
            index = number.get((event.get("image"), event.get("sha256")))
            if index is not None:  # else a picture of another list
                self._apply(event["event"], index)

    def judge(self, index: int, judgement: str) -> None:
        """Write down a judgement in place of an earlier one; an unknown picture or judgement raises a ValueError."""
        check_choice("judgement", judgement, JUDGEMENTS)
        if not 0 <= index < len(self.pictures):
            raise ValueError(f"picture must be 0 to {len(self.pictures) - 1}, got {index}")
        self._write(judgement, index)

    def undo(self) -> int | None:
        """Take the last judgement back; returns its picture, or None if there is none."""
        index = self._history[-1] if self._history else None
        if index is not None:
            self._write("undo", index)
        return index

    def next_picture(self) -> int | None:
        """The first picture without a judgement, or None."""
        return next((i for i in range(len(self.pictures)) if i not in self.judgements), None)

    def counts(self) -> Counter:
        """How many pictures were liked, disliked and skipped."""
        return Counter(self.judgements.values())

    def feedback(self) -> FeedbackTable:
        """This session's likes and dislikes as a table; skipped pictures are left out."""
        return merge_likes([self]).table

    def _write(self, event: str, index: int) -> None:
        picture = self.pictures[index]
        image = {"image": self._names[index], "sha256": self._hashes[index]}
        append_event(self.path, self.session, event=event, prompt=picture.prompt, seed=picture.seed, **image)
        self._apply(event, index)

    def _apply(self, event: str, index: int) -> None:
        if index in self._history:
            self._history.remove(index)
        self.judgements.pop(index, None)
        if event in JUDGEMENTS:
            self._history.append(index)
            self.judgements[index] = event


@dataclass(frozen=True)
class MergedLikes:
    """The likes of several sessions."""

    table: FeedbackTable  # one row for each judgement: a picture judged in two sessions has two rows
    sessions: dict[str, int]  # how many likes and dislikes each session gave
    judged_twice: int  # pictures that more than one session judged
    contradictions: int  # those among them that one session liked and another disliked

    def __str__(self) -> str:
        return (
            f"{self.table}; {len(self.sessions)} sessions; {self.judged_twice} pictures judged more than once, "
            f"{self.contradictions} of them liked and disliked"
        )


def merge_likes(logs: Iterable[LikeLog]) -> MergedLikes:
    """Put the likes of several sessions into one table.

    A contradiction is counted, not settled: both rows stay, since Diffusion-KTO takes single, noisy
    likes, and a rule that dropped one of them would be a guess.

    Raises:
        ValueError: if nobody liked or disliked anything.
    """
    rows, sessions = [], Counter()
    opinions: dict[tuple[str, str], list[bool]] = {}
    for log in logs:
        given = {index: judgement == "like" for index, judgement in log.judgements.items() if judgement != "skip"}
        for index, liked in sorted(given.items()):
            picture = log.pictures[index]
            rows.append((picture.image, picture.prompt, liked))
            opinions.setdefault((log._hashes[index], picture.prompt), []).append(liked)
        sessions[log.session] += len(given)
    if not rows:
        raise ValueError("nothing was liked or disliked yet")
    several = [given for given in opinions.values() if len(given) > 1]
    contradictions = sum(len(set(given)) > 1 for given in several)
    return MergedLikes(make_feedback(*zip(*rows, strict=True)), dict(sessions), len(several), contradictions)
