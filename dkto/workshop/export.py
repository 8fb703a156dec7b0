"""Put the trained parts together as a plain diffusers pipeline, measure it, and write its card."""

import shutil
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from transformers import CLIPTokenizer

from dkto.common.files import write_json
from dkto.models.system import System, draw, noise_generator
from dkto.workshop.pretrain import SCHEDULE, batch_pixel_values, new_denoiser, paint_scenes, psnr
from dkto.workshop.scorers_card import halve
from dkto.workshop.tokenizer import build_tokenizer
from dkto.world.scenes import prompts_for
from dkto.world.truth import judge

GATE = {"colour": 0.95, "background": 0.95, "relation": 0.8, "shape": 0.6}


def export(folder: Path, output: Path, state: str = "unet-cooling.pt") -> None:
    """Put the averaged weights together as a pipeline, measure it and write its card.

    Args:
        folder: of the training.
        output: of the pipeline.
        state: which training state: unet.pt before the rate decays, unet-cooling.pt after.
    """
    stored = torch.load(folder / state, weights_only=True)
    tokenizer = build_tokenizer(folder / "tokenizer")
    model = new_denoiser(tokenizer)
    model.load_state_dict(stored["ema"])
    assemble(model.unet, model.text_encoder, folder, output)
    vae = AutoencoderKL.from_pretrained(output, subfolder="vae")
    images, captions = paint_scenes(folder, 0, 0)
    held_out = batch_pixel_values(images[-128:])
    with torch.no_grad():
        quality = psnr(vae.decode(vae.encode(held_out).latent_dist.mean).sample, held_out)
    count = sum(p.numel() for part in (model, vae) for p in part.parameters())
    about = {"samples": stored["seen"], "scenes": len(captions), "vae_psnr": quality, "parameters": count / 1e6}
    figures = card_figures(output)
    write_card(output, figures, about)
    print(figures)


def assemble(unet, text_encoder, folder: Path, output: Path) -> None:
    """Write the pipeline: UNet and VAE in half precision, the text encoder with keys that transformers 4 and 5 read."""
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(folder / "vae"),
        text_encoder=text_encoder.eval(),
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        unet=unet.eval(),
        scheduler=DDIMScheduler(**SCHEDULE, set_alpha_to_one=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(output)
    for name in ("vocab.json", "merges.txt"):
        shutil.copyfile(folder / "tokenizer" / name, output / "tokenizer" / name)
    for part in ("unet", "vae"):
        halve(output / part / "diffusion_pytorch_model.safetensors")
    path = output / "text_encoder" / "model.safetensors"
    weights = {f"text_model.{k.removeprefix('text_model.')}": v for k, v in load_file(path).items()}
    save_file(weights, path, metadata={"format": "pt"})


def card_figures(folder: Path, prompts: int = 200) -> dict[str, float]:
    """Prompt fidelity of a pipeline folder, the mean of each part: 2 images a prompt, guidance 3, 15 steps, seed 0."""
    system, asked = System(model=str(folder)), prompts_for("test", prompts)
    pipeline, found = system.load(), defaultdict(list)
    for start in range(0, prompts, 16):
        batch = [(p, i) for p in range(start, min(start + 16, prompts)) for i in range(2)]
        images = draw(pipeline, [asked[p] for p, _ in batch], [noise_generator(0, p, i) for p, i in batch], system)
        for (p, _), image in zip(batch, images, strict=True):
            for part, value in judge(np.asarray(image), asked[p]).items():
                found[part].append(value)
    return {part: float(np.mean(values)) for part, values in found.items()}


def write_card(folder: Path, figures: dict[str, float], about: dict[str, float]) -> None:
    """Write `README.md` and `card.json`: data, recipe, measured prompt fidelity, limits."""
    write_json(folder / "card.json", {"fidelity": {k: round(v, 4) for k, v in figures.items()}, **about})
    rows = "\n".join(f"| {part} | {value:.3f} | {GATE.get(part, '')} |" for part, value in sorted(figures.items()))
    passed = all(figures[part] >= bound for part, bound in GATE.items())
    (folder / "README.md").write_text(CARD.format(rows=rows, verdict="passes" if passed else "does not pass", **about))


CARD = """# The small world

A real Stable Diffusion pipeline (CLIP tokenizer and text encoder, AutoencoderKL, UNet2DConditionModel, SD's
scaled-linear schedule, epsilon prediction) for 64 x 64 images, {parameters:.1f} million parameters. It loads with

    StableDiffusionPipeline.from_pretrained("dkto/world/weights")

## Data
{scenes:,} painted scenes: one thing, or two in a relation, out of 6 shapes, 6 colours, 5 backgrounds and 4
styles. Captions follow a small grammar; a finish (saturation, exposure, haze, blur) has no caption. 80 % of all
captions, chosen by a hash of their text, were used; 10 % are validation and 10 % test prompts. During training 10 %
of the captions were dropped, 12 % shortened and 1 % wrong. The relations are "left of" and "above": the first named
thing is always the left or upper one.

## Recipe
`python -m dkto.workshop --help` shows how it is made, on a CPU, resumable. VAE: factor 4, 4 latent channels,
{vae_psnr:.1f} dB on held-out scenes. UNet and text encoder, batch 48, AdamW with a constant rate that falls at the end,
weight average 0.9995, min-SNR-5 weights, offset noise 0.15 (in pretraining only, so that backgrounds can be far from
mid-grey). There were two stages. The first, at 1e-3 (`--two-things 0.5`, then 0.85 after 383,000 samples), knew "right
of" and "below" too. It learned colours, shapes, backgrounds and the axis of a relation, but which thing comes first
stayed at chance. The second continued from its weights (`--start-from`) with two relations for {samples:,} samples:
`--two-things 0.85 --emphasis 40 --lr 7e-4` (0.75 while the rate fell) counts high-noise steps up to 40 times, since
places are decided there.

## Measured on prompts it never saw
200 test prompts x 2 images, DPM-Solver++ 15 steps, guidance 3, seed 0; judged by rule (`dkto.world.truth`), no
learned model. `tests/world/test_weights.py` draws them again and compares.

| part | share right | gate |
|---|---|---|
{rows}

It {verdict} the gate that the project set for itself.

## Limits
It knows its grammar and nothing else: it reads other words as bytes without a meaning. Things may touch or bend,
the painted texture is only hinted at, and white borders of stickers are uneven. It shows how a *method* behaves, not
how good Stable Diffusion becomes. There is no safety checker, since nothing unsafe can be drawn with six shapes; a
tuned Stable Diffusion should keep its own.

Licence: Apache-2.0, weights and images.
"""
