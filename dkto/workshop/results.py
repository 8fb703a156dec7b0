"""The page of results: every figure is read from a kept run, `python -m dkto.workshop.results` writes it.

`papermill_runs/results_tables.yaml` says which rows there are, `results_notes.md` beside it holds the dated notes.
"""

from functools import cache
from pathlib import Path
from typing import NamedTuple

import yaml

from dkto.common.files import read_json
from dkto.evaluation.published import HEADED_FIRST, SCORER_ORDER, SD_2_1, USER_STUDY_AGAIN, both_versions
from dkto.evaluation.published import TABLES as PUBLISHED

ROOT = Path(__file__).parents[2]
KEPT = ROOT / "papermill_runs" / "reference"
PAGE = ROOT / "papermill_runs" / "RESULTS.md"
ROWS = ROOT / "papermill_runs" / "results_tables.yaml"
NOTES = ROOT / "papermill_runs" / "results_notes.md"
SHARES = ("win_rate", "pair_accuracy", "lost")  # what a key begins with whose value is a share, shown in percent


class Table(NamedTuple):
    """One table of the page: its rows are what is said, with the key of the kept run's metrics.json."""

    title: str
    about: str
    folder: str
    rows: dict[str, str]


TABLES = tuple(Table(**each) for each in yaml.safe_load(ROWS.read_text(encoding="utf-8")))


def figure(folder: str, key: str) -> str:
    """One kept number as a text shows it: the value, its 95 % interval, and how many prompts or seeds it is of.

    `n = 3×500` is the mean of three trainings on 500 prompts each.

    Args:
        folder: of the kept run, below `papermill_runs/reference`.
        key: of its metrics.json.

    Raises:
        KeyError: if the run has no such key.

    >>> figure("52_a_specific_user", "win_rate/kto_vs_sft/world_redness")
    '86 % [78, 91], n = 100'
    """
    record = _kept(folder)
    metrics, parameters = record["metrics"], record["parameters"]
    if key not in metrics:
        raise KeyError(f"{folder}/metrics.json has no {key!r}")
    share = any(part in SHARES for part in key.split("/")[:2])
    scale, unit, form = (100, " %", ".0f") if share else (1, "", ".3g")
    text = f"{scale * metrics[key]:{form}}{unit}"
    if f"{key}/low" not in metrics:
        return text
    low, high = (f"{scale * metrics[f'{key}/{end}']:{form}}" for end in ("low", "high"))
    if "/cost/" in key:  # over seeds, on as many prompts as the table says
        return f"{text} [{low}, {high}]"
    n = metrics.get(f"{key}/n") or parameters.get("seeds") or parameters["prompts"]
    seeds = sum(f"seed-{seed}/{key}" in metrics for seed in range(round(metrics.get("seeds", 0))))
    return f"{text} [{low}, {high}], n = {f'{seeds}×{n // seeds}' if seeds else n}"


def over_seeds(folder: str, key: str) -> str:
    """What stands beside a win-rate over seeds: p of one half with Holm's correction, Student's interval of the seeds.

    >>> over_seeds("paper_0_1", "win_rate/kto_vs_kto_shuffled/world_utility")
    "; Holm's p 0.012; seeds alone [46, 69]"
    >>> over_seeds("52_a_specific_user", "win_rate/kto_vs_sft/world_redness")
    ''
    """
    metrics = _kept(folder)["metrics"]
    if f"{key}/holm" not in metrics:
        return ""
    p, low, high = (metrics[f"{key}/{name}"] for name in ("holm", "t_low", "t_high"))
    return f"; Holm's p {'< 0.001' if p < 0.001 else f'{p:.3f}'}; seeds alone [{100 * low:.0f}, {100 * high:.0f}]"


@cache
def _kept(folder: str) -> dict:
    return read_json(KEPT / folder / "metrics.json", "metrics of a kept run", ["metrics", "parameters"])


def paper_lines() -> list[str]:
    """The paper's own win-rates, both versions, as a section of the page."""
    lines = [
        "## The paper's own numbers",
        "",
        "Win-rates of Diffusion-KTO on Stable Diffusion 1.5 in per cent, as the paper prints them: first version / "
        "NeurIPS version. They are of other models, data and judges than ours, so only sides of one half compare. The "
        "first version trained on 16 GPUs with 2 images each, the second on 4. The first heads the column imagereward "
        "HPS and the column hps ImageReward. That is almost certainly a slip: the numbers of the second continue the "
        "columns as they are named here. The paper's ±1.9 points are over 2,500 images; a median of five leaves 500 "
        "comparisons, so ±4.4 points.",
    ]
    heads = [f"{name} (first: {HEADED_FIRST[name]})" if name in HEADED_FIRST else name for name in SCORER_ORDER]
    for table in PUBLISHED:
        lines += ["", f"| {table} | {' | '.join(heads)} |", f"|---|{'---|' * len(heads)}"]
        lines += [f"| over {row[0]} | {' | '.join(row[1:])} |" for row in both_versions(table).itertuples()]
    again = [f"over {name} {' / '.join(map(str, rates))}" for name, rates in SD_2_1.items()]
    people = [f"{name} {share:.0f} %" for name, share in USER_STUDY_AGAIN.items()]
    about = f"On Stable Diffusion 2.1, second version, Pick-a-Pic, in the same order: {'; '.join(again)}. "
    about += f"People preferred it over {', '.join(people)} (100 prompts; the first version had no SFT there)."
    return [*lines, "", about]


def results_page() -> str:
    """The page as text: a table for each of `TABLES`, then the notes."""
    lines = [
        "# Results",
        "",
        "Made by `make results` from the kept runs; each figure links to its run. In brackets is the 95 % interval. "
        "For win-rates of one training it is Tango's score interval over prompts alone: another training is not in "
        "it. Where `n` is a product, as 3×500, it is that of a mixed model over opponents and training seeds. In "
        "the 2-D laboratory it is Student's over seeds, for what is lost a bootstrap over prompts. `n` counts "
        "prompts, or seeds in the laboratory. The base, the liked images and the judges are those of the small "
        "world, on 2 CPU cores. The README says what we make of it.",
    ]
    for table in TABLES:
        lines += ["", f"## {table.title}", "", table.about, ""]
        lines += ["| what | result | key in the kept run |", "|---|---|---|"]
        link = f"reference/{table.folder}/metrics.json"
        lines += [
            f"| {what} | {figure(table.folder, key)}{over_seeds(table.folder, key)} | [`{key}`]({link}) |"
            for what, key in table.rows.items()
        ]
    lines += ["", *paper_lines()]
    return "\n".join(lines) + "\n\n" + NOTES.read_text(encoding="utf-8")


if __name__ == "__main__":
    PAGE.write_text(results_page(), encoding="utf-8")
    print(f"written: {PAGE.relative_to(ROOT)}")
