"""`make gpu` as far as a machine without a card can show it: a dry run, and what it says of rows and ends."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dkto.training.memory import SIZES
from gpu.__main__ import RESULTS, perform, rows_of
from gpu.expected import EXPECTED, MEMORY_GB, Expected

TESTS = Path(__file__).parents[1]
BENCHMARKS = (TESTS / "benchmarks" / "README.md").read_text()


def test_every_row_says_what_was_wanted_and_what_came():
    rows = rows_of(
        [
            {"key": "sd15/step_over_bare", "value": 1.04, "why": ""},
            {"key": "sd15/over_published", "value": 1.9, "why": ""},
            {"key": "sdxl/peak_gb", "value": None, "why": "OutOfMemoryError: 80 GB"},
        ]
    )
    assert rows.keys() == EXPECTED.keys()
    assert rows["sd15/step_over_bare"]["verdict"] == "held" and rows["sd15/over_published"]["verdict"] == "missed"
    assert rows["sdxl/peak_gb"]["verdict"] == "not measured: OutOfMemoryError: 80 GB"
    assert rows["resume/difference"]["verdict"] == "not measured: its stage did not come to it"
    assert [Expected("", 0.9, 1.1).verdict(value) for value in (0.8, 1.0, 1.2)] == ["missed", "held", "missed"]


def test_expectations_are_kept_beside_the_figures_and_the_pages_say_if_there_are_none():
    kept = json.loads(RESULTS.read_text())
    assert {key: row["wanted"] for key, row in kept["rows"].items()} == {k: v.wanted for k, v in EXPECTED.items()}
    measured = any(row["measured"] is not None for row in kept["rows"].values())
    for page in (BENCHMARKS, (TESTS.parent / "README.md").read_text()):
        assert ("has not run on a GPU" in page) == (not measured)


def test_memory_is_that_of_the_table():
    for (size, rank), computed in MEMORY_GB.items():
        what = f"LoRA of rank {rank}" if rank else "all weights"
        (row,) = re.findall(rf"\| {SIZES[size].title} \| {what} \|.*", BENCHMARKS)
        assert row.split(" | ")[4] == str(computed)


@pytest.mark.process
def test_a_stage_that_takes_too_long_is_ended(tmp_path):
    assert perform("card", tmp_path, True, 0.2) == "ended after its 0 s"


@pytest.mark.slow  # ten processes and three trainings
def test_a_dry_run_measures_all_that_needs_no_card(tmp_path):
    command = [sys.executable, "-m", "gpu", "--dry", "--results", str(tmp_path / "results.json")]
    done = subprocess.run(command, cwd=TESTS, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "results.json").read_text())
    assert {stage["end"] for stage in found["stages"].values()} == {"done"}
    card = re.compile(r".*(peak_gb|idle)|memory/.*")
    for key, row in found["rows"].items():
        assert (row["measured"] is not None) != bool(card.fullmatch(key)), (key, row["verdict"])
        assert row["measured"] is not None or "this machine has no GPU" in row["verdict"], row["verdict"]
    assert found["rows"]["resume/difference"]["measured"] == 0
    assert "a dry run at tiny sizes: no figure means anything" in done.stdout
