"""The main job in one call: likes of generated pictures go in, a tuned model and its win-rates come out."""

import os
import time
from pathlib import Path

import pandas as pd

from dkto.runs.notebooks import run_notebook, write_metrics

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
SHOWN = {"kto_vs_base": "kto vs base", "kto_vs_shuffled": "kto vs kto on shuffled likes", "kto_vs_sft": "kto vs sft"}


def run_demo(output_dir: str | Path, *, train: dict | None = None, judge: dict | None = None) -> dict[str, float]:
    """Run the lessons *utility functions*, *train with likes* and *win-rates* and print the table.

    Called again after a kill it goes on: pictures, encodings, checkpoints and scores on disk are kept.

    Args:
        output_dir: executed notebooks, figures, weights and `metrics.json` land here.
        train: parameters of *train with likes* that differ from its defaults.
        judge: parameters of *win-rates* that differ from its defaults.

    Returns:
        The metrics, with flat keys `win_rate/kto_vs_base/<scorer>` and so on.

    Raises:
        FileNotFoundError: outside a checkout, where there are no notebooks.
    """
    if not NOTEBOOKS.is_dir():
        raise FileNotFoundError(f"the demo runs the notebooks of a checkout, but {NOTEBOOKS} does not exist")
    folder, began = Path(output_dir), time.monotonic()
    processes = min(os.cpu_count() or 1, 8)
    lessons = (
        ("10_utility_functions", {"output_dir": str(folder / "utility_functions")}),
        (
            "30_train_with_likes",
            {"output_dir": str(folder / "train_with_likes"), "processes": processes, **(train or {})},
        ),
        (
            "40_win_rates",
            {
                "runs_dir": str(folder / "train_with_likes"),
                "output_dir": str(folder / "win_rates"),
                "processes": processes,
                **(judge or {}),
            },
        ),
    )
    results = {}
    for number, (name, parameters) in enumerate(lessons, 1):
        print(f"[{number}/{len(lessons)}] notebook {name}", flush=True)
        results[name] = run_notebook(NOTEBOOKS / f"{name}.ipynb", folder / f"{name}.ipynb", parameters)
    judged, trained = results["40_win_rates"], results["30_train_with_likes"]
    metrics = {key.replace("kto_vs_kto_shuffled", "kto_vs_shuffled"): value for key, value in judged.items()}
    metrics["seconds/train"] = trained["seconds/train"]
    metrics["seconds/total"] = round(time.monotonic() - began, 1)
    write_metrics(folder, metrics, {"train": train or {}, "judge": judge or {}}, seed=0)
    print("\n" + format_table(metrics))
    print(
        f"\nprompt fidelity: base {metrics['fidelity/base']:.2f}, kto {metrics['fidelity/kto']:.2f}"
        f"\n{metrics['seconds/total']:.0f} s in all, of which {metrics['seconds/train']:.0f} s training"
        f"\nexecuted notebooks: {folder}/*.ipynb"
        f"\nfigures:            {folder}/train_with_likes/before_after.png, {folder}/win_rates/*.png"
        f"\ntuned weights:      {folder}/train_with_likes/kto/model (a plain diffusers pipeline)"
        f"\nmetrics:            {folder}/metrics.json"
    )
    return metrics


def format_table(metrics: dict[str, float]) -> str:
    """The win-rates of a demo's metrics as a text table with intervals and n."""
    rows = []
    for key, title in SHOWN.items():
        for name in sorted(metrics):
            prefix = f"win_rate/{key}/"
            if name.startswith(prefix) and name.count("/") == 2:
                low, high, n = (metrics[f"{name}/{end}"] for end in ("low", "high", "n"))
                interval = f"[{100 * low:.0f}, {100 * high:.0f}]"
                rows.append((title, name.removeprefix(prefix), f"{100 * metrics[name]:.0f} %", interval, int(n)))
    frame = pd.DataFrame(rows, columns=["comparison", "scorer", "win-rate", "95 % interval", "prompts"])
    return frame.to_string(index=False)
