"""`make bench`: each measurement is one flat key in results.json and one line of the table at the end.

A measurement runs only when this folder is named (`pytest tests/benchmarks`), never among the tests.
"""

import json
import math
from pathlib import Path

import pytest

RESULTS = Path(__file__).parent / "results.json"
measured = pytest.StashKey[dict]()


def pytest_ignore_collect(config):
    """Leave this folder out unless a path on the command line leads into it."""
    return True if not any("benchmarks" in str(argument) for argument in config.args) else None


@pytest.fixture
def record_ratio(request):
    """Note one measured value under a flat key, and fail if it misses its bound.

    record_ratio(key, value, *, at_most=None, at_least=None, low=None, high=None, n=None, **more)

    Args of the call:
        key: as in the table of README.md here, for instance "step_over_pure_compute/small".
        value: a ratio of two things measured in one run, or a plain number with its unit in the key.
        at_most, at_least: the bound that a ratio must keep; seconds have none, since they tell of the machine.
        low, high: its 95 % interval.
        n: how many repetitions it comes from.
        more: further numbers, kept as "key.name" and not shown in the table.

    The value is on disk before the bound is checked, so that a miss is seen in results.json too.
    """

    def record(key, value, *, at_most=None, at_least=None, low=None, high=None, n=None, **more):
        line = {"at_most": at_most, "at_least": at_least, "low": low, "high": high, "n": n}
        values = {"": value, **{f".{name}": number for name, number in (line | more).items() if number is not None}}
        for name, number in values.items():
            if not math.isfinite(number):
                raise ValueError(f"{key}{name} must be a finite number, got {number}")
        lines = request.config.stash.setdefault(measured, {})
        lines[key] = {"value": value, **line}
        stored = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        stored |= {f"{key}{name}": number for name, number in values.items()}
        part = RESULTS.with_suffix(".part")
        part.write_text(json.dumps(dict(sorted(stored.items())), indent=2) + "\n")
        part.replace(RESULTS)
        assert at_most is None or value <= at_most, f"{key} is {value:.4g}, wanted at most {at_most:.4g}"
        assert at_least is None or value >= at_least, f"{key} is {value:.4g}, wanted at least {at_least:.4g}"

    return record


def pytest_terminal_summary(terminalreporter, config):
    """One table of what this run measured."""
    lines = config.stash.get(measured, {})
    if not lines:
        return
    terminalreporter.section(f"measured, kept in {RESULTS.relative_to(config.rootpath)}")
    width = max(len(key) for key in lines)
    for key, line in lines.items():
        interval = "" if line["low"] is None else f"{line['low']:.4g} to {line['high']:.4g}"
        wanted = "" if line["at_most"] is None else f"at most {line['at_most']:.4g}"
        wanted += "" if line["at_least"] is None else f"at least {line['at_least']:.4g}"
        count = "" if line["n"] is None else f"n {line['n']}"
        terminalreporter.write_line(f"{key:<{width}}  {line['value']:>10.4g}  {interval:<20}  {wanted:<16}  {count}")
