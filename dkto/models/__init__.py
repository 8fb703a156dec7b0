"""One face over latent diffusion models, and the policy and reference that are made of one.

base.py              the face: encode images and prompts, draw timesteps, add noise, target, predict
stable_diffusion.py  Stable Diffusion 1.x, 2.x and XL
flow.py              Stable Diffusion 3 and its like: rectified flows
policy.py            policy and reference, their weights on disk
"""

from dkto import quiet  # noqa: F401  (before diffusers and transformers, which speak while they are imported)
from dkto.models.base import (
    LEFT_OUT,
    SMALL_WORLD,
    SMALL_WORLD_FOLDER,
    TIMESTEP_SAMPLINGS,
    DiffusionModel,
    pipeline_folder,
    weights_fingerprint,
)
from dkto.models.flow import StableDiffusion3
from dkto.models.load import MODEL_CLASSES, load_model
from dkto.models.policy import PolicyAndReference, make_policy, read_weights, write_weights
from dkto.models.stable_diffusion import StableDiffusion, StableDiffusionXL

__all__ = [
    "LEFT_OUT",
    "MODEL_CLASSES",
    "SMALL_WORLD",
    "SMALL_WORLD_FOLDER",
    "TIMESTEP_SAMPLINGS",
    "DiffusionModel",
    "PolicyAndReference",
    "StableDiffusion",
    "StableDiffusion3",
    "StableDiffusionXL",
    "load_model",
    "make_policy",
    "pipeline_folder",
    "read_weights",
    "weights_fingerprint",
    "write_weights",
]
