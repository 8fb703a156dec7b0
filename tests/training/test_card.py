"""`dkto.training.card`: what is said beside tuned weights is true of them, and its code runs."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from dkto.data.encode import prepare_feedback
from dkto.models import SMALL_WORLD_FOLDER
from dkto.objective.methods import METHODS
from dkto.training.loop import run_training


def card_of(config):
    folder = run_training(config) / ("lora" if config.lora_rank else "model")
    return folder, (folder / "README.md").read_text()


def drawn_by(card, folder, config):
    """The picture that the card's own code draws, in fewer steps, once the places are filled in."""
    code = re.search(r"```python\n(.*?)```", card, re.S).group(1)
    code = code.replace(f'"PATH/TO/{Path(config.model).name}"', repr(str(config.model)))
    code = code.replace('"FOLDER"', repr(str(folder))).replace('("a prompt")', '("a star", num_inference_steps=2)')
    code = code.replace('pipeline("', 'picture = pipeline("')
    names = {}
    exec(code, names)
    return names["picture"]


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_the_code_on_a_card_draws(config, lora_rank):
    folder, card = card_of(replace(config, lora_rank=lora_rank, max_train_steps=1))
    assert drawn_by(card, folder, config).width == 16
    assert f"tuned with {METHODS['kto'].title}" in card and "| utility | kahneman_tversky |" in card


def test_the_code_for_an_adapter_of_the_small_world_draws(likes, tmp_path, config):
    """Its weights lie in this package: plain diffusers knows no model of that name."""
    prepared = prepare_feedback(likes, tmp_path / "prepared", "small-world")
    config = replace(config, prepared_dir=prepared, model="small-world", lora_rank=2, max_train_steps=1)
    folder, card = card_of(config)
    assert "PATH/TO" not in card and drawn_by(card, folder, config).width == 64
    assert str(SMALL_WORLD_FOLDER) not in card


@pytest.mark.parametrize(
    ("objective", "there", "absent"),
    [
        ("dpo", ("| beta | 500.0 |", "2311.12908", "diffusion-dpo"), ("utility", "2404.04465", "desirable_fraction")),
        ("sft", ("on liked images alone", "| learning_rate |"), ("| beta |", "| utility |", "2404.04465")),
        ("sft_all", ("without the preference",), ("| beta |", "| utility |")),
    ],
)
def test_a_card_speaks_of_its_own_method(config, paired, objective, there, absent):
    _, card = card_of(replace(config, prepared_dir=paired, objective=objective, max_train_steps=1))
    assert all(text in card for text in there) and not any(text in card for text in absent)


def test_every_method_has_its_words():
    assert all(method.title and method.trained_on for method in METHODS.values())
