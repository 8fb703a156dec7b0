"""The page of a replay: what it says of the numbers, and the notebook that shows them, run once and written as HTML."""

import html.parser

import pandas as pd
import pytest
from in_process import in_this_process
from PIL import Image

from dkto.common.files import write_json
from dkto.paper.page import SHOWN_GAPS, aims, aims_sentence, extremes, fidelity_sentences, rates, read_table
from dkto.paper.replay import PAGE
from dkto.paper.seeds import MAIN
from dkto.runs.notebooks import run_notebook
from dkto.runs.page import write_notebook_page

EVIL = "<script>alert('x')</script>"


def rate(key, value, half=0.1):
    return {key: value, f"{key}/low": value - half, f"{key}/high": value + half, f"{key}/n": 40}


REACHED = {
    **rate("win_rate/kto_vs_base/world_utility", 0.8),
    **rate("win_rate/kto_vs_base_best_guidance/world_utility", 0.8),
    **rate("win_rate/kto_vs_sft_all/world_utility", 0.8),
    **rate("win_rate/kto_vs_kto_shuffled/world_utility", 0.8),
    **rate("win_rate/kto_vs_kto_shuffled_balanced/world_utility", 0.8),
    **rate("reward_gain/alignprop", 0.3),
    **rate("reward_gain/d3po", 0.3),
}


def test_the_first_paragraph_names_what_was_not_reached():
    assert aims_sentence(REACHED).startswith("Reached: 7 of 7 aims.")
    missed = REACHED | rate("win_rate/kto_vs_sft_all/world_utility", 0.55)
    assert aims_sentence(missed).startswith(
        "Not reached, with its 95 % interval: kto wins over sft_all. Reached: 6 of 7 aims. "
        "An interval of these win-rates is up to 20 points wide, n = 40, of one training each."
    )
    assert "n = 40 over 3 seeds." in aims_sentence(missed | {"seeds": 3})
    chance = REACHED | {"win_rate/kto_vs_sft_all/world_utility/holm": 0.06}
    assert "Not reached, with its 95 % interval: kto wins over sft_all. Reached: 6" in aims_sentence(chance)
    absent = {key: value for key, value in REACHED.items() if "d3po" not in key}
    assert "Not run in this profile: d3po raises its own reward" in aims_sentence(absent)
    assert aims(missed)["verdict"].tolist().count("not reached") == 1
    ordered = aims_sentence(REACHED | {"orderings/yes": 2, "orderings/no": 1, "orderings/all": 5})
    assert "Orderings of the paper that were tried: 5; 2 hold, 1 do not, 2 stay open" in ordered


def win_rates(scorers, opponents=("base", "sft")):
    """A `win_rates.csv` as the notebooks write it."""
    return pd.DataFrame(
        {"method": method, "opponent": opponent, "scorer": scorer, "win_rate": 0.625, "low": 0.5, "high": 0.75,
         "n": 40, "wins": 20, "ties": 10, "losses": 10, "sign_p": 0.1}
        for method in ("kto", "dpo") for opponent in opponents for scorer in scorers
    )  # fmt: skip


GAPS = pd.DataFrame({"prompt": [f"prompt {i:02d}" for i in range(60)], "gap": [(i - 20) / 100 for i in range(60)]})


@pytest.fixture(scope="module")
def replay(tmp_path_factory):
    """A folder as a replay with two seeds, one user and a grid leaves it, and its page; words of strangers in it."""
    folder = tmp_path_factory.mktemp("replay")
    tables = {
        f"{MAIN}-0/win_rates": win_rates(["world_utility", "world_fidelity"]),
        f"{MAIN}-1/win_rates": win_rates(["world_utility", "world_fidelity"]),
        f"{MAIN}-0/cards": pd.DataFrame({"cost": ["7 steps over all systems"]}),
        "user_likes_red/win_rates": win_rates(["world_redness", "world_utility"]),
        "user_likes_red/likes": pd.DataFrame({"image": [f"{i}.png" for i in range(1000)], "liked": 1}),
        "qualitative_grid/gaps": pd.concat([GAPS, pd.DataFrame({"prompt": [EVIL], "gap": [-1.0]})]).sample(frac=1),
    }
    for name, table in tables.items():
        run = folder / name.split("/")[0]
        run.mkdir(exist_ok=True)
        table.to_csv(folder / f"{name}.csv", index=False)
        record = {"status": "finished", "seconds": 2.0, "notebook": "", "source_hash": "", "parameters": {}}
        write_json(run / "run.json", record)
        write_json(run / "metrics.json", {"metrics": REACHED})
    noise = pd.DataFrame({"clean": [1.0], "flipped": [0.9], "lost": [0.1]}, index=["kto/0.3"])
    noise.to_csv(folder / "user_likes_red" / "noise.csv")
    for name in ("user_likes_red/before_after", "qualitative_grid/failures", f"{MAIN}-0/win_rates"):
        Image.new("RGB", (4, 4)).save(folder / f"{name}.png")
    settings = folder / "settings.json"
    write_json(settings, {"settings": {}, "guidance": 3.0, "search": {"by_hand": EVIL}})
    told = {"replay_dir": str(folder), "settings_file": str(settings), "output_dir": str(folder), "profile": EVIL}
    with in_this_process():
        metrics = run_notebook(PAGE, folder / "report.ipynb", told, progress=False)
    return folder, metrics, write_notebook_page(folder / "report.ipynb", folder / "report.html", EVIL).read_text()


class Tags(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.seen, self.sources = [], [], []

    def handle_starttag(self, tag, attributes):
        self.seen.append(tag)
        self.sources += [value for name, value in attributes if name in ("src", "href")]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_well_formed_whole_and_fetches_nothing(replay):
    page = Tags()
    page.feed(replay[2])
    assert not page.open and "script" not in page.seen
    assert page.sources and all(source.startswith("data:image/png;base64,") for source in page.sources)


def test_text_from_prompts_and_files_is_escaped(replay):
    assert "<script" not in replay[2]
    assert replay[2].count("&lt;script&gt;") == 4, "title, settings, prompt, profile"


def test_the_page_starts_with_the_aims_and_where_the_settings_come_from(replay):
    page = replay[2]
    lead = page[page.index('<p class="lead">') : page.index("<h2")]
    assert lead.startswith('<p class="lead">Reached: 7 of 7 aims.') and "Settings: not from a search" in lead
    assert "make paper" not in page and "from dkto" not in page, "no code, no instructions"


def test_the_page_holds_results_and_images_and_no_raw_data(replay):
    page = replay[2]
    assert "999.png" not in page
    assert page.count("<tr") < 110, "a page that a person would look at"
    assert page.count("data:image/png;base64,") == 4
    user = page[page.index("<h3>likes_red") :]
    assert user.index("<img") < user.index("<table"), "images come before tables"
    assert "Win-rates under world_redness" in user and "kto/0.3" in user
    assert user.count("<td>kto</td>") == user.count("<td>dpo</td>") == 2, "only the user's own measure"
    assert "Of 61 prompts, the median image is worse on 21, equal on 1, better on 39." in page
    named = [i for i in range(60) if f"prompt {i:02d}" in page]
    assert named == [*range(SHOWN_GAPS - 1), *range(60 - SHOWN_GAPS, 60)]


def test_all_seeds_are_on_the_page_and_in_the_numbers(replay):
    folder, metrics, page = replay
    assert "seed 1" in page and "2 (0, 1)" in page and "All seeds" in page
    assert metrics["seeds"] == 2 and metrics["seconds/total"] == 8.0
    assert metrics["win_rate/kto_vs_base/world_utility/n"] == 80 and "user_likes_red/reward_gain/d3po" in metrics
    assert (folder / "seeds.csv").is_file() and (folder / "win_rates.png").is_file()


def test_a_table_that_is_missing_and_a_part_that_was_not_run_are_said(replay):
    page = replay[2]
    assert "monitors.csv was not written" in page and "agreement.csv was not written" in page
    ablations = page[page.index(">Ablations") :]
    assert ablations.index("Not run in this profile.") < ablations.index("<h2")


def test_only_the_asked_rates_are_shown(tmp_path):
    path = tmp_path / "win_rates.csv"
    assert rates(path).iloc[0, 0] == "win_rates.csv was not written" == read_table(path).iloc[0, 0]
    win_rates(["world_redness", "world_utility"]).to_csv(path, index=False)
    assert rates(path, method="kto").columns[0] == "opponent" and len(rates(path, method="kto")) == 2
    assert len(rates(path, "world_redness")) == 4 and rates(path, opponent="base").columns[0] == "method"


def test_of_many_prompts_all_are_counted_the_extremes_named_and_ties_are_no_failures():
    assert extremes(GAPS)[0] == "Of 60 prompts, the median image is worse on 20, equal on 1, better on 39."
    tied = pd.DataFrame({"prompt": GAPS["prompt"], "gap": [-0.5, *[0.0] * 58, 0.5]})
    counts, rows = extremes(tied)
    assert "worse on 1, equal on 58, better on 1." in counts and rows["prompt"].tolist() == ["prompt 00", "prompt 59"]


def test_a_user_whose_methods_lost_the_prompt_is_told_which_and_whether_they_won():
    means = {"mean/world_redness": [0.0, 0.2, 0.1, 0.1], "mean/world_fidelity": [0.99, 0.61, 0.95, 0.5]}
    monitors = pd.DataFrame({"system": ["base", "dpo", "kto", "kto_likes_10"], **means})
    table = win_rates(["world_redness"])
    losers = "These lost the prompt while they were tuned and do not win over the base (world_fidelity, base 0.99): "
    assert fidelity_sentences(monitors, table) == [f"{losers}kto_likes_10 0.50, dpo 0.61."]
    table.loc[table["method"] == "dpo", "low"] = 0.7
    won, lost = fidelity_sentences(monitors, table)
    assert "tuned and still win over the base (world_fidelity, base 0.99): dpo 0.61. Their win-rates say" in won
    assert lost == f"{losers}kto_likes_10 0.50."
    control = pd.DataFrame({"system": ["base", "base_best_guidance"], "mean/world_fidelity": [0.99, 0.5]})
    assert fidelity_sentences(control, table) == [], "a guidance scale is no training"
    alone = pd.DataFrame({"system": ["kto"], "mean/world_fidelity": [0.1]})
    assert fidelity_sentences(alone, table) == []
