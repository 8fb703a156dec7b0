import json
from dataclasses import replace

import numpy as np
import pytest

from dkto.common.files import read_records
from dkto.data.encoded import PreparedFeedback
from dkto.data.feedback import make_feedback
from dkto.evaluation.generate import read_manifest
from dkto.evaluation.scoring import score_images
from dkto.models import load_model
from dkto.models.system import System
from dkto.paper.pool import compare_pool, likes_of, make_pool
from dkto.paper.train_all import (
    OFFLINE,
    ONLINE,
    SYSTEMS,
    check_systems,
    make_config,
    read_settings,
    sampled_as,
    settings_origin,
    share_data,
    sweep_guidance,
    train_systems,
    write_settings,
)
from dkto.training.config import OnlineConfig, TrainConfig
from dkto.world.scenes import prompts_for

NAMES = "base base_best_guidance sft sft_all csft dpo kto kto_loss_averse kto_risk_seeking kto_shuffled alignprop d3po"


@pytest.fixture(scope="module")
def likes(tmp_path_factory):
    pool = make_pool(prompts_for("train", 6), tmp_path_factory.mktemp("pool"), pictures_per_prompt=3)
    return likes_of(compare_pool(pool, "world_utility", comparisons=2))


@pytest.fixture(scope="module")
def data(tmp_path_factory, likes, tiny_pipeline):
    return share_data(likes, tmp_path_factory.mktemp("shared"), str(tiny_pipeline))


@pytest.fixture(scope="module")
def runs(tmp_path_factory, data, tiny_pipeline):
    """Every system, really trained: two steps of the tiny pipeline."""
    common = {"model": str(tiny_pipeline), "max_train_steps": 2, "batch_size": 4, "beta": 100.0, "learning_rate": 1e-4}
    own = {name: {"reward": "world_redness", "sampling_steps": 2} for name in ONLINE} | {"kto": {"beta": 50.0}}
    return train_systems(SYSTEMS, data, tmp_path_factory.mktemp("runs"), common, own, processes=0)


def test_the_names_are_those_of_the_paper_and_its_controls():
    assert " ".join(SYSTEMS) == NAMES


def test_every_system_trains_in_one_loop_and_draws(runs, tiny_pipeline):
    assert set(runs) == {*OFFLINE, *ONLINE}
    assert all(len(read_records(run / "metrics.jsonl")) == 2 for run in runs.values())
    base = System(model=str(tiny_pipeline), guidance=2.0, steps=3)
    drawn = sampled_as(runs, SYSTEMS, base, {"base_best_guidance": 5.0, "kto": 4.0})
    assert list(drawn) == list(SYSTEMS)
    assert drawn["base"] == base and drawn["base_best_guidance"].guidance == 5.0
    assert drawn["csft"].prefix == "good image, " and drawn["sft"].prefix == ""
    assert drawn["kto"].guidance == 4.0
    assert {drawn[name].guidance for name in SYSTEMS if name not in ("base_best_guidance", "kto")} == {2.0}
    assert all(system.load().unet is not None for system in (drawn["kto"], drawn["alignprop"]))


def test_csft_draws_in_the_form_that_its_settings_chose(data, tiny_pipeline, tmp_path):
    common = {"model": str(tiny_pipeline), "max_train_steps": 1, "batch_size": 4}
    run = train_systems(["csft"], data, tmp_path, common, {"csft": {"csft_style": "negative"}}, processes=0)
    drawn = sampled_as(run, ["csft"], System(model=str(tiny_pipeline)))["csft"]
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
    plain, shuffled = PreparedFeedback(data.likes, model), PreparedFeedback(data.shuffled, model)
    assert shuffled.is_desirable.sum() == plain.is_desirable.sum()
    assert (shuffled.is_desirable != plain.is_desirable).any()
    rows = np.arange(len(likes))
    assert (plain.latents(rows)[0] == shuffled.latents(rows)[0]).all()
    assert len(PreparedFeedback(data.pairs, model).pairs) == len(likes.pairs)
    assert data.folder("sft_all") == data.likes and data.folder("kto_shuffled") == data.shuffled


def test_two_processes_train_as_one(data, runs, tmp_path, tiny_pipeline):
    common = {"model": str(tiny_pipeline), "max_train_steps": 2, "batch_size": 4, "beta": 100.0, "learning_rate": 1e-4}
    found = train_systems(["base", "sft"], data, tmp_path, common, {}, processes=2)
    assert list(found) == ["sft"]
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
    with pytest.raises(ValueError, match="system 'base' is not trained"):
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
    with pytest.raises(ValueError, match="unknown system 'kto_shufled'; did you mean 'kto_shuffled'"):
        check_systems(["kto_shufled"])
    with pytest.raises(ValueError, match="systems must be named once each"):
        check_systems(["kto", "kto"])
    with pytest.raises(ValueError, match="systems must hold base and kto, got base, sft"):
        check_systems(["base", "sft"], needed=("base", "kto"))
    with pytest.raises(ValueError, match="'base_best_guidance' needs a scale"):
        sampled_as({}, ["base_best_guidance"], System())
    lonely = make_feedback(likes.images[:2], ["a", "b"], [True, False])
    for text in ("a\nb", "a\rb"):
        torn = make_feedback(likes.images[:2], [text, "b"], [True, False])
        with pytest.raises(ValueError, match=r"take one prompt a line, but 'a\\[nr]b' is empty or has a line break"):
            share_data(torn, tmp_path, str(tiny_pipeline), ["d3po"])
    with pytest.raises(ValueError, match="system 'dpo' needs comparisons"):
        share_data(lonely, tmp_path, str(tiny_pipeline), ["dpo"])


def test_a_folder_of_other_feedback_keeps_its_prompts(tmp_path, tiny_pipeline, likes):
    first = make_feedback(likes.images[:2], ["a", "b"], [True, False])
    data = share_data(first, tmp_path, str(tiny_pipeline), ["kto"])
    with pytest.raises(ValueError, match="holds encoded feedback of another run"):
        share_data(make_feedback(likes.images[:2], ["c", "d"], [True, False]), tmp_path, str(tiny_pipeline), ["kto"])
    assert data.prompts_file.read_text() == "a\nb\n"


def test_settings_for_no_system_are_refused_before_anything_trains(data, tmp_path):
    with pytest.raises(ValueError, match="settings are given for 'ktoo', which is no system; did you mean 'kto'"):
        train_systems(["kto"], data, tmp_path, {}, {"ktoo": {"beta": 1.0}})
    assert not list(tmp_path.iterdir())


def test_the_base_at_its_best_guidance_is_the_base_in_all_else():
    base = System(model="m", unet="u", negative_prompt="bad", guidance=7.5, steps=9)
    drawn = sampled_as({}, ["base_best_guidance"], base, {"base_best_guidance": 3.0})
    assert drawn["base_best_guidance"] == replace(base, guidance=3.0)


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
    path = write_settings(tmp_path / "deep" / "settings.json", {"kto": {"beta": 10.0}}, 3.0, {"seed": 1})
    assert read_settings(path)["settings"]["kto"] == {"beta": 10.0}
    tuned = {"tries": 2, "validation_prompts": 4, "seed": 1, "ranges": "Ranges by hand."}
    assert settings_origin({"search": tuned}).endswith("4 validation prompts, seed 1. Ranges by hand.")
    assert settings_origin(read_settings(path)).startswith("Settings: not from a search with equal budgets")
    other = settings_origin({"search": tuned}, "hub/model")
    assert other.startswith("Settings: found on the model small-world, not on hub/model")
    with pytest.raises(FileNotFoundError, match="`dkto paper-search` writes one"):
        read_settings(tmp_path / "none.json")
    path.write_text("{}")
    with pytest.raises(ValueError, match="is no search result: settings is missing"):
        read_settings(path)
