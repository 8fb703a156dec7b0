"""The page's engine draws and trains as Python does: in Node, with the browsers' runtime, without a browser."""

import base64
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from in_node import in_node
from safetensors.torch import load_file
from test_scripts import packed, unpacked

from dkto.models import System, draw, noise_generator
from dkto.models.policy import LORA_FILE
from dkto.training.loop import run_training
from dkto.web.blob import read_layout
from dkto.web.lora import flat_lora
from dkto.web.page import files, prompt_pools
from dkto.web.runtime import CACHE, ONNXRUNTIME

HELD = ["a sticker of a star", "an icon of a red triangle", "a toy of a green square"]
START = """
  const fs = require("fs"), read = (name) => fs.readFileSync(`${given.folder}/${name}`);
  const ort = require(`${given.folder}/runtime.cjs`), { pathToFileURL } = require("url");
  ort.env.wasm.numThreads = 1;
  ort.env.wasm.wasmBinary = read("wasm");
  ort.env.wasm.wasmPaths = { mjs: String(pathToFileURL(`${given.folder}/glue.mjs`)) };
  const graphs = Object.fromEntries(["text", "unet", "vae", "step"].map((name) => [name, read(name)]));
  const engine = await makeEngine(ort, JSON.parse(read("about")), read("weights"), graphs);
"""
pytestmark = [
    pytest.mark.process,
    pytest.mark.skipif(
        not (CACHE / ONNXRUNTIME.archive).is_file(), reason="no runtime in the cache: run make page once"
    ),
]


@pytest.fixture(scope="session")
def machine(tmp_path_factory):
    """The page's files, unpacked, as Node finds them."""
    folder = tmp_path_factory.mktemp("machine")
    names = {"runtime": "runtime.cjs", "glue": "glue.mjs"}
    for name, data in files().items():
        (folder / names.get(name, name)).write_bytes(data)
    return folder


def sent(batch):
    """A batch of `dkto train` as the engine takes one."""
    found = {"x_t": batch.noisy_latents, "t": batch.timesteps.float(), "target": batch.target}
    found |= {"c": batch.conditioning["encoder_hidden_states"], "sign": torch.where(batch.is_desirable, 1.0, -1.0)}
    return {name: packed(tensor.numpy()) for name, tensor in found.items()}


REPLAY = """
  await engine.open("step");
  const unpack = (batch) => Object.fromEntries(Object.entries(batch).map(([name, text]) => [name, floats(text)]));
  const lora = floats(given.lora), state = adamw(lora.length), felt = engine.feeling({ method: "kto", utility: CLOSED_FORMS.kahneman_tversky });
  const points = [], norms = [];
  for (const [i, batch] of given.batches.entries()) {
    const found = await engine.kto(unpack(batch), lora, given.beta, felt);
    points.push(found.point);
    norms.push(update(lora, found.gradient, state, given.rate * Math.min(1, (i + 1) / given.warmup)));
  }
  return { lora: bytes(lora), points, norms };
"""


@pytest.mark.parametrize("steps", [3, pytest.param(40, marks=pytest.mark.slow)])
def test_the_engine_trains_as_dkto_train(machine, trained, tmp_path, steps):
    run = trained(steps)
    config, first = run.config, run.lora()
    given = {
        "folder": str(machine),
        "lora": packed(first),
        "batches": [sent(run.batches.draw(n)) for n in range(steps)],
    }
    given |= {"beta": config.beta, "rate": config.learning_rate, "warmup": config.warmup_steps}
    found = in_node(START + REPLAY, tmp_path, **given)
    run_training(config)
    lines = (config.output_dir / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines if "grad_norm" in line]
    wanted = flat_lora(read_layout().lora, load_file(config.output_dir / "lora" / LORA_FILE))
    lora = torch.from_numpy(unpacked(found["lora"]).copy())
    apart = ((lora - wanted).norm() / wanted.norm()).item()
    print(
        f"after {steps} steps the LoRA is apart by {apart:.1e}, of its change {((lora - wanted).norm() / (wanted - first).norm()).item():.1e}"
    )
    assert apart < 1e-3
    assert found["points"] == pytest.approx([record["reference_point"] for record in records], abs=1e-3)
    assert found["norms"] == pytest.approx([record["grad_norm"] for record in records], rel=1e-3)


@pytest.mark.slow  # the browser's test draws too
def test_the_engine_draws_the_images_of_python(machine, tmp_path):
    """At every strength of a LoRA, from the same noise, within one grey level; Python merges it in at that scale."""
    layout = read_layout()
    flat = torch.randn(layout.lora[-1].end) * 0.05
    system, scales = System(), [0.0, 1.5]
    noise = [torch.randn((1, 4, 16, 16), generator=noise_generator(1, n, 0)) for n in range(len(HELD))]
    body = """
      const lora = floats(given.lora), found = [];
      for (const scale of given.scales) for (const [k, prompt] of given.prompts.entries()) {
        const { pixels } = await engine.draw({ prompt, noise: floats(given.noise[k]), scale, lora });
        found.push(bytes(pixels));
      }
      return found;"""
    given = {
        "folder": str(machine),
        "lora": packed(flat),
        "scales": scales,
        "prompts": HELD,
        "noise": list(map(packed, noise)),
    }
    found = in_node(START + body, tmp_path, **given)
    for n, scale in enumerate(scales):
        pipeline = system.load(compiled=False)
        for layer in layout.lora:
            a, b = layer.matrices(flat)
            pipeline.unet.get_submodule(layer.name).weight.data += scale * (b @ a)
        images = draw(pipeline, HELD, [noise_generator(1, k, 0) for k in range(len(HELD))], system)
        for k, image in enumerate(images):
            pixels = np.frombuffer(base64.b64decode(found[n * len(HELD) + k]), np.uint8).reshape(64, 64, 4)[..., :3]
            assert np.abs(np.asarray(image, int) - pixels).max() <= 1, (scale, HELD[k])


def test_a_stop_ends_between_two_steps_and_a_likes_batch_is_biased(machine, tmp_path):
    body = """
      const next = random(5), likes = Array.from({ length: 6 }, (_, i) => ({ prompt: "a toy of a star", latents: next.normal(1024), liked: i < 2 }));
      const settings = { method: "kto", utility: CLOSED_FORMS.kahneman_tversky, beta: 100, gamma: 0.9, steps: 50, rate: 2e-3, warmup: 5, seed: 3 }, log = [];
      const { lora, steps } = await engine.tune(likes, settings, (record) => log.push(record), () => log.length === 2);
      return { steps, log, moved: lora.some((x) => x !== 0) };"""
    found = in_node(START + body, tmp_path, folder=str(machine))
    assert found["steps"] == len(found["log"]) == 2 and found["moved"]
    for record in found["log"]:
        assert [(row < 2) for row in record["rows"]] == [sign > 0 for sign in record["sign"]]
    signs = [sign for record in found["log"] for sign in record["sign"]]
    assert signs.count(1) > 8  # of 16, at gamma 0.9


def test_guidance_by_dislikes_trains_two_adapters_and_draws_as_python_does(machine, tmp_path):
    """Each is what SFT makes of its side; the contrast of the two is `dkto.models.dislike_guidance`'s."""
    body = """
      const next = random(5), likes = Array.from({ length: 6 }, (_, i) => ({ prompt: "a toy of a star", latents: next.normal(1024), liked: i < 2 }));
      const settings = { method: "contrast", utility: CLOSED_FORMS.kahneman_tversky, beta: 100, gamma: 0.9, steps: 5, rate: 2e-3, warmup: 2, seed: 3 }, log = [];
      const { lora, steps } = await engine.tune(likes, settings, (record) => log.push(record), () => false);
      const alone = async (side, steps) => (await engine.tune(likes.map((row) => ({ ...row, liked: row.liked === side })), { ...settings, method: "sft", steps }, () => {}, () => false)).lora;
      const apart = [...(await alone(true, 3)), ...(await alone(false, 2))];
      const strong = lora.map((x) => 2 * x), images = [];
      for (const scale of [0, 1.5]) images.push(bytes((await engine.draw({ prompt: given.prompt, noise: floats(given.noise), scale, lora: strong })).pixels));
      const file = (side) => bytes(engine.file(strong, side));
      return { steps, log, same: apart.every((x, i) => x === lora[i]), images, liked: file(0), disliked: file(1) };"""
    noise = torch.randn((1, 4, 16, 16), generator=noise_generator(1, 2, 0))
    found = in_node(START + body, tmp_path, folder=str(machine), prompt=HELD[0], noise=packed(noise))
    assert found["same"] and found["steps"] == 5 and [record["step"] for record in found["log"]] == [1, 2, 3, 4, 5]
    assert [{sign > 0 for sign in record["sign"]} for record in found["log"]] == 3 * [{True}] + 2 * [{False}]
    for side in ("liked", "disliked"):
        (tmp_path / f"{side}.safetensors").write_bytes(base64.b64decode(found[side]))
    adapters = {"lora": str(tmp_path / "liked.safetensors"), "disliked_lora": str(tmp_path / "disliked.safetensors")}
    drawn = []
    for system, image in zip((System(), System(**adapters, dislike_strength=1.5)), found["images"], strict=True):
        pipeline = system.load()
        pipeline.prepare_latents = lambda *_, **__: noise.clone()
        drawn += draw(pipeline, HELD[:1], [noise_generator(0, 0, 0)], system)
        pixels = np.frombuffer(base64.b64decode(image), np.uint8).reshape(64, 64, 4)[..., :3]
        assert np.abs(np.asarray(drawn[-1], int) - pixels).max() <= 1
    assert np.abs(np.subtract(*(np.asarray(image, int) for image in drawn))).max() > 8


VISITS = """
  const visit = makeVisitor(engine, given.pools), found = [];
  for (const one of given.visits) found.push(await visit(one));
  return found;
"""


@pytest.mark.slow
@pytest.mark.parametrize("taste", ["dark", "blue", "clean"])
def test_a_taste_of_forty_likes_is_learned(machine, tmp_path, taste):
    """A simulated visitor over five seeds: at least 70 % of 24 held-out comparisons in at least four; shuffled likes
    win no more than chance does."""
    visits = [{"taste": taste, "seed": seed} for seed in range(1, 6)]
    visits += [{"taste": taste, "seed": seed, "shuffled": True} for seed in range(1, 4)]
    visitor = Path(__file__).with_name("visitor.js").read_text(encoding="utf-8")
    found = in_node(visitor + START + VISITS, tmp_path, folder=str(machine), pools=prompt_pools(), visits=visits)
    for visit, result in zip(visits, found, strict=True):
        print(visit, result)
    shares = [result["wins"] / result["n"] for result in found]
    assert sum(share >= 0.7 for share in shares[:5]) >= 4
    assert np.mean(shares[5:]) <= 0.6
