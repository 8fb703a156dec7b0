import numpy as np
import pytest

from dkto.evaluation.metrics import win_rate
from dkto.evaluation.published import (
    PUBLISHED_AGAIN,
    PUBLISHED_WIN_RATES,
    SD_2_1,
    TABLES,
    USER_STUDY,
    USER_STUDY_AGAIN,
    both_versions,
    published_table,
)
from dkto.paper.tables import ordering_cards, orderings, reproduction_card, verdict


def test_the_published_tables_are_whole():
    assert {name: len(rows) for name, rows in PUBLISHED_WIN_RATES.items()} == dict.fromkeys(TABLES, 5)
    assert {name: len(rows) for name, rows in PUBLISHED_AGAIN.items()} == dict.fromkeys(TABLES, 6), "D3PO is new"
    every = [v for rates in (PUBLISHED_WIN_RATES, PUBLISHED_AGAIN) for rows in rates.values() for v in rows.values()]
    assert all(len(values) == 5 and all(0 < v < 100 for v in values) for values in [*every, *SD_2_1.values()])
    assert published_table("pickscore").loc["base"].tolist() == [84.0, 85.2, 74.5, 77.7, 60.2, 67.1]
    assert published_table("pickscore").loc["d3po"].isna().tolist() == [True, False] * 3
    assert USER_STUDY == {"base": 75.0, "dpo": 69.0} == {name: USER_STUDY_AGAIN[name] for name in USER_STUDY}
    with pytest.raises(ValueError, match="scorer must be one of aesthetic, pickscore"):
        published_table("world_utility")
    assert both_versions(TABLES[2]).loc["dpo"].tolist() == [
        "59.5 / 66.2",
        "48.3 / 52.7",
        "59.3 / 56.4",
        "48.6 / 49.6",
        "48.2 / 46.1",
    ]


def test_the_versions_continue_each_others_columns_under_the_names_of_the_second():
    """By the headings of the first version HPS and ImageReward would have to change places between the versions."""
    for table in TABLES:
        both = [(PUBLISHED_WIN_RATES[table][name], PUBLISHED_AGAIN[table][name]) for name in PUBLISHED_WIN_RATES[table]]
        rms = {
            swap: np.sqrt(np.mean([(a[i] - b[j]) ** 2 for a, b in both for i, j in pairs]))
            for swap, pairs in (("as named here", ((2, 2), (4, 4))), ("as headed", ((2, 4), (4, 2))))
        }
        assert rms["as named here"] < rms["as headed"] / 2, table


def test_an_ordering_holds_fails_or_stays_open():
    won, lost, even = win_rate([1.0] * 20, [0.0] * 20), win_rate([0.0] * 20, [1.0] * 20), win_rate([0.0] * 9, [0.0] * 9)
    assert [verdict(result) for result in (won, lost, even)] == ["above", "below", "open"]
    table = orderings({"base": won, "sft": lost, "dpo": even, "kto_shuffled": won})
    assert table["ordering"].tolist() == ["kto over base", "kto over sft", "kto over dpo"]
    assert table["holds"].tolist() == ["yes", "no", "open"]
    assert table["paper, %"].tolist() == [84.0, 73.0, 59.6]
    assert table["NeurIPS version, %"].tolist() == [85.2, 72.8, 61.8]
    # under HPS the two versions have KTO on two sides of DPO: nothing can hold that ordering
    assert orderings({"dpo": lost}, "hps")["holds"].tolist() == ["open"]
    cards = ordering_cards(table, measured="m", seeds="s", cost="c")
    assert cards.loc[2, "paper"] == "59.6 %, NeurIPS version 61.8 % (PickScore, Table 1)"


def test_a_card_names_everything():
    card = reproduction_card(claim="c", paper="p", ours="o", measured="m", seeds="s", cost="t", verdict="yes")
    assert list(card) == ["claim", "paper", "ours", "how measured", "seeds", "cost", "verdict"]
