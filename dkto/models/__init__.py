"""One face over Stable Diffusion 1.x, 2.x, XL and 3, Qwen-Image, Z-Image and FLUX.2 klein: load, noise, predict; the
policy and its frozen reference.

`System` is what draws images: a model, an adapter and the settings of the sampler.
"""

import lazy_loader

from dkto.common import quiet  # noqa: F401  (before diffusers, which speaks while it is imported)

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "base": [
            "DiffusionModel",
            "LEFT_OUT",
            "SMALL_WORLD",
            "SMALL_WORLD_FOLDER",
            "T5_TOKENS",
            "TIMESTEP_SAMPLINGS",
            "pipeline_folder",
        ],
        "export": ["export_lora"],
        "families": ["FAMILIES", "Family", "family_of"],
        "flow": ["StableDiffusion3"],
        "language_flow": ["Flux2Klein", "QwenImage", "ZImage"],
        "hub": ["MODEL_CLASSES", "TUNED_ON", "load_model"],
        "policy": ["PolicyAndReference", "make_policy", "read_weights", "write_weights"],
        "stable_diffusion": ["StableDiffusion", "StableDiffusionXL"],
        "system": ["System", "draw", "noise_generator"],
    },
)
