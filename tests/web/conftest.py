"""A short training of the shipped model by `dkto train`, whose batches, noise and numbers the page has to repeat."""

from dataclasses import dataclass

import numpy as np
import pytest

from dkto.data.encode import prepare_feedback
from dkto.data.encoded import PreparedFeedback
from dkto.data.feedback import make_feedback
from dkto.models import System, draw, load_model, noise_generator
from dkto.training.batches import GlobalBatches
from dkto.training.config import TrainConfig
from dkto.training.engine import Engine
from dkto.web.lora import flat_lora, lora_layers

PROMPTS = ["a sticker of a star", "a toy of a ring", "an icon of a red triangle", "a painting of a square"]
QUICK = {"beta": 100.0, "learning_rate": 1e-3, "warmup_steps": 5, "batch_size": 8, "lora_rank": 8}


@dataclass
class Trained:
    """What went into a training of the small world, and what came out."""

    config: TrainConfig
    model: object
    batches: GlobalBatches
    engine: Engine

    def lora(self):
        return flat_lora(lora_layers(self.engine.pair.policy), self.engine.pair.trainable())


@pytest.fixture(scope="session")
def eight_likes(tmp_path_factory):
    """Eight images of the small world, the brighter half liked, prepared."""
    folder = tmp_path_factory.mktemp("eight")
    system = System(steps=4)
    images = draw(system.load(), PROMPTS * 2, [noise_generator(0, n, 0) for n in range(8)], system)
    paths = [folder / f"{number}.png" for number in range(8)]
    for path, image in zip(paths, images, strict=True):
        image.save(path)
    level = np.array([np.asarray(image).mean() for image in images])
    return prepare_feedback(make_feedback(paths, PROMPTS * 2, (level > np.median(level)).tolist()), folder / "prepared")


@pytest.fixture
def trained(eight_likes, tmp_path, one_thread):
    """`trained(steps)`: a training on the eight likes, ready to begin; nothing is trained yet."""
    model = load_model("small-world")

    def make(steps, **more):
        config = TrainConfig(eight_likes, tmp_path / "run", **(QUICK | {"max_train_steps": steps} | more))
        data = PreparedFeedback(eight_likes, model)
        return Trained(config, model, GlobalBatches(config, data, model), Engine(config, model))

    return make
