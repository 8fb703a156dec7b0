"""The stages of the GPU check, each in a process of its own; each figure is on disk before the next is measured."""

import gc
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from benchmarks.loops import Ours, Published, denoiser_of, finish, in_turn, make_material, make_pipeline
from tiny_models import make_tiny_sd, make_tiny_sdxl

from gpu.expected import MEMORY_GB, PEAK_TFLOPS, SCORERS

ROOT = Path(__file__).parents[2]
ON_GPU = torch.cuda.is_available()
ROUNDS = 5  # repetitions of a figure; their median counts
LARGEST = {"sd15": 32, "sdxl": 8}  # samples a step; halved while the card has too little memory


@dataclass(frozen=True)
class Check:
    """Where a stage works, and whether it only tries the script: tiny networks, two repetitions."""

    folder: Path
    dry: bool

    @property
    def rows(self) -> Path:
        """What was measured so far, a line each."""
        return self.folder / "rows.jsonl"

    def note(self, key: str, value: float | None = None, why: str = "") -> None:
        """Keep a figure, or why there is none."""
        with self.rows.open("a") as file:
            file.write(json.dumps({"key": key, "value": value, "why": why}) + "\n")

    def attempt(self, *keys: str, by: Callable[[], object]) -> None:
        """Keep the figures that a function returns, or why it failed: the other figures of the stage follow anyhow."""
        try:
            found = by()
            for key, value in zip(keys, found if isinstance(found, tuple) else (found,), strict=True):
                self.note(key, float(value))
        except Exception as error:
            for key in keys:
                self.note(key, why=f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}")

    def known(self, key: str) -> float:
        """A figure of an earlier stage."""
        lines = map(json.loads, self.rows.read_text().splitlines())
        return next(line["value"] for line in lines if line["key"] == key and line["value"] is not None)

    def material(self, size: str) -> dict:
        """Likes, prepared with a pipeline of that size, as options of a loop; made once."""
        folder = self.folder / size
        if not (folder / "options.json").is_file():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            if self.dry and size != "small":
                pipeline = {"sd15": make_tiny_sd, "sdxl": make_tiny_sdxl}[size](folder)
            else:
                pipeline = make_pipeline(folder / "pipeline", size)
            side = 64 if self.dry or size == "small" else {"sd15": 512, "sdxl": 1024}[size]
            (folder / "options.json").write_text(json.dumps(make_material(folder, pipeline, 32, side)))
        options = json.loads((folder / "options.json").read_text())
        return options | {"size": "as it lies" if self.dry else size, "precision": "bfloat16", "lora_rank": 0}

    @property
    def rounds(self) -> int:
        return 2 if self.dry else ROUNDS


def seconds(function: Callable, rounds: int) -> float:
    """Median time of a call, the device's work included."""
    took = []
    for _ in range(rounds):
        finish()
        began = time.perf_counter()
        function()
        finish()
        took.append(time.perf_counter() - began)
    return float(np.median(took))


def peak_gb(function: Callable) -> float:
    """Most memory of the GPU that was held during a call, GB of 2^30 bytes."""
    if not ON_GPU:
        raise RuntimeError("this machine has no GPU")
    finish()
    torch.cuda.reset_peak_memory_stats()
    function()
    finish()
    return torch.cuda.max_memory_allocated() / 2**30


def free() -> None:
    """Give memory of what is no longer there back."""
    gc.collect()
    if ON_GPU:
        torch.cuda.empty_cache()


def tests(check: Check) -> None:
    """The tests marked gpu."""
    report = check.folder / "tests.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", f"--junitxml={report}"]
    places = ["tests/training"] if not check.dry else ["tests/training/test_engine.py"]
    subprocess.run([*command, *places], cwd=ROOT, check=False)
    suite = ElementTree.parse(report).getroot().find("testsuite")
    total, skipped, *wrong = (int(suite.get(name)) for name in ("tests", "skipped", "failures", "errors"))
    check.note("tests/failed", sum(wrong))
    check.note("tests/passed", total - skipped - sum(wrong))


def matmul_tflops(check: Check) -> float:
    """What the card reaches in the product of two large matrices, TFLOP/s."""
    side = 256 if check.dry else 8192
    one = torch.randn(side, side, device="cuda" if ON_GPU else "cpu", dtype=torch.bfloat16)
    seconds(lambda: one @ one, 3)
    return 2 * side**3 / seconds(lambda: one @ one, 10) / 1e12


def card(check: Check) -> None:
    """The card's ceiling."""
    check.attempt("card/matmul_tflops", by=lambda: matmul_tflops(check))


def loop_that_fits(check: Check, size: str, kind: type, largest: int, **more: object) -> Ours | Published:
    """A loop at the largest batch, from `largest` downwards by halves, of which three steps fit into memory."""
    batch = largest
    while True:
        loop = None
        try:
            output = str(check.folder / f"run-{kind.__name__}-{size}-{batch}")
            loop = kind(check.material(size) | {"batch": batch, "output": output} | more)
            for _ in range(3):
                loop.step()
            return loop
        except torch.OutOfMemoryError:
            if batch <= 2:
                raise
            batch //= 2
        del loop
        free()


def steps(check: Check, size: str) -> None:
    """Our step of full fine-tuning: over its bare computation, against the card's peak, and with other settings."""
    checkpointing = size == "sdxl"  # without, 8 samples of 1024 pixels take more than any card has
    largest = 4 if check.dry else LARGEST[size]
    loop = loop_that_fits(check, size, Ours, largest, gradient_checkpointing=checkpointing)
    batch_size, engine, batch = loop.config.batch_size, loop.engine, loop.tensors()
    check.note(f"{size}/batch", batch_size)
    took = seconds(loop.step, check.rounds)
    check.note(f"{size}/samples_per_second", batch_size / took)
    check.attempt(
        f"{size}/step_over_bare",
        by=lambda: np.median(in_turn(loop.step, loop.pure, 2 * check.rounds, lambda: batch)),
    )
    check.attempt(f"{size}/draw_over_step", by=lambda: seconds(loop.tensors, check.rounds) / took)
    check.attempt(f"{size}/peak_gb", by=lambda: peak_gb(loop.step))
    check.attempt(f"{size}/bare_peak_gb", by=lambda: peak_gb(lambda: loop.pure(batch)))
    check.attempt(f"{size}/idle", by=lambda: idle_share(loop.step))

    def shares() -> tuple[float, float]:
        tflops = 4 * forward_flops(loop, batch) / took / 1e12
        matmul = check.known("card/matmul_tflops")
        name = torch.cuda.get_device_name() if ON_GPU else ""
        stated = next((peak for part, peak in PEAK_TFLOPS.items() if part in name), matmul)
        return tflops / stated, tflops / matmul

    check.attempt(f"{size}/share_of_peak", f"{size}/share_of_matmul", by=shares)

    def unfused() -> float:
        other = torch.optim.AdamW(engine.parameters, lr=1e-6, foreach=True)
        optimizers, times = (engine.prepared_optimizer, other), []
        for optimizer in optimizers:
            loss_of(loop, batch).backward()
            times.append(seconds(optimizer.step, check.rounds))
            optimizer.state.clear() if optimizer is other else engine.optimizer.state.clear()
            free()
        engine.prepared_optimizer.zero_grad()
        return times[1] / times[0]

    check.attempt(f"{size}/fused", by=unfused)

    def relative(prepare: Callable[[torch.nn.Module], object]) -> float:
        engine.optimizer.state.clear()
        for network in (engine.pair.policy, engine.pair.reference):
            prepare(network)
        for _ in range(2):
            loop.step()
        return took / seconds(loop.step, check.rounds)

    last = torch.channels_last
    check.attempt(f"{size}/channels_last", by=lambda: relative(lambda network: network.to(memory_format=last)))

    def compiled() -> tuple[float, float, float]:
        plain = torch.contiguous_format
        for network in (engine.pair.policy, engine.pair.reference):
            network.to(memory_format=plain)
        engine.pair.policy.load_state_dict(engine.pair.reference.state_dict())  # as at the first step
        engine.compile_blocks(backend="eager" if check.dry else "inductor")
        began = time.perf_counter()
        with torch.no_grad():
            reward = 5000 * loss_of(loop, batch, torch.abs)
        ratio = relative(lambda network: None)
        return reward, time.perf_counter() - began, ratio

    keys = [f"{size}/{name}" for name in ("compile_first_reward", "compile_seconds", "compile")]
    check.attempt(*keys, by=compiled)


def loss_of(loop: Ours, batch: object, of: Callable = lambda gap: gap) -> torch.Tensor:
    """Mean gap of the errors of policy and reference."""
    from dkto.training.step import denoising_errors

    errors = denoising_errors(loop.run, batch)
    return of(errors.policy - errors.reference).mean()


def forward_flops(loop: Ours, batch: object) -> float:
    """Operations of one forward pass; a step of full fine-tuning has four such: reference, policy, backward twice."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, loop.engine.pair.as_reference() as network, loop.engine.autocast():
        loop.model.predict(network, batch.noisy_latents, batch.timesteps, batch.conditioning)
    return counter.get_total_flops()


def idle_share(step: Callable) -> float:
    """Share of three steps in which no kernel runs and nothing is copied."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    if not ON_GPU:
        raise RuntimeError("this machine has no GPU")
    finish()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        began = time.perf_counter()
        for _ in range(3):
            step()
        finish()
        wall = 1e6 * (time.perf_counter() - began)
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in profiler.events()
        if event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False)
    )
    busy = reached = 0.0
    for start, end in spans:
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    if not busy:
        raise RuntimeError("the profiler saw no kernel")
    return max(0.0, 1 - busy / wall)


def published(check: Check, size: str) -> None:
    """The loop of the published scripts at our batch, in bf16, its reading of images left out."""
    largest = int(check.known(f"{size}/batch"))
    loop = loop_that_fits(check, size, Published, largest)
    rates = []
    for _ in range(check.rounds):
        loop.seconds.clear()
        took = seconds(lambda: loop.step(fused=True), 1) - loop.seconds["read images"]
        rates.append(loop.options["batch"] / took)
    check.attempt(
        f"{size}/over_published", by=lambda: check.known(f"{size}/samples_per_second") / float(np.median(rates))
    )
    check.attempt(f"{size}/published_peak_gb", by=lambda: peak_gb(loop.step))


def resume(check: Check) -> None:
    """The small world on the card, by deterministic kernels: whole, whole again, and with a stop in the middle."""
    from safetensors.torch import load_file

    from dkto.training import TrainConfig, train

    torch.use_deterministic_algorithms(True, warn_only=True)
    options, weights = check.material("small"), []
    for number, stop in enumerate((0, 0, 5)):
        output = check.folder / f"resume-{number}"
        settings = {"beta": 500.0, "learning_rate": 1e-4, "warmup_steps": 1, "max_train_steps": 10, "batch_size": 8}
        settings |= {"checkpoint_every": 5, "precision": "float32" if check.dry else "bfloat16"}
        config = TrainConfig(Path(options["prepared"]), output, **settings)
        if stop:
            run = train(config, should_stop=lambda: True)
            assert len(list(run)) == 1, "one step, then a checkpoint"
            run = train(config)
            list(itertools.islice(run, stop))
            run.close()
        list(train(config))
        weights.append(load_file(output / "model" / "unet" / "diffusion_pytorch_model.safetensors"))

    def difference(other: dict) -> float:
        return max(float((value - other[name]).abs().max()) for name, value in weights[0].items())

    check.note("resume/repeat", difference(weights[1]))
    check.note("resume/difference", difference(weights[2]))


def memory(check: Check) -> None:
    """Peak of our step with gradient checkpointing over what `dkto memory` says of it; and what the card holds more."""
    for (size, rank), computed in MEMORY_GB.items():
        batch, rank = (4, min(rank, 4)) if check.dry else (8, rank)
        key = f"memory/{size}-{32 if rank else 0}"

        def ratio(size: str = size, rank: int = rank, batch: int = batch, computed: float = computed) -> tuple:
            options = {"lora_rank": rank, "gradient_checkpointing": True, "batch": batch}
            loop = Ours(check.material(size) | options | {"output": str(check.folder / f"memory-{size}-{rank}")})
            loop.step()
            peak = peak_gb(loop.step)
            left, whole = torch.cuda.mem_get_info()
            return peak / computed, (whole - left) / 2**30 - peak

        check.attempt(key, f"{key}-beyond_gb", by=ratio)
        free()


def generate(check: Check) -> None:
    """Images per second of `generate_images`, from the end of its first batch to that of its last."""
    from dkto.evaluation.generate import generate_images
    from dkto.models import System

    pipeline, batch = Path(check.material("sd15")["folder"]), 4 if check.dry else 25
    if not check.dry:
        denoiser_of("sd15").save_pretrained(pipeline / "unet")
    options = {"steps": 2 if check.dry else 20, "precision": "float32" if check.dry else "bfloat16"}
    prompts = ["a red circle", "a blue square", "a green star"]
    folder = generate_images(
        System(model=str(pipeline), **options),
        prompts,
        check.folder / "images",
        images_per_prompt=batch,
        batch_size=batch,
        num_processes=0,
    )
    ends = [max(path.stat().st_mtime for path in folder.glob(f"p{number:05d}-s*.png")) for number in range(3)]
    check.note("generate/images_per_second", 2 * batch / (ends[2] - ends[0]))


def scorers(check: Check) -> None:
    """Images per second of five published scorers, at full size with random weights."""
    from PIL import Image

    rng, count = np.random.default_rng(0), 8 if check.dry else 128
    images = [Image.fromarray(rng.integers(0, 256, (512, 512, 3), dtype=np.uint8)) for _ in range(count)]
    for name in SCORERS:

        def rate(name: str = name) -> float:
            scorer = with_random_weights(name, check)
            scorer(images[:8], ["a red circle"] * 8)
            return count / seconds(lambda: scorer(images, ["a red circle"] * count), 2)

        check.attempt(f"scorers/{name}", by=rate)
        free()


def with_random_weights(name: str, check: Check) -> object:
    """A published scorer that finds a network of its shape with random weights where its own would be loaded."""
    from transformers import BertTokenizer, CLIPConfig, CLIPModel, CLIPTokenizer

    from dkto.evaluation.scorers import SCORERS as KNOWN
    from dkto.evaluation.scorers import image_reward
    from dkto.evaluation.scorers.clip import AestheticsPredictor
    from dkto.evaluation.scorers.network import ClipWithTokenizer
    from dkto.evaluation.scorers.open_clip import VIT_H_14
    from dkto.models import SMALL_WORLD_FOLDER

    if check.dry:
        small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
        image_reward.VISION.update(small)
        image_reward.TEXT.update(small, encoder_hidden_size=32)

    def network() -> torch.nn.Module:
        torch.manual_seed(0)
        if name == "image_reward":
            vocabulary = check.folder / "vocab.txt"
            vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "circle"]))
            return image_reward.ImageRewardModel(BertTokenizer(str(vocabulary)))
        text, vision = (VIT_H_14[part] for part in ("text_config", "vision_config"))
        if name in ("laion_aesthetics", "clip_l14"):  # ViT-L/14
            text = text | {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12}
            text |= {"num_attention_heads": 12}
            vision = vision | {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24}
        width = 768 if name in ("laion_aesthetics", "clip_l14") else 1024
        if check.dry:
            text, vision, width = text | small, vision | small, 32
        config = CLIPConfig(projection_dim=width, text_config=text, vision_config=vision)
        clip = ClipWithTokenizer(
            CLIPModel(config), CLIPTokenizer.from_pretrained(SMALL_WORLD_FOLDER, subfolder="tokenizer")
        )
        return AestheticsPredictor(clip) if name == "laion_aesthetics" else clip

    kind = type(KNOWN[name])
    methods = {"load": lambda self: network().eval().requires_grad_(False), "weights_about": lambda self: {}}
    return type(kind.__name__, (kind,), methods)(name=name)


STAGES: dict[str, tuple[Callable[[Check], None], float]] = {
    "card": (card, 30),
    "steps-sd15": (lambda check: steps(check, "sd15"), 120),
    "published-sd15": (lambda check: published(check, "sd15"), 45),
    "memory": (memory, 75),
    "resume": (resume, 40),
    "steps-sdxl": (lambda check: steps(check, "sdxl"), 120),
    "published-sdxl": (lambda check: published(check, "sdxl"), 60),
    "generate": (generate, 60),
    "scorers": (scorers, 60),
    "tests": (tests, 90),
}
"""Each stage with the seconds that it may take, by weight: the last ones are left out if time runs short."""


def main(stage: str, folder: Path, dry: bool) -> None:
    """One stage, in this process."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    STAGES[stage][0](Check(folder, dry))
