"""Images as files: every mode rightly, and every refusal with the file's name."""

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dkto.data.images import load_image


def with_chunk(path, name, data):
    """A PNG at `path` with one chunk more after its header."""
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, "PNG")
    whole = buffer.getvalue()
    chunk = struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    path.write_bytes(whole[:33] + chunk + whole[33:])
    return path


def test_16_bit_grey_is_the_8_bit_image(tmp_path):
    grey = np.random.default_rng(0).integers(0, 256, (12, 9), dtype=np.uint8)
    Image.fromarray(grey).save(tmp_path / "8.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "16.png")
    assert (np.asarray(load_image(tmp_path / "16.png")) == np.asarray(load_image(tmp_path / "8.png"))).all()


def test_a_transparent_image_lies_on_white_the_right_way_up(tmp_path):
    image = Image.new("RGBA", (6, 4), (0, 255, 0, 0))
    image.putpixel((0, 0), (255, 0, 0, 255))
    exif = image.getexif()
    exif[0x0112] = 3  # upside down
    image.save(tmp_path / "a.webp", lossless=True, exact=True, exif=exif)
    found = load_image(tmp_path / "a.webp")
    assert found.getpixel((5, 3)) == (255, 0, 0) and found.getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize(
    ("name", "data"),
    [(b"zTXt", b"key\0\0" + zlib.compress(b"x" * 80_000_000)), (b"iCCP", b"p\0\0" + zlib.compress(b"x" * 80_000_000))],
)
def test_a_bomb_in_the_text_of_a_png_names_the_file_or_is_passed_over(tmp_path, name, data):
    path = with_chunk(tmp_path / "bomb.png", name, data)
    try:
        assert load_image(path).size == (4, 4)
    except ValueError as error:
        assert str(error).startswith(f"image {path} cannot be read: ")


@pytest.mark.parametrize("cut", [0, 8, 40, -200])
@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "BMP"])
def test_a_damaged_file_is_named(tmp_path, format, cut):
    path = tmp_path / f"x.{format.lower()}"
    Image.effect_noise((64, 64), 80).convert("RGB").save(path, format)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ValueError, match=r"image .*x\.\w+ cannot be read: "):
        load_image(path)


def test_a_pipe_or_a_folder_is_no_image(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    (tmp_path / "b.png").mkdir()
    for name in ("a.png", "b.png"):
        with pytest.raises(ValueError, match=f"image .*{name} cannot be read: it is no file"):
            load_image(tmp_path / name)


def test_an_image_that_is_not_there_is_named():
    with pytest.raises(FileNotFoundError, match=r"image none\.png does not exist"):
        load_image(Path("none.png"))
