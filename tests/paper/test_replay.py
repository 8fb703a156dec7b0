import json
from pathlib import Path

import pytest

from dkto.paper.replay import MAIN, NOTEBOOKS, PROFILES, READS_TABLES, SETTINGS_FILE, combine, run_paper
from dkto.runs.notebooks import check_parameters


def rate(key, value, half=0.1):
    return {key: value, f"{key}/low": value - half, f"{key}/high": value + half, f"{key}/n": 40}


@pytest.mark.parametrize("profile", PROFILES)
def test_every_step_names_parameters_that_its_notebook_declares(profile):
    for step in PROFILES[profile]:
        path = NOTEBOOKS / f"{step.notebook}.ipynb"
        read = {"lesson_dir": ""} if step.notebook == READS_TABLES else {"settings_file": "", "processes": 2}
        check_parameters(path, {**step.parameters, **read, "output_dir": "x"})
    assert PROFILES[profile][0].name.startswith(MAIN)


def test_seeds_are_pooled_without_hiding_one():
    key = "win_rate/kto_vs_base/world_utility"
    results = {f"{MAIN}-0": rate(key, 0.6), f"{MAIN}-1": rate(key, 0.8), "ablations": {"gamma/0.8": 0.5}}
    for seed, scale in enumerate((10.0, 15.0)):
        results[f"{MAIN}-{seed}"]["best_guidance"] = scale
    found = combine(results, {"ablations": 2.0})
    assert found[key] == pytest.approx(0.7) and found["seeds"] == 2
    assert (found[f"{key}/low"], found[f"{key}/high"]) == pytest.approx((0.5, 0.9))
    assert found[f"{key}/n"] == 80 and found[f"seed-0/{key}/n"] == 40
    assert found[f"seed-0/{key}"] == 0.6 and found["ablations/gamma/0.8"] == 0.5
    assert found["seconds/total"] == 2.0
    assert "best_guidance" not in found and found["seed-1/best_guidance"] == 15.0, "no mean of scales that were chosen"


def test_a_tiny_replay_leaves_numbers_and_a_page_and_goes_on(tmp_path):
    settings_file = tmp_path / "settings.json"
    settings = json.loads(Path(SETTINGS_FILE).read_text())
    settings_file.write_text(json.dumps(settings))
    part = run_paper(tmp_path, "tiny", settings_file=str(settings_file), only=[MAIN])
    assert {path.name for path in tmp_path.iterdir()} == {"settings.json", "tiny"}, "no numbers of a whole from a part"
    metrics = run_paper(tmp_path, "tiny", settings_file=str(settings_file))
    assert part.items() <= metrics.items()
    stored = json.loads((tmp_path / "metrics.json").read_text())["metrics"]
    assert stored == metrics
    for opponent in ("base", "base_best_guidance", "sft_all", "kto_shuffled"):
        key = f"win_rate/kto_vs_{opponent}/world_utility"
        assert 0 <= metrics[f"{key}/low"] <= metrics[key] <= metrics[f"{key}/high"] <= 1 and metrics[f"{key}/n"] == 4
    page = (tmp_path / "report.html").read_text()
    assert page == (tmp_path / "tiny" / "report.html").read_text()
    assert {path.name for path in tmp_path.iterdir()} == {"settings.json", "metrics.json", "report.html", "tiny"}
    assert page.index("aims") < page.index("<h2") and "data:image/png;base64," in page
    stamp = (tmp_path / "tiny" / f"{MAIN}.ipynb").stat().st_mtime_ns
    assert run_paper(tmp_path, "tiny", settings_file=str(settings_file)) == metrics
    assert (tmp_path / "tiny" / f"{MAIN}.ipynb").stat().st_mtime_ns == stamp
    settings["settings"]["kto"]["beta"] = 7.0
    settings_file.write_text(json.dumps(settings))
    with pytest.raises(RuntimeError, match=r"runs/kto belongs to another configuration \(.*beta: .* stored, 7.0 asked"):
        run_paper(tmp_path, "tiny", settings_file=str(settings_file))


def test_an_unknown_profile_is_refused(tmp_path):
    with pytest.raises(ValueError, match="profile must be one of tiny, quick, default, full, got 'qick'"):
        run_paper(tmp_path, "qick")


def test_an_unknown_step_is_refused_before_anything_is_made(tmp_path):
    with pytest.raises(ValueError, match="profile 'full' has no step 'ablation'; its steps: win_rate_tables-0, abl"):
        run_paper(tmp_path, "full", only=["user_likes_red", "ablation"])
    assert list(tmp_path.iterdir()) == []
