import json

import matplotlib.pyplot as plt
import numpy as np
import pytest

from dkto.objective.utilities import UTILITIES, register_utility
from dkto.widgets import Explorer
from dkto.widgets.explorer import LARGEST_UPLOAD, rewards_of_records, rewards_of_text

REWARDS, LIKED = np.array([1.0, -2.0, 0.5]), np.array([True, False, True])


@pytest.fixture(autouse=True)
def figures_are_closed():
    yield
    plt.close("all")


def test_beta_spreads_the_rewards_that_were_given():
    explorer = Explorer(REWARDS, LIKED, beta=100.0)
    explorer.beta = 200.0
    rewards, labels = explorer.rewards()
    np.testing.assert_allclose(rewards, 2 * REWARDS, rtol=1e-6)
    assert labels.tolist() == LIKED.tolist()


def test_a_registered_utility_travels_as_a_table():
    register_utility("cube", lambda x: x**3 + x)
    explorer = Explorer()
    (curve,) = [curve for curve in explorer.curves if curve["name"] == "cube"]
    samples = np.frombuffer(curve["value"])
    assert samples[0] == -(50.0**3) - 50 and samples[-1] == 50.0**3 + 50 and abs(samples[len(samples) // 2]) < 1e-12
    assert "value" not in next(curve for curve in explorer.curves if curve["name"] == "linear")


def test_the_page_asks_for_a_formula_and_reads_why_not():
    explorer = Explorer()
    explorer.receive({"type": "utility", "name": "mine", "formula": "x.real"})
    assert "is not allowed" in explorer.message and "mine" not in UTILITIES
    explorer.receive({"type": "utility", "name": "mine", "formula": "tanh(x)"})
    assert explorer.message == "" and explorer.utility == "mine" and explorer.curves[-1]["formula"] == "tanh(x)"
    explorer.receive({"type": "nothing that is known"})
    assert explorer.message == "" and explorer.utility == "mine"


def test_the_page_sends_a_file():
    explorer = Explorer()
    explorer.receive({"type": "rewards", "name": "a.csv", "text": "reward,liked\n2,1\n-1,0\n"})
    assert explorer.source == "a.csv" and explorer.rewards()[1].tolist() == [True, False]
    explorer.receive({"type": "rewards", "name": "a.csv", "text": "reward\n2\n"})
    assert explorer.message == "a.csv needs the columns reward, liked; missing: liked; found: reward"


@pytest.mark.parametrize("end", ["\r", "\r\n", "\n"])
def test_every_end_of_a_line_is_one(end):
    text = "\ufeff" + end.join(["reward,liked", "2,1", "-1,0", ""])
    rewards, labels = rewards_of_text(text, "a.csv")
    assert rewards.tolist() == [2, -1] and labels.tolist() == [True, False]


@pytest.mark.parametrize(
    "message",
    [
        [],
        {"type": "rewards", "name": "a.csv", "text": "reward,liked\n1\x00,1"},
        {"type": "rewards", "name": "a.jsonl", "text": '{"reward/desirable": 1' + "0" * 400 + "}"},
        {"type": "utility", "name": "a", "formula": "9" * 190},
    ],
)
def test_whatever_the_page_sends_ends_in_a_sentence_on_it(message):
    explorer = Explorer()
    explorer.receive(message)
    assert explorer.message


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (None, "config: beta must be a number above 0, got nothing"),
        ({"beta": "x", "utility": "linear"}, "config: beta must be a number above 0, got 'x'"),
        ({"beta": 1.0, "utility": None}, "config: utility must be text, got None"),
    ],
)
def test_a_damaged_record_of_a_run_is_named(tmp_path, config, sentence):
    (tmp_path / "metrics.jsonl").write_text('{"global_step": 1, "reward/desirable": 1.0}\n')
    (tmp_path / "training.json").write_text(json.dumps({"config": config}))
    with pytest.raises(ValueError, match=rf"training\.json, {sentence}"):
        Explorer.of_run(tmp_path)


def test_the_curves_hold_gamma_and_class_weights():
    table = Explorer(utility="linear", desirable_fraction=0.75, undesirable_weight=2.0).curves_table()
    assert (table["weight:liked"] == 1).all() and (table["weight:disliked"] == -2).all()
    assert (table["drawn:liked"] == 0.75).all() and (table["drawn:disliked"] == -0.5).all()


@pytest.mark.parametrize("given", [True, False])
def test_the_static_figure_shows_four_panels(given, tmp_path):
    figure = (Explorer(REWARDS, LIKED, source="$three$") if given else Explorer()).figure()
    assert len(figure.axes) == 4
    figure.savefig(tmp_path / "figure.png")
    if given:
        assert figure.axes[3].get_title() == "$three$"


def test_a_run_gives_its_step_means_its_beta_and_its_utility(tmp_path):
    records = [
        {"global_step": 1, "loss": 1.0, "reward/desirable": 1.0, "reward/undesirable": -1.0},
        {"global_step": 2, "loss": 1.0, "reward/desirable": 2.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (tmp_path / "training.json").write_text(json.dumps({"config": {"beta": 50.0, "utility": "flat = tanh(x/9)"}}))
    explorer = Explorer.of_run(tmp_path)
    assert explorer.beta == 50.0 and explorer.utility == "flat"
    np.testing.assert_allclose(explorer.rewards()[0], [1, -1, 2], rtol=1e-6)
    with pytest.raises(FileNotFoundError, match=r"holds no run \(metrics.jsonl is missing\)"):
        Explorer.of_run(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("arguments", "settings", "sentence"),
    [
        ((REWARDS, LIKED[:2]), {}, "must be lists of one length"),
        ((REWARDS, None), {}, "must be lists of one length"),
        ((REWARDS, LIKED.astype(int)), {}, "the second of bool"),
        (([np.nan], [True]), {}, "reward 0 must be finite, and a float32 when divided by beta, got nan"),
        (([1, 1e308], [True, True]), {}, r"reward 1 must be finite, .*, got 1e\+308"),
        ((np.zeros(50_001), np.ones(50_001, bool)), {}, "1 to 50,000, got 50,001"),
        ((), {"beta": 0.0}, "beta must be above 0"),
        ((), {"largest_reward": -1.0}, "largest_reward must be above 0"),
        ((), {"desirable_fraction": 1.5}, r"desirable_fraction must be in \[0, 1\]"),
        ((), {"utility": "loss_avers"}, "did you mean 'loss_averse'"),
    ],
)
def test_wrong_arguments_are_refused(arguments, settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        Explorer(*arguments, **settings)


@pytest.mark.parametrize(
    ("text", "name", "sentence"),
    [
        ("reward,liked\n1,maybe\n", "a.csv", "a.csv, row 1: liked must be"),
        ("reward,liked\n1,1\nx,1\n", "a.csv", "a.csv, row 2: reward must be a number, got 'x'"),
        ("reward,liked\n1\n", "a.csv", "row 1: expected 2 fields as in the header, got 1"),
        ("reward,liked\n1e999,1\n", "a.csv", "a.csv, row 1: reward must be a number, got '1e999'"),
        ('reward,liked\n"1,1\n', "a.csv", "a.csv.* cannot be read as CSV|expected"),
        ("{", "a.jsonl", "a.jsonl is not JSON lines: line 1: "),
        ('{"loss": 1}\n' + "[" * 3000, "a.jsonl", "a.jsonl is not JSON lines: line 2: "),
        ('{"reward/desirable": "x"}', "a.jsonl", "record 1: reward/desirable must be a finite number, got 'x'"),
        ('{"reward/desirable": NaN}', "a.jsonl", "record 1: reward/desirable must be a finite number, got nan"),
        ('{"reward/desirable": [[1]]}', "a.jsonl", "record 1: reward/desirable must be a finite number"),
        ("3\n", "a.jsonl", "one JSON object a line"),
        ('{"loss": 1}\n', "a.jsonl", "none of 1 records"),
        ("", "a.xlsx", "must be a .csv"),
        ("x" * (LARGEST_UPLOAD + 1), "a.csv", "characters, more than"),
    ],
)
def test_wrong_files_are_refused_with_their_row(text, name, sentence):
    with pytest.raises(ValueError, match=sentence):
        rewards_of_text(text, name)


def test_step_records_become_one_reward_for_each_class():
    rewards, labels = rewards_of_records([{"reward/undesirable": -3}, {"loss": 0}])
    assert rewards.tolist() == [-3.0] and labels.tolist() == [False]


def test_the_modules_hold_no_way_to_parse_html():
    """Strings reach the page as text: no script of the widgets parses HTML or evaluates code."""
    from dkto.widgets.base import FOLDER

    scripts = sorted(FOLDER.glob("*.js"))
    assert len(scripts) >= 5, "common.js and one of each instrument"
    for path in scripts:
        source = path.read_text()
        for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "Function(", "http"):
            assert word not in source, f"{path.name} holds {word}"
