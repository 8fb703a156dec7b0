import json

import numpy as np
import pytest

from dkto.data.feedback import make_feedback
from dkto.evaluation.scoring import Scores
from dkto.models.system import System
from dkto.paper.dislikes import NEED_DISLIKES, ask_for_dislikes, costs, pool_users, some_of_each
from dkto.paper.seeds import pool_metrics
from dkto.paper.train_all import COMPARED, make_config
from dkto.runs.record import RECORD_NAME
from dkto.world.scenes import parse
from dkto.world.users import USERS


def test_what_is_asked_shares_no_prompt_with_what_is_judged(tmp_path):
    base = System(guidance=3.0, steps=3)
    sizes = {"judged": 5, "beside": 4, "validation": 3, "pool_prompts": 24}
    given = ask_for_dislikes(tmp_path, base, "never_pink", **sizes)
    provokes = USERS["never_pink"].provokes
    assert [len(part) for part in (given.judged, given.beside, given.validation)] == [5, 4, 3]
    assert all(provokes(parse(prompt)) for prompt in (*given.judged, *given.validation))
    assert not any(provokes(parse(prompt)) for prompt in given.beside)
    assert len(given.likes) == 24 and 0 < given.likes.is_desirable.sum() < 24
    few = ask_for_dislikes(tmp_path, base, "never_pink", **sizes, likes_each=2).likes
    assert few.is_desirable.tolist().count(False) == 2 and set(few.images) <= set(given.likes.images)
    with pytest.raises(ValueError, match="user must be one of clean_backgrounds, no_outlines, never_pink, got"):
        ask_for_dislikes(tmp_path, base, "likes_red")


def test_a_user_who_has_seen_nothing_bad_is_no_teacher(tmp_path, tiny_pipeline):
    with pytest.raises(ValueError, match="no_outlines must dislike some of 3 images and like some, raise pool_prompts"):
        ask_for_dislikes(tmp_path, System(model=str(tiny_pipeline), steps=1), "no_outlines", pool_prompts=3, judged=2)


def test_small_numbers_of_each_are_parts_of_larger_ones():
    paths = [f"/tmp/{n}.png" for n in range(20)]
    table = make_feedback(paths, ["p"] * 20, [n % 4 > 0 for n in range(20)])
    few, more = some_of_each(table, 2), some_of_each(table, 4)
    assert len(few) == 4 and few.is_desirable.sum() == 2
    assert set(few.images) < set(more.images) and len(some_of_each(table, 100)) == 20


def test_costs_are_paired_differences_from_the_base():
    rng = np.random.default_rng(0)
    before = rng.random((30, 1))
    scores = Scores({("base", "world_craft"): before, ("kto", "world_craft"): before - 0.1})
    beside = Scores({("base", "world_craft"): before, ("kto", "world_craft"): before})
    found = costs(scores, beside, ["world_craft"])
    assert found.loc["kto/judged/world_craft", ["mean", "low", "high"]].tolist() == pytest.approx([-0.1] * 3)
    assert found.loc["kto/beside/world_craft", "mean"] == 0 and found["n"].tolist() == [30, 30]


def test_a_balanced_training_weighs_both_classes_alike(tmp_path):
    for gamma in (0.8, 0.5):
        made = make_config("kto_shuffled_balanced", tmp_path, tmp_path / "run", {"desirable_fraction": gamma})
        liked, disliked = gamma * made.desirable_weight, (1 - gamma) * made.undesirable_weight
        assert liked == pytest.approx(disliked) and COMPARED["kto_shuffled_balanced"].control


def finished(folder, user, seed, rates):
    run = folder / "runs" / f"seed={seed},user={user}"
    run.mkdir(parents=True)
    metrics = {}
    for opponent, rate in rates.items():
        key = f"win_rate/kto_vs_{opponent}/world_clean"
        metrics |= {key: rate, f"{key}/low": rate - 0.1, f"{key}/high": rate + 0.05, f"{key}/n": 50, f"{key}/ties": 0}
    record = {"status": "finished", "seconds": 10.0, "notebook": "n", "source_hash": "0", "schema_version": 1}
    record |= {"parameters": {}, "seed": seed}
    (run / RECORD_NAME).write_text(json.dumps(record))
    (run / "metrics.json").write_text(json.dumps({"metrics": metrics, "parameters": {}, "schema_version": 1}))
    return metrics


def test_seeds_of_each_user_are_pooled_and_shown_one_by_one(tmp_path):
    each = [finished(tmp_path, "clean_backgrounds", seed, {"base": 0.9 + seed / 100, "sft": 0.8}) for seed in range(3)]
    metrics, tables = pool_users(tmp_path)
    key = "win_rate/kto_vs_base/world_clean"
    expected = pool_metrics(each)
    assert metrics["seeds"] == 3 and metrics[f"clean_backgrounds/{key}"] == pytest.approx(0.91)
    assert metrics[f"clean_backgrounds/{key}/holm"] == expected[f"{key}/holm"]
    assert metrics[f"seed-2/clean_backgrounds/{key}"] == 0.92
    rates, pooled = tables["clean_backgrounds"]
    assert rates.loc["base"].tolist() == [0.9, 0.91, 0.92] and list(rates.columns) == [0, 1, 2]
    assert pooled["sft"].n == 150 and pooled["sft"].wins == 120 and pooled["sft"].losses == 30
    finished(tmp_path, "no_outlines", 0, {"base": 0.9})
    with pytest.raises(ValueError, match="must hold the same seeds of every user, at least two"):
        pool_users(tmp_path)


def test_users_that_need_dislikes_have_settings_to_train_with():
    for name in NEED_DISLIKES:
        assert {"beta", "desirable_fraction", "learning_rate", "max_train_steps", "batch_size"} <= set(
            USERS[name].settings
        )
