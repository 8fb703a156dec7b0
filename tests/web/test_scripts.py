"""The page's scripts say what Python says: tokens, sampler, optimiser, utilities, intervals, files. They run in Node."""

import base64
import io
import zipfile

import numpy as np
import pandas as pd
import pytest
import torch
from in_node import in_node
from safetensors.torch import load

from dkto.evaluation.metrics import wilson_interval
from dkto.models import System, load_model
from dkto.objective.formula import compile_expression
from dkto.objective.utilities import UTILITIES
from dkto.web.blob import read_layout, weights_of, wire_bytes
from dkto.web.lora import flat_lora
from dkto.web.page import about, prompt_pools

pytestmark = pytest.mark.process

ODD = ["", "Photograph of an astronaut, 4k!!", "don't   stop", "ein grüner Stern über 12 Kreisen", "a" * 60, "日本"]


def packed(array):
    return base64.b64encode(np.ascontiguousarray(array, "<f4").tobytes()).decode()


def unpacked(text):
    return np.frombuffer(base64.b64decode(text), "<f4")


def test_token_ids_are_those_of_clip(tmp_path):
    prompts = [text for pool in prompt_pools().values() for part in pool.values() for text in part] + ODD
    (tokenizer,) = load_model("small-world").tokenizers()
    wanted = tokenizer(prompts, padding="max_length", max_length=24, truncation=True).input_ids
    found = in_node(
        "return given.prompts.map(makeTokenizer(given.about));", tmp_path, prompts=prompts, about=about()["tokenizer"]
    )
    assert found == wanted


def test_weights_arrive_as_they_were(tmp_path):
    layout = read_layout()
    blob = weights_of(layout)
    (tmp_path / "wire").write_bytes(wire_bytes(layout, blob))
    body = """
      const wire = require("fs").readFileSync(given.path), all = unpackWeights(wire, given.tensors);
      let refused = "";
      try { unpackWeights(wire.subarray(2), given.tensors); } catch (error) { refused = error.message; }
      require("fs").writeFileSync(given.path + ".out", Buffer.from(all.buffer));
      return refused;"""
    refused = in_node(body, tmp_path, path=str(tmp_path / "wire"), tensors=layout.tensors)
    assert np.array_equal(np.fromfile(tmp_path / "wire.out", np.float32), blob)
    assert "the file is not whole" in refused


def test_the_sampler_takes_the_steps_of_diffusers(tmp_path):
    scheduler = System().load().scheduler
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((15, 64)).astype(np.float32)
    x = torch.from_numpy(rng.standard_normal(64).astype(np.float32))
    scheduler.set_timesteps(15)
    body = """
      const { timesteps, step } = solver(15, cumulativeAlphas(given.schedule)), x = floats(given.x);
      given.noise.forEach((noise, i) => step(i, x, floats(noise)));
      return { timesteps, x: bytes(x) };"""
    noises = [packed(each) for each in noise]
    found = in_node(body, tmp_path, schedule=about()["schedule"], x=packed(x), noise=noises)
    for t, each in zip(scheduler.timesteps, noise, strict=True):
        x = scheduler.step(torch.from_numpy(each), t, x).prev_sample
    assert found["timesteps"] == scheduler.timesteps.tolist()
    assert np.allclose(unpacked(found["x"]), x, atol=2e-5)


def test_the_optimiser_is_torchs(tmp_path):
    rng = np.random.default_rng(0)
    start, gradients = (
        rng.standard_normal(50).astype(np.float32),
        rng.standard_normal((12, 50)).astype(np.float32) * 0.3,
    )
    weights = torch.nn.Parameter(torch.from_numpy(start.copy()))
    optimizer = torch.optim.AdamW([weights], lr=2e-3)
    norms = []
    for gradient in gradients:
        weights.grad = torch.from_numpy(gradient.copy())
        norms.append(torch.nn.utils.clip_grad_norm_([weights], 1.0).item())
        optimizer.step()
    body = """
      const weights = floats(given.start), state = adamw(weights.length);
      const norms = given.gradients.map((gradient) => update(weights, floats(gradient), state, 2e-3));
      const before = weights.slice(), broken = update(weights, weights.map(() => NaN), state, 2e-3);
      return { weights: bytes(weights), norms, same: before.every((value, i) => value === weights[i]), broken: String(broken) };"""
    found = in_node(body, tmp_path, start=packed(start), gradients=[packed(each) for each in gradients])
    assert np.allclose(unpacked(found["weights"]), weights.detach(), atol=1e-6)
    assert found["norms"] == pytest.approx(norms, rel=1e-5)
    assert found["same"] and found["broken"] == "NaN"  # a step that is not finite is left out


def test_utilities_and_formulas_are_those_of_the_package(tmp_path):
    x = torch.linspace(-8, 8, 65, dtype=torch.float64)
    formulas = [
        "tanh(x / 2)",
        "x",
        "-sigmoid(-3*x) ** 2",
        "maximum(x, 2*x) + log1p(exp(x))",
        "arctan(x) - -0.5e-1 * x / pi",
    ]
    body = """
      const of = ({ value, slope, sign }) => ({ value: given.x.map(value), slope: given.x.map(slope), sign });
      return { closed: Object.fromEntries(Object.entries(CLOSED_FORMS).map(([name, u]) => [name, of(u)])),
               typed: given.formulas.map((text) => given.x.map(compileFormula(text))) };"""
    found = in_node(body, tmp_path, x=x.tolist(), formulas=formulas)
    for name, form in found["closed"].items():
        utility = UTILITIES[name]
        assert form["value"] == pytest.approx(utility(x).tolist()) and form["slope"] == pytest.approx(
            utility.slope(x).tolist()
        )
        assert form["sign"] == utility.sign
    assert set(found["closed"]) == {name for name, utility in UTILITIES.items() if not utility.definition}
    for text, values in zip(formulas, found["typed"], strict=True):
        assert values == pytest.approx(compile_expression(text)(x).tolist()), text


def test_what_is_no_formula_is_refused_in_a_sentence(tmp_path):
    bad = {
        "alert(x)": "alert is not known",
        "x ** x": "the exponent of a power",
        "9 ** 9": "does not depend on x",
        "tanh(x": "expected ), got its end",
        "x x": "x is not expected there",
        "-x": "must be increasing",
        "log(x)": "must be finite",
        "constructor(x)": "constructor is not known",
        "x" * 201: "201 signs",
    }
    body = "return given.bad.map((text) => { try { utilityFromText(text); return ''; } catch (error) { return error.message; } });"
    for (text, wanted), message in zip(bad.items(), in_node(body, tmp_path, bad=list(bad)), strict=True):
        assert wanted in message, text


def test_the_interval_is_wilsons(tmp_path):
    counts = [(0, 5), (3, 12), (9, 12), (12, 12), (47, 50)]
    found = in_node("return given.counts.map(([k, n]) => wilson(k, n));", tmp_path, counts=counts)
    for (k, n), ends in zip(counts, found, strict=True):
        assert ends == pytest.approx(wilson_interval(k, n), abs=1e-9)


def test_rules_measure_the_border_and_the_thing(tmp_path):
    rng = np.random.default_rng(0)
    image = rng.integers(90, 130, (64, 64, 4)).astype(np.uint8)
    image[20:40, 20:40] = (20, 30, 220, 255)
    edge = np.ones((64, 64), bool)
    edge[4:60, 4:60] = False
    frame = image[edge][:, :3].astype(float)
    body = """
      const pixels = Uint8ClampedArray.from(given.pixels), judged = Object.entries(TASTES).map(([name, { measure }]) => [name, measure(pixels)]);
      return Object.fromEntries(judged);"""
    found = in_node(body, tmp_path, pixels=image.ravel().tolist())
    assert found["light"] == -found["dark"] == pytest.approx(frame.mean())
    assert found["clean"] == pytest.approx(-np.sqrt(((frame - frame.mean(0)) ** 2).mean(0).sum()))
    assert found["blue"] == -found["warm"] == pytest.approx(200 / 255, abs=0.01)


def test_a_comparison_counts_ties_apart(tmp_path):
    tallies = [{"wins": 9, "losses": 2, "ties": 1}, {"wins": 0, "losses": 0, "ties": 3}]
    one, none = in_node("return given.tallies.map(comparisonText);", tmp_path, tallies=tallies)
    assert one == "You preferred the tuned model on 9 of 11 pairs: 82 % [52, 95]; 1 without a difference"
    assert none == "No pair with a difference, 3 without"


def test_the_zip_holds_likes_that_the_package_reads(tmp_path):
    rows = [["image", "prompt", "liked"], ["00.png", 'a "star", <b>', 1], ["01.png", "=2+2", 0]]
    body = """
      const files = { "likes.csv": new TextEncoder().encode(csvOf(given.rows)), "00.png": Uint8Array.of(1, 2, 3) };
      return bytes(zipOf(files));"""
    archive = zipfile.ZipFile(io.BytesIO(base64.b64decode(in_node(body, tmp_path, rows=rows))))
    assert archive.testzip() is None and archive.namelist() == ["likes.csv", "00.png"]
    assert archive.read("00.png") == b"\x01\x02\x03"
    assert pd.read_csv(io.BytesIO(archive.read("likes.csv"))).to_numpy().tolist() == rows[1:]


def test_the_adapter_is_a_file_of_safetensors(tmp_path):
    layout = read_layout()
    body = "const flat = freshLora(given.lora, 8, 3); return { flat: bytes(flat), file: bytes(loraFile(flat, given.lora, 8)) };"
    found = in_node(body, tmp_path, lora=about()["lora"])
    flat = unpacked(found["flat"])
    tensors = load(base64.b64decode(found["file"]))
    assert len(tensors) == 2 * len(layout.lora) and all(name.startswith("unet.") for name in tensors)
    assert np.array_equal(flat_lora(layout.lora, tensors).numpy(), flat)
    a, b = layout.lora[0].matrices(torch.from_numpy(flat.copy()))
    assert a.std().item() == pytest.approx(1 / 8, rel=0.15) and not b.any()


def test_links_hold_settings_and_nothing_else(tmp_path):
    body = """
      const link = fragmentOf({ ...DEFAULTS, beta: 250, utility: "own", formula: "tanh(x)", wrong: true, group: undefined });
      return { link, back: settingsOf(link), none: fragmentOf(DEFAULTS),
               bad: settingsOf("#beta=-1&gamma=nan&utility=<b>&judge=constructor&steps=1e9&__proto__=1&seed=&rate=x&other=1") };"""
    found = in_node(body, tmp_path)
    assert found["back"] == {"beta": 250, "utility": "own", "formula": "tanh(x)", "wrong": True}
    assert found["none"] == "" and found["bad"] == {}


def test_codes_of_a_class_are_checked(tmp_path):
    body = """
      const result = { group: 4711, card: 7, wins: 9, losses: 2, ties: 1 }, code = resultCode(result);
      return { code, back: readCode(` ${code.toLowerCase()} `), bad: [code.replace("-9-", "-8-"), code.replace("-9-2", "-2-9"), "x", ""].map(readCode) };"""
    found = in_node(body, tmp_path)
    assert found["back"] == {"group": 4711, "card": 7, "wins": 9, "losses": 2, "ties": 1}
    assert found["bad"] == [None] * 4 and found["code"].startswith("4711-7-9-2-1-")


def test_the_page_says_whether_a_tuning_is_healthy(tmp_path):
    body = """
      const run = (liked, disliked, pull, norm = 1, steps = 20) => Array.from({ length: steps }, () => ({ reward: [liked, disliked], sign: [1, -1], pull: [pull, -pull], point: 0, norm }));
      const states = (log, method) => health(log, CLOSED_FORMS.kahneman_tversky.slope, method).state;
      return [states(run(1, -1, 0.2)), states(run(1, -7, 0.2)), states(run(30, -4, 0.001)), states(run(0, 0.5, 0.2)), states(run(1, -1, 0.2, NaN)), states(run(1, -1, 0.2, 1, 3)), states(run(1, 0, 1), "sft"), states(run(1, 0, 1), "contrast")];"""
    assert in_node(body, tmp_path) == ["healthy", "flees", "saturated", "mixed", "broken", "early", "sft", "sft"]
