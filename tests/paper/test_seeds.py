from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from scipy import stats

from dkto.evaluation.metrics import win_rate
from dkto.paper.seeds import MAIN, PREFERENCE, combine, holm, pool, prompt_error, read_seed, write_pooled


def scores(wins, ties, losses):
    return [1.0] * wins + [0.5] * ties + [0.0] * losses, [0.0] * wins + [0.5] * ties + [1.0] * losses


SEEDS = {
    "0": {"base": win_rate(*scores(30, 5, 5)), "sft": win_rate(*scores(22, 0, 18))},
    "1": {"base": win_rate(*scores(36, 0, 4)), "sft": win_rate(*scores(17, 1, 22))},
    "2": {"base": win_rate(*scores(34, 2, 4)), "sft": win_rate(*scores(20, 0, 20)), "dpo": win_rate([1.0], [0.0])},
}


def write_tables(folder, found):
    rows = [
        {"method": method, "opponent": opponent, "scorer": scorer, "win_rate": r.rate, "low": r.low, "high": r.high,
         "n": r.n, "wins": r.wins, "ties": r.ties, "losses": r.losses, "sign_p": 0.5}
        for opponent, r in found.items() for method in ("kto", "dpo") for scorer in (PREFERENCE, "world_fidelity")
    ]  # fmt: skip
    folder.mkdir()
    pd.DataFrame(rows).to_csv(folder / "win_rates.csv", index=False)


def test_a_written_table_reads_as_it_was(tmp_path):
    write_tables(tmp_path / "tables", SEEDS["0"])
    assert read_seed(tmp_path / "tables", PREFERENCE) == SEEDS["0"]


KEPT = Path(__file__).parents[2] / "papermill_runs" / "reference" / "paper_0_1" / "seeds.csv"
# opponent: mean, ends of the mixed model, its p with Holm's correction, ends of Student's interval
KEPT_RATES = {
    "base": (73.4, 69.0, 77.8, 0.000, 68.0, 78.9),
    "base_best_guidance": (72.0, 67.6, 76.4, 0.000, 70.2, 73.9),
    "sft": (62.0, 57.6, 66.4, 0.000, 48.1, 75.9),
    "sft_all": (59.6, 55.2, 64.0, 0.001, 51.6, 67.6),
    "csft": (54.5, 50.1, 58.9, 0.141, 42.0, 66.9),
    "dpo": (63.6, 59.2, 68.0, 0.000, 49.5, 77.7),
    "kto_loss_averse": (55.7, 51.3, 60.1, 0.053, 51.2, 60.2),
    "kto_risk_seeking": (50.2, 45.8, 54.6, 0.926, 43.6, 56.8),
    "kto_shuffled": (57.3, 52.9, 61.7, 0.012, 45.6, 69.1),
    "alignprop": (46.4, 42.0, 50.8, 0.207, 39.5, 53.3),
    "d3po": (67.8, 63.4, 72.2, 0.000, 63.8, 71.9),
}


def test_the_mixed_model_of_the_kept_seeds_is_what_was_computed_elsewhere():
    kept = pd.read_csv(KEPT).set_index("opponent")
    found = pool(kept.filter(like="seed "), np.zeros(len(kept)))
    found = found[["rate", "low", "high", "holm", "t_low", "t_high"]] * [100, 100, 100, 1, 100, 100]
    assert set(found.index) == set(KEPT_RATES)
    for opponent, expected in KEPT_RATES.items():
        assert found.loc[opponent].tolist() == pytest.approx(expected, abs=0.051), opponent
        assert found.loc[opponent, "holm"] == pytest.approx(expected[3], abs=6e-4), opponent


def test_one_comparison_has_students_interval():
    rates = pd.DataFrame([[0.61, 0.7, 0.64]])
    found, student = pool(rates, np.zeros(1)).loc[0], stats.ttest_1samp(rates.loc[0], 0.5)
    assert [found["low"], found["high"]] == pytest.approx(list(student.confidence_interval(0.95)))
    assert [found["t_low"], found["t_high"]] == pytest.approx([found["low"], found["high"]])
    assert found["p"] == found["holm"] == pytest.approx(student.pvalue)


def test_the_mixed_model_covers_where_seeds_are_shared_and_where_they_are_not():
    """95 % over 60 tables of 11 comparisons and 3 seeds, in which a seed helps all comparisons, some, or none."""
    rng = np.random.default_rng(0)
    for shared in (0.0, 0.04):
        inside = []
        for _ in range(60):
            table = 0.5 + shared * rng.normal(size=3) + 0.03 * rng.normal(size=(11, 3))
            found = pool(pd.DataFrame(table), np.zeros(11))
            inside.append(((found["low"] < 0.5) & (found["high"] > 0.5)).mean())
        assert np.mean(inside) == pytest.approx(0.95, abs=0.05), shared


def test_seeds_that_agree_by_chance_have_the_error_of_their_prompts():
    alike = pd.DataFrame([[0.6, 0.6, 0.6], [1.0, 1.0, 1.0]])
    found = pool(alike, prompt_error(np.array([[0.12] * 3, [0.06] * 3])))
    assert (found["high"] - found["low"])[0] == pytest.approx(0.12 / 3**0.5) and found.loc[1, "high"] == 1.0
    assert found.loc[1, "low"] < 1.0 and found.loc[0, "p"] < 0.01
    with pytest.raises(ValueError, match="rates must have at least 2 seeds, got 1"):
        pool(alike[[0]], np.zeros(2))


def test_holms_correction_by_hand():
    assert holm([0.04, 0.01, 0.03, 0.5]).tolist() == pytest.approx([0.09, 0.04, 0.09, 0.5])


def test_all_seeds_leave_tables_and_a_figure(tmp_path):
    for name, found in SEEDS.items():
        write_tables(tmp_path / f"{MAIN}-{name}", found)
    order = write_pooled(tmp_path, SEEDS, PREFERENCE, "7 steps")
    assert order.set_index("ordering")["holds"].to_dict() == {"kto over base": "yes", "kto over sft": "open"}
    assert (order["Holm's p"] < 0.05).tolist() == [True, False]
    table = pd.read_csv(tmp_path / "seeds.csv").set_index("opponent")
    assert table.loc["base", "seed 1"] == SEEDS["1"]["base"].rate
    assert table.loc["base", "n"] == 120 and set(table.index) == {"base", "sft"}
    assert pd.read_csv(tmp_path / "cards.csv")["seeds"].tolist() == ["3 (0, 1, 2)"] * 2
    assert pd.read_csv(tmp_path / "cards.csv")["cost"].tolist() == ["7 steps, each seed"] * 2
    assert {"p", "holm", "t_low", "t_high", "low", "high"} <= set(table.columns)
    assert "Holm's p 0." in pd.read_csv(tmp_path / "cards.csv")["ours"][0]
    with Image.open(tmp_path / "win_rates.png") as picture:
        assert picture.width > 500 and len(picture.convert("L").getcolors(1 << 16)) > 2


def rate(key, value, half=0.1):
    return {key: value, f"{key}/low": value - half, f"{key}/high": value + half, f"{key}/n": 40}


def test_seeds_are_pooled_without_hiding_one():
    """KTO's comparisons are one table, those of the others over the base another; what has no opponent stands alone."""
    rates = {"kto_vs_base": (0.6, 0.8), "kto_vs_sft": (0.5, 0.6), "sft_vs_base": (0.55, 0.57)}
    results = {"ablations": {"gamma/0.8": 0.5}}
    for seed, scale in enumerate((10.0, 15.0)):
        results[f"{MAIN}-{seed}"] = {"best_guidance": scale, "drift/kto": 0.1 + seed}
        results[f"{MAIN}-{seed}"] |= rate("reward_gain/d3po", 0.1 + seed)
        for name, values in rates.items():
            results[f"{MAIN}-{seed}"] |= rate(f"win_rate/{name}/world_utility", values[seed], half=0.01)
    results[f"{MAIN}-1"]["only/here"] = 1.0
    results |= {f"user_likes_red-{seed}": rate("lost/kto/0.3", 0.1 + 0.02 * seed) for seed in range(3)}
    found = combine(results, {"ablations": 2.0})
    ours = pool(pd.DataFrame([rates["kto_vs_base"], rates["kto_vs_sft"]]), prompt_error(np.full((2, 2), 0.02)))
    for row, name in enumerate(("kto_vs_base", "kto_vs_sft")):
        key = f"win_rate/{name}/world_utility"
        assert found[key] == pytest.approx(sum(rates[name]) / 2) and found[f"{key}/n"] == 80
        for end in ("low", "high", "holm", "t_low", "t_high"):
            assert found[f"{key}/{end}"] == pytest.approx(ours.loc[row, end])
        assert found[f"seed-0/{key}"] == rates[name][0] and found[f"seed-1/{key}/low"] == rates[name][1] - 0.01
    alone = pool(pd.DataFrame([rates["sft_vs_base"]]), prompt_error(np.full((1, 2), 0.02)))
    assert found["win_rate/sft_vs_base/world_utility/high"] == pytest.approx(alone.loc[0, "high"])
    assert found["reward_gain/d3po"] == pytest.approx(0.6) and found["reward_gain/d3po/low"] < 0
    assert found["drift/kto"] == pytest.approx(0.6) and found["seeds"] == 2
    assert "only/here" not in found and found["seed-1/only/here"] == 1.0
    assert found["ablations/gamma/0.8"] == 0.5 and found["seconds/total"] == 2.0
    assert "best_guidance" not in found and found["seed-1/best_guidance"] == 15.0, "no mean of scales that were chosen"
    red = pool(pd.DataFrame([[0.1, 0.12, 0.14]]), prompt_error(np.full((1, 3), 0.2)), (-np.inf, np.inf))
    assert found["user_likes_red/lost/kto/0.3"] == pytest.approx(0.12)
    assert found["user_likes_red/lost/kto/0.3/low"] == pytest.approx(red.loc[0, "low"])
    assert found["seed-2/user_likes_red/lost/kto/0.3"] == 0.14 and found["user_likes_red/lost/kto/0.3/n"] == 120
    single = combine({MAIN: results[f"{MAIN}-0"]}, {})
    assert single["best_guidance"] == 10.0 and single["seeds"] == 1
    assert combine({}, {}) == {"seeds": 0, "seconds/total": 0}
