"""What the experiments share, in one sampler step; the experiments themselves run in tests/test_notebooks.py."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from dkto.data.feedback import write_feedback
from dkto.evaluation.scoring import Scores
from dkto.evaluation.win_rates import win_rate_table
from dkto.models.system import System
from dkto.paper.experiment import flip_costs, judge_all, measures_of, side_by_side, simulated_feedback

HELD_OUT = {"judged": ("world_test", 4), "validation": ("world_validation", 3), "scorers": ["world_fidelity"]}


@pytest.fixture(scope="module")
def base():
    return System(steps=1, guidance=2.0)


@pytest.fixture(scope="module")
def compared(tmp_path_factory, base):
    options = {"partitions": ["at_least_once", "always"], "pool_prompts": 4, "pictures_per_prompt": 3}
    return simulated_feedback(tmp_path_factory.mktemp("compared"), base, "balanced", **HELD_OUT, **options)


def written(given):
    """The likes as a file beside their pool."""
    likes = given.likes["at_least_once"]
    path = likes.images[0].parents[2] / "likes.csv"
    write_feedback(likes, path)
    return path


def test_one_call_gives_likes_by_every_rule_and_prompts_that_nothing_is_trained_on(compared):
    assert list(compared.likes) == ["at_least_once", "always"] and len(compared.judged) == 4
    assert sum(compared.likes["always"].is_desirable) < sum(compared.likes["at_least_once"].is_desirable)
    assert len(compared.likes["always"].pairs) == 2 * 4, "K pictures make K - 1 comparisons"
    held_out = {*compared.judged.prompts, *compared.validation}
    assert len(held_out) == 7 and not held_out & {*compared.likes["always"].prompts}
    assert "finish/base" in compared.liked
    rows = [text.get_text() for text in compared.grid(2).texts + list(compared.grid(2).get_yticklabels())]
    assert {"liked", "disliked"} <= set(rows)
    plt.close("all")


def test_likes_of_a_file_take_the_place_of_a_simulated_user(compared, base, tmp_path):
    file = {"feedback": str(written(compared)), **HELD_OUT}
    single = simulated_feedback(tmp_path / "a", base, "Ann", **file, flip_rates=[0.0, 0.5])
    assert list(single.likes) == [0.0, 0.5] and single.liked == {}
    assert (single.likes[0.0].is_desirable != single.likes[0.5].is_desirable).any()
    one = simulated_feedback(tmp_path / "b", base, "Ann", **file, partitions=["at_least_once"]).likes["at_least_once"]
    assert one.is_desirable.tolist() == single.likes[0.0].is_desirable.tolist()
    assert not list(tmp_path.rglob("*.png")), "nothing is drawn"


def test_what_cannot_work_is_said_before_anything_is_drawn(compared, base, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(dict.fromkeys(compared.likes["always"].prompts)))
    known = {"feedback": str(written(compared)), "judged": (str(prompts), 0), "scorers": ["world_fidelity"]}
    for options, sentence in (
        (known, "judged and training prompts must differ, but share 4 of 4"),
        (HELD_OUT | {"validation": ("world_test", 4)}, "judged and validation prompts must differ, but share 4"),
        (HELD_OUT, "user must be one of likes_red, likes_vivid, prompt_faithful, got 'balanced'"),
        (HELD_OUT | {"judged": ("neutral", 0)}, "scorer world_fidelity judges the small world alone"),
    ):
        with pytest.raises(ValueError, match=sentence):
            simulated_feedback(tmp_path / "x", base, "balanced", **options)
    assert not (tmp_path / "x").exists()


def test_all_are_drawn_on_equal_noise_and_scored_once(compared, base, tmp_path):
    """Two names for one system: every prompt ties, and nothing has moved."""
    systems = {"base": base, "kto": System(**vars(base)), "sharp": System(guidance=9.0, steps=1)}
    options = {"images_per_prompt": 2, "neutral": ["a dog", "a cup"], "guidance": base.guidance}
    judged = judge_all(systems, compared.judged.prompts, ["world_redness"], tmp_path, **options)
    assert judged.scores["kto", "world_redness"].shape == (4, 2)
    rates, monitors = win_rate_table(judged.scores, [("kto", "base")]), judged.monitors()
    found = measures_of(rates, monitors)
    assert found["win_rate/kto_vs_base/world_redness"] == 0.5 and found["drift/kto"] == 0 < found["drift/sharp"]
    assert found["neutral_drift/sharp"] == 0, "on neutral prompts all draw at one scale"
    assert found["mean/world_redness/kto"] == found["mean/world_redness/base"]
    ax = side_by_side(judged.folders, [2, 9], numbers={name: np.ones(4) for name in systems})
    assert ax is not judged.grid(["base"])
    plt.close("all")


def test_what_flipped_likes_cost_is_paired_by_prompt():
    columns = {"base": [0, 0, 0, 0], "kto": [1, 1, 1, -1], "kto_flipped_30": [1, 1, -1, -1]}
    scores = Scores({(name, "red"): np.array(values, float)[:, None] for name, values in columns.items()})
    table = flip_costs(scores, {"kto/0.3": ("kto", "kto_flipped_30")}, "red")
    assert table.loc["kto/0.3", ["clean", "flipped", "lost", "score_lost"]].tolist() == [0.75, 0.5, 0.25, 0.5]
    found = measures_of(pd.DataFrame(), pd.DataFrame(), lost=table.filter(["lost", "low", "high"]))
    assert list(found) == ["lost/kto/0.3", "lost/kto/0.3/low", "lost/kto/0.3/high"] and found["lost/kto/0.3"] == 0.25
    assert found["lost/kto/0.3/low"] <= 0.25 <= found["lost/kto/0.3/high"]
