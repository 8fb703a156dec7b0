import json
from pathlib import Path

import pytest

from dkto.notebooks import check_parameters
from dkto.paper import MAIN, NOTEBOOKS, PROFILES, READS_TABLES, SETTINGS_FILE, aims, aims_sentence, combine, run_paper


def rate(key, value, half=0.1):
    return {key: value, f"{key}/low": value - half, f"{key}/high": value + half, f"{key}/n": 40}


REACHED = {
    **rate("win_rate/kto_vs_base/world_utility", 0.8),
    **rate("win_rate/kto_vs_base_best_guidance/world_utility", 0.8),
    **rate("win_rate/kto_vs_sft_all/world_utility", 0.8),
    **rate("win_rate/kto_vs_kto_shuffled/world_utility", 0.8),
    **rate("reward_gain/alignprop", 0.3),
    **rate("reward_gain/d3po", 0.3),
}


@pytest.mark.parametrize("profile", PROFILES)
def test_every_step_names_parameters_that_its_notebook_declares(profile):
    for step in PROFILES[profile]:
        path = NOTEBOOKS / f"{step.notebook}.ipynb"
        read = {"lesson_dir": ""} if step.notebook == READS_TABLES else {"settings_file": "", "processes": 2}
        check_parameters(path, {**step.parameters, **read, "output_dir": "x"})
    assert PROFILES[profile][0].name.startswith(MAIN)


def test_the_first_paragraph_names_what_was_not_reached():
    assert aims_sentence(REACHED).startswith("Reached: 6 of 6 aims.")
    missed = REACHED | rate("win_rate/kto_vs_sft_all/world_utility", 0.55)
    assert aims_sentence(missed).startswith(
        "Not reached, with its 95 % interval: kto wins over sft_all. Reached: 5 of 6"
    )
    absent = {key: value for key, value in REACHED.items() if "d3po" not in key}
    assert "Not run in this profile: d3po raises its own reward" in aims_sentence(absent)
    assert aims(missed)["verdict"].tolist().count("not reached") == 1
    ordered = aims_sentence(REACHED | {"orderings/yes": 2, "orderings/no": 1, "orderings/all": 5})
    assert "Orderings of the paper that were tried: 5; 2 hold, 1 do not, 2 stay open" in ordered


def test_seeds_are_pooled_without_hiding_one():
    key = "win_rate/kto_vs_base/world_utility"
    results = {f"{MAIN}-0": rate(key, 0.6), f"{MAIN}-1": rate(key, 0.8), "ablations": {"gamma/0.8": 0.5}}
    found = combine(results, {"ablations": 2.0})
    assert found[key] == pytest.approx(0.7) and found["seeds"] == 2
    assert (found[f"{key}/low"], found[f"{key}/high"]) == pytest.approx((0.5, 0.9))
    assert found[f"seed-0/{key}"] == 0.6 and found["ablations/gamma/0.8"] == 0.5
    assert found["seconds/total"] == 2.0


def test_a_tiny_replay_leaves_numbers_and_a_page_and_goes_on(tmp_path):
    settings_file = tmp_path / "settings.json"
    settings = json.loads(Path(SETTINGS_FILE).read_text())
    settings_file.write_text(json.dumps(settings))
    metrics = run_paper(tmp_path, "tiny", settings_file=str(settings_file))
    stored = json.loads((tmp_path / "metrics.json").read_text())["metrics"]
    assert stored == metrics
    for opponent in ("base", "base_best_guidance", "sft_all", "kto_shuffled"):
        key = f"win_rate/kto_vs_{opponent}/world_utility"
        assert 0 <= metrics[f"{key}/low"] <= metrics[key] <= metrics[f"{key}/high"] <= 1 and metrics[f"{key}/n"] == 4
    page = (tmp_path / "report.html").read_text()
    assert page.index("aims") < page.index("<h2") and "data:image/png;base64," in page
    stamp = (tmp_path / f"{MAIN}.ipynb").stat().st_mtime_ns
    assert run_paper(tmp_path, "tiny", settings_file=str(settings_file)) == metrics
    assert (tmp_path / f"{MAIN}.ipynb").stat().st_mtime_ns == stamp
    settings["settings"]["kto"]["beta"] = 7.0
    settings_file.write_text(json.dumps(settings))
    with pytest.raises(RuntimeError, match=r"runs/kto belongs to another configuration \(.*beta: .* stored, 7.0 asked"):
        run_paper(tmp_path, "tiny", settings_file=str(settings_file))


def test_an_unknown_profile_is_refused(tmp_path):
    with pytest.raises(ValueError, match="profile must be one of tiny, quick, default, full, got 'qick'"):
        run_paper(tmp_path, "qick")
