"""What fits each family of models on one card of 24 GB: how images are encoded and drawn."""

from dataclasses import dataclass

import torch

from dkto.models.base import DiffusionModel
from dkto.models.flow import StableDiffusion3
from dkto.models.stable_diffusion import StableDiffusionXL

SMALL_SIDE = 128  # pixels; a Stable Diffusion of no larger images is of the small world's family


@dataclass(frozen=True)
class Family:
    """Settings that `dkto` takes for a model where none are given."""

    title: str
    encode_batch: int  # images per pass of the VAE in `dkto prepare`, which encodes in float32
    draw_batch: int  # images per pass in `dkto generate`
    guidance: float  # as diffusers' pipeline of the family draws
    steps: int  # of the sampler
    large: bool = True  # drawn in bfloat16 on a GPU, and decoded image by image

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


FAMILIES = {
    "small-world": Family("small world", 16, 25, 3.0, 15, large=False),
    "sd15": Family("Stable Diffusion 1.5", 16, 16, 7.5, 30),
    "sdxl": Family("SDXL", 4, 4, 5.0, 30),
    "sd3": Family("Stable Diffusion 3 medium", 4, 4, 7.0, 28),
}


def family_of(model: DiffusionModel) -> Family:
    """The family of a model: by its class, and Stable Diffusion by the size of its images."""
    if isinstance(model, StableDiffusion3):
        return FAMILIES["sd3"]
    if isinstance(model, StableDiffusionXL):
        return FAMILIES["sdxl"]
    return FAMILIES["small-world" if model.image_size <= SMALL_SIDE else "sd15"]
