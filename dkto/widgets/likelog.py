"""Images to be judged, and likes kept as an append-only log: resume, undo, merge, export.

Each event holds session, time, event (like, dislike, skip, undo), prompt, seed, the image's path below
the log's folder and its SHA-256, so that a like stays with the image and the prompt it was given to.
"""

import hashlib
import os
import stat
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dkto.common.files import Fields, append_record, check_fields, refuse_leaving, refuse_other_than_file, stays_inside
from dkto.common.json_text import parse_json
from dkto.common.names import check_choice, shown
from dkto.data.feedback import FeedbackTable, make_feedback
from dkto.data.folders import Folder, listed_images, prompt_beside, warn_unread
from dkto.data.images import IMAGE_SUFFIXES
from dkto.data.tables import TABLE_SUFFIXES
from dkto.evaluation.manifest import image_path, read_manifest

JUDGEMENTS = ("like", "dislike", "skip")
LEAST = 8  # likes, and dislikes, below which a tuning shows little
TEXT = (lambda value: isinstance(value, str), "text")
EVENT: Fields = {
    **dict.fromkeys(("session", "image", "sha256", "prompt"), TEXT),
    "event": ((*JUDGEMENTS, "undo").__contains__, f"one of {', '.join(JUDGEMENTS)}, undo"),
}


@dataclass(frozen=True)
class Picture:
    """One image to be judged: its file, its prompt, and the seed it was drawn with where known."""

    image: Path
    prompt: str
    seed: int | None = None


def pictures_in(folder: str | Path) -> list[Picture]:
    """The images of a folder: as `dkto.evaluation.generate` wrote them, or any images with their prompt in a `.txt`.

    A warning names the files in the folder that are neither, nor a table.

    Raises:
        FileNotFoundError: if the folder does not exist, or an image has no prompt.
        ValueError: if it holds no image, one or its prompt is a link to elsewhere, or a prompt is not UTF-8.
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
            raise FileNotFoundError(f"{folder} is not complete ({missing[0]} is missing): draw the images again")
    else:
        (images, unread), inside = listed_images(folder), Folder(folder)
        found = [Picture(image, prompt_beside(image, inside)) for image in images]
        beside = (".json", *TABLE_SUFFIXES)  # likes of these images lie here, and folders of what was tuned on them
        warn_unread(folder, [p for p in unread if p.is_file() and p.suffix.lower() not in beside], IMAGE_SUFFIXES)
    if not found:
        raise ValueError(f"{folder} holds no image")
    for picture in found:  # a link that someone else made would show and keep what is in a file of the user
        if picture.image.is_symlink():
            refuse_leaving(picture.image, folder)
    return found


def still_missing(likes: int, dislikes: int, least: int = LEAST) -> str:
    """What is missing until there are `least` likes and as many dislikes; empty where nothing is.

    >>> still_missing(7, 3), still_missing(9, 8)
    ('1 more like and 5 more dislikes', '')
    """
    short = {"like": least - likes, "dislike": least - dislikes}
    return " and ".join(f"{n} more {name}{'s' * (n > 1)}" for name, n in short.items() if n > 0)


def append_event(path: Path, session: str, **event) -> None:
    """Write one event with its session and UTC time; it is on disk when this returns."""
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    append_record(path, {"session": session, "time": now, **event})


def read_events(path: Path, session: str) -> list[dict]:
    """A session's events, oldest first.

    A line that a crash cut is left out with a warning; any other that is no event is a ValueError with its number.
    """
    events = []
    refuse_other_than_file(path, "log of likes")
    for number, line in enumerate(path.read_bytes().split(b"\n") if path.exists() else [], 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            event = parse_json(line.decode())
        except ValueError:
            text = line.decode(errors="replace").strip()
            if not text.startswith("{") or text.endswith("}"):
                raise ValueError(f"{where} is damaged, got {shown(text)}: mend it, or remove the line") from None
            warnings.warn(f"{where} was cut short by a crash and is left out: {shown(text)}", stacklevel=3)
            continue
        if not isinstance(event, dict):
            raise ValueError(f"{where}: expected an object, got {shown(event)}")
        check_fields(event, EVENT, where)
        if event["session"] == session:
            events.append(event)
    return events


class LikeLog:
    """One session's judgements of a list of images, kept in a log.

    Args:
        pictures: what is judged; they must lie in the log's folder or below, so that the log can move with them.
        path: the log, .jsonl.
        session: a name; the same name goes on where it stopped.

    Raises:
        ValueError: if the session has no name, there is no image, one lies outside the log's folder, or a line of
            the log is damaged.
        FileNotFoundError: if an image does not exist.
    """

    def __init__(self, pictures: Sequence[Picture], path: str | Path, session: str) -> None:
        self.pictures = list(pictures)
        self.path, self.session = Path(path), session
        if not isinstance(session, str) or not session.strip():
            raise ValueError(f"session must be a name, got {session!r}")
        if not self.pictures:
            raise ValueError("pictures must hold at least one image, got none")
        if not stays_inside(self.path, self.path.parent):
            raise ValueError(f"the log {self.path} is a link that leaves its folder: choose another file")
        places = _Places(self.path.parent)
        found = [places.find(picture.image) for picture in self.pictures]
        self._names, self._hashes = [name for name, _ in found], [digest for _, digest in found]
        self.judgements: dict[int, str] = {}  # in the order in which they were given
        prompts = [picture.prompt for picture in self.pictures]
        number = {key: index for index, key in enumerate(zip(self._names, self._hashes, prompts, strict=True))}
        names, changed = set(self._names), set()
        for event in read_events(self.path, session):
            index = number.get((event["image"], event["sha256"], event["prompt"]))
            if index is not None:
                self._apply(event["event"], index)
            elif event["image"] in names:  # else an image of another list
                changed.add(event["image"])
        if changed:
            warnings.warn(
                f"{len(changed)} images of {self.path} or their prompts have changed since they were judged, for "
                f"instance {shown(min(changed))}: those judgements do not count, judge them again",
                stacklevel=2,
            )

    def judge(self, index: int, judgement: str) -> None:
        """Write down a judgement in place of an earlier one; an unknown image or judgement raises a ValueError."""
        check_choice("judgement", judgement, JUDGEMENTS)
        if not 0 <= index < len(self.pictures):
            raise ValueError(f"image must be 0 to {len(self.pictures) - 1}, got {index}")
        self._write(judgement, index)

    def undo(self) -> int | None:
        """Take the last judgement back; returns its image, or None if there is none."""
        index = next(reversed(self.judgements), None)
        if index is not None:
            self._write("undo", index)
        return index

    def next_picture(self) -> int | None:
        """The first image without a judgement, or None."""
        return next((i for i in range(len(self.pictures)) if i not in self.judgements), None)

    def counts(self) -> Counter:
        """How many images were liked, disliked and skipped."""
        return Counter(self.judgements.values())

    def feedback(self) -> FeedbackTable:
        """This session's likes and dislikes as a table; skipped images are left out."""
        return merge_likes([self]).table

    def _write(self, event: str, index: int) -> None:
        picture = self.pictures[index]
        image = {"image": self._names[index], "sha256": self._hashes[index]}
        append_event(self.path, self.session, event=event, prompt=picture.prompt, seed=picture.seed, **image)
        self._apply(event, index)

    def _apply(self, event: str, index: int) -> None:
        self.judgements.pop(index, None)
        if event in JUDGEMENTS:
            self.judgements[index] = event


class _Places:
    """The images in a folder and below; each folder on the way is resolved once, so that 100,000 take seconds."""

    def __init__(self, folder: Path) -> None:
        self._root = os.path.realpath(folder)
        self._parents: dict[str, str] = {}

    def find(self, image: Path) -> tuple[str, str]:
        """An image's path below the folder, and the SHA-256 of its content."""
        head, tail = os.path.split(image)
        if head not in self._parents:
            self._parents[head] = os.path.realpath(head)
        place = f"{self._parents[head]}/{tail}"
        try:
            digest = _digest(place)
        except OSError:  # not there, or a link
            place = os.path.realpath(place)
            if not os.path.isfile(place):
                raise FileNotFoundError(f"image {image} does not exist") from None
            digest = _digest(place)
        if not place.startswith(f"{self._root.rstrip('/')}/"):
            raise ValueError(f"image {image} must lie in the folder of the log, {self._root}")
        return os.path.relpath(place, self._root) if "//" in place else place[len(self._root.rstrip("/")) + 1 :], digest


def _digest(path: str) -> str:
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)  # a FIFO is opened without waiting
    try:
        about = os.fstat(descriptor)
        if not stat.S_ISREG(about.st_mode):
            raise FileNotFoundError
        return hashlib.sha256(os.read(descriptor, about.st_size + 1)).hexdigest()
    finally:
        os.close(descriptor)


@dataclass(frozen=True)
class MergedLikes:
    """The likes of several sessions."""

    table: FeedbackTable  # one row for each judgement: an image judged in two sessions has two rows
    sessions: dict[str, int]  # how many likes and dislikes each session gave
    judged_twice: int  # images that more than one session judged
    contradictions: int  # those among them that one session liked and another disliked

    def __str__(self) -> str:
        return (
            f"{self.table}; {len(self.sessions)} sessions; {self.judged_twice} images judged more than once, "
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
