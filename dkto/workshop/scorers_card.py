"""Measure the small world's learned scorers on held-out prompts, and write them with their card."""

import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPModel

from dkto.common import quiet  # noqa: F401  (no loading bars)
from dkto.common.files import file_sha256, write_json
from dkto.evaluation.metrics import wilson_interval
from dkto.evaluation.scorers.network import ClipWithTokenizer
from dkto.workshop.preference import (
    CHOICE_SHARPNESS,
    PaintedPairs,
    clip_pixels,
    paint_pairs,
    train_clip,
    train_preference,
)
from dkto.workshop.tokenizer import build_tokenizer
from dkto.world.scenes import ATTRIBUTES, caption, changed, parse, prompts_for

PARTS = ("clip", "preference")
TEST_PROMPTS = 200


def halve(path: Path) -> None:
    """Write the weights in a safetensors file in half precision."""
    save_file({k: v.half().contiguous() for k, v in load_file(path).items()}, path, metadata={"format": "pt"})


@torch.no_grad()
def pair_scores(embed: ClipWithTokenizer, pairs: PaintedPairs) -> np.ndarray:
    """(N, 2) cosine of both pictures of every pair with their prompt."""
    found = []
    for start in range(0, len(pairs), 64):
        pictures = embed.embed_images(clip_pixels(pairs.images[start : start + 64]).flatten(0, 1)).unflatten(0, (-1, 2))
        found.append((pictures * embed.embed_prompts(pairs.prompts[start : start + 64])[:, None]).sum(-1))
    return torch.cat(found).numpy()


def choice_accuracy(scores: np.ndarray, pairs: PaintedPairs, seed: int) -> np.ndarray:
    """(N,) bool: whether the higher score belongs to the picture that a simulated person chooses."""
    return (scores[:, 1] > scores[:, 0]) == (pairs.choices(np.random.default_rng([seed, 2])) == 1)


@torch.no_grad()
def caption_accuracy(embed: ClipWithTokenizer, pairs: PaintedPairs, seed: int) -> dict[str, np.ndarray]:
    """By attribute, (n,) bool: whether a picture is nearer to its own caption than to one with that one changed."""
    rng, found = np.random.default_rng([seed, 3]), {}
    batches = (pairs.images[i : i + 64, 0] for i in range(0, len(pairs), 64))
    pictures = torch.cat([embed.embed_images(clip_pixels(images)) for images in batches])
    own = [texts[0] for texts in pairs.captions]
    right = (pictures * embed.embed_prompts(own)).sum(-1)
    for attribute in ATTRIBUTES:
        others = [changed(parse(text), attribute, rng) for text in own]
        rows = [row for row, scene in enumerate(others) if scene]
        wrong = (pictures[rows] * embed.embed_prompts([caption(others[row]) for row in rows])).sum(-1)
        found[attribute] = (right[rows] > wrong).numpy()
    return found


def rate(right: np.ndarray) -> dict[str, float]:
    """A share with its 95 % Wilson interval and n."""
    low, high = wilson_interval(int(right.sum()), len(right))
    return {"rate": round(float(right.mean()), 4), "low": round(low, 4), "high": round(high, 4), "n": len(right)}


def measure_scorers(
    clip: ClipWithTokenizer, preference: ClipWithTokenizer, pairs: PaintedPairs, seed: int = 0
) -> dict[str, dict[str, float]]:
    """Every figure of the card, from pictures of prompts that no training saw."""
    scores = {"world_preference": pair_scores(preference, pairs), "world_clip": pair_scores(clip, pairs)}
    scores |= {"world_utility_1 itself": pairs.utilities}
    figures = {f"choices/{name}": rate(choice_accuracy(values, pairs, seed)) for name, values in scores.items()}
    return figures | {f"captions/{name}": rate(right) for name, right in caption_accuracy(clip, pairs, seed).items()}


def write_scorers(
    output: Path, tokenizer_folder: Path, clip: CLIPModel, preference: CLIPModel, pairs: PaintedPairs, about: dict
) -> dict:
    """Write both networks in half precision, their tokenizer and the card, measured on what was written."""
    shutil.copytree(tokenizer_folder, output / "tokenizer", dirs_exist_ok=True)
    for name, model in zip(PARTS, (clip, preference), strict=True):
        model.save_pretrained(output / name)
        halve(output / name / "model.safetensors")
    figures = measure_scorers(*(load_clip(output, name) for name in PARTS), pairs)
    hashes = {name: file_sha256(output / name / "model.safetensors") for name in PARTS}
    write_json(output / "card.json", {**about, "sha256": hashes, "figures": figures})
    rows = "\n".join(
        f"| {name} | {v['rate']:.3f} | {v['low']:.3f} to {v['high']:.3f} | {v['n']} |" for name, v in figures.items()
    )
    parameters = sum(parameter.numel() for parameter in clip.parameters())
    ceiling = figures["choices/world_utility_1 itself"]["rate"]
    (output / "README.md").write_text(CARD.format(rows=rows, parameters=parameters, ceiling=ceiling, **about))
    return figures


def held_out_prompts(count: int) -> list[str]:
    """200 test prompts in turn, so that every card, whatever its size, has lone things and pairs in equal shares."""
    distinct = prompts_for("test", TEST_PROMPTS)
    return [distinct[i % TEST_PROMPTS] for i in range(count)]


def train_scorers(
    folder: Path,
    output: Path,
    *,
    pairs: int = 4_000,
    test_pairs: int = 1_000,
    clip_steps: int = 900,
    preference_steps: int = 600,
    clip_batch: int = 64,
    preference_batch: int = 32,
    seed: int = 0,
) -> dict:
    """Paint, train both networks, measure and write them; goes on where it stopped when it is called again.

    Args:
        folder: for pictures and training state.
        output: for the two networks, their tokenizer and the card.
        pairs, test_pairs: painted pairs of training and of test prompts.
        clip_steps, preference_steps: optimiser steps.
        clip_batch: pictures per step. preference_batch: pairs per step.
        seed: of everything.
    """
    tokenizer = build_tokenizer(folder / "tokenizer")
    train = paint_pairs(folder / "train", prompts_for("train", pairs, seed), seed)
    clip = train_clip(folder, train, tokenizer, steps=clip_steps, batch=clip_batch, lr=1e-3, seed=seed)
    options = {"steps": preference_steps, "batch": preference_batch, "lr": 5e-4, "seed": seed}
    preference = train_preference(folder, clip, train, tokenizer, **options)
    held_out = paint_pairs(folder / "test", held_out_prompts(test_pairs), seed)
    about = {"pairs": pairs, "test_pairs": test_pairs, "clip_steps": clip_steps, "preference_steps": preference_steps}
    about |= {"clip_batch": clip_batch, "preference_batch": preference_batch}
    about |= {"sharpness": CHOICE_SHARPNESS, "seed": seed}
    return write_scorers(output, folder / "tokenizer", clip, preference, held_out, about)


def load_clip(folder: Path, name: str) -> ClipWithTokenizer:
    """One of the two networks from their folder, in float32, frozen."""
    return ClipWithTokenizer.from_folder(folder / name, folder / "tokenizer")


CARD = """# The small world's learned scorers

`world_clip`: a CLIP of {parameters:,} weights, trained from scratch on painted images and their captions.
`world_preference`: the same network tuned on choices between two images of one prompt, in PickScore's recipe.
Both are for 64 x 64 images of the small world and for no others. Neither is CLIP or PickScore.

## Data
{pairs:,} pairs of painted images for training prompts: faithful, with one attribute changed, or of something else;
in good, bad or any finish. A simulated person chooses by Bradley-Terry in `world_utility_1` (fidelity x aesthetics): a
choice has the chance sigmoid({sharpness:g} x difference).

## Recipe
`python -m dkto.workshop preference --folder runs/scorers --output dkto/world/scorers`: {clip_steps:,} steps of the
CLIP (contrastive, batch {clip_batch}, with captions of one changed attribute as further wrong answers), then
{preference_steps:,} steps of the preference model (batch {preference_batch} pairs); AdamW, on one core.

## Measured on prompts that no training saw
{test_pairs:,} pairs painted for 200 test prompts. *choices*: share of simulated choices that the scorer orders alike;
the utility itself orders {ceiling:.0%} of them, the rest is the person's noise. *captions*: share of images nearer to
their own caption than to one with that attribute changed, where chance is one half. 95 % Wilson intervals.

| measure | rate | interval | n |
|---|---|---|---|
{rows}

## Limits
It saw painted images only. On drawn ones, blurred or half-formed, it can be wrong, and a model tuned on it can exploit
that. Report `world_fidelity` and `world_aesthetics`, which are rules, beside it.

Licence: Apache-2.0.
"""
