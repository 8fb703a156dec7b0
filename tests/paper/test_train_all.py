import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from dkto.common.files import read_records, write_json
from dkto.data.encoded import PreparedFeedback
from dkto.data.feedback import make_feedback
from dkto.evaluation.manifest import read_manifest
from dkto.evaluation.scoring import score_images
from dkto.models import load_model
from dkto.models.system import System
from dkto.objective.methods import ONLINE
from dkto.paper.pool import compare_pool, likes_of, make_pool
from dkto.paper.train_all import (
    COMPARED,
    CONTROLS,
    UNTRAINED,
    at_best_guidance,
    check_methods,
    make_config,
    method_configs,
    read_settings,
    run_configs,
    settings_origin,
    share_data,
    source_of,
    sweep_guidance,
    systems_of,
)
from dkto.training.config import OnlineConfig, TrainConfig
from dkto.world.scenes import prompts_for

NAMES = (
    "base base_best_guidance sft sft_all csft dpo "
    "kto kto_loss_averse kto_risk_seeking kto_shuffled kto_shuffled_balanced alignprop d3po"
)


@pytest.fixture(scope="module")
def likes(tmp_path_factory):
    pool = make_pool(prompts_for("train", 6), tmp_path_factory.mktemp("pool"), pictures_per_prompt=3)
    return likes_of(compare_pool(pool, "world_utility"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("experiment")


@pytest.fixture(scope="module")
def data(folder, likes, tiny_pipeline):
    return share_data(likes, folder / "data", str(tiny_pipeline))


@pytest.fixture(scope="module")
def size(tiny_pipeline):
    return {"model": str(tiny_pipeline), "train_steps": 2, "batch_size": 4}


@pytest.fixture(scope="module")
def runs(folder, data, likes, size):
    """Every method, really trained: two steps of the tiny pipeline, on the data that are there."""
    own = {name: {"learning_rate": 1e-4} for name in ("sft", "csft")} | {"dpo": {"beta": 100.0}, "kto": {"beta": 50.0}}
    own |= {name: {"reward": "world_redness", "sampling_steps": 2} for name in ONLINE}
    return run_configs(method_configs(list(COMPARED), likes, folder, own, **size), processes=0)


def test_the_names_are_those_of_the_paper_and_its_controls():
    assert " ".join(COMPARED) == NAMES
    assert UNTRAINED == ("base", "base_best_guidance")
    assert CONTROLS == ("base_best_guidance", "sft_all", "kto_shuffled", "kto_shuffled_balanced")


def test_every_method_trains_in_one_loop_and_draws(runs, tiny_pipeline):
    assert [*UNTRAINED, *runs] == list(COMPARED)
    assert all(len(read_records(run / "metrics.jsonl")) == 2 for run in runs.values())
    base = System(model=str(tiny_pipeline), guidance=2.0, steps=3)
    drawn = systems_of(runs, base)
    assert list(drawn) == ["base", *runs] and drawn["base"] == base
    assert drawn["csft"].prefix == "good image, " and drawn["sft"].prefix == ""
    assert {system.guidance for system in drawn.values()} == {2.0}
    assert all(system.load().unet is not None for system in (drawn["kto"], drawn["alignprop"]))


def test_each_is_drawn_at_the_scale_that_is_best_for_it():
    """The base stays at its own, and a copy of it joins as a control; what was not swept stays too."""
    base = System(model="m", unet="u", negative_prompt="bad", guidance=7.5, steps=9)
    sweep = pd.DataFrame({3.0: [0.9, 0.1], 5.0: [0.2, 0.4]}, index=["base", "kto"])
    drawn = at_best_guidance({"base": base, "kto": System(lora="x"), "sft": System(lora="y")}, sweep)
    assert list(drawn) == ["base", "base_best_guidance", "kto", "sft"] and drawn["base"] == base
    assert drawn["base_best_guidance"] == replace(base, guidance=3.0), "the base in all else"
    assert drawn["kto"] == System(lora="x", guidance=5.0) and drawn["sft"] == System(lora="y")


def test_csft_draws_in_the_form_that_its_settings_chose(likes, size, tmp_path):
    configs = method_configs(["csft"], likes, tmp_path, {"csft": {"csft_style": "negative"}}, part="ann", **size)
    run = run_configs(configs, processes=0)
    assert run == {"csft": tmp_path / "runs" / "ann" / "csft"} and (tmp_path / "data" / "ann" / "likes").is_dir()
    drawn = systems_of(run, System(model=size["model"]))["csft"]
    assert drawn.prefix == "" and drawn.negative_prompt == "Weird image."


def test_variants_take_their_methods_settings_and_nothing_else(runs):
    configs = {name: json.loads((run / "training.json").read_text())["config"] for name, run in runs.items()}
    assert {configs[name]["beta"] for name in ("kto", "kto_loss_averse", "kto_risk_seeking", "kto_shuffled")} == {50.0}
    assert configs["dpo"]["beta"] == 100.0
    assert [configs[name]["utility"] for name in ("kto_loss_averse", "kto_risk_seeking")] == [
        "loss_averse",
        "risk_seeking",
    ]
    assert {configs[name]["max_train_steps"] for name in runs} == {2}


def test_the_controls_see_the_same_pictures(data, likes, tiny_pipeline):
    model = load_model(str(tiny_pipeline))
    plain, shuffled = PreparedFeedback(data / "likes", model), PreparedFeedback(data / "shuffled", model)
    assert shuffled.is_desirable.sum() == plain.is_desirable.sum()
    assert (shuffled.is_desirable != plain.is_desirable).any()
    rows = np.arange(len(likes))
    assert (plain.latents(rows)[0] == shuffled.latents(rows)[0]).all()
    assert len(PreparedFeedback(data / "pairs", model).pairs) == len(likes.pairs)
    names = {"sft_all": "likes", "kto_shuffled": "shuffled", "dpo": "pairs", "d3po": "prompts.txt"}
    assert {name: source_of(name, data) for name in names} == {name: data / place for name, place in names.items()}


def test_two_processes_train_as_one_and_a_run_with_two_names_once(likes, runs, tmp_path, size):
    configs = method_configs(["base", "sft"], likes, tmp_path, {"sft": {"learning_rate": 1e-4}}, **size)
    assert list(configs) == ["sft"] and configs["sft"].warmup_steps == 2
    found = run_configs({"sft": configs["sft"], "again": configs["sft"]}, processes=2)
    assert found["sft"] == found["again"]
    losses = [[r["loss"] for r in read_records(run / "metrics.jsonl")] for run in (found["sft"], runs["sft"])]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_settings_reach_the_kind_of_training_that_knows_them(data, tmp_path):
    settings = {"learning_rate": 1e-5, "desirable_fraction": 0.5, "backprop_steps": 2, "max_train_steps": 3}
    offline = make_config("kto", data, tmp_path, settings)
    online = make_config("alignprop", data, tmp_path, settings)
    assert isinstance(offline, TrainConfig) and offline.desirable_fraction == 0.5
    assert isinstance(online, OnlineConfig) and online.backprop_steps == 2 and online.objective == "alignprop"
    with pytest.raises(ValueError, match="settings of kto: 'lerning_rate' is no setting"):
        make_config("kto", data, tmp_path, {"lerning_rate": 1.0})
    with pytest.raises(ValueError, match="'base' is not trained; trained are: sft, "):
        make_config("base", data, tmp_path, {})


def test_the_guidance_sweep_scores_every_scale(tmp_path, tiny_pipeline):
    systems = {"base": System(model=str(tiny_pipeline), steps=2), "kto": System(model=str(tiny_pipeline), steps=3)}
    found = sweep_guidance(systems, [1.0, 3.0], ["a star"], "world_redness", tmp_path)
    assert list(found) == [1.0, 3.0] and list(found.index) == ["base", "kto"]
    for name, system in systems.items():
        for scale in found:
            folder = tmp_path / f"{name}-{scale:g}"
            drawn = read_manifest(folder)["system"]
            assert (drawn["guidance"], drawn["steps"]) == (scale, system.steps)
            assert found.loc[name, scale] == score_images(folder, "world_redness").mean()
    assert found.loc["base", 1.0] != found.loc["base", 3.0]


def test_wrong_names_and_missing_comparisons_are_refused(tmp_path, tiny_pipeline, likes):
    with pytest.raises(ValueError, match="guidance scales must hold at least one, got none"):
        sweep_guidance({"base": System()}, [], ["a"], "world_redness", tmp_path)
    with pytest.raises(ValueError, match="unknown method 'kto_shufled'; did you mean 'kto_shuffled'"):
        check_methods(["kto_shufled"])
    with pytest.raises(ValueError, match="systems must be named once each"):
        check_methods(["kto", "kto"])
    with pytest.raises(ValueError, match="systems must hold base and kto, got base, sft"):
        check_methods(["base", "sft"], needed=("base", "kto"))
    lonely = make_feedback(likes.images[:2], ["a", "b"], [True, False])
    for text in ("a\nb", "a\rb"):
        torn = make_feedback(likes.images[:2], [text, "b"], [True, False])
        with pytest.raises(ValueError, match=r"take one prompt a line, but 'a\\[nr]b' is empty or has a line break"):
            share_data(torn, tmp_path, str(tiny_pipeline), ["d3po"])
    with pytest.raises(ValueError, match="method 'dpo' needs comparisons"):
        share_data(lonely, tmp_path, str(tiny_pipeline), ["dpo"])


def test_a_folder_of_other_feedback_keeps_its_prompts(tmp_path, tiny_pipeline, likes):
    first = make_feedback(likes.images[:2], ["a", "b"], [True, False])
    data = share_data(first, tmp_path, str(tiny_pipeline), ["kto"])
    with pytest.raises(ValueError, match="holds encoded feedback of another run"):
        share_data(make_feedback(likes.images[:2], ["c", "d"], [True, False]), tmp_path, str(tiny_pipeline), ["kto"])
    assert (data / "prompts.txt").read_text() == "a\nb\n"


def test_settings_for_no_method_are_refused_before_anything_is_encoded(likes, tmp_path, size):
    with pytest.raises(ValueError, match="settings are given for 'ktoo', which is no method; did you mean 'kto'"):
        method_configs(["kto"], likes, tmp_path, {"ktoo": {"beta": 1.0}}, **size)
    assert not list(tmp_path.iterdir())


def test_settings_at_an_end_of_what_was_tried_are_named():
    def tried(method, knob, values, chosen):
        return [{"method": method, "settings": {knob: v, "style": "x"}, "chosen": v == chosen} for v in values]

    rows = tried("sft", "learning_rate", (1, 2, 3), 3) + tried("kto", "learning_rate", (1, 2, 3), 2)
    rows += tried("dpo", "beta", (1, 2, 3), 1) + tried("csft", "beta", (1, 2), 1)
    told = settings_origin({"search": {"tries": 3, "validation_prompts": 4, "seed": 0, "tried": rows}})
    assert told.endswith(" so that better ones may lie beyond: learning_rate of sft; beta of dpo.")
    middle = {"tries": 3, "validation_prompts": 4, "seed": 0, "tried": tried("kto", "beta", (1, 2, 3), 2)}
    assert "end of" not in settings_origin({"search": middle})


def test_a_search_result_is_kept_and_read(tmp_path):
    path = tmp_path / "settings.json"
    write_json(path, {"settings": {"kto": {"beta": 10.0}}, "guidance": 3.0, "search": {"seed": 1}})
    assert read_settings(path)["settings"]["kto"] == {"beta": 10.0}
    tuned = {"tries": 2, "validation_prompts": 4, "seed": 1, "ranges": "Ranges by hand."}
    assert settings_origin({"search": tuned}).endswith("4 validation prompts, seed 1. Ranges by hand.")
    assert settings_origin(read_settings(path)).startswith("Settings: not from a search with equal budgets")
    other = settings_origin({"search": tuned}, "hub/model")
    assert other.startswith("Settings: found on the model small-world, not on hub/model")
    with pytest.raises(FileNotFoundError, match="`dkto paper-search` writes one"):
        read_settings(tmp_path / "none.json")
    result = {"settings": {"kto": {"beta": 10.0}}, "guidance": 3.0, "search": tuned}
    row = {"method": "kto", "chosen": True, "settings": {"beta": 1}}
    for change, place in (
        ({"settings": {"kto": {"beta": [1]}}}, r"settings.json: settings must be objects by method, got \{'kto'"),
        ({"guidance": True}, "settings.json: guidance must be a number above 0, got True"),
        ({"search": {**tuned, "seed": "x"}}, "settings.json, search: seed must be a whole number, got 'x'"),
        (
            {"search": {"tried": [row, row | {"chosen": 1}]}},
            "settings.json, try 2: chosen must be true or false, got 1",
        ),
        ({"search": {"tried": [[]]}}, r"settings.json, try 1: expected an object, got \[\]"),
    ):
        write_json(path, result | change)
        with pytest.raises(ValueError, match=place):
            read_settings(path)
    path.write_text("{}")
    with pytest.raises(ValueError, match="is no search result: settings is missing"):
        read_settings(path)
