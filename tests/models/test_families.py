"""Every large family, of the real classes and tiny, from likes to a pipeline that plain diffusers loads."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from dkto.data.encode import prepare_feedback
from dkto.data.encoded import PreparedFeedback
from dkto.data.feedback import make_feedback
from dkto.models import load_model
from dkto.models.system import System, draw, noise_generator
from dkto.training.loop import train
from dkto.training.rewards import error_gaps, load_run, margin_interval


@pytest.fixture(scope="module")
def bright_and_dark(tmp_path_factory):
    """Training and held-out pictures: bright ones liked, dark ones disliked."""
    folder, rng, tables = tmp_path_factory.mktemp("pictures"), np.random.default_rng(1), []
    for name, count in (("train", 24), ("held-out", 40)):
        paths = []
        for index in range(count):
            level = 190 if index % 2 == 0 else 50
            pixels = np.clip(level + rng.normal(0, 30, 3) + rng.normal(0, 12, (16, 16, 3)), 0, 255).astype(np.uint8)
            paths.append(folder / f"{name}-{index}.png")
            Image.fromarray(pixels).save(paths[-1])
        pairs = [i // 2 for i in range(count)]
        tables.append(make_feedback(paths, ["a picture"] * count, [i % 2 == 0 for i in range(count)], pair_ids=pairs))
    return tables


CASES = [  # twenty seconds each: among the quick tests each family is met once, and each way of training
    pytest.param("tiny_sdxl", 0, "kto", marks=pytest.mark.slow),
    ("tiny_sdxl", 8, "kto"),
    ("tiny_sd3", 0, "kto"),
    pytest.param("tiny_sd3", 8, "kto", marks=pytest.mark.slow),
    pytest.param("tiny_sd3", 0, "dpo", marks=pytest.mark.slow),
    pytest.param("tiny_qwen_image", 8, "kto", marks=pytest.mark.slow),
    pytest.param("tiny_z_image", 8, "kto", marks=pytest.mark.slow),
    pytest.param("tiny_klein", 8, "kto", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("kind", "lora_rank", "objective"), CASES)
def test_fifty_steps_teach_a_taste_that_holds_on_new_pictures(
    kind, lora_rank, objective, request, config, bright_and_dark, tmp_path
):
    pipeline = request.getfixturevalue(kind)
    prepared, held_out = (
        prepare_feedback(table, tmp_path / str(i), str(pipeline)) for i, table in enumerate(bright_and_dark)
    )
    config = replace(
        config,
        model=str(pipeline),
        prepared_dir=prepared,
        lora_rank=lora_rank,
        objective=objective,
        max_train_steps=50,
        batch_size=8,
        beta=50.0,
        desirable_fraction=0.5,
        learning_rate=2e-2 if lora_rank else 2e-3,
        checkpoint_every=100,
    )
    assert len(list(train(config))) == 50
    _, model, pair = load_run(config.output_dir)
    data = PreparedFeedback(held_out, model)
    margin = margin_interval(config.beta * error_gaps(model, pair, data, config, draws=16), data.is_desirable)
    assert margin.low > 0, margin

    before = load_model(pipeline).load_denoiser().state_dict()
    if lora_rank:
        plain = DiffusionPipeline.from_pretrained(pipeline)
        plain.load_lora_weights(config.output_dir / "lora")
        assert any(p.abs().sum() > 0 for n, p in plain.components[pair.part].named_parameters() if "lora_B" in n)
    else:
        plain = DiffusionPipeline.from_pretrained(config.output_dir / "model")
        assert not all(torch.equal(v, before[n]) for n, v in plain.components[pair.part].state_dict().items())
    system = System.of_run(config.output_dir, steps=2)
    assert draw(system.load(), ["a picture"], [noise_generator(0, 0, 0)], system)[0].size == (16, 16)
