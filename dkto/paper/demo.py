"""The main job in one call: likes of generated images go in, a tuned model and its win-rates come out."""

import os
from pathlib import Path

import pandas as pd

from dkto.runs.notebooks import write_metrics
from dkto.runs.runner import results_of, run_sweep
from dkto.runs.sweeps import SHIPPED, read_sweep

PROCESSES = min(os.cpu_count() or 1, 8)
SHOWN = {"kto_vs_base": "kto vs base", "kto_vs_shuffled": "kto vs kto on shuffled likes", "kto_vs_sft": "kto vs sft"}


def run_demo(
    output_dir: str | Path = "papermill_runs/outputs/demo", *, train: dict | None = None, judge: dict | None = None
) -> dict[str, float]:
    """Run the sweep `demo.yaml`, the lessons *utility functions*, *train with likes* and *win-rates*; print the table.

    Called again it goes on: what is done is kept, and images, encodings, checkpoints and scores on disk are used.

    Args:
        output_dir: the runs' folders and `metrics.json` land here.
        train: parameters of *train with likes* that differ from its defaults.
        judge: parameters of *win-rates* that differ from its defaults.

    Returns:
        The metrics, with flat keys `win_rate/kto_vs_base/<scorer>` and so on; `seconds/total` is what the runs took.

    Raises:
        FileNotFoundError: outside a checkout, where there are no sweeps.
        ValueError, RuntimeError: see `dkto.runs.runner.run_sweep`.
    """
    folder, train, judge = Path(output_dir), train or {}, judge or {}
    changes = {}
    for stage, given in (("train_with_likes", train), ("win_rates", judge)):
        changes |= {f"{stage}.{name}": value for name, value in ({"processes": PROCESSES} | given).items()}
    plan = read_sweep(SHIPPED / "demo.yaml", folder, changes)
    run_sweep(plan, in_turn=True, renew=True)
    results, seconds = results_of(folder, [run.name for run in plan.runs])
    metrics = results["win_rates"]
    metrics |= {name.replace("kto_vs_kto_shuffled", "kto_vs_shuffled"): value for name, value in metrics.items()}
    metrics |= {"seconds/train": results["train_with_likes"]["seconds/train"]}
    metrics |= {"seconds/total": round(sum(seconds.values()), 1)}
    write_metrics(folder, metrics, {"train": train, "judge": judge}, seed=0)
    print("\n" + format_table(metrics))
    print(
        f"\nprompt fidelity: base {metrics['fidelity/base']:.2f}, kto {metrics['fidelity/kto']:.2f}"
        f"\n{metrics['seconds/total']:.0f} s in all, of which {metrics['seconds/train']:.0f} s training"
        f"\nexecuted notebooks: {folder}/*/notebook.ipynb"
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
    frame = pd.DataFrame(rows, columns=["comparison", "scorer", "win-rate", "95 % interval (Tango)", "prompts"])
    return frame.to_string(index=False)
