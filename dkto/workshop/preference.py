"""Make the small world's two learned scorers: a small CLIP, and a preference model tuned from it in PickScore's recipe.

The preference model sees two pictures of one prompt and which of them a simulated person chose: the chance of a choice
is Bradley-Terry in `world_utility_1`, that is fidelity x aesthetics, so that neither beauty nor fidelity alone wins.
Its loss is PickScore's (Kirstain et al. 2023): cross-entropy of the choice under softmax of exp(scale) x cosine.
"""

import math
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from dkto.common.files import read_json, write_atomically, write_json
from dkto.evaluation.scorers.network import ClipWithTokenizer
from dkto.evaluation.scorers.preprocess import normalise
from dkto.workshop.tokenizer import MAX_LENGTH
from dkto.world.painter import BAD_FINISH, GOOD_FINISH, IMAGE_SIZE, paint, random_finish
from dkto.world.scenes import ATTRIBUTES, Scene, caption, changed, parse, random_scene
from dkto.world.truth import aesthetics, judge

CHOICE_SHARPNESS = 10.0  # Bradley-Terry: chance of a choice = sigmoid(sharpness x difference of utilities)
SAVE_SECONDS = 30.0
PAINTING = 5  # the stream of random numbers that pictures are painted from


def new_clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    """A CLIP of about half a million weights for 64 x 64 pictures and the world's captions."""
    tower = {"hidden_act": "gelu", "num_attention_heads": 4}
    text = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "vocab_size": len(tokenizer)}
    text |= {"max_position_embeddings": MAX_LENGTH, "bos_token_id": tokenizer.bos_token_id}
    text |= {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    vision = {"hidden_size": 96, "intermediate_size": 288, "num_hidden_layers": 3}
    vision |= {"image_size": IMAGE_SIZE, "patch_size": 8}
    return CLIPModel(CLIPConfig(text_config=text | tower, vision_config=vision | tower, projection_dim=64))


@dataclass(frozen=True)
class PaintedPairs:
    """Two pictures of each prompt, and who prefers which."""

    images: np.ndarray  # (N, 2, 64, 64, 3) uint8
    prompts: list[str]  # what both were asked to show
    captions: list[list[str]]  # what each of them does show
    utilities: np.ndarray  # (N, 2) fidelity x aesthetics of each under the prompt, in [0, 1]

    def __len__(self) -> int:
        return len(self.prompts)

    def choices(self, rng: np.random.Generator) -> np.ndarray:
        """(N,) 0 or 1: which picture a simulated person chooses."""
        gap = self.utilities[:, 1] - self.utilities[:, 0]
        return (rng.random(len(self)) < 1 / (1 + np.exp(-CHOICE_SHARPNESS * gap))).astype(np.int64)


def paint_pairs(path: Path, prompts: list[str], seed: int) -> PaintedPairs:
    """Paint two pictures for each prompt, once: faithful or not, in good and bad finish.

    Of the pictures 55 % are faithful, 35 % differ in one attribute and 10 % show something else. What lies at `path`
    already is read.
    """
    if not path.with_suffix(".json").exists():
        rng = np.random.default_rng([seed, PAINTING])
        images = np.zeros((len(prompts), 2, IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
        captions, utilities = [], np.zeros((len(prompts), 2))
        for i, prompt in enumerate(tqdm(prompts, desc=f"painting {path.name} pairs", mininterval=5)):
            shown = [_shown(parse(prompt), rng) for _ in range(2)]
            captions.append([caption(scene) for scene in shown])
            for side, scene in enumerate(shown):
                finish = (GOOD_FINISH, BAD_FINISH, random_finish(rng))[rng.choice(3, p=(0.3, 0.2, 0.5))]
                images[i, side] = picture = paint(scene, finish, rng)
                utilities[i, side] = judge(picture, prompt)["fidelity"] * aesthetics(picture)
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path.with_suffix(".npy"), images)
        about = {"prompts": prompts, "captions": captions, "utilities": utilities.tolist()}
        write_json(path.with_suffix(".json"), about)
    about = read_json(path.with_suffix(".json"), "record of judged pictures")
    images = np.load(path.with_suffix(".npy"), mmap_mode="r")
    return PaintedPairs(images, about["prompts"], about["captions"], np.array(about["utilities"]))


def _shown(scene: Scene, rng: np.random.Generator) -> Scene:
    kind = rng.random()
    if kind < 0.55:
        return scene
    if kind < 0.9:
        other = changed(scene, str(rng.choice(["shape", "colour", "background", "relation"])), rng)
        return other or changed(scene, "shape", rng)
    return random_scene(rng)


def clip_pixels(images: np.ndarray) -> Tensor:
    """(..., 64, 64, 3) uint8 to (..., 3, 64, 64), CLIP's normalisation."""
    return normalise(torch.from_numpy(np.array(images)).movedim(-1, -3).float() / 255)


def clip_loss(embed: ClipWithTokenizer, pixel_values: Tensor, captions: list[str], wrong: list[str]) -> Tensor:
    """CLIP's contrastive loss, with captions of one changed attribute as further wrong answers for the pictures."""
    scale = embed.model.logit_scale.exp().clamp(max=100)
    pictures, texts = embed.embed_images(pixel_values), embed.embed_prompts([*captions, *wrong])
    logits, right = scale * pictures @ texts.T, torch.arange(len(captions))
    return (F.cross_entropy(logits, right) + F.cross_entropy(logits[:, : len(captions)].T, right)) / 2


def preference_loss(embed: ClipWithTokenizer, pixel_values: Tensor, prompts: list[str], chosen: Tensor) -> Tensor:
    """PickScore's loss: cross-entropy of the choice between two pictures under softmax of exp(scale) x cosine.

    `pixel_values` are (B, 2, 3, 64, 64) and `chosen` is (B,), 0 or 1.
    """
    pictures = embed.embed_images(pixel_values.flatten(0, 1)).unflatten(0, (-1, 2))
    scores = embed.model.logit_scale.exp().clamp(max=100) * (pictures * embed.embed_prompts(prompts)[:, None]).sum(-1)
    return F.cross_entropy(scores, chosen)


def train_clip(
    folder: Path, pairs: PaintedPairs, tokenizer: CLIPTokenizer, *, batch: int, seed: int, **options
) -> CLIPModel:
    """Train the small CLIP on pictures and their own captions; `options` are `steps` and `lr`."""

    def loss(embed: ClipWithTokenizer, rng: np.random.Generator) -> Tensor:
        rows, sides = rng.integers(len(pairs), size=batch), rng.integers(2, size=batch)
        captions = [pairs.captions[row][side] for row, side in zip(rows, sides, strict=True)]
        wrong = [changed(parse(text), str(rng.choice(ATTRIBUTES)), rng) for text in captions for _ in range(2)]
        images = np.stack([pairs.images[row, side] for row, side in zip(rows, sides, strict=True)])
        return clip_loss(embed, clip_pixels(images), captions, [caption(scene) for scene in wrong if scene])

    torch.manual_seed(seed)
    return _train(folder / "clip.pt", ClipWithTokenizer(new_clip(tokenizer), tokenizer), loss, seed=seed, **options)


def train_preference(
    folder: Path, start: CLIPModel, pairs: PaintedPairs, tokenizer: CLIPTokenizer, *, batch: int, seed: int, **options
) -> CLIPModel:
    """Tune a copy of the small CLIP on choices between pairs; `options` as for `train_clip`."""
    model = new_clip(tokenizer)
    model.load_state_dict(start.state_dict())
    chosen = pairs.choices(np.random.default_rng([seed, 1]))

    def loss(embed: ClipWithTokenizer, rng: np.random.Generator) -> Tensor:
        rows = np.sort(rng.integers(len(pairs), size=batch))
        prompts = [pairs.prompts[row] for row in rows]
        return preference_loss(embed, clip_pixels(pairs.images[rows]), prompts, torch.from_numpy(chosen[rows]))

    return _train(folder / "preference.pt", ClipWithTokenizer(model, tokenizer), loss, seed=seed, **options)


def _train(path: Path, embed: ClipWithTokenizer, loss, *, steps: int, lr: float, seed: int) -> CLIPModel:
    """AdamW with a warm-up and a cosine; the state is saved every half minute, and each step's draw is its own."""
    optimizer = torch.optim.AdamW(embed.model.parameters(), lr, betas=(0.9, 0.98), weight_decay=0.02, fused=True)
    step, saved = 0, time.monotonic()
    if path.exists():
        state = torch.load(path, weights_only=True)
        embed.model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
    bar, average = tqdm(total=steps, initial=step, desc=path.stem, mininterval=5), None
    while step < steps:
        rng = np.random.default_rng([seed, step])
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (step + 1) / 100) * (0.02 + 0.49 * (1 + math.cos(math.pi * step / steps)))
        value = loss(embed, rng)
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(embed.model.parameters(), 1.0)
        optimizer.step()
        step += 1
        average = value.item() if average is None else 0.98 * average + 0.02 * value.item()
        bar.update()
        bar.set_postfix(loss=f"{average:.3f}", refresh=False)
        if time.monotonic() - saved > SAVE_SECONDS or step == steps:
            saved = time.monotonic()
            state = {"model": embed.model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
            write_atomically(path, partial(torch.save, state))
    bar.close()
    return embed.model.eval().requires_grad_(False)
