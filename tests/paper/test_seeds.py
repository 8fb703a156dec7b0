import pandas as pd
import pytest
from PIL import Image

from dkto.evaluation.metrics import win_rate
from dkto.paper.page import MAIN, PREFERENCE, make_report
from dkto.paper.seeds import pool_seeds, read_seed, write_pooled


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


def test_all_seeds_leave_tables_a_figure_and_a_page(tmp_path):
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
    page = make_report(tmp_path, "full", {"seconds/total": 1.0, "seeds": 2}, "lead")
    assert "seed 1" in page and "2 (0, 1)" in page and page.count("data:image/png;base64,") == 1
