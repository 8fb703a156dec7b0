"""Any image as 8-bit RGB: what is transparent is put on white, as most viewers show it, and 16-bit grey is scaled."""

import numpy as np
from PIL import Image

STRIP_ROWS = 512  # converted at once: no second copy of a large image is made
KEY_SCALE = {"L;2": 85, "L;4": 17, "RGB;16B": 1 / 256}
"""By the depth of a PNG: what its transparent colour is multiplied by, which Pillow leaves as the file has it."""


def to_rgb(image: Image.Image) -> Image.Image:
    """An image of any mode as RGB; one that is RGB already is handed back.

    Raises:
        ValueError: if the mode does not say which value is white ("I" and "F", 32 bits).

    >>> to_rgb(Image.new("RGBA", (1, 1), (255, 0, 0, 0))).getpixel((0, 0))
    (255, 255, 255)
    >>> to_rgb(Image.new("I;16", (1, 1), 257 * 129)).getpixel((0, 0))
    (129, 129, 129)
    """
    return put_on_white(image)[0]


def put_on_white(image: Image.Image) -> tuple[Image.Image, bool]:
    """The image as RGB, as `to_rgb` gives it, and whether any of it was transparent."""
    key = image.info.get("transparency")
    if image.mode in ("I", "F"):
        raise ValueError(
            f"its mode {image.mode} (32 bits) does not say which value is white: save it with 8 or 16 bits"
        )
    deep = image.mode.startswith("I;16")
    if not image.has_transparency_data and not deep:
        return (image if image.mode == "RGB" else image.convert("RGB")), False
    if image.mode in ("L", "RGB") and (tile := getattr(image, "tile", None)):
        scale = KEY_SCALE.get(tile[0].args, 1)
        key = tuple(int(value * scale) for value in key) if isinstance(key, tuple) else int(key * scale)
    result, transparent = Image.new("RGB", image.size, "white"), False
    for top in range(0, image.height, STRIP_ROWS):
        box = (0, top, image.width, min(top + STRIP_ROWS, image.height))
        strip = image.crop(box)
        if deep:
            strip = _scaled(strip, key)
        elif key is not None:
            strip.info["transparency"] = key
        strip = (strip.convert("LA") if strip.mode == "La" else strip).convert("RGBA")
        transparent |= strip.getchannel("A").getextrema()[0] < 255
        result.paste(strip, box, strip)
    return result, transparent


def _scaled(image: Image.Image, key: int | None) -> Image.Image:
    """16-bit grey as grey with transparency: 65535 is white, and `key` is the value that is transparent."""
    values = np.asarray(image)
    grey = np.rint(values / 257).astype(np.uint8)
    alpha = np.full_like(grey, 255) if key is None else np.where(values == key, 0, 255).astype(np.uint8)
    return Image.fromarray(np.stack([grey, alpha], -1), "LA")
