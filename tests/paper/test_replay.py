import json
from pathlib import Path

import pytest
from in_process import in_this_process

from dkto.paper.replay import PROFILES, run_paper
from dkto.paper.seeds import MAIN
from dkto.paper.train_all import read_settings
from dkto.runs.sweeps import SHIPPED, read_sweep

TINY = str(Path(__file__).parents[1] / "files" / "paper_tiny.yaml")


@pytest.mark.parametrize("profile", PROFILES)
def test_every_profile_is_a_sweep_of_the_main_tables_first_with_one_settings_file(profile):
    plan = read_sweep(SHIPPED / f"{PROFILES[profile]}.yaml", changes={"settings_file": "x", "processes": 1})
    assert plan.runs[0].name.startswith(MAIN)
    for run in plan.runs:
        assert run.inputs or (run.parameters["settings_file"], run.parameters["processes"]) == ("x", 1)


@pytest.mark.parametrize("profile", ["quick", "default"])
def test_settings_were_searched_for_trainings_about_as_long_and_under_the_judge_of_the_tables(profile):
    """A learning rate that is best after 120 steps hardly moves a model in 40."""
    for run in read_sweep(SHIPPED / f"{PROFILES[profile]}.yaml").runs:
        if "settings_file" in run.parameters:
            search = read_settings(run.parameters["settings_file"])["search"]
            steps = run.parameters["train_steps"]
            assert search["scorer"] == "world_utility" and 0.6 < steps / search["train_steps"] < 1.7, run.name


@pytest.fixture
def no_kernel():
    with in_this_process():
        yield


@pytest.mark.slow  # six notebooks; the tables, the runner and the page are tested by themselves
@pytest.mark.usefixtures("no_kernel")
def test_a_tiny_replay_leaves_numbers_and_a_page_and_goes_on(tmp_path):
    settings_file = tmp_path / "settings.json"
    settings = json.loads(Path("papermill_runs/paper_settings.json").read_text())
    settings_file.write_text(json.dumps(settings))
    options = {"settings_file": str(settings_file), "processes": 0}
    part = run_paper(tmp_path, TINY, steps=[MAIN], **options)
    assert {path.name for path in tmp_path.iterdir()} == {"settings.json", "paper_tiny"}, "no whole from a part"
    metrics = run_paper(tmp_path, TINY, **options)
    assert part and part.items() <= metrics.items()
    stored = json.loads((tmp_path / "metrics.json").read_text())["metrics"]
    assert stored == metrics
    for opponent in ("base", "base_best_guidance", "sft_all", "kto_shuffled"):
        key = f"win_rate/kto_vs_{opponent}/world_utility"
        assert 0 <= metrics[f"{key}/low"] <= metrics[key] <= metrics[f"{key}/high"] <= 1 and metrics[f"{key}/n"] == 4
    page = (tmp_path / "report.html").read_text()
    assert page == (tmp_path / "paper_tiny" / "report.html").read_text()
    assert {path.name for path in tmp_path.iterdir()} == {"settings.json", "metrics.json", "report.html", "paper_tiny"}
    assert page.index("aims") < page.index("<h2") and "data:image/png;base64," in page
    assert "Diffusion-KTO over every other method" in page
    notebook = tmp_path / "paper_tiny" / MAIN / "notebook.ipynb"
    stamp = notebook.stat().st_mtime_ns
    assert run_paper(tmp_path, TINY, **options) == metrics
    assert notebook.stat().st_mtime_ns == stamp
    settings["settings"]["kto"]["beta"] = 7.0
    settings_file.write_text(json.dumps(settings))
    with pytest.raises(RuntimeError, match=r"runs/kto belongs to another configuration \(.*beta: .* stored, 7.0 asked"):
        run_paper(tmp_path, TINY, **options)


def test_an_unknown_profile_is_refused(tmp_path):
    with pytest.raises(ValueError, match="profile must be one of quick, default, full, or a sweep file, got 'qick'"):
        run_paper(tmp_path, "qick")


def test_a_sweep_without_a_settings_file_is_refused_before_anything_is_made(tmp_path):
    sweep = tmp_path / "mine.yaml"
    sweep.write_text("notebook: notebooks/30_train_with_likes.ipynb\n")
    with pytest.raises(ValueError, match=r"mine\.yaml must hold a run with a settings_file"):
        run_paper(tmp_path / "out", str(sweep))
    assert not (tmp_path / "out").exists()


def test_an_unknown_step_is_refused_before_anything_is_made(tmp_path):
    with pytest.raises(
        ValueError, match=r"sweep paper_full has no run 'qualitative'; did you mean 'qualitative_grid'\?"
    ):
        run_paper(tmp_path, "full", steps=["user_likes_vivid", "qualitative"])
    assert list(tmp_path.iterdir()) == []
