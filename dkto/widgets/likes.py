"""Like or dislike images by mouse or keyboard, one after another or as a grid (the data of paper 4.3)."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import traitlets
from matplotlib.figure import Figure
from PIL import Image

from dkto.common.names import check_choice, shown
from dkto.data.feedback import FeedbackTable
from dkto.data.images import load_image
from dkto.plotting import image_grid
from dkto.widgets.base import ROLE_COLOURS, Instrument, script, small_bytes, style
from dkto.widgets.likelog import JUDGEMENTS, LEAST, LikeLog, Picture, still_missing
from dkto.world.mirror import mirror_sentences, taste_mirror, traits

AHEAD = 6  # images that are sent before they are asked for
SIDES = {"single": 640, "grid": 256, "strip": 96}  # pixels: larger images are sent as copies of that size
STRIP = 8  # of each kind, the last that were judged


class Likes(Instrument):
    """Judge images; every judgement is on disk before the next image is shown.

    Keys, while the widget has the focus: right or l likes, left or d dislikes, space skips, z takes back;
    in the grid, up and down move between the images.

    Args:
        pictures: what is judged, see `dkto.widgets.likelog.pictures_in`.
        path: log of the judgements (.jsonl), in the images' folder or above it.
        session: a name; the same name goes on where it stopped.
        view: "single" or "grid".
        page_size: images of one page of the grid.
        least: likes, and dislikes, that are asked for.

    Raises:
        ValueError, FileNotFoundError: as `LikeLog`, or for an unknown view.
    """

    _esm = script("likes")
    _css = style("likes")
    _refused = "not kept: "

    view = traitlets.Unicode("single").tag(sync=True)
    shown = traitlets.List().tag(sync=True)  # dicts: index, prompt, judgement, image (bytes)
    current = traitlets.Int(-1).tag(sync=True)
    counts = traitlets.Dict().tag(sync=True)
    total = traitlets.Int().tag(sync=True)
    page = traitlets.Int(0).tag(sync=True)
    pages = traitlets.Int(1).tag(sync=True)
    colours = traitlets.Dict(ROLE_COLOURS).tag(sync=True)
    missing = traitlets.Unicode().tag(sync=True)  # what is asked for and not given yet
    strip = traitlets.Dict().tag(sync=True)  # by judgement: dicts of index, prompt, image (bytes)
    mirror = traitlets.List().tag(sync=True)  # sentences: what liked images share

    def __init__(
        self,
        pictures: Sequence[Picture],
        path: str | Path,
        *,
        session: str = "me",
        view: str = "single",
        page_size: int = 12,
        least: int = LEAST,
    ) -> None:
        check_choice("view", view, ("single", "grid"))
        if page_size < 1:
            raise ValueError(f"page_size must be 1 or more, got {page_size}")
        self.likes = LikeLog(pictures, path, session)
        self._page_size, self._least = page_size, least
        self._bytes: dict[tuple[str, int], bytes] = {}
        self._found: dict[int, set[str]] = {}
        super().__init__(view=view, total=len(self.likes.pictures), pages=-(-len(self.likes.pictures) // page_size))
        self._show()
        self.observe(lambda _: self._show(), names=["page", "view"])

    def judge(self, index: int, judgement: str) -> None:
        """Like, dislike or skip an image, as the page does."""
        self.likes.judge(index, judgement)
        self._show()

    def undo(self) -> None:
        """Take the last judgement back and show its image again."""
        index = self.likes.undo()
        if index is not None and self.view == "grid":
            self.page = index // self._page_size
        self._show(at=index)

    def feedback(self) -> FeedbackTable:
        """The likes and dislikes so far; raises a ValueError if there is none."""
        return self.likes.feedback()

    def taste_mirror(self) -> pd.DataFrame:
        """What liked images share against disliked ones, with counts, see `dkto.world.mirror.taste_mirror`."""
        given = {index: kind == "like" for index, kind in self.likes.judgements.items() if kind != "skip"}
        for index in given.keys() - self._found.keys():
            picture = self.likes.pictures[index]
            self._found[index] = traits(load_image(picture.image), picture.prompt)
        return taste_mirror([self._found[index] for index in given], list(given.values()))

    def figure(self) -> Figure:
        """The first judged images, 8 of each kind, as a static figure: liked above, disliked below."""
        given = self.likes.judgements
        groups = {name: [i for i in given if given[i] == name][:8] for name in ("like", "dislike")}
        groups = {name: rows for name, rows in groups.items() if rows}
        if not groups:
            figure, ax = plt.subplots(figsize=(6, 0.6))
            ax.text(0.5, 0.5, "no image was judged yet", ha="center")
            ax.set_axis_off()
        else:
            figure, axes = plt.subplots(len(groups), 1, figsize=(7, 1.5 * len(groups)), layout="constrained")
            for ax, (name, rows) in zip([axes] if len(groups) == 1 else axes, groups.items(), strict=True):
                images = [load_image(self.likes.pictures[i].image) for i in rows]
                blank = Image.new("RGB", images[0].size, "white")
                image_grid([images + [blank] * (8 - len(images))], [f"{name}d"], ax=ax)
        plt.close(figure)
        return figure

    def _about(self, index: int, place: str) -> dict:
        picture = self.likes.pictures[index]
        if (place, index) not in self._bytes:
            self._bytes[place, index] = small_bytes(load_image(picture.image), SIDES[place])
        about = {"index": index, "prompt": picture.prompt, "image": self._bytes[place, index]}
        return about | {"judgement": self.likes.judgements.get(index, "")}

    def _show(self, at: int | None = None) -> None:
        """Send what the page shows: the next images, or one page of the grid."""
        if self.view == "grid":
            first = self.page * self._page_size
            wanted = list(range(first, min(first + self._page_size, len(self.likes.pictures))))
            open_ones = [i for i in wanted if i not in self.likes.judgements]
            current = at if at in wanted else (open_ones or wanted)[0]
        else:
            start = self.likes.next_picture() if at is None else at
            current = -1 if start is None else start
            later = [i for i in range(len(self.likes.pictures)) if i not in self.likes.judgements and i != current]
            wanted = [] if start is None else [current, *later[: AHEAD - 1]]
        counts = self.likes.counts()
        given = self.likes.judgements
        last = {kind: [i for i in given if given[i] == kind][-STRIP:] for kind in ("like", "dislike")}
        with self.hold_sync():
            self.shown = [self._about(i, self.view) for i in wanted]
            self.strip = {kind: [self._about(i, "strip") for i in rows] for kind, rows in last.items()}
            self.missing = still_missing(counts["like"], counts["dislike"], self._least)
            self.mirror = [] if self.missing else mirror_sentences(self.taste_mirror())
            self.current, self.counts = current, {name: counts[name] for name in JUDGEMENTS}

    def _obey(self, message: dict) -> None:
        if message.get("type") == "undo":
            self.undo()
        elif message.get("type") == "judge":
            index = message["index"]
            if type(index) is not int:
                raise ValueError(f"the page's message: index must be a whole number, got {shown(index)}")
            self.judge(index, str(message["judgement"]))
