"""What fits each family of models on one card of 24 GB: how images are encoded and drawn, and a LoRA is trained."""

from dataclasses import dataclass

import torch

from dkto.models.base import DiffusionModel

SMALL_SIDE = 128  # pixels; a Stable Diffusion of no larger images is of the small world's family


@dataclass(frozen=True)
class Family:
    """Settings that `dkto` takes for a model where none are given."""

    title: str
    encode_batch: int  # images per pass of the VAE in `dkto prepare`, which encodes in float32
    draw_batch: int  # images per pass in `dkto generate`
    guidance: float  # as diffusers' pipeline of the family draws
    steps: int  # of the sampler
    lora_rank: int
    learning_rate: float
    beta: float  # where `dkto calibrate` begins: the errors of each model want their own
    warmup_steps: int
    max_train_steps: int
    batch_size: int
    gradient_accumulation: int
    large: bool = True  # drawn in bfloat16 on a GPU, decoded image by image, trained in bfloat16 with checkpointing

    def encoding(self) -> dict[str, object]:
        """What `prepare_feedback` does at once."""
        return {"batch_size": self.encode_batch}

    def drawing(self) -> dict[str, object]:
        """Fields of `System` for images as this family is drawn here."""
        precision = "bfloat16" if self.large and torch.cuda.is_available() else "float32"
        return {"guidance": self.guidance, "steps": self.steps, "precision": precision}

    def passes(self) -> dict[str, object]:
        """What `generate_images` does at once."""
        return {"batch_size": self.draw_batch, "vae_slicing": self.large}

    def training(self) -> dict[str, object]:
        """Fields of `TrainConfig` for a LoRA."""
        names = ("lora_rank", "learning_rate", "beta", "warmup_steps", "max_train_steps", "batch_size")
        found = {name: getattr(self, name) for name in (*names, "gradient_accumulation")}
        more = {"precision": "bfloat16", "gradient_checkpointing": True, "checkpoint_every": 200}
        return found | (more if self.large else {})


FAMILIES = {
    "small-world": Family(
        "small world",
        encode_batch=16,
        draw_batch=25,
        guidance=3.0,
        steps=15,
        lora_rank=8,
        learning_rate=1e-3,
        beta=30.0,
        warmup_steps=5,
        max_train_steps=60,
        batch_size=16,
        gradient_accumulation=1,
        large=False,
    ),
    "sd15": Family(
        "Stable Diffusion 1.5",
        encode_batch=16,
        draw_batch=16,
        guidance=7.5,
        steps=30,
        lora_rank=32,
        learning_rate=1e-5,
        beta=5000.0,
        warmup_steps=100,
        max_train_steps=2000,
        batch_size=32,
        gradient_accumulation=1,
    ),
    "sdxl": Family(
        "SDXL",
        encode_batch=4,
        draw_batch=4,
        guidance=5.0,
        steps=30,
        lora_rank=32,
        learning_rate=1e-5,
        beta=2500.0,
        warmup_steps=100,
        max_train_steps=2000,
        batch_size=32,
        gradient_accumulation=4,
    ),
    "sd3": Family(
        "Stable Diffusion 3 medium",
        encode_batch=4,
        draw_batch=4,
        guidance=7.0,
        steps=28,
        lora_rank=32,
        learning_rate=1e-5,
        beta=1000.0,
        warmup_steps=100,
        max_train_steps=2000,
        batch_size=32,
        gradient_accumulation=4,
    ),
    "qwen-image": Family(
        "Qwen-Image",
        encode_batch=4,
        draw_batch=1,
        guidance=4.0,
        steps=50,
        lora_rank=32,
        learning_rate=1e-5,
        beta=1000.0,
        warmup_steps=100,
        max_train_steps=2000,
        batch_size=32,
        gradient_accumulation=8,
    ),
    "z-image": Family(
        "Z-Image",
        encode_batch=4,
        draw_batch=2,
        guidance=6.0,  # 5 in the pipeline's own words, where 0 is off
        steps=50,
        lora_rank=32,
        learning_rate=1e-5,
        beta=1000.0,
        warmup_steps=100,
        max_train_steps=2000,
        batch_size=32,
        gradient_accumulation=16,
    ),
    "flux2-klein": Family(
        "FLUX.2 klein 4B",
        encode_batch=4,
        draw_batch=4,
        guidance=4.0,
        steps=50,
        lora_rank=32,
        learning_rate=1e-5,
        beta=1000.0,
        warmup_steps=100,
        max_train_steps=2000,
        batch_size=32,
        gradient_accumulation=8,
    ),
}
"""By the names of `dkto memory`. No rate, beta or length of a large model was tried on a GPU here; of the last three
families no model was run at full size."""


def family_of(model: DiffusionModel) -> Family:
    """The family of a model: by its class, and Stable Diffusion by the size of its images."""
    small = model.family == "sd15" and model.image_size <= SMALL_SIDE
    return FAMILIES["small-world" if small else model.family]
