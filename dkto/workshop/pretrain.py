"""Make the small Stable Diffusion, from nothing, on a CPU: paint, train the VAE, cache latents, train UNet and text.

`python -m dkto.workshop --help` lists the stages.
Every stage saves its state every few minutes and goes on where it stopped when called again, so
the training may be split over any number of sessions.
"""

import json
import math
import shutil
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from torch import nn
from tqdm.auto import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from dkto.common.files import write_atomically
from dkto.workshop.autoencoder import new_autoencoder
from dkto.workshop.tokenizer import MAX_LENGTH, build_tokenizer
from dkto.world.painter import IMAGE_SIZE, paint, random_finish
from dkto.world.scenes import caption, parse, random_scene, split_of

SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SCHEDULE |= {"num_train_timesteps": 1000, "clip_sample": False}


def new_unet(channels=(32, 64, 128)) -> UNet2DConditionModel:
    """The small UNet: attention to the prompt at 8x8 and 4x4 latents."""
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=channels,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=96,
        attention_head_dim=4,  # diffusers means the number of heads
        norm_num_groups=8,
    )


def new_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """The small CLIP text encoder, 3 layers of width 96."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=96,
            intermediate_size=288,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=MAX_LENGTH,
            projection_dim=96,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
        )
    )


def paint_scenes(folder: Path, count: int, seed: int) -> tuple[np.ndarray, list[str]]:
    """Paint `count` training scenes once; (N, 64, 64, 3) uint8 memory map and their captions."""
    images, captions = folder / "images.npy", folder / "captions.json"
    if not captions.exists():
        folder.mkdir(parents=True, exist_ok=True)
        rng, texts = np.random.default_rng(seed), []
        array = np.lib.format.open_memmap(images, "w+", np.uint8, (count, IMAGE_SIZE, IMAGE_SIZE, 3))
        for index in tqdm(range(count), desc="painting scenes", mininterval=5):
            scene = random_scene(rng)
            while split_of(caption(scene)) != "train":
                scene = random_scene(rng)
            array[index] = paint(scene, random_finish(rng), rng)
            texts.append(caption(scene))
        array.flush()
        captions.write_text(json.dumps(texts))
    return np.load(images, mmap_mode="r"), json.loads(captions.read_text())


def batch_pixel_values(images: np.ndarray) -> torch.Tensor:
    """(B, H, W, 3) uint8 to (B, 3, H, W) in [-1, 1]."""
    return torch.tensor(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def psnr(reconstruction: torch.Tensor, pixel_values: torch.Tensor) -> float:
    """Peak signal-to-noise ratio in dB of pictures in [-1, 1]."""
    error = ((reconstruction.clamp(-1, 1) - pixel_values) / 2).square().mean()
    return float(-10 * torch.log10(error))


def train_vae(
    folder: Path, minutes: float = 30.0, *, scenes: int = 48_000, seed: int = 0, batch: int = 10, lr: float = 2e-3
) -> None:
    """Train the autoencoder: squared error, its edges, a faint KL; the rate decays at the end.

    Args:
        folder: for painted scenes and training state.
        minutes: in all sessions together.
        scenes: painted, once.
        seed: of everything.
        batch: images per step.
        lr: highest learning rate.
    """
    images, _ = paint_scenes(folder, scenes, seed)
    torch.manual_seed(seed)
    vae = new_autoencoder()
    accelerator = Accelerator(cpu=True)
    optimizer = torch.optim.AdamW(vae.parameters(), lr, betas=(0.9, 0.99), weight_decay=1e-4)
    spent, step, path = 0.0, 0, folder / "vae.pt"
    if path.exists():
        state = torch.load(path, weights_only=True)
        vae.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        spent, step = state["spent"], state["step"]
    wrapped, optimizer = accelerator.prepare(_Reconstruct(vae), optimizer)
    held_out = batch_pixel_values(images[-128:])
    rng = np.random.default_rng([seed, step, accelerator.process_index])
    began_shared = _shared_clock(accelerator)
    saved = began = time.monotonic()
    while (now := spent + _shared_clock(accelerator) - began_shared) < 60 * minutes:
        done = now / (60 * minutes)
        decay = 1.0 if done < 0.5 else 0.5 * (1 + math.cos(math.pi * (done - 0.5) / 0.5))
        pixel_values = batch_pixel_values(images[np.sort(rng.integers(0, len(images) - 128, batch))])
        loss = wrapped(pixel_values)
        _descend(accelerator, wrapped, optimizer, loss, lr * min(1, (step + 1) / 100) * (0.01 + 0.99 * decay))
        step += 1
        if accelerator.is_main_process and time.monotonic() - saved > 60:
            saved = time.monotonic()
            state = {"model": vae.state_dict(), "optimizer": optimizer.optimizer.state_dict()}
            state |= {"spent": spent + saved - began, "step": step}
            write_atomically(path, partial(torch.save, state))
            with torch.no_grad():
                code = vae.encode(held_out).latent_dist
                quality = psnr(vae.decode(code.mean).sample, held_out)
            live = [round(float(s), 2) for s in code.mean.std((0, 2, 3))]
            done = f"step {step} minutes {(spent + saved - began) / 60:.1f} loss {loss.item():.5f}"
            print(f"{done} PSNR {quality:.2f} dB\nlatent std by channel {live}", flush=True)
    if accelerator.is_main_process:
        codes = torch.cat([_encoded(vae, images, start) for start in range(0, 4096, 256)])
        vae.register_to_config(scaling_factor=float(1 / codes.std()))
        vae.save_pretrained(folder / "vae")
        each = codes.std((0, 2, 3)).tolist()
        print(f"finished: scaling factor {vae.config.scaling_factor:.4f}, per-channel std {each}")


@torch.no_grad()
def _encoded(vae: AutoencoderKL, images: np.ndarray, start: int) -> torch.Tensor:
    """Latent means of the 256 images from `start` on."""
    return vae.encode(batch_pixel_values(images[start : start + 256])).latent_dist.mean


def _descend(accelerator: Accelerator, model: nn.Module, optimizer, loss: torch.Tensor, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.zero_grad()
    accelerator.backward(loss)
    accelerator.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def _shared_clock(accelerator: Accelerator) -> float:
    """Seconds, the same on every rank, so that all stop at the same step."""
    return float(accelerator.reduce(torch.tensor(time.monotonic(), dtype=torch.float64), "mean"))


class _Reconstruct(nn.Module):
    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        code = self.vae.encode(pixel_values).latent_dist
        error = self.vae.decode(code.sample()).sample - pixel_values
        edges = sum(error.diff(dim=side).square().mean() for side in (-1, -2))
        return error.square().mean() + 0.05 * error.abs().mean() + 0.5 * edges + 5e-8 * code.kl().mean()


def cache_latents(folder: Path, scenes: int, seed: int) -> tuple[np.ndarray, list[str]]:
    """Latent means of the painted scenes, (N, 4, 16, 16) float16, scaled, computed once."""
    images, captions = paint_scenes(folder, scenes, seed)
    path = folder / "latents.npy"
    if not path.exists():
        vae = AutoencoderKL.from_pretrained(folder / "vae").eval()
        starts = tqdm(range(0, len(images), 256), desc="encoding latents", mininterval=5)
        parts = [(_encoded(vae, images, start) * vae.config.scaling_factor).half().numpy() for start in starts]
        np.save(folder / "latents.part.npy", np.concatenate(parts))
        (folder / "latents.part.npy").replace(path)
    return np.load(path, mmap_mode="r"), captions


class Denoiser(nn.Module):
    """UNet and text encoder as one module, so that one optimiser and one backward pass train both."""

    def __init__(self, unet: UNet2DConditionModel, text_encoder: CLIPTextModel) -> None:
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder

    def forward(self, noisy_latents: torch.Tensor, timesteps: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
        return self.unet(noisy_latents, timesteps, self.text_encoder(input_ids)[0]).sample


def new_denoiser(tokenizer: CLIPTokenizer) -> Denoiser:
    """An untrained one."""
    return Denoiser(new_unet(), new_text_encoder(tokenizer))


def timestep_tables(
    alphas_cumprod: torch.Tensor, emphasis: float = 1.0, gamma: float = 5.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Where to draw timesteps and how to weigh them so that the expected loss is min-SNR-5 weighted.

        weight = min(SNR, gamma) / SNR * min(1 + 1 / SNR, emphasis)

    Steps are drawn with a density that follows the weight, since most passes would be spent on steps
    without weight otherwise. What stands where is decided at high noise, where the error in the noise
    hardly shows it: an `emphasis` above 1 counts those steps more, and teaches relations.

    Returns:
        (T,) cumulative density and (T,) loss weight (mean 1 under the density).
    """
    snr = alphas_cumprod / (1 - alphas_cumprod)
    weight = snr.clamp(max=gamma) / snr * (1 + 1 / snr).clamp(max=emphasis)
    density = weight.sqrt().clamp(min=0.15) if emphasis > 1 else weight.clamp(min=0.15)
    density = density / density.sum()
    loss_weight = weight / density
    return density.cumsum(0), loss_weight / (density * loss_weight).sum()


def vary_caption(text: str, rng: np.random.Generator) -> str:
    """What people type: often the whole caption, now and then without its style or background, or nothing."""
    draw = rng.random()
    if draw < 0.10:
        return ""
    if draw < 0.16:
        return text.split(" on a")[0]
    if draw < 0.22:
        return text.split(" of ", 1)[1]
    return text


def train_unet(
    folder: Path,
    *,
    samples: int = 1_500_000,
    cooldown: float = 0.25,
    two_things: float = 0.5,
    emphasis: float = 1.0,
    start_from: Path | None = None,
    scenes: int = 48_000,
    seed: int = 0,
    batch: int = 24,
    lr: float = 1e-3,
) -> None:
    """Train UNet and text encoder; calling again with more samples goes on from the state before the decay.

    Args:
        folder: for painted scenes, latents and training state.
        samples: images to be seen in all sessions together.
        cooldown: share of `samples` over which the rate falls to 1 %; it is constant before, after a short warm-up.
        two_things: share of samples with two things; raise it once lone things are right, for the sake of relations.
        emphasis: up to how much more a high-noise step counts; 12 teaches relations.
        start_from: pipeline folder, such as the shipped one, to start from where `folder` holds no state yet.
        scenes: painted, once.
        seed: of everything.
        batch: images per step and process.
        lr: highest learning rate.
    """
    if start_from is not None and not (folder / "vae").exists():
        AutoencoderKL.from_pretrained(start_from, subfolder="vae").save_pretrained(folder / "vae")
    if start_from is not None and not (folder / "tokenizer").exists():
        shutil.copytree(Path(start_from) / "tokenizer", folder / "tokenizer")
    latents, captions = cache_latents(folder, scenes, seed)
    accelerator = Accelerator(cpu=True)
    tokenizer = build_tokenizer(folder / "tokenizer")
    torch.manual_seed(seed)
    model = new_denoiser(tokenizer)
    if start_from is not None:
        model.unet.load_state_dict(UNet2DConditionModel.from_pretrained(start_from, subfolder="unet").state_dict())
        text_encoder = CLIPTextModel.from_pretrained(start_from, subfolder="text_encoder", dtype=torch.float32)
        model.text_encoder.load_state_dict(text_encoder.state_dict())
    ema = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    trunk, latest, seen, spent = folder / "unet.pt", folder / "unet-cooling.pt", 0, 0.0
    for path in (latest, trunk):
        if path.exists():
            state = torch.load(path, weights_only=True)
            if path == latest and state["samples"] != samples:
                continue
            model.load_state_dict(state["model"])
            ema = state["ema"]
            optimizer.load_state_dict(state["optimizer"])
            seen, spent = state["seen"], state["spent"]
            break
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    alphas_cumprod = DDPMScheduler(**SCHEDULE).alphas_cumprod
    cumulative, loss_weight = timestep_tables(alphas_cumprod, emphasis)
    width = batch * accelerator.num_processes
    has_pair = np.array([bool(parse(text).relation) for text in captions])
    pairs, lone = np.flatnonzero(has_pair), np.flatnonzero(~has_pair)
    began, saved, average = time.monotonic(), time.monotonic(), None
    while seen < samples:
        rng = np.random.default_rng([seed, seen, accelerator.process_index])
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        kinds = [pairs if paired else lone for paired in rng.random(batch) < two_things]
        rows = np.sort([int(rng.choice(kind)) for kind in kinds])
        target_latents = torch.from_numpy(latents[rows]).float()
        shown = (int(rng.integers(len(captions))) if rng.random() < 0.01 else row for row in rows)
        texts = [vary_caption(captions[row], rng) for row in shown]
        tokens = tokenizer(texts, padding="max_length", truncation=True, max_length=MAX_LENGTH, return_tensors="pt")
        strata = (torch.arange(batch) + torch.rand(batch, generator=generator)) / batch
        timesteps = torch.searchsorted(cumulative, strata).clamp(max=999)[torch.randperm(batch, generator=generator)]
        noise = torch.randn(target_latents.shape, generator=generator)
        noise = noise + 0.15 * torch.randn(batch, noise.shape[1], 1, 1, generator=generator)
        alpha = alphas_cumprod[timesteps][:, None, None, None]
        noise_pred = wrapped(alpha.sqrt() * target_latents + (1 - alpha).sqrt() * noise, timesteps, tokens.input_ids)
        error = (noise_pred - noise).square().mean((1, 2, 3))
        loss = (loss_weight[timesteps] * error).mean()
        left = (samples - seen) / max(cooldown * samples, 1)
        rate = lr * min(1, (seen + width) / (500 * width)) * (0.01 + 0.99 * min(1, left))
        _descend(accelerator, wrapped, optimizer, loss, rate)
        seen += width
        with torch.no_grad():
            decay = min(0.9995, (1 + seen / width) / (10 + seen / width))
            torch._foreach_lerp_(list(ema.values()), list(model.state_dict().values()), 1 - decay)
        average = loss.item() if average is None else 0.99 * average + 0.01 * loss.item()
        if accelerator.is_main_process and (time.monotonic() - saved > 120 or seen >= samples):
            saved = time.monotonic()
            state = {"model": model.state_dict(), "ema": ema, "optimizer": optimizer.optimizer.state_dict()}
            state |= {"seen": seen, "spent": spent + saved - began, "samples": samples}
            write_atomically(latest if samples - seen < cooldown * samples else trunk, partial(torch.save, state))
            minutes = (spent + saved - began) / 60
            print(f"seen {seen} minutes {minutes:.1f} lr {rate:.1e} loss {average:.5f}", flush=True)
