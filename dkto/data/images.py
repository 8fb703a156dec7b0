"""Decode the image of a row of feedback: known formats only, bounded size, the right way up."""

from pathlib import Path

from PIL import Image, ImageOps

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp"})
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP")  # Pillow's names; of others some start programs to decode
MAX_PIXELS = 64_000_000  # an image larger than this is refused before it is decoded


def load_image(path: str | Path) -> Image.Image:
    """Decode one image as RGB, the right way up (a camera's orientation mark is applied).

    Raises:
        ValueError: if the file is no image of `IMAGE_FORMATS`, is damaged, or has more than `MAX_PIXELS` pixels.
    """
    try:
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"image {path} has {image.width} x {image.height} pixels, more than {MAX_PIXELS:,}")
            return ImageOps.exif_transpose(image).convert("RGB")
    except FileNotFoundError:
        raise FileNotFoundError(f"image {path} does not exist") from None
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"image {path} cannot be read: {error}") from error
