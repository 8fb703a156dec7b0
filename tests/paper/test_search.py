import json

import pytest

from dkto.objective import METHODS
from dkto.paper.search import GRIDS, GUIDANCE_SCALES, RANGES, equal_budgets, online_settings, search_settings
from dkto.paper.search_config import SearchConfig
from dkto.paper.train_all import COMPARED, read_settings, settings_origin


def test_every_method_gets_the_same_number_of_tries():
    assert equal_budgets(GRIDS) == 6
    assert {*GRIDS} == {row.like or name for name, row in COMPARED.items() if row.method}, (
        "each has its own, or another's"
    )
    newer = {"bco", "tgo", "nft", "awm", "dgpo", "dmpo", "sdpo"}  # the paper's tables do not hold them
    assert {row.method for row in COMPARED.values() if row.method} == {*METHODS} - newer
    with pytest.raises(ValueError, match="the same number of tries"):
        equal_budgets({"kto": [{}, {}], "sft": [{}]})


def test_one_rule_makes_the_tries_of_every_method():
    """No method is offered rates that another of its kind is not, and gamma stays the paper's."""
    rates = {method: sorted({tried["learning_rate"] for tried in tries}) for method, tries in GRIDS.items()}
    assert rates["sft"] == rates["csft"] == rates["dpo"] == rates["kto"] == [3e-5, 1e-4, 3e-4]
    assert rates["alignprop"] == rates["d3po"] == [3e-4, 1e-3, 3e-3]
    assert GRIDS["dpo"] == GRIDS["kto"]


def test_alignprop_is_given_a_reward_that_has_a_gradient():
    assert online_settings(5, "world_utility")["alignprop"]["reward"] == "world_aesthetics"
    assert online_settings(5, "world_redness")["alignprop"]["reward"] == "world_redness"
    assert online_settings(5, "world_utility")["d3po"]["reward"] == "world_utility"
    for own in ("pickscore", "laion_aesthetics", "world_preference"):
        assert online_settings(5, own)["alignprop"]["reward"] == own


def test_chains_and_batches_of_the_small_world_are_not_forced_on_another_model():
    assert online_settings(5, "world_utility")["d3po"]["guidance"] == 1.0
    given = online_settings(5, "pickscore", "stable-diffusion-v1-5/stable-diffusion-v1-5")
    shared = {"max_train_steps": 5, "warmup_steps": 0, "reward": "pickscore"}
    assert given == {"alignprop": shared, "d3po": shared}


def test_what_a_search_found_comes_on_top_of_what_online_methods_always_get():
    found = {"d3po": {"beta": 10.0, "guidance": 2.0}, "kto": {"beta": 5.0}}
    given = online_settings(5, "world_utility", found=found)
    assert given["d3po"] == online_settings(5, "world_utility")["d3po"] | found["d3po"]
    assert given["kto"] == {"beta": 5.0} and given["alignprop"] == online_settings(5, "world_utility")["alignprop"]


def test_a_search_keeps_the_best_try_of_each_method(tmp_path):
    """One step a try of the small world's own model: the table and the kept file agree."""
    config = SearchConfig(
        tmp_path / "search",
        pool_prompts=4,
        tries=2,
        train_steps=1,
        batch_size=2,
        validation_prompts=2,
        sampling_steps=2,
        processes=0,
    )
    grids = {"sft": [{"learning_rate": 1e-9}, {"learning_rate": 1e-3}, {"learning_rate": 1.0}]}
    table = search_settings(config, tmp_path / "deep" / "settings.json", grids)
    assert len(table) == 2 and table["chosen"].sum() == 1
    kept = read_settings(tmp_path / "deep" / "settings.json")
    best = table.loc[table["score"].idxmax(), "settings"]
    assert kept["settings"] == {"sft": best} and "ranges" not in kept["search"]
    assert kept["search"]["tries"] == 2 and len(kept["search"]["tried"]) == 2
    assert json.dumps(kept) and kept["guidance"] in GUIDANCE_SCALES
    assert table["guidance"].isin(GUIDANCE_SCALES).all()
    with pytest.raises(ValueError, match=r"tries must be in \[1, 3\]"):
        search_settings(SearchConfig(tmp_path, tries=4), tmp_path / "x.json", grids)
    with pytest.raises(ValueError, match="user must be one of balanced"):
        search_settings(SearchConfig(tmp_path, user="nobody"), tmp_path / "x.json")


def test_the_kept_settings_say_what_equal_budgets_do_not_cover():
    kept = read_settings("papermill_runs/paper_settings.json")
    rule = RANGES[: RANGES.index("The centres")]
    assert kept["search"]["ranges"].startswith(rule) and kept["search"]["ranges"] in settings_origin(kept)
