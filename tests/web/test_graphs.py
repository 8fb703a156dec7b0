"""The exported graphs compute what torch computes: no browser, onnxruntime in Python."""

from functools import cache

import numpy as np
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file

from dkto.models import System, draw, noise_generator
from dkto.models.policy import LORA_FILE, write_weights
from dkto.objective.losses import denoising_error, implicit_reward, kto_loss, reference_point
from dkto.objective.utilities import UTILITIES
from dkto.training.loop import run_training
from dkto.web.blob import BLOB, KNOTS, NAMES, REACH, configs_hash, read_graph, read_layout, weights_of, wire_bytes
from dkto.web.lora import RANK, flat_lora, lora_layers


@pytest.fixture(scope="session")
def graph(tmp_path_factory):
    """`graph(name)`: an exported graph over the one blob of weights."""
    folder = tmp_path_factory.mktemp("graphs")
    weights_of(read_layout()).tofile(folder / BLOB)
    for name in NAMES:
        (folder / f"{name}.onnx").write_bytes(read_graph(name))

    @cache
    def open_graph(name):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        return onnxruntime.InferenceSession(folder / f"{name}.onnx", options)

    yield open_graph
    open_graph.cache_clear()


def error_of(batch, model, denoiser):
    predicted = model.predict(denoiser, batch.noisy_latents, batch.timesteps, batch.conditioning)
    return denoising_error(predicted, batch.target)


def slopes(utility):
    return utility.slope(torch.linspace(-REACH, REACH, KNOTS, dtype=torch.float64)).float().numpy()


class Step:
    """The step's graph, with the reference pass by the UNet's graph as the page makes it."""

    def __init__(self, graph, size):
        self.unet, self.step, self.zeros = graph("unet"), graph("step"), np.zeros(size, np.float32)

    def __call__(self, batch, lora, beta, utility):
        x, t = batch.noisy_latents.numpy(), batch.timesteps.float().numpy()
        c, target = batch.conditioning["encoder_hidden_states"].numpy(), batch.target.numpy()
        scalar = np.float32
        given = {"x": x, "t": t, "c": c, "lora": self.zeros, "scale": scalar(0)}
        (base,) = self.unet.run(None, {k: np.asarray(v) for k, v in given.items()})
        reference = ((base - target) ** 2).mean((1, 2, 3))
        sign = np.where(batch.is_desirable, 1, -1).astype(np.float32)
        given = {"x_t": x, "t": t, "c": c, "target": target, "reference_error": reference, "sign": sign}
        given |= {"weight": np.ones_like(sign), "beta": scalar(beta), "table": slopes(utility)}
        given |= {"inside": scalar(utility.sign == "inside"), "batch_point": scalar(1), "given_point": scalar(0)}
        outputs = self.step.run(None, {k: np.asarray(v) for k, v in given.items()} | {"lora": lora.numpy()})
        return [torch.from_numpy(np.asarray(each)) for each in outputs]


def test_the_graphs_belong_to_the_weights_that_ship():
    layout = read_layout()
    assert layout.configs == configs_hash()
    assert layout.lora == lora_layers(System().load(compiled=False).unet)
    assert len(wire_bytes(layout, weights_of(layout))) < 8e6
    assert max(len(read_graph(name)) for name in NAMES) < 400_000  # no weights in them


def test_graphs_of_other_networks_are_refused(tmp_path):
    (tmp_path / "layout.json").write_text('{"tensors": [], "lora": [], "configs": "other"}')
    with pytest.raises(ValueError, match="holds graphs of other networks: rerun"):
        read_layout(tmp_path)


def test_images_are_within_one_grey_level(graph):
    """The pipeline of diffusers draws with torch, and with its networks replaced by graphs."""
    system = System(steps=8)
    prompts = ["a sticker of a star", "an icon of a red triangle"]
    pipeline = system.load()
    generators = [noise_generator(3, n, 0) for n in range(2)]
    wanted = draw(pipeline, prompts, generators, system)
    text, unet, vae = graph("text"), graph("unet"), graph("vae")
    layout = read_layout()
    zeros = np.zeros(layout.lora[-1].end, np.float32)

    def predict(x, t, encoder_hidden_states, **_):
        given = {"x": x.numpy(), "t": np.full(len(x), float(t), np.float32), "c": encoder_hidden_states.numpy()}
        given |= {"lora": zeros, "scale": np.float32(0)}
        return (torch.from_numpy(unet.run(None, {k: np.asarray(v) for k, v in given.items()})[0]),)

    def encode(ids, **_):
        return (torch.from_numpy(text.run(None, {"ids": ids.numpy()})[0]),)

    def decode(z, **_):
        scaled = (z * pipeline.vae.config.scaling_factor).numpy()
        return (torch.from_numpy(vae.run(None, {"z": scaled})[0]),)

    pipeline.unet.forward, pipeline.text_encoder.forward, pipeline.vae.decode = predict, encode, decode
    found = draw(pipeline, prompts, [noise_generator(3, n, 0) for n in range(2)], system)
    apart = np.abs(np.asarray(wanted, int) - np.asarray(found, int))
    assert apart.max() <= 1 and np.asarray(wanted).std() > 20


def test_the_gradient_is_that_of_the_loss(graph, trained):
    run = trained(1)
    pair, batch, beta = run.engine.pair, run.batches.draw(0), 100.0
    torch.manual_seed(1)
    for parameter in pair.trainable().values():
        parameter.data += 0.05 * torch.randn_like(parameter)
    with pair.as_reference() as reference:
        reference_error = error_of(batch, run.model, reference)
    reward = implicit_reward(error_of(batch, run.model, pair.policy), reference_error, beta)
    point = reference_point(reward, "batch")
    step, layers, parameters = Step(graph, len(run.lora())), lora_layers(pair.policy), pair.trainable()
    for name in ("kahneman_tversky", "loss_averse", "risk_seeking", "linear"):
        loss = kto_loss(reward, batch.is_desirable, point, name)
        gradients = torch.autograd.grad(loss, list(parameters.values()), retain_graph=True)
        wanted = flat_lora(layers, dict(zip(parameters, gradients, strict=True)))
        error, found_point, _, gradient = step(batch, run.lora(), beta, UTILITIES[name])
        assert ((gradient - wanted).norm() / wanted.norm()).item() < 1e-4, name
        assert found_point.item() == pytest.approx(point.item(), abs=1e-4)
        assert torch.allclose(implicit_reward(error, reference_error, beta), reward, atol=2e-3)


def repeated(graph, run, steps):
    """The LoRA after some steps of AdamW on the graph's gradients, as `dkto train` schedules them."""
    lora = torch.nn.Parameter(run.lora())
    optimizer = torch.optim.AdamW([lora], lr=run.config.learning_rate, weight_decay=run.config.weight_decay)
    step = Step(graph, len(lora))
    for number in range(steps):
        *_, lora.grad = step(run.batches.draw(number), lora.detach(), run.config.beta, UTILITIES[run.config.utility])
        torch.nn.utils.clip_grad_norm_([lora], 1.0)
        optimizer.param_groups[0]["lr"] = run.config.learning_rate * min(1, (number + 1) / run.config.warmup_steps)
        optimizer.step()
    return lora.detach()


@pytest.mark.process
@pytest.mark.parametrize("steps", [3, pytest.param(40, marks=pytest.mark.slow)])
def test_training_ends_with_the_lora_of_dkto_train(graph, trained, steps):
    run = trained(steps)
    first = run.lora()
    found = repeated(graph, run, steps)
    run_training(run.config)
    wanted = flat_lora(read_layout().lora, load_file(run.config.output_dir / "lora" / LORA_FILE))
    assert ((wanted - first).norm() / wanted.norm()).item() > 1e-3  # it did learn
    assert ((found - wanted).norm() / wanted.norm()).item() < 1e-3
    assert ((found - wanted).norm() / (wanted - first).norm()).item() < 1e-2


def test_an_adapter_of_lower_rank_is_the_same_graph(trained, tmp_path):
    run = trained(1, lora_rank=4)
    write_weights(run.engine.pair, tmp_path)
    flat = flat_lora(read_layout().lora, load_file(tmp_path / LORA_FILE))
    a, b = read_layout().lora[0].matrices(flat)
    assert a.shape[0] == RANK and not a[4:].any() and not b[:, 4:].any() and a[:4].any()
    with pytest.raises(ValueError, match="an adapter must have one lora_A of "):
        flat_lora(read_layout().lora, {})
