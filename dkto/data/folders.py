"""Folders that people bring: names may not lead out of them, and what is in them and not read is said."""

import os
import stat
import unicodedata
import warnings
from collections.abc import Collection
from pathlib import Path

from dkto.common.names import shown
from dkto.data.images import IMAGE_SUFFIXES
from dkto.data.texts import prompt_in_png, prompt_of_image, read_text

DROPPINGS = frozenset({"thumbs.db", "desktop.ini", "__macosx"})  # of systems; so are names that start with a dot
NAMED = 5  # how many of the files that are not read a warning names


class OutsideError(ValueError):
    """A name leads out of its folder."""


class Folder:
    """A folder that file names may not leave, by ".." or by a link; folders below it are resolved once each."""

    def __init__(self, folder: Path) -> None:
        self.given, self.root = folder.absolute(), folder.resolve()
        self._parents: dict[str, tuple[str, Path, bool]] = {}

    def path(self, name: str | Path, what: str = "image") -> Path:
        """The file `name` in the folder, or that at a `Path`; a name as another system writes it is found too.

        Raises:
            OutsideError: if `name` leads out of the folder.
            ValueError: if it can be no name.
            FileNotFoundError: if there is no such file.
        """
        name = os.path.relpath(name, self.given) if isinstance(name, Path) else name
        if not name or "\0" in name:
            raise ValueError(f"{what} must be a file name, got {shown(name)}")
        if path := self._found(name, what):
            return path
        for form in _other_forms(name):
            if path := self._found(form, what):
                return path
        if os.path.lexists(self.root / name):
            raise ValueError(f"{what} {shown(name)} in {self.root} must be a file, but it is none")
        raise FileNotFoundError(f"{what} {shown(name)} does not exist in {self.root}")

    def relative(self, path: Path) -> str:
        """`path` as seen from the folder, in which it must lie."""
        head, tail = os.path.split(path)
        return str((self._parent(head)[1] / tail).relative_to(self.root))

    def _found(self, name: str, what: str) -> Path | None:
        head, tail = os.path.split(name)
        if tail in ("", ".", ".."):
            head, tail = name, ""
        text, folder, inside = self._parent(head)
        try:
            path = os.path.join(text, tail)
            mode = os.lstat(path).st_mode
            if stat.S_ISLNK(mode):
                path = os.path.realpath(path)
                mode, inside = os.stat(path).st_mode, Path(path).is_relative_to(self.root)
                folder, tail = Path(path).parent, os.path.basename(path)
        except OSError:
            mode = 0
        if not inside:
            raise OutsideError(f"{what} {shown(name)} leaves the folder {self.root}")
        return folder / tail if stat.S_ISREG(mode) else None

    def _parent(self, head: str) -> tuple[str, Path, bool]:
        if head not in self._parents:
            text = os.path.realpath(self.root / head)
            self._parents[head] = text, Path(text), Path(text).is_relative_to(self.root)
        return self._parents[head]


def _other_forms(name: str) -> set[str]:
    """A name with slashes for backslashes, and with accents as other systems compose them."""
    slashed = name.strip().replace("\\", "/")
    return {slashed, *(unicodedata.normalize(form, slashed) for form in ("NFC", "NFD"))} - {name, ""}


def listed(folder: Path, suffixes: Collection[str]) -> tuple[list[Path], list[Path]]:
    """The files of a folder with one of some endings, and all else in it, both sorted; droppings aside."""
    entries = sorted(p for p in folder.iterdir() if p.name[0] != "." and p.name.lower() not in DROPPINGS)
    files = [path for path in entries if path.suffix.lower() in suffixes and not path.is_dir()]
    taken = set(files)
    return files, [path for path in entries if path not in taken]


def listed_images(folder: Path, known: Collection[str] = ()) -> tuple[list[Path], list[Path]]:
    """The images of a folder, and what is neither one, nor a text beside one, nor a file of a `known` name."""
    images, others = listed(folder, IMAGE_SUFFIXES)
    stems = {path.stem for path in images} | {path.stem for path in others if path.suffix.lower() != ".txt"}
    return images, [p for p in others if p.name not in known and not (p.suffix.lower() == ".txt" and p.stem in stems)]


def warn_unread(folder: Path, unread: list[Path], suffixes: Collection[str]) -> None:
    """Say what of a folder is not read, and what would be."""
    if unread:
        names = [f"{path.relative_to(folder)}{'/' if path.is_dir() else ''}" for path in unread]
        more = ", ..." if len(names) > NAMED else ""
        text = f"{folder}: {len(names)} files or folders in it are not read: {', '.join(map(shown, names[:NAMED]))}"
        warnings.warn(f"{text}{more}; read are {', '.join(sorted(suffixes))}, not in sub-folders", stacklevel=3)


def prompt_beside(image: Path, inside: Folder, elsewhere: str = "") -> str:
    """The prompt of an image in the .txt file of its name, or inside it, as AUTOMATIC1111's web UI writes it.

    Args:
        image: a file in the folder `inside`.
        inside: the folder that neither file may leave.
        elsewhere: the other place for it, for the sentence.

    Raises:
        OutsideError: if the image or the text is a link out of the folder.
        ValueError: if the text holds no prompt, or is not UTF-8.
        FileNotFoundError: if there is neither.
    """
    text = image.with_suffix(".txt")
    if os.path.lexists(text):
        if prompt := prompt_of_image(read_text(inside.path(text))):
            return prompt
        raise ValueError(f"{text} holds no prompt")
    if prompt := prompt_in_png(inside.path(image)):
        return prompt
    raise FileNotFoundError(f"{image} has no prompt: expected it in {text.name} beside the image{elsewhere}")
