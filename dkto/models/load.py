"""From a name to a model."""

from pathlib import Path

from dkto.common.files import read_json
from dkto.models.base import DiffusionModel, pipeline_folder
from dkto.models.flow import StableDiffusion3
from dkto.models.stable_diffusion import StableDiffusion, StableDiffusionXL

MODEL_CLASSES: dict[str, type[DiffusionModel]] = {
    kind.pipeline_class.__name__: kind for kind in (StableDiffusion, StableDiffusionXL, StableDiffusion3)
}


def load_model(source: str | Path) -> DiffusionModel:
    """The model behind `source`, its parts loaded when they are first asked for.

    Raises:
        ValueError: if the pipeline is of a class that no face is written for.
    """
    folder = pipeline_folder(source)
    kind = read_json(folder / "model_index.json", "index of a pipeline").get("_class_name")
    if kind not in MODEL_CLASSES:
        raise ValueError(f"{folder} is a {kind}; supported: {', '.join(MODEL_CLASSES)}")
    return MODEL_CLASSES[kind](folder)
