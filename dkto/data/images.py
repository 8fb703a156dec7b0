"""Decode the image of a row of feedback: known formats only, bounded size, the right way up."""

import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from PIL import Image, ImageOps, UnidentifiedImageError

from dkto.common.names import printable
from dkto.common.pixels import put_on_white

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp"})
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP")  # Pillow's names; of others some start programs to decode
MAX_PIXELS = 64_000_000  # an image larger than this is refused before it is decoded


def load_image(path: str | Path) -> Image.Image:
    """Decode one image as RGB, the right way up (a camera's orientation mark is applied).

    What is transparent is put on white, and 16-bit grey is scaled, see `dkto.common.pixels`.

    Raises:
        ValueError: if the file is no image of `IMAGE_FORMATS`, is damaged, or has more than `MAX_PIXELS` pixels.
    """
    with open_image(path, str(path)) as image:
        return decode_image(image)[0]


def decode_image(image: Image.Image) -> tuple[Image.Image, bool]:
    """An open image as `load_image` gives it, and whether any of it was transparent."""
    ImageOps.exif_transpose(image, in_place=True)
    rgb, transparent = put_on_white(image)
    rgb.load()  # while its file is open
    return rgb, transparent


@contextmanager
def open_image(file: str | Path | BinaryIO, name: str, formats: Sequence[str] = IMAGE_FORMATS) -> Iterator[Image.Image]:
    """An image of which only the header is read yet; what cannot be decoded within the block is refused by its name."""
    try:
        if isinstance(file, str | Path) and not stat.S_ISREG(os.stat(file).st_mode):  # a pipe would wait
            raise ValueError("it is no file")
        with Image.open(file, formats=formats) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"it has {image.width} x {image.height} pixels, more than {MAX_PIXELS:,}")
            yield image
    except FileNotFoundError:
        raise FileNotFoundError(f"image {name} does not exist") from None
    except UnidentifiedImageError as error:  # its own text has an address in memory
        raise ValueError(f"image {name} cannot be read: it is no {', '.join(formats)}") from error
    except Exception as error:  # a decoder raises whatever the bytes lead it to
        raise ValueError(f"image {name} cannot be read: {printable(error, 200)}") from error
