import pytest

from dkto.evaluation.metrics import win_rate
from dkto.paper.tables import PUBLISHED_WIN_RATES, USER_STUDY, orderings, published_table, reproduction_card, verdict


def test_the_published_tables_are_whole():
    assert {name: len(rows) for name, rows in PUBLISHED_WIN_RATES.items()} == dict.fromkeys(PUBLISHED_WIN_RATES, 5)
    assert all(len(values) == 5 and all(0 < v < 100 for v in values)
               for rows in PUBLISHED_WIN_RATES.values() for values in rows.values())  # fmt: skip
    assert published_table("pickscore").loc["base"].tolist() == [84.0, 74.5, 60.2]
    assert USER_STUDY == {"base": 75.0, "dpo": 69.0}
    with pytest.raises(ValueError, match="scorer must be one of aesthetic, pickscore"):
        published_table("world_utility")


def test_an_ordering_holds_fails_or_stays_open():
    won, lost, even = win_rate([1.0] * 20, [0.0] * 20), win_rate([0.0] * 20, [1.0] * 20), win_rate([0.0] * 9, [0.0] * 9)
    assert [verdict(result) for result in (won, lost, even)] == ["above", "below", "open"]
    table = orderings({"base": won, "sft": lost, "dpo": even, "kto_shuffled": won})
    assert table["ordering"].tolist() == ["kto over base", "kto over sft", "kto over dpo"]
    assert table["holds"].tolist() == ["yes", "no", "open"]
    assert table["paper, %"].tolist() == [84.0, 73.0, 59.6]
    # under ImageReward the paper has KTO slightly below DPO: a loss would hold that ordering
    assert orderings({"dpo": lost}, "imagereward")["holds"].tolist() == ["yes"]


def test_a_card_names_everything():
    card = reproduction_card(claim="c", paper="p", ours="o", measured="m", seeds="s", cost="t", verdict="yes")
    assert list(card) == ["claim", "paper", "ours", "how measured", "seeds", "cost", "verdict"]
