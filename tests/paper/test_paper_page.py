import pandas as pd
import pytest
from PIL import Image

from dkto.paper.page import MAIN, SHOWN_GAPS, aims, aims_sentence, fidelity_sentences, make_report


def rate(key, value, half=0.1):
    return {key: value, f"{key}/low": value - half, f"{key}/high": value + half, f"{key}/n": 40}


REACHED = {
    **rate("win_rate/kto_vs_base/world_utility", 0.8),
    **rate("win_rate/kto_vs_base_best_guidance/world_utility", 0.8),
    **rate("win_rate/kto_vs_sft_all/world_utility", 0.8),
    **rate("win_rate/kto_vs_kto_shuffled/world_utility", 0.8),
    **rate("reward_gain/alignprop", 0.3),
    **rate("reward_gain/d3po", 0.3),
}


def test_the_first_paragraph_names_what_was_not_reached():
    assert aims_sentence(REACHED).startswith("Reached: 6 of 6 aims.")
    missed = REACHED | rate("win_rate/kto_vs_sft_all/world_utility", 0.55)
    assert aims_sentence(missed).startswith(
        "Not reached, with its 95 % interval: kto wins over sft_all. Reached: 5 of 6 aims. "
        "An interval of these win-rates is up to 20 points wide, n = 40."
    )
    assert "n = 40 over 3 seeds, the widest of theirs." in aims_sentence(missed | {"seeds": 3})
    absent = {key: value for key, value in REACHED.items() if "d3po" not in key}
    assert "Not run in this profile: d3po raises its own reward" in aims_sentence(absent)
    assert aims(missed)["verdict"].tolist().count("not reached") == 1
    ordered = aims_sentence(REACHED | {"orderings/yes": 2, "orderings/no": 1, "orderings/all": 5})
    assert "Orderings of the paper that were tried: 5; 2 hold, 1 do not, 2 stay open" in ordered


def picture(path):
    Image.new("RGB", (4, 4)).save(path)


def rates(folder, scorers, opponents=("base", "sft")):
    """A `win_rates.csv` as the notebooks write it."""
    rows = [
        {"method": method, "opponent": opponent, "scorer": scorer, "win_rate": 0.625, "low": 0.5, "high": 0.75,
         "n": 40, "wins": 20, "ties": 10, "losses": 10, "sign_p": 0.1}
        for method in ("kto", "dpo") for opponent in opponents for scorer in scorers
    ]  # fmt: skip
    folder.mkdir()
    pd.DataFrame(rows).to_csv(folder / "win_rates.csv", index=False)


@pytest.fixture
def replay(tmp_path):
    rates(tmp_path / MAIN, ["world_utility", "world_fidelity"])
    user = tmp_path / "user_likes_red"
    rates(user, ["world_redness", "world_utility"])
    pd.DataFrame({"image": [f"{i}.png" for i in range(1000)], "liked": 1}).to_csv(user / "likes.csv", index=False)
    pd.DataFrame({"clean": [1.0], "flipped": [0.9], "lost": [0.1]}, index=["kto/0.3"]).to_csv(user / "noise.csv")
    grid = tmp_path / "qualitative_grid"
    grid.mkdir()
    gaps = pd.DataFrame({"prompt": [f"prompt {i:02d}" for i in range(60)], "gap": [(i - 20) / 100 for i in range(60)]})
    gaps.sample(frac=1, random_state=0).to_csv(grid / "gaps.csv", index=False)
    for path in (user / "before_after.png", grid / "failures.png", tmp_path / MAIN / "win_rates.png"):
        picture(path)
    return tmp_path


def test_the_page_holds_results_and_pictures_and_no_raw_data(replay):
    page = make_report(replay, "default", REACHED | {"seconds/total": 1.0, "seeds": 1}, "lead")
    assert "999.png" not in page
    assert page.count("<tr") < 70, "a page that a person would look at"
    assert page.count("data:image/png;base64,") == 3
    user = page[page.index("A specific user: likes_red", page.index("<h2")) :]
    assert user.index("<img") < user.index("<table"), "pictures come before tables"
    assert "Win-rates under world_redness" in user and "kto/0.3" in user
    assert user.count("<td>kto</td>") == user.count("<td>dpo</td>") == 2, "only the user's own measure"


def test_of_many_prompts_the_page_counts_all_and_names_the_extremes(replay):
    page = make_report(replay, "default", REACHED | {"seconds/total": 1.0, "seeds": 1}, "lead")
    assert "Of 60 prompts, the median picture is worse on 20, equal on 1, better on 39." in page
    named = [i for i in range(60) if f"prompt {i:02d}" in page]
    assert named == [*range(SHOWN_GAPS), *range(60 - SHOWN_GAPS, 60)]


def test_prompts_that_tie_are_no_failures(replay):
    gaps = pd.DataFrame({"prompt": [f"prompt {i:02d}" for i in range(60)], "gap": [-0.5, *[0.0] * 58, 0.5]})
    gaps.to_csv(replay / "qualitative_grid" / "gaps.csv", index=False)
    page = make_report(replay, "default", REACHED | {"seconds/total": 1.0, "seeds": 1}, "lead")
    assert "worse on 1, equal on 58, better on 1." in page
    assert [i for i in range(60) if f"prompt {i:02d}" in page] == [0, 59]


def test_a_table_that_is_missing_is_said_to_be(replay):
    (replay / "user_likes_red" / "win_rates.csv").unlink()
    page = make_report(replay, "default", REACHED | {"seconds/total": 1.0, "seeds": 1}, "lead")
    assert "win_rates.csv was not written" in page and "monitors.csv was not written" in page


def test_a_user_whose_systems_lost_the_prompt_is_told_which_and_whether_they_won(replay):
    means = {"mean/world_redness": [0.0, 0.2, 0.1, 0.1], "mean/world_fidelity": [0.99, 0.61, 0.95, 0.5]}
    pd.DataFrame(means, index=["base", "dpo", "kto", "kto_likes_10"]).to_csv(replay / "user_likes_red" / "monitors.csv")
    numbers, rates_file = REACHED | {"seconds/total": 1.0, "seeds": 1}, replay / "user_likes_red" / "win_rates.csv"
    losers = "These lost the prompt while they were tuned and do not win over the base (world_fidelity, base 0.99): "
    assert f"{losers}kto_likes_10 0.50, dpo 0.61." in make_report(replay, "default", numbers, "lead")
    table = pd.read_csv(rates_file)
    table.loc[(table["method"] == "dpo") & (table["scorer"] == "world_redness"), "low"] = 0.7
    table.to_csv(rates_file, index=False)
    page = make_report(replay, "default", numbers, "lead")
    assert "tuned and still win over the base (world_fidelity, base 0.99): dpo 0.61. Their win-rates say" in page
    assert f"{losers}kto_likes_10 0.50." in page
    control = pd.DataFrame({"system": ["base", "base_best_guidance"], "mean/world_fidelity": [0.99, 0.5]})
    assert fidelity_sentences(control, table) == [], "a guidance scale is no training"
    alone = pd.DataFrame({"system": ["kto"], "mean/world_fidelity": [0.1]})
    assert fidelity_sentences(alone, table) == []
