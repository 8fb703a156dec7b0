import pandas as pd
import pytest
from PIL import Image

from dkto.evaluation.metrics import win_rate
from dkto.paper.seeds import MAIN, PREFERENCE, combine, pool_seeds, read_seed, write_pooled


def scores(wins, ties, losses):
    return [1.0] * wins + [0.5] * ties + [0.0] * losses, [0.0] * wins + [0.5] * ties + [1.0] * losses


SEEDS = {
    "0": {"base": win_rate(*scores(30, 5, 5)), "sft": win_rate(*scores(20, 0, 20))},
    "1": {"base": win_rate(*scores(36, 0, 4)), "sft": win_rate(*scores(10, 1, 29))},
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


def test_the_pooled_interval_is_never_narrower_than_a_seed_s():
    pooled = pool_seeds(SEEDS)
    for opponent, result in pooled.items():
        of_seeds = [seed[opponent] for seed in SEEDS.values()]
        assert result.rate == pytest.approx(sum(one.rate for one in of_seeds) / 2)
        assert all(result.low <= one.low and one.high <= result.high for one in of_seeds)
        assert result.n == 80 == result.wins + result.ties + result.losses
    assert set(pool_seeds({**SEEDS, "2": {"base": SEEDS["0"]["base"]}})) == {"base"}
    with pytest.raises(ValueError, match="seeds must hold at least one"):
        pool_seeds({})


def test_all_seeds_leave_tables_and_a_figure(tmp_path):
    for name, found in SEEDS.items():
        write_tables(tmp_path / f"{MAIN}-{name}", found)
    order = write_pooled(tmp_path, SEEDS, PREFERENCE, "7 steps")
    assert order.set_index("ordering")["holds"].to_dict() == {"kto over base": "yes", "kto over sft": "open"}
    table = pd.read_csv(tmp_path / "seeds.csv").set_index("opponent")
    assert table.loc["base", "seed 1"] == SEEDS["1"]["base"].rate and table.loc["base", "n"] == 80
    assert pd.read_csv(tmp_path / "cards.csv")["seeds"].tolist() == ["2 (0, 1)"] * 2
    assert pd.read_csv(tmp_path / "cards.csv")["cost"].tolist() == ["7 steps, each seed"] * 2
    with Image.open(tmp_path / "win_rates.png") as picture:
        assert picture.width > 500 and len(picture.convert("L").getcolors(1 << 16)) > 2


def rate(key, value, half=0.1):
    return {key: value, f"{key}/low": value - half, f"{key}/high": value + half, f"{key}/n": 40}


def test_seeds_are_pooled_without_hiding_one():
    key = "win_rate/kto_vs_base/world_utility"
    results = {f"{MAIN}-0": rate(key, 0.6), f"{MAIN}-1": rate(key, 0.8), "ablations": {"gamma/0.8": 0.5}}
    for seed, scale in enumerate((10.0, 15.0)):
        results[f"{MAIN}-{seed}"]["best_guidance"] = scale
    found = combine(results, {"ablations": 2.0})
    assert found[key] == pytest.approx(0.7) and found["seeds"] == 2
    assert (found[f"{key}/low"], found[f"{key}/high"]) == pytest.approx((0.5, 0.9))
    assert found[f"{key}/n"] == 80 and found[f"seed-0/{key}/n"] == 40
    assert found[f"seed-0/{key}"] == 0.6 and found["ablations/gamma/0.8"] == 0.5
    assert found["seconds/total"] == 2.0
    assert "best_guidance" not in found and found["seed-1/best_guidance"] == 15.0, "no mean of scales that were chosen"
