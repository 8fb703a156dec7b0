"""`python -m toy`: the headline of the laboratory through papermill, its numbers and where they landed."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pandas as pd
import tyro

from dkto.runs.notebooks import run_notebook

NOTEBOOK = Path(__file__).parent.parent / "notebooks" / "23_which_objective.ipynb"


@dataclass(frozen=True)
class Headline:
    """Run the headline notebook: every objective of the paper on the 2-D world, with intervals over seeds."""

    profile: Literal["small", "full"] = "small"
    """Recipe: "small" takes about a minute on 2 cores, "full" is wider and longer, several minutes."""
    seeds: int = 20
    """Repetitions."""
    processes: int = 2
    """Single-thread processes."""
    output_dir: Path = Path("papermill_runs/outputs/toy")
    """Executed notebook, figures, verdict card and metrics.json."""

    def run(self) -> dict[str, float]:
        """Run it and print the table.

        Raises:
            FileNotFoundError: outside a checkout, where there are no notebooks.
        """
        if not NOTEBOOK.is_file():
            raise FileNotFoundError(f"the headline is a notebook of a checkout, but {NOTEBOOK} does not exist")
        given = {"profile": self.profile, "seeds": self.seeds, "processes": self.processes}
        executed = self.output_dir / NOTEBOOK.name
        metrics = run_notebook(NOTEBOOK, executed, {**given, "output_dir": str(self.output_dir)})
        print("\n" + format_headline(metrics))
        ensemble, alone = metrics["seconds/ensemble"], metrics["seconds/one_by_one"]
        print(
            f"\nmeans over {self.seeds} seeds with 95 % intervals; KL to desirable in nats, shares in %"
            f"\n{ensemble:.1f} s as ensembles; {alone:.0f} s one by one ({alone / ensemble:.1f} times as long)"
            f"\nexecuted notebook: {executed}"
            f"\nfigures:           {self.output_dir}/clouds.png, estimates.png, tradeoff.png"
            f"\nverdict card:      {self.output_dir}/verdicts.csv"
            f"\nmetrics:           {self.output_dir}/metrics.json"
        )
        return metrics


def format_headline(metrics: dict[str, float]) -> str:
    """KL, undesirable share and pair accuracy by method as a text table with intervals and diverged seeds."""
    names = [key.removeprefix("diverged/") for key in metrics if key.startswith("diverged/")]
    rows = []
    for name in names:
        columns = [
            ("KL", "kl", 1, 3),
            ("undesirable", "undesirable_share", 100, 1),
            ("accuracy", "pair_accuracy", 100, 1),
        ]
        row = {"method": name}
        for title, measure, scale, digits in columns:
            values = [metrics.get(f"{measure}/{name}{end}") for end in ("", "/low", "/high")]
            shown = [f"{scale * value:.{digits}f}" if value is not None else "-" for value in values]
            row[title] = "-" if values[0] is None else f"{shown[0]} [{shown[1]}, {shown[2]}]"
        rows.append(row | {"diverged": int(metrics[f"diverged/{name}"])})
    return pd.DataFrame(rows).to_string(index=False)


if __name__ == "__main__":
    tyro.cli(Headline).run()
