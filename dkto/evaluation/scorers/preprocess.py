"""How a scorer sees an image: resize, crop or pad, normalise; as its authors do it, and differentiably.

The `*_image` functions take a PIL image and resize it as the authors' own code does (Pillow's bicubic filter on bytes
for CLIP and BLIP). The `*_pixels` functions take tensors and carry gradient; they differ from the former only by the
rounding to bytes inside Pillow, about 0.3 grey levels of 255 on photographs.
"""

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from dkto.common.pixels import to_rgb

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def to_pixels(image: Image.Image) -> Tensor:
    """(3, H, W) float in [0, 1] of an image, RGB."""
    return torch.from_numpy(np.array(to_rgb(image))).permute(2, 0, 1).float() / 255


def normalise(pixels: Tensor) -> Tensor:
    """Subtract CLIP's mean and divide by its standard deviation, channel by channel; (..., 3, H, W)."""
    mean, std = (pixels.new_tensor(values)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
    return (pixels - mean) / std


def _shortest_to(width: int, height: int, side: int) -> tuple[int, int]:
    """Width and height whose shorter one is `side`; the longer one is cut to a whole number."""
    if width <= height:
        return side, int(side * height / width)
    return int(side * width / height), side


def _crop_start(extra: int, rounded: bool) -> int:
    """Where a centre crop starts: torchvision rounds half to even, transformers cuts."""
    return round(extra / 2) if rounded else extra // 2


def cropped_image(image: Image.Image, side: int, *, rounded: bool = False) -> Tensor:
    """Shorter side to `side` (Pillow, bicubic), centre crop, CLIP's normalisation: PickScore, CLIP, LAION, ImageReward.

    Args:
        side: in pixels, 224 for the published models.
        rounded: where an odd rest lies: True as in torchvision (ImageReward), False as in transformers.

    Returns:
        (3, side, side) float.
    """
    resized = to_rgb(image).resize(_shortest_to(*image.size, side), Image.Resampling.BICUBIC)
    left, top = (_crop_start(extent - side, rounded) for extent in resized.size)
    return normalise(to_pixels(resized.crop((left, top, left + side, top + side))))


def cropped_pixels(pixels: Tensor, side: int, *, rounded: bool = False) -> Tensor:
    """`cropped_image` on (B, 3, H, W) float in [0, 1], with gradient; (B, 3, side, side)."""
    width, height = _shortest_to(pixels.shape[3], pixels.shape[2], side)
    resized = _bicubic(pixels, height, width).clamp(0, 1)
    top, left = (_crop_start(extent - side, rounded) for extent in (height, width))
    return normalise(resized[:, :, top : top + side, left : left + side])


def padded_pixels(pixels: Tensor, side: int, *, antialias: bool = True) -> Tensor:
    """Longer side to `side` (bicubic, on tensors), zeros around it, CLIP's normalisation: HPS v2.

    The authors resize tensors too, so nothing is lost to bytes and it carries gradient. Their padding is black
    before normalisation, and values beyond [0, 1] that the bicubic filter makes are kept, as they keep them.

    `antialias` smooths before shrinking, as torchvision does with tensors since 0.17. Takes (B, 3, H, W) float in
    [0, 1]; returns (B, 3, side, side).
    """
    scale = side / max(pixels.shape[2:])
    height, width = (round(extent * scale) for extent in pixels.shape[2:])
    resized = _bicubic(pixels, height, width, antialias) if scale != 1 else pixels
    down, right = side - height, side - width
    return normalise(F.pad(resized, (right // 2, right - right // 2, down // 2, down - down // 2)))


def _bicubic(pixels: Tensor, height: int, width: int, antialias: bool = True) -> Tensor:
    return F.interpolate(pixels, (height, width), mode="bicubic", antialias=antialias, align_corners=False)
