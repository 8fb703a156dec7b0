"""Training loops to be timed, each in a process of its own: ours, and one that works as the published scripts do.

    python loops.py ours|published|pure '{"size": "small", ...}'      prints one line of JSON

The published loop, operation by operation (Diffusion-KTO's and Diffusion-DPO's scripts for Stable Diffusion 1.5):
read and resize the images, encode them with the VAE, tokenise and encode the prompts, noise; copy the policy's weights
aside, load the reference's into the same UNet, predict without gradient, load the policy's back; predict with gradient
checkpointing, KTO loss, backward, clip, AdamW. Nothing is slowed: it runs under the same threads, precision, batch
and optimiser, in the same order of memory, and moves nothing to where it already is. Its steps take turns, from
AdamW as the scripts call it to the fused kernel that ours takes and back, so that each row is compared like for like.
"""

import json
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dkto.common.machine import peak_memory_mb
from dkto.data.decode import to_pixel_values
from dkto.data.encode import prepare_feedback
from dkto.data.encoded import PreparedFeedback
from dkto.data.feedback import make_feedback
from dkto.data.images import load_image
from dkto.models import SMALL_WORLD_FOLDER, load_model
from dkto.objective.losses import denoising_error, implicit_reward, kto_loss, reference_point
from dkto.training.batches import GlobalBatches
from dkto.training.config import TrainConfig
from dkto.training.engine import Engine
from dkto.training.loop import learning_rate_at, resume
from dkto.training.memory import SIZES, build_denoiser
from dkto.training.noise_bank import fill_bank
from dkto.training.run_folder import RunFolder
from dkto.training.step import Run, denoising_errors, finish_step, train_step

# a UNet of the real class that a shared machine can bear, to try the script with
REDUCED = {"block_out_channels": (32, 64), "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D")}
REDUCED |= {"up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "cross_attention_dim": 768, "sample_size": 64}


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ENCODERS = {"text_encoder": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}}
ENCODERS |= {"text_encoder_2": {"hidden_size": 1280, "num_hidden_layers": 32, "num_attention_heads": 20}}


def denoiser_of(size):
    """Random weights, the same ones in every process."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    if size == "reduced":
        return UNet2DConditionModel(**REDUCED)
    return build_denoiser("small-world" if size == "small" else size, DEVICE)


def make_pipeline(folder, size):
    """VAE, text encoders and scheduler on disk; the UNet's configuration only, its weights are made on the spot."""
    if size == "small":
        return SMALL_WORLD_FOLDER
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    torch.manual_seed(0)
    folder.mkdir(parents=True)
    config = REDUCED if size == "reduced" else SIZES[size].config
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    sizes = {"block_out_channels": (128, 256, 512, 512), "sample_size": 8 * config["sample_size"]}
    with torch.device(DEVICE):
        AutoencoderKL(**blocks, **sizes, layers_per_block=2).save_pretrained(folder / "vae")
    tokenizer = CLIPTokenizer.from_pretrained(SMALL_WORLD_FOLDER, subfolder="tokenizer", model_max_length=77)
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    kind, index = "StableDiffusionPipeline", {"vae": ["diffusers", "AutoencoderKL"]}
    for name, sizes in ENCODERS.items():
        if name == "text_encoder_2" and size != "sdxl":
            continue
        cls, width = CLIPTextModel if name == "text_encoder" else CLIPTextModelWithProjection, sizes["hidden_size"]
        options = sizes | ids | {"vocab_size": 49_408, "intermediate_size": 4 * width, "projection_dim": width}
        with torch.device(DEVICE):
            cls(CLIPTextConfig(**options)).save_pretrained(folder / name)
        where = name.replace("text_encoder", "tokenizer")
        tokenizer.save_pretrained(folder / where)
        index |= {name: ["transformers", cls.__name__], where: ["transformers", "CLIPTokenizer"]}
    if size == "sdxl":
        kind = "StableDiffusionXLPipeline"
    with torch.device("meta"):
        UNet2DConditionModel(**config).save_config(folder / "unet")
    shutil.copytree(SMALL_WORLD_FOLDER / "scheduler", folder / "scheduler")
    index |= {"unet": ["diffusers", "UNet2DConditionModel"], "scheduler": ["diffusers", "DDIMScheduler"]}
    (folder / "model_index.json").write_text(json.dumps({"_class_name": kind} | index))
    return folder


def make_material(folder, pipeline, count, side):
    """Likes of `count` images, and what was prepared of them, as options of a loop."""
    rng, paths = np.random.default_rng(0), [folder / f"{i:03d}.jpg" for i in range(count)]
    for path in paths:
        coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        coarse.resize((side, side), Image.Resampling.BICUBIC).save(path, quality=92)
    likes = make_feedback(paths, ["a red circle"] * count, [i % 2 for i in range(count)])
    lines = [{"image": str(p), "prompt": "a red circle", "liked": i % 2} for i, p in enumerate(paths)]
    (folder / "likes.jsonl").write_text("\n".join(map(json.dumps, lines)))
    prepared = prepare_feedback(likes, folder / "prepared", str(pipeline), batch_size=1)
    found = {"folder": pipeline, "prepared": prepared, "table": folder / "likes.jsonl", "output": folder / "run"}
    return {name: str(path) for name, path in found.items()}


def open_model(folder, size):
    """The face of a folder from `make_pipeline`; of a whole pipeline, where `size` is "as it lies"."""
    model = load_model(folder)
    if size != "as it lies":
        model.load_denoiser = lambda: denoiser_of(size)
    return model


def finish():
    """Wait for the device."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


class Ours:
    """The trainer's own parts, step by step; what it reads was prepared before."""

    def __init__(self, options):
        self.config = TrainConfig(
            Path(options["prepared"]),
            Path(options["output"]),
            model=options["folder"],
            batch_size=options["batch"],
            beta=100.0,
            learning_rate=1e-6,
            warmup_steps=1,
            lora_rank=options["lora_rank"],
            precision=options["precision"],
            gradient_checkpointing=options.get("gradient_checkpointing", False),
            max_train_steps=10**6,
            **options.get("method", {}),
        )
        self.model = open_model(options["folder"], options["size"])
        data = PreparedFeedback(self.config.prepared_dir, self.model)
        self.batches = GlobalBatches(self.config, data, self.model)
        self.engine, self.folder = Engine(self.config, self.model), RunFolder(self.config)
        self.run = Run(self.config, self.model, self.engine, self.batches)
        resume(self.run, self.folder)
        self.batches.bank = fill_bank(self.run) if self.config.noise_bank else None
        self.config.output_dir.mkdir(parents=True, exist_ok=True)

    def step(self):
        began, rate = time.monotonic(), learning_rate_at(self.run.progress.global_step, self.config)
        self.engine.set_rate(rate)
        record = finish_step(self.run, train_step(self.run), rate, began)
        assert record is not None
        self.folder.append(record)

    def tensors(self):
        return self.batches.draw(self.run.progress.global_step).to(self.engine.device)

    def pure(self, batch):
        """Reference forward, policy forward and backward, optimizer step, on tensors that are there already."""
        errors = denoising_errors(self.run, batch)
        (errors.policy - errors.reference).mean().backward()
        self.engine.prepared_optimizer.step()
        self.engine.prepared_optimizer.zero_grad()


class Published:
    """The loop of the published scripts, its operations timed by name."""

    def __init__(self, options):
        self.options, self.seconds = options, {}
        self.model = open_model(options["folder"], options["size"])
        self.vae = self.model.load_vae().to(DEVICE)
        self.text = self.model.load_text()
        self.text[1].to(DEVICE)
        self.unet = self.model.load_denoiser().to(DEVICE).train()
        self.unet.enable_gradient_checkpointing()
        self.reference = {name: value.clone() for name, value in self.unet.state_dict().items()}
        self.optimizer = torch.optim.AdamW(self.unet.parameters(), lr=1e-6, weight_decay=0.01)
        self.rng, self.dtype = np.random.default_rng(0), getattr(torch, options["precision"])
        self.rows = [json.loads(line) for line in Path(options["table"]).read_text().splitlines()]

    def timed(self, name, function):
        began = time.perf_counter()
        result = function()
        finish()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began
        return result

    def mixed(self):
        return torch.autocast(DEVICE, self.dtype, enabled=self.dtype != torch.float32)

    def predict(self, *inputs):
        with self.mixed():
            return self.model.predict(self.unet, *inputs)

    @torch.no_grad()
    def reference_pass(self, inputs):
        policy = self.timed("swap weights", lambda: {k: v.clone() for k, v in self.unet.state_dict().items()})
        self.timed("swap weights", lambda: self.unet.load_state_dict(self.reference))
        prediction = self.timed("reference forward", lambda: self.predict(*inputs))
        self.timed("swap weights", lambda: self.unet.load_state_dict(policy))
        return prediction

    def step(self, fused=False):
        rows = [self.rows[i] for i in self.rng.integers(len(self.rows), size=self.options["batch"])]
        size = self.model.image_size
        pixels = self.timed("read images", lambda: [to_pixel_values(load_image(Path(r["image"])), size) for r in rows])
        pixels = torch.stack(pixels).to(DEVICE)
        prompts = [row["prompt"] for row in rows]
        with self.mixed():  # the scripts give both encoders the precision of the passes
            mean, std = self.timed("encode images", lambda: self.model.encode_images(self.vae, pixels))
            conditioning = self.timed("encode prompts", lambda: self.model.encode_prompts(*self.text, prompts))
        latents = mean + std * torch.randn_like(mean)
        noise, timesteps = torch.randn_like(latents), torch.randint(0, 1000, (len(rows),), device=DEVICE)
        inputs = (self.model.add_noise(latents, noise, timesteps), timesteps, conditioning)
        reference_error = denoising_error(self.reference_pass(inputs), noise)
        prediction = self.timed("policy forward", lambda: self.predict(*inputs))
        reward = implicit_reward(denoising_error(prediction, noise), reference_error, 100.0)
        liked = torch.tensor([bool(row["liked"]) for row in rows], device=DEVICE)
        loss = kto_loss(reward, liked, reference_point(reward))
        self.timed("policy backward", loss.backward)
        self.timed("clip", lambda: torch.nn.utils.clip_grad_norm_(self.unet.parameters(), 1.0))
        self.optimizer.param_groups[0]["fused"] = fused
        self.timed("optimizer fused" if fused else "optimizer", self.optimizer.step)
        self.optimizer.zero_grad()


def in_turn(ours, theirs, rounds, given):
    """Ratios of the times of two functions that go in turn; the second gets what `given` makes beforehand."""
    ratios = []
    for number in range(rounds):
        batch, seconds = given(), {}
        for name in ("ours", "theirs") if number % 2 else ("theirs", "ours"):
            began = time.perf_counter()
            ours() if name == "ours" else theirs(batch)
            finish()
            seconds[name] = time.perf_counter() - began
        ratios.append(seconds["ours"] / seconds["theirs"])
    return ratios


def main(kind, options):
    torch.set_num_threads(options["threads"])
    loop = Published(options) if kind == "published" else Ours(options)
    for _ in range(options["warmup"]):
        loop.step()
    if kind == "pure":
        print(json.dumps({"ratios": in_turn(loop.step, loop.pure, options["steps"], loop.tensors)}))
        return
    if kind == "kto":
        other = Ours(options | {"method": {}, "output": f"{options['output']}-kto"})
        print(json.dumps({"ratios": in_turn(loop.step, lambda _: other.step(), options["steps"], lambda: None)}))
        return
    turns = [{}] * options["steps"]
    if kind == "published":
        turns = [{"fused": number % 2 == 1} for number in range(2 * options["steps"] - 1)]
        loop.seconds.clear()
    times = {}
    for how in turns:
        began = time.perf_counter()
        loop.step(**how)
        times.setdefault("_fused" if how.get("fused") else "", []).append(time.perf_counter() - began)
    result = {f"samples_per_second{name}": options["batch"] / float(np.median(took)) for name, took in times.items()}
    result["peak_mb"] = peak_memory_mb()
    if kind == "published":
        counts = {"optimizer": len(times[""]), "optimizer fused": len(times["_fused"])}
        result["seconds"] = {name: value / counts.get(name, len(turns)) for name, value in loop.seconds.items()}
    print(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
