"""The paper replayed on the small world: a sweep of the experiments, one table of numbers, one page to look at.

    make paper                     one seed, 50 prompts, ablations with three points, all users
    make paper PROFILE=quick       the methods of the paper's tables, their controls, and the user who likes red
    make paper PROFILE=full        a search with equal budgets, six seeds, 100 prompts of 5 images
    make paper PROFILE=full STEPS="win_rate_tables-1 win_rate_tables-2"      a part of it, here or on another machine

A profile is a sweep file (`papermill_runs/sweeps/paper_quick.yaml`, `paper.yaml`, `paper_full.yaml`) and works in a
folder of its own; the numbers and the page of the last one lie beside these folders as well. Called again, it goes on.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path

from dkto.models.system import computes_bfloat16
from dkto.paper.demo import PROCESSES
from dkto.paper.page import lead
from dkto.paper.search import search_settings
from dkto.paper.search_config import SearchConfig
from dkto.paper.seeds import combine
from dkto.runs.notebooks import run_notebook
from dkto.runs.page import write_notebook_page
from dkto.runs.runner import results_of, run_sweep
from dkto.runs.sweeps import CHECKOUT, SHIPPED, read_sweep

PROFILES = {"quick": "paper_quick", "default": "paper", "full": "paper_full"}
PAGE = CHECKOUT / "notebooks" / "pages" / "what_did_the_replay_show.ipynb"


def run_paper(
    output_dir: str | Path = "papermill_runs/outputs/paper",
    profile: str = "default",
    *,
    settings_file: str = "",
    steps: Sequence[str] = (),
    processes: int = PROCESSES,
) -> dict[str, float]:
    """Run a profile; writes `metrics.json` and `report.html` and returns the metrics.

    Args:
        output_dir: the runs land in `output_dir/profile`, numbers and page there and here.
        profile: quick, default, full, or a sweep file of your own with the same names of runs.
        settings_file: a search result for every run; "" takes those that the profile names, and "full" makes its own.
        steps: names of runs; only these and those that they read are run, and no numbers and no page are written.
        processes: that train, draw and score; 0 trains in the notebooks' own.

    Raises:
        ValueError: if the profile or a step is unknown, no run has a settings_file, or one was made with other
            parameters.
        FileNotFoundError: outside a checkout, where there are no sweeps.
        RuntimeError: if runs failed; the sentence names each with its error.
    """
    path = SHIPPED / f"{PROFILES[profile]}.yaml" if profile in PROFILES else Path(profile)
    if path.suffix != ".yaml":
        raise ValueError(f"profile must be one of {', '.join(PROFILES)}, or a sweep file, got {profile!r}")
    folder, searches = Path(output_dir) / (profile if profile in PROFILES else path.stem), profile == "full"
    settings_file = str(folder / "paper_settings.json") if searches else settings_file
    changes: dict[str, object] = {"processes": processes} | ({"settings_file": settings_file} if settings_file else {})
    if not computes_bfloat16():
        changes["precision"] = "float32"  # the other would take many times as long here
    plan = read_sweep(path, folder, changes).only(steps)
    files = [str(run.parameters["settings_file"]) for run in plan.runs if "settings_file" in run.parameters]
    if not files and not steps:
        raise ValueError(f"{path} must hold a run with a settings_file: the page says where its settings come from")
    if searches and not Path(settings_file).exists():
        search_settings(SearchConfig(folder / "search"), settings_file)
    run_sweep(plan, in_turn=True, renew=True)
    names = [run.name for run in plan.runs]
    if steps:
        print(f"\nran {', '.join(names)}; numbers and page of the whole: call without steps")
        return combine(*results_of(folder, names))
    settings_file = files[0]  # of the tables, which come first
    about = {"replay_dir": str(folder), "runs": names, "settings_file": settings_file}
    executed = folder / "report.ipynb"
    metrics = run_notebook(PAGE, executed, {**about, "profile": profile, "output_dir": str(folder)}, progress=False)
    write_notebook_page(executed, folder / "report.html", "Diffusion-KTO on the small world")
    for name in ("metrics.json", "report.html"):
        shutil.copyfile(folder / name, Path(output_dir) / name)
    print(f"\n{lead(metrics, settings_file)}")
    print(f"{metrics['seconds/total']:.0f} s, what earlier calls had left not counted")
    print(f"numbers: {output_dir}/metrics.json\npage: {output_dir}/report.html")
    print(f"notebooks as they ran, trained models and images: {folder}")
    return metrics
