"""Images to pixel values, a batch ahead of the VAE that takes them; memory stays bounded also for large images."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dkto.data.images import MAX_PIXELS, decode_image, open_image

DECODING_THREADS = 4
LARGE_PIXELS = 4_000_000  # larger images are decoded one at a time: their sum bounds memory


def to_pixel_values(image: Image.Image, size: int) -> Tensor:
    """Resize the shorter side to `size`, crop the centre, scale to [-1, 1]; (3, size, size)."""
    return _fitted(image, size)[0]


def _fitted(image: Image.Image, size: int) -> tuple[Tensor, tuple[int, int, int, int]]:
    """Pixel values, and (height, width) of the original with (top, left) of the crop in the resized image."""
    original = image.size[::-1]
    scale = size / min(image.size)
    if scale != 1:
        wide, high = (round(side * scale) for side in image.size)
        if wide * high > MAX_PIXELS:
            raise ValueError(f"image of {image.width} x {image.height} pixels is too long: {wide} x {high} at {size}")
        image = image.resize((wide, high), Image.Resampling.LANCZOS)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    pixels = np.asarray(image.crop((left, top, left + size, top + size)), dtype=np.float32)
    return torch.from_numpy(pixels).permute(2, 0, 1) / 127.5 - 1, (*original, top, left)


def decoded(paths: list[str], size: int, batch_size: int) -> Iterator[tuple[int, list]]:
    """Batches of (pixel values, sizes, whether it was transparent), or of (None, reason, False).

    The next one is decoded while the last is encoded. Large images have one thread for themselves: they are decoded one
    at a time, and the memory that one took is taken again by the next.
    """

    def decode(path: str) -> tuple[Tensor | None, tuple | str, bool]:
        try:
            with open_image(path, path) as image:
                if image.width * image.height <= LARGE_PIXELS:
                    return _pixels_of(image, size)
            return apart.submit(decode_large, path).result()
        except (ValueError, FileNotFoundError) as error:
            return None, str(error), False

    def decode_large(path: str) -> tuple[Tensor, tuple, bool]:
        with open_image(path, path) as image:
            return _pixels_of(image, size)

    with ThreadPoolExecutor(1) as apart, ThreadPoolExecutor(DECODING_THREADS) as pool:
        ahead = [[pool.submit(decode, path) for path in paths[:batch_size]]]
        for start in range(0, len(paths), batch_size):
            following = paths[start + batch_size : start + 2 * batch_size]
            ahead.append([pool.submit(decode, path) for path in following])
            yield start, [future.result() for future in ahead.pop(0)]


def _pixels_of(image: Image.Image, size: int) -> tuple[Tensor, tuple, bool]:
    rgb, transparent = decode_image(image)
    return *_fitted(rgb, size), transparent
