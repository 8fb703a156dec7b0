import json

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler

from dkto.workshop.autoencoder import new_autoencoder
from dkto.workshop.pretrain import (
    SCHEDULE,
    batch_pixel_values,
    paint_scenes,
    psnr,
    timestep_tables,
    train_unet,
    vary_caption,
)
from dkto.world.scenes import split_of


def test_the_autoencoder_starts_as_a_blurred_copy(tmp_path):
    images, captions = paint_scenes(tmp_path, 24, 0)
    assert {split_of(text) for text in captions} == {"train"}
    pixel_values = batch_pixel_values(images[:])
    torch.manual_seed(0)
    vae = new_autoencoder()
    with torch.no_grad():
        start = psnr(vae.decode(vae.encode(pixel_values).latent_dist.mean).sample, pixel_values)
    blind = psnr(pixel_values.mean((2, 3), keepdim=True).expand_as(pixel_values), pixel_values)
    assert start > blind and start > 15


@pytest.mark.parametrize("emphasis", [1.0, 12.0])
def test_timestep_tables_are_an_unbiased_reweighting(emphasis):
    alphas_cumprod = DDPMScheduler(**SCHEDULE).alphas_cumprod
    cumulative, loss_weight = timestep_tables(alphas_cumprod, emphasis)
    density = torch.diff(cumulative, prepend=torch.zeros(1))
    assert cumulative[-1].item() == pytest.approx(1, abs=1e-4)
    snr = alphas_cumprod / (1 - alphas_cumprod)
    wanted = snr.clamp(max=5) / snr * (1 + 1 / snr).clamp(max=emphasis)
    product = density * loss_weight
    torch.testing.assert_close(product / product.sum(), wanted / wanted.sum(), atol=2e-5, rtol=2e-2)


def test_captions_are_varied_at_the_stated_rates():
    rng = np.random.default_rng(0)
    text = "an icon of a red star left of a blue ring on a navy background"
    seen = [vary_caption(text, rng) for _ in range(4000)]
    assert 0.08 < seen.count("") / 4000 < 0.12
    assert 0.75 < seen.count(text) / 4000 < 0.81
    assert {
        "",
        text,
        "an icon of a red star left of a blue ring",
        "a red star left of a blue ring on a navy background",
    } == set(seen)


def test_pretraining_goes_on_where_it_stopped(tmp_path):
    """Two sessions, the second with more samples: the state's count and the weights move on."""
    paint_scenes(tmp_path, 40, 0)
    np.save(tmp_path / "latents.npy", np.random.default_rng(0).normal(size=(40, 4, 16, 16)).astype(np.float16))
    options = {"cooldown": 0.5, "two_things": 0.5, "emphasis": 1.0, "start_from": None}
    options |= {"scenes": 40, "seed": 0, "batch": 4, "lr": 1e-3}
    train_unet(tmp_path, samples=8, **options)
    first = torch.load(tmp_path / "unet-cooling.pt", weights_only=True)
    assert first["seen"] == 8 and first["samples"] == 8
    train_unet(tmp_path, samples=8, **options)
    again = torch.load(tmp_path / "unet-cooling.pt", weights_only=True)
    assert all(torch.equal(first["ema"][k], again["ema"][k]) for k in first["ema"])
    train_unet(tmp_path, samples=12, **options)
    more = torch.load(tmp_path / "unet-cooling.pt", weights_only=True)
    assert more["seen"] == 12 and any(not torch.equal(first["ema"][k], more["ema"][k]) for k in first["ema"])
    assert json.loads((tmp_path / "captions.json").read_text())
