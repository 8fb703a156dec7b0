"""Guidance by dislikes: its two forms by their formulas, on denoisers and in whole pipelines."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from dkto.evaluation.generate import generate_all, generate_images
from dkto.models import SMALL_WORLD, System, draw, load_model, make_policy, noise_generator, write_weights
from dkto.models.dislike_guidance import DislikeGuided
from dkto.models.onnx_unet import OnnxUNet


class Shifted(nn.Module):
    """Predicts its input and a number, plus the prompt's; counts its rows."""

    def __init__(self, shift):
        super().__init__()
        self.shift, self.rows, self.config, self.dtype, self.device = shift, 0, None, torch.float32, "cpu"

    def forward(self, sample, timestep, encoder_hidden_states, added_cond_kwargs=None, return_dict=True):
        assert not return_dict and len(encoder_hidden_states) == len(sample)
        assert added_cond_kwargs is None or len(added_cond_kwargs["ids"]) == len(sample)
        self.rows += len(sample)
        return (sample + self.shift + encoder_hidden_states,)


@pytest.fixture
def call():
    """Noise of two images, without and with the prompt, whose embeddings are 0 and 10."""
    sample = torch.randn(2, 1, generator=torch.Generator().manual_seed(0)).repeat(2, 1)
    prompts = torch.tensor([0.0, 0.0, 10.0, 10.0])[:, None]
    return {"sample": sample, "timestep": 3, "encoder_hidden_states": prompts, "added_cond_kwargs": {"ids": prompts}}


def guided(form, strength, on=True):
    wrapper = DislikeGuided(Shifted(1.0), Shifted(2.0), Shifted(4.0), form)
    wrapper.strength, wrapper.guided = strength, on
    return wrapper


def test_contrast_adds_the_difference_of_the_prompt_whatever_the_guidance(call):
    wrapper = guided("contrast", 0.5)
    (found,) = wrapper(**call, return_dict=False)
    assert found == pytest.approx(call["sample"] + 1 + call["encoder_hidden_states"] + 0.5 * (2 - 4))
    without, prompted = found.chunk(2)
    plain, plain_prompted = (call["sample"] + 1 + call["encoder_hidden_states"]).chunk(2)
    for scale in (1.5, 7.0):
        ours = without + scale * (prompted - without)
        assert ours == pytest.approx(plain + scale * (plain_prompted - plain) - 1.0)
    assert (wrapper.base.rows, wrapper.liked.rows, wrapper.disliked.rows) == (4, 2, 2)
    unguided = {key: value[2:] if isinstance(value, torch.Tensor) else value for key, value in call.items()}
    unguided["added_cond_kwargs"] = None
    (found,) = guided("contrast", 0.5, on=False)(**unguided, return_dict=False)
    assert found == pytest.approx(unguided["sample"] + 1 + 10 - 1)


def test_negative_leads_away_from_the_disliked_without_a_prompt(call):
    wrapper = guided("negative", 0.25)
    without, prompted = wrapper(call["sample"], 3, call["encoder_hidden_states"], return_dict=False)[0].chunk(2)
    assert without == pytest.approx(call["sample"][:2] + 0.75 * 1 + 0.25 * 4)
    assert prompted == pytest.approx(call["sample"][:2] + 2 + 10)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"disliked_lora": "x"}, "disliked_lora and a dislike_strength above 0 must be given together, got 'x' and 0"),
        ({"dislike_strength": 1.0}, "must be given together, got '' and 1"),
        ({"disliked_lora": "x", "dislike_strength": -1.0}, "dislike_strength"),
        ({"dislike_form": "push"}, "dislike_form"),
        ({"disliked_lora": "x", "dislike_strength": 1.5, "dislike_form": "negative"}, "of at most 1, got 3 and 1.5"),
        (
            {"disliked_lora": "x", "dislike_strength": 1.0, "dislike_form": "negative", "guidance": 1.0},
            "must have a guidance above 1",
        ),
    ],
)
def test_settings_that_do_not_fit_together_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        System(**settings)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """Two LoRAs of the small world that move its images."""
    folder, found = tmp_path_factory.mktemp("adapters"), []
    for seed in (1, 2):
        pair = make_policy(load_model(SMALL_WORLD).load_denoiser(), lora_rank=4, seed=0)
        with torch.no_grad():
            for name, parameter in pair.trainable().items():
                if "lora_B" in name:
                    parameter.normal_(0, 0.03, generator=torch.Generator().manual_seed(seed))
        (folder / str(seed)).mkdir()
        write_weights(pair, folder / str(seed))
        found.append(str(folder / str(seed)))
    return found


def image(system, compiled=True):
    pipeline = system.load(compiled)
    (found,) = draw(pipeline, ["a red circle on a white background"], [noise_generator(0, 0, 0)], system)
    return np.asarray(found, dtype=int), pipeline


def test_a_pipeline_draws_with_both_forms_and_both_kinds_of_unet(adapters):
    liked, disliked = adapters
    plain = image(System(steps=4))[0]
    for form in ("contrast", "negative"):
        system = System(
            steps=4, lora=liked, disliked_lora=disliked, dislike_strength=0.8, dislike_form=form, guidance=2.5
        )
        ours, pipeline = image(system)
        assert isinstance(pipeline.unet, DislikeGuided) and isinstance(pipeline.unet.liked, OnnxUNet)
        assert np.abs(ours - image(system, compiled=False)[0]).max() <= 1
        assert np.abs(ours - plain).max() > 20


def test_corners_are_what_they_should_be(adapters):
    """With equal adapters, or at next to no strength, the base; without a liked one, away from the disliked."""
    same, other = adapters
    twice = System(steps=4, lora=same, disliked_lora=same, dislike_strength=3.0)
    assert np.abs(image(twice)[0] - image(System(steps=4))[0]).max() <= 1
    alone = System(steps=4, disliked_lora=same, dislike_strength=1.0)
    pushed, pipeline = image(alone)
    assert pipeline.unet.liked is pipeline.unet.base
    assert np.abs(pushed - image(System(steps=4))[0]).max() > 5
    faint = replace(alone, lora=other, dislike_strength=1e-6)
    assert np.abs(image(faint)[0] - image(System(steps=4))[0]).max() <= 1


def test_strengths_share_one_pipeline_and_a_manifest_of_a_plain_system_is_as_before(adapters, tmp_path):
    liked, disliked = adapters
    weak = System(steps=2, lora=liked, disliked_lora=disliked, dislike_strength=0.5)
    strong = replace(weak, dislike_strength=2.0)
    folders = generate_all({"weak": weak, "strong": strong}, ["a red circle"], tmp_path, images_per_prompt=1)
    assert (folders["weak"] / "p00000-s0.png").read_bytes() != (folders["strong"] / "p00000-s0.png").read_bytes()
    assert weak.record()["dislike_strength"] == 0.5 and weak.source == strong.source
    assert not any("dislike" in key for key in System().record())
    with pytest.raises(ValueError, match="holds"):
        generate_images(strong, ["a red circle"], folders["weak"], images_per_prompt=1)
