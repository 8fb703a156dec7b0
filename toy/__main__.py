"""`python -m toy`: the headline of the laboratory, the sweep `toy.yaml`, its numbers and where they landed."""

import shutil
import sys
from pathlib import Path
from typing import Literal

from dkto.common.ends import guarded


def run_headline(
    profile: Literal["small", "full"] = "small",
    seeds: int = 20,
    processes: int = 2,
    output_dir: Path = Path("papermill_runs/outputs/toy"),
) -> dict[str, float]:
    """Run the headline notebook: every objective of the paper on the 2-D world, with intervals over seeds.

    Args:
        profile: recipe: "small" takes about a minute on 2 cores, "full" is wider and longer, several minutes.
        seeds: repetitions.
        processes: single-thread processes.
        output_dir: a folder for each profile and number of seeds, and the metrics.json of the last one.

    Raises:
        FileNotFoundError: outside a checkout, where there are no sweeps.
    """
    from dkto.runs.runner import results_of, run_sweep  # an interruption while this is imported ends in a sentence too
    from dkto.runs.sweeps import SHIPPED, read_sweep

    changes = {"profile": profile, "seeds": seeds, "processes": processes}
    plan = read_sweep(SHIPPED / "toy.yaml", output_dir, changes)
    run_sweep(plan, in_turn=True, renew=True)
    name = plan.runs[0].name
    metrics, folder = results_of(output_dir, [name])[0][name], output_dir / name
    shutil.copyfile(folder / "metrics.json", output_dir / "metrics.json")
    print("\n" + format_headline(metrics))
    ensemble, alone = metrics["seconds/ensemble"], metrics["seconds/one_by_one"]
    print(
        f"\nmeans over {seeds} seeds with 95 % intervals; KL to desirable in nats, shares in %"
        f"\n{ensemble:.1f} s as ensembles; {alone:.0f} s one by one ({alone / ensemble:.1f} times as long)"
        f"\nexecuted notebook: {folder}/notebook.ipynb"
        f"\nfigures:           {folder}/clouds.png, estimates.png, tradeoff.png"
        f"\nverdict card:      {folder}/verdicts.csv"
        f"\nmetrics:           {output_dir}/metrics.json"
    )
    return metrics


def format_headline(metrics: dict[str, float]) -> str:
    """KL, undesirable share and pair accuracy by method as a text table with intervals and diverged seeds."""
    import pandas as pd

    names = [key.removeprefix("diverged/") for key in metrics if key.startswith("diverged/")]
    columns = [("KL", "kl", 1, 3), ("undesirable", "undesirable_share", 100, 1), ("accuracy", "pair_accuracy", 100, 1)]
    rows = []
    for name in names:
        row = {"method": name}
        for title, measure, scale, digits in columns:
            values = [metrics.get(f"{measure}/{name}{end}") for end in ("", "/low", "/high")]
            mean, *ends = [f"{scale * value:.{digits}f}" if value is not None else "-" for value in values]
            row[title] = "-" if values[0] is None else f"{mean} [{', '.join(ends)}]"
        rows.append(row | {"diverged": int(metrics[f"diverged/{name}"])})
    return pd.DataFrame(rows).to_string(index=False)


def _main() -> None:
    import tyro

    tyro.cli(run_headline)


if __name__ == "__main__":
    sys.exit(guarded(_main, "toy"))
