"""The UNet that only draws: equal to torch's, and for the small world's form alone."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from dkto.models import SMALL_WORLD, System, draw, load_model, make_policy, noise_generator, write_weights
from dkto.models.onnx_unet import CONFIG, GRAPH, OnnxUNet, has_graph
from dkto.world.scenes import prompts_for

PROMPTS = prompts_for("test", 6, 0)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A LoRA of the small world that moves its images."""
    folder = tmp_path_factory.mktemp("adapter")
    pair = make_policy(load_model(SMALL_WORLD).load_denoiser(), lora_rank=4, seed=0)
    with torch.no_grad():
        for name, parameter in pair.trainable().items():
            if "lora_B" in name:
                parameter.normal_(0, 0.05, generator=torch.Generator().manual_seed(1))
    write_weights(pair, folder)
    return str(folder)


def images(system, compiled=True):
    pipeline = system.load(compiled)
    assert isinstance(pipeline.unet, OnnxUNet) is compiled
    found = draw(pipeline, PROMPTS, [noise_generator(0, p, 0) for p in range(len(PROMPTS))], system)
    return np.stack([np.asarray(image, dtype=int) for image in found])


@pytest.mark.parametrize("settings", [{}, {"guidance": 1.0}, {"negative_prompt": "Weird image. "}])
def test_images_are_torchs_within_one_level(settings, adapter):
    system = System(lora=adapter, steps=8, **settings)
    ours, theirs = images(system), images(system, compiled=False)
    assert np.abs(ours - theirs).max() <= 1
    moved = np.abs(images(replace(system, lora="")) - theirs).max()
    assert moved > 20, "the adapter must be seen"


def test_another_form_or_precision_or_a_request_keeps_torch(tiny_pipeline):
    assert not has_graph(load_model(tiny_pipeline).load_denoiser())
    assert not isinstance(System(precision="bfloat16").load().unet, OnnxUNet)
    assert not has_graph(load_model(SMALL_WORLD).load_denoiser().to(torch.bfloat16))


@pytest.mark.slow  # 20 seconds: the exporter runs
def test_the_shipped_graph_is_what_the_exporter_makes(tmp_path, monkeypatch):
    from dkto.workshop import unet_graph

    monkeypatch.setattr(unet_graph, "GRAPH", tmp_path / GRAPH.name)
    monkeypatch.setattr(unet_graph, "CONFIG", tmp_path / CONFIG.name)
    unet_graph.write_graph()
    assert (tmp_path / GRAPH.name).read_bytes() == GRAPH.read_bytes()
    assert (tmp_path / CONFIG.name).read_text() == CONFIG.read_text()
