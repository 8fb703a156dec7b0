"""How much memory a training takes, computed without taking it: the real step on tensors that have a shape and no data.

A denoiser of the published size is built, policy and reference are made of it, and one whole step of the trainer's
kind (reference, policy, backward, AdamW) is run under PyTorch's fake tensors. Every storage is counted from its
making to its end; the most at once is the answer. What a machine adds to it (Python, CUDA's context, the
allocator's leftovers) is not in it, and `overhead_gb` stands for that.
"""

import json
import subprocess
import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from types import SimpleNamespace

import diffusers
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

from dkto.common.names import check_name
from dkto.common.settings import checked_number
from dkto.models import (
    DiffusionModel,
    Flux2Klein,
    PolicyAndReference,
    QwenImage,
    StableDiffusion,
    StableDiffusion3,
    StableDiffusionXL,
    ZImage,
    make_policy,
)
from dkto.models.parts import LARGE_BYTES
from dkto.objective.methods import METHODS, method_loss
from dkto.training.batches import Batch
from dkto.training.step import denoising_errors

GB = 2**30


@dataclass(frozen=True)
class Size:
    """A published denoiser: how it is configured, and what one sample of its conditioning looks like."""

    title: str  # name for tables
    model_class: type[DiffusionModel]  # whose passes it makes
    config: dict  # what differs from the class' defaults
    latents: tuple[int, int, int]  # (C, h, w) of one sample at the model's own resolution
    inputs: dict[str, tuple[int, ...]]  # shape of each further input of one sample
    text: tuple[int, ...] = ()  # weights of each text encoder


CLIP_L, CLIP_G, T5_XXL = 123_060_480, 694_659_840, 4_762_310_656
QWEN3_4B, QWEN2_5_VL_7B = 4_022_468_096, 8_292_166_656

SIZES = {
    "small-world": Size(
        "small world",
        StableDiffusion,
        {"sample_size": 16, "block_out_channels": (32, 64, 128), "layers_per_block": 1, "cross_attention_dim": 96}
        | {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"), "attention_head_dim": 4}
        | {"up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), "norm_num_groups": 8},
        (4, 16, 16),
        {"encoder_hidden_states": (24, 96)},
    ),
    "sd15": Size(
        "Stable Diffusion 1.5",
        StableDiffusion,
        {"sample_size": 64, "cross_attention_dim": 768},
        (4, 64, 64),
        {"encoder_hidden_states": (77, 768)},
        (CLIP_L,),
    ),
    "sdxl": Size(
        "SDXL",
        StableDiffusionXL,
        {"sample_size": 128, "block_out_channels": (320, 640, 1280), "attention_head_dim": (5, 10, 20)}
        | {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D")}
        | {"up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")}
        | {"transformer_layers_per_block": (1, 2, 10), "cross_attention_dim": 2048, "use_linear_projection": True}
        | {"addition_embed_type": "text_time", "addition_time_embed_dim": 256}
        | {"projection_class_embeddings_input_dim": 2816},
        (4, 128, 128),
        {"encoder_hidden_states": (77, 2048), "text_embeds": (1280,), "time_ids": (6,)},
        (CLIP_L, CLIP_G),
    ),
    "sd3": Size(
        "Stable Diffusion 3 medium",
        StableDiffusion3,
        {"sample_size": 128, "num_layers": 24, "num_attention_heads": 24}
        | {"caption_projection_dim": 1536, "pos_embed_max_size": 192},
        (16, 128, 128),
        {"encoder_hidden_states": (154, 4096), "pooled_projections": (2048,)},
        (CLIP_L, CLIP_G, T5_XXL),
    ),
    "qwen-image": Size(
        "Qwen-Image",
        QwenImage,
        {},
        (16, 128, 128),
        {"encoder_hidden_states": (512, 3584), "encoder_hidden_states_mask": (512,)},
        (QWEN2_5_VL_7B,),
    ),
    "z-image": Size("Z-Image", ZImage, {}, (16, 128, 128), {"encoder_hidden_states": (512, 2560)}, (QWEN3_4B,)),
    "flux2-klein": Size(
        "FLUX.2 klein 4B",
        Flux2Klein,
        {"num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24, "joint_attention_dim": 7680}
        | {"guidance_embeds": False},
        (128, 64, 64),
        {"encoder_hidden_states": (512, 7680)},
        (QWEN3_4B,),
    ),
}


def build_denoiser(name: str, device: str = "meta") -> nn.Module:
    """A denoiser of a published size, a key of `SIZES`, with random weights, on "meta" without any."""
    check_name("size", name, SIZES)
    with torch.device(device):
        return getattr(diffusers, SIZES[name].model_class.denoiser_name)(**SIZES[name].config)


@dataclass(frozen=True)
class _Passes:
    """What `denoising_errors` asks of an engine: policy and reference, and the precision of their passes."""

    pair: PolicyAndReference
    dtype: torch.dtype

    @property
    def policy(self) -> nn.Module:
        return self.pair.policy

    def autocast(self) -> torch.autocast:
        return torch.autocast("cpu", self.dtype, enabled=self.dtype != torch.float32)


def run_step(
    size: Size, pair: PolicyAndReference, optimizer: torch.optim.Optimizer, batch: int, dtype: torch.dtype
) -> None:
    """One step of training by the trainer's own errors and loss, on random inputs, and AdamW."""
    latents, liked = torch.randn(batch, *size.latents), torch.ones(batch, dtype=torch.bool)
    conditioning = {name: torch.randn(batch, *shape) for name, shape in size.inputs.items()}
    inputs = Batch(latents, latents, torch.full((batch,), 500.0), conditioning, liked)
    model = object.__new__(size.model_class)  # it predicts; what it reads from a folder is not asked for
    run = SimpleNamespace(model=model, engine=_Passes(pair, dtype), method=METHODS["kto"])
    method_loss("kto", denoising_errors(run, inputs), liked, beta=1.0).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


class CountBytes(TorchDispatchMode):
    """Bytes of all storages that live, and the most at once, while the mode is on."""

    def __init__(self) -> None:
        super().__init__()
        self.now, self.peak = 0, 0
        self._known: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Callable, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._meet, result)
        return result

    def _meet(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage not in self._known:
            self._known[storage] = size = storage.nbytes()
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._part, size)

    def _part(self, size: int) -> None:
        self.now -= size


def _give_shapes(module: nn.Module) -> None:
    """Parameters, buffers and other tensors of a module on "meta" as fake tensors on the CPU."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                empty = torch.empty(parameter.shape, dtype=parameter.dtype)
                part._parameters[name] = nn.Parameter(empty, parameter.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = torch.zeros(buffer.shape, dtype=buffer.dtype)
        for name, value in vars(part).items():  # positions that Qwen-Image keeps in no buffer
            if isinstance(value, Tensor):
                setattr(part, name, torch.zeros(value.shape, dtype=value.dtype))


def step_memory(
    name: str, batch: int = 1, *, lora_rank: int = 0, precision: str = "float32", gradient_checkpointing: bool = False
) -> float:
    """Most memory that one process holds at once in a step, GB of 2^30 bytes, computed.

    Args:
        name: key of `SIZES`.
        batch: samples that the process works on at once.
        lora_rank: 0 for full fine-tuning against a frozen copy.
        precision: "float32", "bfloat16" or "float16".
        gradient_checkpointing: compute activations again in the backward pass.

    Raises:
        ValueError: for an unknown size, or a batch below 1.
    """
    batch = checked_number("batch", batch, least=1)
    dtype = getattr(torch, precision)
    pair = make_policy(build_denoiser(name), lora_rank, seed=0, frozen_dtype=dtype)
    if gradient_checkpointing:
        pair.policy.enable_gradient_checkpointing()
    with FakeTensorMode(), CountBytes() as count:
        for module in (pair.policy, pair.reference):
            if module is not None:
                _give_shapes(module)
        optimizer = torch.optim.AdamW(pair.trainable().values(), foreach=False)
        for parameter in pair.trainable().values():  # as after a first step
            moments = {key: torch.zeros_like(parameter) for key in ("exp_avg", "exp_avg_sq")}
            optimizer.state[parameter] = {"step": torch.tensor(0.0), **moments}
        run_step(SIZES[name], pair, optimizer, batch, dtype)
    return count.peak / GB


def text_memory(name: str) -> float:
    """What `dkto prepare` holds of text encoders on a GPU, GB of 2^30 bytes: large ones in bfloat16, see `kept_in`.

    Args:
        name: key of `SIZES`.

    >>> round(text_memory("sd3"), 1)
    11.9
    """
    return sum(weights * (2 if 2 * weights > LARGE_BYTES else 4) for weights in SIZES[name].text) / GB


@dataclass(frozen=True)
class MemoryRow:
    """One line of the table: what is trained how, what it takes, and the largest batch of each GPU."""

    model: str  # key of `SIZES`
    lora_rank: int  # 0 for full fine-tuning
    parameters: float  # of the denoiser, in millions
    trained: float  # of them, in millions
    gb: dict[int, float]  # memory by batch, GB of 2^30 bytes
    largest_batch: dict[int, int]  # samples by GB of the GPU; 0 where not even one fits


def largest_batch(memory: Callable[[int], float], limit: float, most: int = 512) -> int:
    """The largest batch whose memory is at most `limit`; 0 if none, `most` at the most.

    Memory grows with the batch, slowly at first (the optimiser's step holds the most), then along a line: so the
    next guess is drawn from the line through the last two batches, and halving guards it.

    Args:
        memory: GB by batch, not decreasing.
        limit: GB.
        most: where the search ends.

    >>> largest_batch(lambda batch: max(5.0, 1.0 + 0.5 * batch), limit=9.2)
    16
    """
    if memory(1) > limit:
        return 0
    if memory(most) <= limit:
        return most
    fits, breaks = 1, most
    while breaks - fits > 1:
        slope = (memory(breaks) - memory(fits)) / (breaks - fits)
        guess = fits + int((limit - memory(fits)) / slope) if slope > 0 else (fits + breaks) // 2
        guess = min(max(guess, fits + 1), breaks - 1)
        fits, breaks = (guess, breaks) if memory(guess) <= limit else (fits, guess)
        if breaks - fits > 1 and memory(fits + 1) > limit:  # a line from below often ends just here
            breaks = fits + 1
    return fits


def memory_row(
    name: str,
    lora_rank: int,
    *,
    cards: tuple[int, ...] = (24, 40, 80),
    overhead_gb: float = 1.5,
    precision: str = "bfloat16",
    gradient_checkpointing: bool = True,
) -> MemoryRow:
    """What a model takes and the largest batch for each card; some minutes for a large one.

    Args:
        name: key of `SIZES`.
        lora_rank: 0 for full fine-tuning.
        cards: memory of the cards, GB.
        overhead_gb: kept free for CUDA's context, its workspaces and the allocator's leftovers.
        precision, gradient_checkpointing: as in `TrainConfig`.
    """
    options = {"precision": precision, "gradient_checkpointing": gradient_checkpointing}
    memory = cache(partial(step_memory, name, lora_rank=lora_rank, **options))
    largest = {card: largest_batch(memory, card - overhead_gb) for card in cards}
    pair = make_policy(build_denoiser(name), lora_rank, seed=0)
    counts = [sum(p.numel() for p in group) / 1e6 for group in (pair.policy.parameters(), pair.trainable().values())]
    return MemoryRow(name, lora_rank, *counts, {batch: memory(batch) for batch in (1, 8)}, largest)


MEASURE = """
import json, sys
import torch
from dkto.training.memory import SIZES, build_denoiser, run_step
from dkto.models import make_policy
from dkto.common.machine import peak_memory_mb

name, batch, rank, precision, threads = sys.argv[1], *map(int, sys.argv[2:4]), sys.argv[4], int(sys.argv[5])
torch.set_num_threads(threads)
torch.nn.functional.scaled_dot_product_attention(*[torch.zeros(1, 1, 2, 8)] * 3)
make_policy(build_denoiser(name), rank, seed=0)  # on no memory: libraries are loaded by now
before = peak_memory_mb()
pair = make_policy(build_denoiser(name, "cpu"), rank, seed=0, frozen_dtype=getattr(torch, precision))
optimizer = torch.optim.AdamW(pair.trainable().values(), foreach=False)
for _ in range(2):
    run_step(SIZES[name], pair, optimizer, batch, getattr(torch, precision))
print(json.dumps((peak_memory_mb() - before) / 2**10))
"""


def measured_step_memory(
    name: str, *, batch: int = 1, lora_rank: int = 0, precision: str = "float32", threads: int = 1
) -> float:
    """The same measured on this CPU: growth of the resident memory of a process of its own, GB of 2^30 bytes (Linux).

    Raises:
        RuntimeError: if the process ends badly, for instance for want of memory.
    """
    arguments = [name, str(batch), str(lora_rank), precision, str(threads)]
    done = subprocess.run([sys.executable, "-c", MEASURE, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"measuring {name} ended with code {done.returncode}: {done.stderr.strip()[-200:]}")
    return float(json.loads(done.stdout.splitlines()[-1]))


def memory_table(rows: list[MemoryRow]) -> str:
    """Rows as a table in Markdown."""
    cards = list(rows[0].largest_batch)
    sizes = [f"GB at batch {batch}" for batch in rows[0].gb]
    head = ["model", "trained", "parameters", *sizes, *(f"largest batch, {card} GB" for card in cards)]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in rows:
        what = f"LoRA of rank {row.lora_rank}" if row.lora_rank else "all weights"
        need = [f"{gb:.1f}" for gb in row.gb.values()]
        count = f"{row.trained:,.0f} of {row.parameters:,.0f} M"
        batches = [str(batch) if batch else "does not fit" for batch in row.largest_batch.values()]
        lines.append("| " + " | ".join([SIZES[row.model].title, what, count, *need, *batches]) + " |")
    return "\n".join(lines)
