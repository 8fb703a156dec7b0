"""The page of results: every figure is read from a kept run, `python -m dkto.workshop.results` writes it.

`TABLES` says which rows there are; `papermill_runs/results_notes.md` holds the dated notes below them.
"""

from functools import cache
from pathlib import Path
from typing import NamedTuple

from dkto.common.files import read_json

ROOT = Path(__file__).parents[2]
KEPT = ROOT / "papermill_runs" / "reference"
PAGE = ROOT / "papermill_runs" / "RESULTS.md"
NOTES = ROOT / "papermill_runs" / "results_notes.md"
SHARES = ("win_rate", "pair_accuracy", "lost")  # what a key begins with whose value is a share, shown in percent
FULL = "`make paper PROFILE=full`"


class Table(NamedTuple):
    """One table of the page: its rows are (what, key of the kept run's metrics.json)."""

    title: str
    about: str
    folder: str
    rows: tuple[tuple[str, str], ...]


_RED = "world_redness"
_OPPONENTS = (
    ("the base at the plain guidance scale", "base"),
    ("the base at its own best guidance", "base_best_guidance"),
    ("SFT on the liked images", "sft"),
    ("SFT on all images, which saw no preference", "sft_all"),
    ("CSFT", "csft"),
    ("Diffusion-DPO", "dpo"),
    ("D3PO", "d3po"),
    ("AlignProp, whose reward is a part of the measure", "alignprop"),
    ("KTO with the loss-averse utility", "kto_loss_averse"),
    ("KTO with the risk-seeking utility", "kto_risk_seeking"),
    ("KTO on shuffled likes", "kto_shuffled"),
)
TABLES = (
    Table(
        "A simple taste, five minutes",
        "`make demo`: a user likes images with a red tint; 60 test prompts with 5 images each, judged by redness.",
        "40_win_rates",
        (
            ("KTO against the base", f"win_rate/kto_vs_base/{_RED}"),
            ("KTO against KTO on shuffled likes", f"win_rate/kto_vs_kto_shuffled/{_RED}"),
            ("KTO against SFT on the liked images", f"win_rate/kto_vs_sft/{_RED}"),
            ("KTO on shuffled likes against the base", f"win_rate/kto_shuffled_vs_base/{_RED}"),
            ("prompt fidelity of the base", "fidelity/base"),
            ("prompt fidelity of KTO", "fidelity/kto"),
        ),
    ),
    Table(
        "The paper's tables on the small world",
        f"{FULL}: the simulated user `balanced` weighs fidelity and aesthetics. Means of three training seeds, "
        "500 held-out prompts with 5 images each; the interval reaches from the lowest bound of a seed to the highest "
        "([each seed](reference/paper_full/seeds.csv)). Each method draws at its own best guidance.",
        "paper_full",
        (
            *((f"KTO against {words}", f"win_rate/kto_vs_{name}/world_utility") for words, name in _OPPONENTS),
            ("SFT on all images against the base", "win_rate/sft_all_vs_base/world_utility"),
            ("KTO on shuffled likes against the base", "win_rate/kto_shuffled_vs_base/world_utility"),
        ),
    ),
    Table(
        "A user who likes red",
        f"{FULL}: the pool of the tables, judged by one simulated user; 100 test prompts with 3 images each.",
        "52_a_specific_user",
        (
            ("KTO against the base", f"win_rate/kto_vs_base/{_RED}"),
            ("KTO against the base at its best guidance", f"win_rate/kto_vs_base_best_guidance/{_RED}"),
            ("KTO against KTO on shuffled likes", f"win_rate/kto_vs_kto_shuffled/{_RED}"),
            ("KTO against SFT on the liked images", f"win_rate/kto_vs_sft/{_RED}"),
            ("KTO against SFT on all images of the pool", f"win_rate/kto_vs_sft_all/{_RED}"),
            ("KTO against Diffusion-DPO", f"win_rate/kto_vs_dpo/{_RED}"),
            ("Diffusion-DPO against the base", f"win_rate/dpo_vs_base/{_RED}"),
            ("SFT on all images against the base", f"win_rate/sft_all_vs_base/{_RED}"),
            ("KTO on shuffled likes against the base", f"win_rate/kto_shuffled_vs_base/{_RED}"),
            ("KTO on 30 % flipped likes against the base", f"win_rate/kto_flipped_30_vs_base/{_RED}"),
            ("Diffusion-DPO on 30 % flipped comparisons against the base", f"win_rate/dpo_flipped_30_vs_base/{_RED}"),
            ("win-rate over the base that KTO loses by 30 % flips", "lost/kto/0.3"),
            ("win-rate over the base that SFT loses by 30 % flips", "lost/sft/0.3"),
            ("win-rate over the base that Diffusion-DPO loses by 30 % flips", "lost/dpo/0.3"),
            ("redness that KTO loses by 30 % flips", "score_lost/kto/0.3"),
            ("redness that SFT loses by 30 % flips", "score_lost/sft/0.3"),
            ("redness that Diffusion-DPO loses by 30 % flips", "score_lost/dpo/0.3"),
            ("mean redness of the base", f"mean/{_RED}/base"),
            ("mean redness of SFT on all images", f"mean/{_RED}/sft_all"),
            ("mean redness of KTO on shuffled likes", f"mean/{_RED}/kto_shuffled"),
            ("mean redness of KTO", f"mean/{_RED}/kto"),
            ("prompt fidelity of the base", "mean/world_fidelity/base"),
            ("prompt fidelity of KTO", "mean/world_fidelity/kto"),
            ("prompt fidelity of KTO on ten likes", "mean/world_fidelity/kto_likes_10"),
            ("prompt fidelity of Diffusion-DPO", "mean/world_fidelity/dpo"),
            ("prompt fidelity of Diffusion-DPO on 30 % flipped comparisons", "mean/world_fidelity/dpo_flipped_30"),
            ("distance from the base on neutral prompts, KTO", "neutral_drift/kto"),
            ("distance from the base on neutral prompts, Diffusion-DPO", "neutral_drift/dpo"),
        ),
    ),
    Table(
        "A user who likes vivid images",
        f"{FULL}: as above, judged by aesthetics.",
        "paper_full/user_likes_vivid",
        (
            ("KTO against the base", "win_rate/kto_vs_base/world_aesthetics"),
            ("KTO on shuffled likes against the base", "win_rate/kto_shuffled_vs_base/world_aesthetics"),
            ("KTO against KTO on shuffled likes", "win_rate/kto_vs_kto_shuffled/world_aesthetics"),
            ("KTO against SFT on the liked images", "win_rate/kto_vs_sft/world_aesthetics"),
            ("KTO against Diffusion-DPO", "win_rate/kto_vs_dpo/world_aesthetics"),
        ),
    ),
    Table(
        "A user who likes faithful images",
        f"{FULL}: as above, judged by prompt fidelity.",
        "paper_full",
        (("KTO against the base", "user_prompt_faithful/win_rate/kto_vs_base/world_fidelity"),),
    ),
    Table(
        "The 2-D laboratory",
        "`make toy`: KL divergence from the model's samples to the desirable distribution, lower is nearer; "
        "implicit accuracy over pairs. The verdicts on the paper's section 7 are in the "
        "[kept lesson](reference/23_which_objective/notebook.ipynb).",
        "23_which_objective",
        (
            *(
                (f"KL: {words}", f"kl/{name}")
                for words, name in (
                    ("base", "base"),
                    ("SFT on desirable samples", "sft"),
                    ("CSFT", "csft"),
                    ("Diffusion-DPO", "dpo"),
                    ("KTO, loss-averse", "loss_averse"),
                    ("KTO, risk-seeking", "risk_seeking"),
                    ("KTO, Kahneman-Tversky", "kahneman_tversky"),
                )
            ),
            ("pair accuracy: Diffusion-DPO", "pair_accuracy/dpo"),
            ("pair accuracy: KTO, Kahneman-Tversky, gamma 0.5", "pair_accuracy/kahneman_tversky@0.5"),
            ("pair accuracy: KTO, Kahneman-Tversky, gamma 0.8", "pair_accuracy/kahneman_tversky"),
        ),
    ),
)


def figure(folder: str, key: str) -> str:
    """One kept number as a text shows it: the value, its 95 % interval, and how many prompts or seeds it is of.

    Args:
        folder: of the kept run, below `papermill_runs/reference`.
        key: of its metrics.json.

    Raises:
        KeyError: if the run has no such key.

    >>> figure("40_win_rates", "win_rate/kto_vs_sft/world_redness")
    '18 % [11, 30], n = 60'
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
    n = metrics.get(f"{key}/n") or parameters.get("prompts") or parameters["seeds"]
    return f"{text} [{low}, {high}], n = {n:,}"


@cache
def _kept(folder: str) -> dict:
    return read_json(KEPT / folder / "metrics.json", "metrics of a kept run", ["metrics", "parameters"])


def results_page() -> str:
    """The page as text: a table for each of `TABLES`, then the notes."""
    lines = [
        "# Results",
        "",
        "Made by `make results` from the kept runs; each figure links to its run. In brackets is the 95 % interval: "
        "Wilson over the prompts for win-rates, over seeds for the 2-D laboratory, a bootstrap over prompts for what "
        "is lost. `n` counts prompts, or seeds in the laboratory. The base, the liked images and the judges are those "
        "of the small world, on 2 CPU cores. The README says what we make of it.",
    ]
    for table in TABLES:
        lines += [
            "",
            f"## {table.title}",
            "",
            table.about,
            "",
            "| what | result | key in the kept run |",
            "|---|---|---|",
        ]
        link = f"reference/{table.folder}/metrics.json"
        lines += [f"| {what} | {figure(table.folder, key)} | [`{key}`]({link}) |" for what, key in table.rows]
    return "\n".join(lines) + "\n\n" + NOTES.read_text(encoding="utf-8")


if __name__ == "__main__":
    PAGE.write_text(results_page(), encoding="utf-8")
    print(f"written: {PAGE.relative_to(ROOT)}")
