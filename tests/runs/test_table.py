"""Runs read back from their files: one table, pivots, intervals over seeds, the difference of two."""

import json
import os

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from finished_runs import TRAIN, kl_of, leave
from scipy import stats

from dkto.common.files import write_json
from dkto.runs.record import recorded
from dkto.runs.runner import results_of
from dkto.runs.table import (
    column,
    diff_runs,
    over_seeds,
    pivot_runs,
    plot_over_seeds,
    read_runs,
    varying_parameters,
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two betas, two sorts of likes, three seeds, and one run that failed."""
    root = tmp_path_factory.mktemp("runs")
    for beta in (1.0, 2.0):
        for likes in ("few", "many"):
            for seed in range(3):
                leave(root / "train" / f"beta={beta:g},likes={likes},seed={seed}", beta=beta, likes=likes, seed=seed)
    failed = root / "train" / "failed"
    failed.mkdir()
    with (
        pytest.raises(ValueError, match="no likes"),
        recorded(failed, TRAIN, failed / "n.ipynb", {"beta": 1.0, "likes": "few", "seed": 9, "output_dir": "out"}),
    ):
        raise ValueError("no likes")
    return root


@pytest.fixture(scope="module")
def table(runs):
    return read_runs(runs)


def test_every_run_is_one_row_the_failed_one_too(runs, table):
    assert len(table) == 13 and table["run"].is_unique
    failed = table.set_index("run").loc["train/failed"]
    assert (failed["status"], failed["error"]) == ("failed", "no likes") and pd.isna(failed["metric.kl"])
    whole = table.set_index("run").loc["train/beta=2,likes=many,seed=2"]
    assert whole["metric.kl"] == pytest.approx(0.62) and whole["parameter.beta"] == 2.0
    assert str(table["parameter.seed"].dtype) == "Int64", "whole numbers stay whole"
    assert whole["versions.torch"] and whole["hardware.cores"] >= 1 and whole["git_commit"]
    assert len(read_runs(runs / "train", runs)) == 13, "a run found twice counts once"
    assert list(read_runs(runs / "train" / "failed")["run"]) == ["failed"]


def test_a_failed_run_has_no_metrics_even_if_an_old_file_lies_there(tmp_path):
    folder = leave(tmp_path / "run", beta=1.0, likes="few", seed=0)
    record = json.loads((folder / "run.json").read_text()) | {"status": "failed", "error": "x"}
    write_json(folder / "run.json", record)
    assert "metric.kl" not in read_runs(tmp_path).columns


@pytest.mark.parametrize("other", [0.5, None, 3])
def test_whole_numbers_that_no_float_holds_stay_exact_beside_others(tmp_path, other):
    leave(tmp_path / "a", beta=1.0, likes="few", seed=2**53 + 1)
    leave(tmp_path / "b", beta=1.0, likes="few", seed=0)
    record = json.loads((tmp_path / "b" / "run.json").read_text())
    record["parameters"]["seed"] = other
    write_json(tmp_path / "b" / "run.json", record)
    assert read_runs(tmp_path)["parameter.seed"][0] == 9007199254740993


@pytest.mark.parametrize(
    ("name", "change", "sentence"),
    [
        ("run", {"status": "done"}, r"status must be one of running, finished, failed, got 'done'"),
        ("run", {"status": ["finished"]}, r"status must be one of"),
        ("run", {"parameters": None}, r"parameters must be an object of numbers, texts and lists, got None"),
        ("run", {"parameters": {"beta": {"a": 1}}}, r"parameters must be an object of numbers"),
        ("run", {"seconds": "1"}, r"seconds must be a finite number, got '1'"),
        ("run", {"error": 3}, r"error must be text or null, got 3"),
        ("run", {"status": "failed"}, r"error must be text, got None"),
        ("run", {"notebook": 3}, r"notebook must be text, got 3"),
        ("run", {"versions": "x"}, r"versions must be an object of"),
        ("run", "[" * 3000, r"it is nested too deeply"),
        ("run", "", r"Expecting value"),
        ("run", {"parameters": {"likes": "\ud800"}}, r"'\\ud800' in it is half a sign: remove it"),
        ("metrics", {"metrics": {"\ud800": 1}}, r"'\\ud800' in it is half a sign: remove it"),
        ("metrics", {"metrics": {"kl": "0.5"}}, r"metrics must be an object of numbers, got \{'kl': '0.5'\}"),
        ("metrics", {"metrics": {"kl": [1]}}, r"metrics must be an object of numbers"),
        ("metrics", {"metrics": {"kl": True}}, r"metrics must be an object of numbers"),
        ("metrics", {"metrics": {"kl": float("nan")}}, r"metrics must be an object of numbers"),
        ("metrics", {"metrics": [1]}, r"metrics must be an object of numbers, got \[1\]"),
    ],
)
def test_a_damaged_record_is_named_with_its_field(tmp_path, name, change, sentence):
    path = leave(tmp_path / "run", beta=1.0, likes="few", seed=0) / f"{name}.json"
    path.write_text(change if isinstance(change, str) else json.dumps(json.loads(path.read_text()) | change))
    for read in (read_runs, results_of):
        with pytest.raises(ValueError, match=rf"{name}\.json is no (record of a run|table of metrics): {sentence}"):
            read(tmp_path)


def test_whole_numbers_of_any_size_are_kept(tmp_path):
    leave(tmp_path / "a", beta=1.0, likes="few", seed=2**70)
    assert read_runs(tmp_path)["parameter.seed"].tolist() == [2**70]


@pytest.mark.parametrize("name", ["run.json", "metrics.json"])
def test_no_link_leads_out_of_a_folder_of_runs(tmp_path, name):
    run = leave(tmp_path / "runs" / "a", beta=1.0, likes="few", seed=0)
    (run / name).rename(tmp_path / name)
    (run / name).symlink_to(tmp_path / name)
    with pytest.raises(ValueError, match=rf"{name} is a link that leaves the folder .*: put the file itself there"):
        read_runs(tmp_path / "runs")


def test_neither_a_pipe_nor_a_folder_is_a_record(tmp_path):
    run = leave(tmp_path / "a", beta=1.0, likes="few", seed=0)
    (run / "run.json").unlink()
    os.mkfifo(run / "run.json")
    with pytest.raises(ValueError, match=r"run.json is no record of a run: expected a file, got a folder or a pipe"):
        read_runs(tmp_path)


def test_folders_without_runs_are_told_apart_from_missing_ones(tmp_path):
    write_json(tmp_path / "run.json", {"fingerprint": "a training's"})
    with pytest.raises(ValueError, match=r"no run in .*: a run's folder holds run.json"):
        read_runs(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"folder of runs .*none does not exist"):
        read_runs(tmp_path / "none")


def test_names_of_columns(table):
    assert column(table, "kl") == "metric.kl" and column(table, "likes") == "parameter.likes"
    assert column(table, "metric.beta") == "metric.beta" and column(table, "seconds") == "seconds"
    with pytest.raises(KeyError, match=r"no column 'lkes' in the table; did you mean 'likes'\? known: run, status"):
        column(table, "lkes")
    with pytest.raises(KeyError, match=r"'beta' is the name of parameter.beta and of metric.beta: give it in full"):
        column(table, "beta")


def test_what_varies_is_named_without_folders(table):
    assert varying_parameters(table) == ["beta", "likes", "seed"]
    assert varying_parameters(table[table["parameter.beta"] == 1.0].head(3)) == ["seed"]


def test_a_pivot_holds_means(table):
    pivot = pivot_runs(table, "kl", "likes", "parameter.beta")
    assert pivot.loc["many", 2.0] == pytest.approx(0.61)
    assert pivot.index.name == "likes" and list(pivot.columns) == [1.0, 2.0]


def test_the_interval_over_seeds_is_students(table):
    summary = over_seeds(table, "kl", ["parameter.beta", "likes"])
    assert len(summary) == 4 and set(summary["n"]) == {3}
    row = summary[(summary["beta"] == 2.0) & (summary["likes"] == "few")].iloc[0]
    sample = [kl_of(2.0, "few", seed) for seed in range(3)]
    low, high = stats.t.interval(0.95, 2, loc=np.mean(sample), scale=stats.sem(sample))
    assert (row["mean"], row["low"], row["high"]) == (pytest.approx(0.51), pytest.approx(low), pytest.approx(high))
    one = over_seeds(table[table["parameter.seed"] == 0], "kl", ["parameter.beta", "likes"])
    assert set(one["n"]) == {1} and one["low"].isna().all()


def test_runs_that_differ_in_more_than_the_seed_are_not_averaged(table):
    with pytest.raises(ValueError, match=r"runs with beta=1.0 differ in likes too: add them to by"):
        over_seeds(table, "kl", "parameter.beta")
    with pytest.raises(ValueError, match=r"confidence must be in \(0, 1\), got 95"):
        over_seeds(table, "kl", ["likes"], confidence=95)


def test_the_interval_covers_the_truth_as_often_as_it_says():
    """2,000 draws of 5 runs from a normal distribution: 95 % of the intervals hold its mean, +- 2 % by chance."""
    values = np.random.default_rng(0).normal(3.0, 2.0, (2000, 5))
    rows = {"metric.kl": values.ravel(), "parameter.group": np.repeat(np.arange(2000), 5)}
    summary = over_seeds(pd.DataFrame(rows | {"parameter.seed": np.tile(np.arange(5), 2000)}), "kl", "group")
    assert ((summary["low"] < 3) & (summary["high"] > 3)).mean() == pytest.approx(0.95, abs=0.02)


def test_the_plot_shows_one_line_a_value_with_its_intervals(table):
    summary = over_seeds(table, "kl", ["parameter.beta", "likes"])
    ax = plot_over_seeds(summary, "beta", lines="likes", ylabel="KL (nats)")
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["likes = few", "likes = many"]
    lines = [container.lines[0] for container in ax.containers]
    assert (np.diff([line.get_xdata() for line in lines], axis=0) > 0).all(), "no interval hides another"
    assert len(ax.containers) == 2 and ax.get_ylabel() == "KL (nats)" and "n = 3" in ax.get_title()
    names = plot_over_seeds(over_seeds(table[table["parameter.beta"] == 1.0], "kl", "likes"), "likes")
    assert [label.get_text() for label in names.get_xticklabels()] == ["few", "many"]
    with pytest.raises(KeyError, match=r"column .bet. in the summary; did you mean .beta.\? known: beta, likes, n, "):
        plot_over_seeds(summary, "bet")
    plt.close("all")


def test_the_difference_of_two_runs_is_what_differs_and_nothing_else(runs, tmp_path):
    first = runs / "train" / "beta=1,likes=few,seed=0"
    difference = diff_runs(first, runs / "train" / "beta=2,likes=few,seed=0").set_index("name")
    assert set(difference.index) == {"beta", "kl"}
    assert tuple(difference.loc["beta", ["what", "first", "second"]]) == ("parameter", 1.0, 2.0)
    assert difference.loc["kl", "change"] == pytest.approx(-0.5)
    other = leave(tmp_path / "other", beta=1.0, likes="few", seed=0)
    record = json.loads((other / "run.json").read_text())
    record["versions"]["torch"], record["parameters"]["rate"] = "2.4.0", 0.1
    write_json(other / "run.json", record)
    difference = diff_runs(first, other)
    assert list(zip(difference["what"], difference["name"], strict=True)) == [
        ("parameter", "rate"),
        ("versions", "torch"),
    ]
    with pytest.raises(ValueError, match=r"two runs are compared, but .* hold 13"):
        diff_runs(runs, first)


def test_a_record_without_its_notebook_is_refused_and_not_left_out(tmp_path):
    path = tmp_path / "one" / "run.json"
    leave(path.parent, beta=1.0, likes="many", seed=0)
    record = json.loads(path.read_text())
    write_json(path, {key: value for key, value in record.items() if key != "notebook"})
    with pytest.raises(ValueError, match=r"run\.json is no record of a run: notebook must be text, got nothing"):
        read_runs(tmp_path)
