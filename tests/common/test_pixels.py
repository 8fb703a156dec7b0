"""Every mode of an image as RGB: 16 bits scaled, what is transparent on white."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from dkto.common.pixels import put_on_white, to_rgb

RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)


@pytest.mark.parametrize("mode", ["I;16", "I;16L", "I;16B", "L", "P", "RGB", "LA", "RGBA", "CMYK", "YCbCr"])
def test_a_grey_ramp_is_the_same_in_every_mode(mode):
    if mode.startswith("I;16"):
        order = {"I;16": "<u2", "I;16L": "<u2", "I;16B": ">u2"}[mode]
        image = Image.frombytes(mode, (16, 16), (RAMP.astype("uint16") * 257).astype(order).tobytes())
    else:
        image = Image.fromarray(RAMP).convert("RGB" if mode in ("CMYK", "YCbCr") else "L").convert(mode)
    found = np.asarray(to_rgb(image)).astype(int)
    assert found.shape == (16, 16, 3) and np.abs(found - RAMP[..., None]).max() <= 1


def test_black_and_white():
    found = np.asarray(to_rgb(Image.fromarray(RAMP > 100)))
    assert (found == np.where(RAMP > 100, 255, 0)[..., None]).all()


@pytest.mark.parametrize("strip", [3, 512])
def test_what_is_transparent_is_put_on_white(monkeypatch, strip):
    monkeypatch.setattr("dkto.common.pixels.STRIP_ROWS", strip)
    alpha = RAMP.T
    green = np.stack([0 * RAMP, 0 * RAMP + 200, RAMP, alpha], -1)
    expected = green[..., :3] * (alpha[..., None] / 255) + 255 * (1 - alpha[..., None] / 255)
    found, transparent = put_on_white(Image.fromarray(green, "RGBA"))
    assert transparent and np.abs(np.asarray(found) - expected).max() <= 1
    opaque = Image.fromarray(green[..., :3]).convert("RGBA")
    assert put_on_white(opaque)[1] is False and (np.asarray(to_rgb(opaque)) == green[..., :3]).all()


@pytest.mark.parametrize("format", ["PNG", "WEBP", "GIF"])
def test_a_sticker_lies_on_white_in_every_format(format):
    """A red square; what is transparent around it hides green."""
    pixels = np.zeros((8, 8, 4), np.uint8)
    pixels[...] = (0, 255, 0, 0)
    pixels[2:6, 2:6] = (255, 0, 0, 255)
    file = io.BytesIO()
    Image.fromarray(pixels, "RGBA").save(
        file, format, **({"lossless": True, "exact": True} if format == "WEBP" else {})
    )
    found, transparent = put_on_white(Image.open(file))
    assert transparent and found.getpixel((0, 0)) == (255, 255, 255) and found.getpixel((3, 3)) == (255, 0, 0)


def png(depth, colour, row, key):
    """A PNG of 2 x 1 pixels with one transparent colour, as the standard writes it; Pillow writes no such depths."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 1, depth, colour, 0, 0, 0))
    parts = header + chunk(b"tRNS", struct.pack(f">{len(key)}H", *key)) + chunk(b"IDAT", zlib.compress(b"\0" + row))
    return io.BytesIO(b"\x89PNG\r\n\x1a\n" + parts + chunk(b"IEND", b""))


@pytest.mark.parametrize(
    ("depth", "colour", "row", "key"),
    [
        (1, 0, b"\x00", [0]),
        (2, 0, b"\x10", [0]),
        (2, 0, b"\x60", [1]),
        (4, 0, b"\x57", [5]),
        (8, 0, b"\x40\x50", [0x40]),
        (16, 0, struct.pack(">2H", 5, 6), [5]),
        (8, 2, b"\1\2\3\1\2\4", [1, 2, 3]),
        (16, 2, struct.pack(">6H", 1000, 2000, 3000, 1, 2, 4), [1000, 2000, 3000]),
    ],
)
def test_the_transparent_colour_of_a_png_is_found_at_every_depth(depth, colour, row, key):
    found, transparent = put_on_white(Image.open(png(depth, colour, row, key)))
    first, second = np.asarray(found)[0]
    assert transparent and first.tolist() == [255, 255, 255]
    assert depth == 1 or second.tolist() != [255, 255, 255]


@pytest.mark.parametrize("mode", ["I", "F"])
def test_a_mode_without_a_white_is_refused(mode):
    with pytest.raises(ValueError, match=f"its mode {mode} .32 bits. does not say which value is white: save it with"):
        to_rgb(Image.new(mode, (2, 2)))
