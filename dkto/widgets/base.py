"""What the instruments share: front-end files, messages from the page, images as bytes, the colours of roles."""

import io
from pathlib import Path

import anywidget
import matplotlib.pyplot as plt
import numpy as np
import traitlets
from PIL import Image, ImageOps

from dkto.common.pixels import to_rgb
from dkto.plotting import COLOURS

FOLDER = Path(__file__).parent
SHARED = (FOLDER / "common.js", FOLDER / "utilities.js")  # the page of dkto.web is made of them too

ROLE_COLOURS = {role: COLOURS[role] for role in ("desirable", "undesirable", "model", "reference_point", "pretraining")}


class Instrument(anywidget.AnyWidget):
    """A widget whose page sends messages. A refusal becomes `message`, and the page shows it."""

    message = traitlets.Unicode().tag(sync=True)
    _refused = ""  # what a refusal begins with

    def __init__(self, **values) -> None:
        super().__init__(**values)
        self.on_msg(lambda _, content, buffers: self.receive(content))

    def receive(self, message: dict) -> None:
        """Do what the page asks: `message` holds a "type" and what belongs to it. Unknown types do nothing."""
        self.message = ""  # the same refusal again is a change that the page hears of
        try:
            self._obey(message)
        except Exception as refusal:  # of any kind: a full disk, or a message that holds something else
            text = refusal.args[0] if isinstance(refusal, KeyError) else refusal
            if isinstance(refusal, KeyError) and text in ("index", "judgement"):
                text = f"the page's message has no field {text}"
            self.message = f"{self._refused}{text or type(refusal).__name__}"

    def _obey(self, message: dict) -> None:
        raise NotImplementedError


def script(name: str, folder: Path = FOLDER) -> str:
    """The JavaScript of a widget: what all share and its own file, as one module."""
    return "\n".join(path.read_text() for path in (*SHARED, folder / f"{name}.js"))


def style(name: str, folder: Path = FOLDER) -> str:
    """The CSS of a widget: common.css and its own file."""
    return f"{(FOLDER / 'common.css').read_text()}\n{(folder / f'{name}.css').read_text()}"


def png_bytes(image: Image.Image) -> bytes:
    """An image as PNG with nothing in it but pixels: no file name, no generator's note travels with it."""
    buffer = io.BytesIO()
    Image.fromarray(np.asarray(to_rgb(image))).save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def small_bytes(image: Image.Image, side: int) -> bytes:
    """An image as it is sent: as PNG, or where it is larger than `side` pixels a copy of that size as JPEG."""
    if max(image.size) <= side:
        return png_bytes(image)
    buffer = io.BytesIO()
    Image.fromarray(np.asarray(ImageOps.contain(to_rgb(image), (side, side)))).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def figure_bytes(figure) -> bytes:
    """A matplotlib figure as PNG; the figure is closed, or the notebook's cell would show it a second time."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    plt.close(figure)
    return buffer.getvalue()
