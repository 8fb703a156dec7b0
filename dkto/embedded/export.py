"""Put the trained parts together as a plain diffusers pipeline, measure it, and write its card.

    python -m dkto.embedded.pretrain export --folder runs/world --output dkto/embedded/weights
"""

import json
from collections import defaultdict
from pathlib import Path

import numpy as np
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from dkto.embedded.scenes import prompts_for
from dkto.embedded.truth import judge
from dkto.generate import System, draw, noise_generator

GATE = {"colour": 0.95, "background": 0.95, "relation": 0.8, "shape": 0.6}


def assemble(unet, text_encoder, tokenizer_folder: Path, vae_folder: Path, output: Path, schedule: dict) -> None:
    """Write the pipeline: half-precision UNet and VAE, text encoder in float32 with the keys old and new transformers read."""
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(tokenizer_folder)
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(vae_folder),
        text_encoder=text_encoder.eval(),
        tokenizer=tokenizer,
        unet=unet.eval(),
        scheduler=DDPMScheduler(**schedule),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(output)
    for name in ("vocab.json", "merges.txt"):
        (output / "tokenizer" / name).write_bytes((tokenizer_folder / name).read_bytes())
    for part in ("unet", "vae"):
        path = output / part / "diffusion_pytorch_model.safetensors"
        save_file({k: v.half().contiguous() for k, v in load_file(path).items()}, path, metadata={"format": "pt"})
    path = output / "text_encoder" / "model.safetensors"
    weights = {f"text_model.{k.removeprefix('text_model.')}": v for k, v in load_file(path).items()}
    save_file(weights, path, metadata={"format": "pt"})


def measure(
    system: System, prompts: list[str], images_per_prompt: int, *, seed: int = 0, batch_size: int = 32
) -> dict[str, float]:
    """Draw and judge: the mean of every part of prompt fidelity over prompts x images."""
    pipeline = system.load()
    keys = [(p, i) for p in range(len(prompts)) for i in range(images_per_prompt)]
    found = defaultdict(list)
    for start in range(0, len(keys), batch_size):
        batch = keys[start : start + batch_size]
        images = draw(pipeline, [prompts[p] for p, _ in batch], [noise_generator(seed, p, i) for p, i in batch], system)
        for (p, _), image in zip(batch, images, strict=True):
            for part, value in judge(np.asarray(image), prompts[p]).items():
                found[part].append(value)
    return {part: float(np.mean(values)) for part, values in found.items()}


def card_figures(folder: Path, *, split: str = "test", prompts: int = 200, images_per_prompt: int = 2) -> dict[str, float]:
    """The card's prompt fidelity of a pipeline folder, on prompts of a held-out split."""
    return measure(System(model=str(folder)), prompts_for(split, prompts), images_per_prompt)


def read_card_figures(folder: Path) -> dict[str, float]:
    """The figures that were stored beside the weights when they were exported."""
    return json.loads((folder / "card.json").read_text())["fidelity"]
