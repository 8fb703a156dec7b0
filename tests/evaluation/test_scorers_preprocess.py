"""Preparation of pictures against transformers' processor and Pillow's float filter, on scikit-image's photographs."""

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from dkto.evaluation.scorers.preprocess import (
    CLIP_MEAN,
    CLIP_STD,
    cropped_image,
    cropped_pixels,
    normalise,
    padded_pixels,
    to_pixels,
)

PHOTOGRAPHS = ("astronaut", "coffee", "chelsea", "rocket")


@pytest.fixture(scope="module", params=PHOTOGRAPHS)
def photograph(request):
    return Image.fromarray(getattr(data, request.param)())


def test_the_photographs_have_odd_and_even_shapes():
    sizes = [getattr(data, name)().shape[:2] for name in PHOTOGRAPHS]
    assert (512, 512) in sizes and any(h != w for h, w in sizes)


def test_cropping_equals_transformers_clip_processor(photograph):
    expected = CLIPImageProcessorPil()(photograph, return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(cropped_image(photograph, 224), expected, atol=1e-5, rtol=0)


def test_small_and_tall_pictures_are_enlarged_and_cropped_alike():
    picture = Image.fromarray(data.chelsea()).resize((64, 97))
    expected = CLIPImageProcessorPil()(picture, return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(cropped_image(picture, 224), expected, atol=1e-5, rtol=0)


def test_torchvisions_crop_rounds_an_odd_rest_half_to_even():
    """Resized to 227 x 224: the rest of 3 is cut at 1 by transformers and at round(1.5) = 2 by torchvision."""
    picture = Image.fromarray(data.astronaut()).resize((227, 224), Image.Resampling.BICUBIC)
    pixels = normalise(to_pixels(picture))
    assert torch.equal(cropped_image(picture, 224), pixels[:, :, 1:225])
    assert torch.equal(cropped_image(picture, 224, rounded=True), pixels[:, :, 2:226])
    both = torch.stack([to_pixels(picture)])
    torch.testing.assert_close(cropped_pixels(both, 224, rounded=True)[0], pixels[:, :, 2:226], atol=1e-5, rtol=0)


def test_padding_equals_pillows_float_filter_on_black(photograph):
    channels = np.moveaxis(np.asarray(photograph, np.float32) / 255, 2, 0)
    width, height = photograph.size
    new = (round(width * 224 / max(width, height)), round(height * 224 / max(width, height)))
    expected = np.zeros((3, 224, 224), np.float32)
    left, top = (224 - new[0]) // 2, (224 - new[1]) // 2
    for channel, values in enumerate(channels):
        resized = np.asarray(Image.fromarray(values, "F").resize(new, Image.Resampling.BICUBIC))
        expected[channel, top : top + new[1], left : left + new[0]] = resized
    expected = (expected - np.array(CLIP_MEAN)[:, None, None]) / np.array(CLIP_STD)[:, None, None]
    found = padded_pixels(to_pixels(photograph)[None], 224)[0]
    np.testing.assert_allclose(found, expected, atol=2e-4)


def test_nothing_is_cropped_by_padding():
    wide = torch.ones(1, 3, 100, 400)
    prepared = padded_pixels(wide, 224) * torch.tensor(CLIP_STD)[:, None, None] + torch.tensor(CLIP_MEAN)[:, None, None]
    assert prepared[0, 0].sum() == pytest.approx(224 * 56, rel=1e-4)
    assert prepared[0, :, :84].abs().max() < 1e-6 and prepared[0, :, 84:140].min() > 0.999
    same = torch.rand(1, 3, 224, 100)
    assert torch.allclose(padded_pixels(same, 224)[0, :, :, 62:162], normalise(same[0]))


def test_tensors_differ_from_pictures_by_bytes_rounding_only(photograph):
    on_bytes = cropped_image(photograph, 224)
    on_tensors = cropped_pixels(to_pixels(photograph)[None], 224)[0]
    grey_levels = (on_bytes - on_tensors).abs() * torch.tensor(CLIP_STD)[:, None, None] * 255
    assert grey_levels.mean() < 0.35 and grey_levels.quantile(0.99) < 1
    assert grey_levels.max() < 8  # where Pillow cuts an overshoot between its two passes


def test_tensors_carry_gradient():
    pixels = torch.rand(1, 3, 40, 60, requires_grad=True)
    (cropped_pixels(pixels, 32).sum() + padded_pixels(pixels, 32).sum()).backward()
    assert pixels.grad.abs().sum() > 0


def test_grey_and_transparent_pictures_are_read_as_rgb():
    grey = Image.fromarray(data.camera())
    assert torch.equal(cropped_image(grey, 224), cropped_image(grey.convert("RGB"), 224))
    assert to_pixels(Image.new("RGBA", (2, 2), (255, 0, 0, 0)))[:, 0, 0].tolist() == [1, 1, 1]
    assert to_pixels(Image.new("RGBA", (2, 2), (255, 0, 0, 255)))[:, 0, 0].tolist() == [1, 0, 0]
