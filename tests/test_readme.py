"""The README's Python runs as it stands."""

import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from dkto.cli import main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_ten_lines_turn_likes_into_a_redder_picture(tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.S)
    assert len(code.strip().splitlines()) <= 12
    shutil.copytree(ROOT / "notebooks" / "likes", tmp_path / "notebooks" / "likes")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    before, after = (
        np.asarray(Image.open(tmp_path / "my_run" / f"{name}.png")).astype(float) for name in ("before", "after")
    )
    assert before.shape == (256, 256, 3)
    red = [p[..., 0].mean() - p[..., 1:].mean() for p in (before, after)]
    assert red[1] > red[0] + 5  # of 255


def test_three_commands_go_from_twenty_likes_to_pictures(tmp_path, monkeypatch):
    """As they stand, but with fewer steps and pictures: what is appended comes last and counts."""
    section = README.split("## Your own likes")[1].split("\n## ")[0]
    (block,) = re.findall(r"```bash\n(.*?)```", section, flags=re.S)
    commands = [shlex.split(line.removeprefix(".venv/bin/dkto ")) for line in block.strip().splitlines()]
    assert [command[0] for command in commands] == ["prepare", "train", "generate"]
    lines = (ROOT / "notebooks" / "likes" / "likes.csv").read_text().splitlines(keepends=True)
    shutil.copytree(ROOT / "notebooks" / "likes", tmp_path / "likes")
    monkeypatch.chdir(tmp_path / "likes")
    Path("likes.csv").write_text("".join(lines[:21]))
    Path("prompts.txt").write_text("a toy of a large yellow star on a grey background\n")
    fewer = {"train": ["--max-train-steps", "2", "--batch-size", "4"], "generate": ["--images-per-prompt", "1"]}
    for command in commands:
        assert main([*command, *fewer.get(command[0], [])]) == 0
    assert Path("out/run/lora/pytorch_lora_weights.safetensors").is_file()
    assert len(list(Path("out/images").glob("*.png"))) == 1


def test_links_and_files_exist():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
    block = README.split("## Files")[1].split("```")[1]
    for line in block.strip().splitlines():
        assert (ROOT / line.split()[0].rstrip(",")).exists(), line


def test_the_example_table_reads():
    from dkto import read_feedback

    table = read_feedback(ROOT / "notebooks" / "likes" / "likes.csv")
    assert table.is_desirable.any() and not table.is_desirable.all()


def test_the_results_are_those_of_the_kept_runs():
    """Each row's figure is read again from the metrics that it links to."""
    rows = re.findall(r"^\| .*? \| (.*?) \| \[`(.*?)`\]\((.*?)\) \|", README.split("## Results")[1], flags=re.M)
    assert len(rows) >= 10
    for shown, key, link in rows:
        metrics = json.loads((ROOT / link).read_text())["metrics"]
        value, ends = metrics[key], [metrics.get(f"{key}/{end}") for end in ("low", "high")]
        scale, unit, form = (100, " %", ".0f") if "%" in shown else (1, "", ".3g")
        low_high = "" if ends[0] is None else " [{}, {}]".format(*(format(scale * end, form) for end in ends))
        assert shown == f"{scale * value:{form}}{unit}{low_high}", key


def test_the_seed_made_again_is_as_near_the_former_one_as_the_readme_says():
    assert "KTO's eleven win-rates lie within one point of the former ones, on the same sides of one half" in README
    kept = ROOT / "papermill_runs" / "reference" / "paper_full"
    former, again = pd.read_csv(kept / "seeds.csv"), pd.read_csv(kept / "win_rate_tables-0" / "win_rates.csv")
    again = again[(again["method"] == "kto") & (again["scorer"] == "world_utility")].set_index("opponent")["win_rate"]
    former = former.set_index("opponent")["seed 0"]
    assert set(again.index) == set(former.index) and len(again) == 11
    assert ((again - former).abs().round(3) <= 0.01).all() and ((again > 0.5) == (former > 0.5)).all()


def test_what_a_class_should_see_is_what_the_kept_runs_saw():
    page = (ROOT / "notebooks" / "README.md").read_text()
    for lesson, key in (("61_teach_by_likes", "win_rate"), ("62_judge_blind", "study/ours_vs_theirs")):
        metrics = json.loads((ROOT / "papermill_runs" / "reference" / lesson / "metrics.json").read_text())["metrics"]
        rate, low, high = (100 * metrics[f"{key}{end}"] for end in ("", "/low", "/high"))
        row = next(line for line in page.splitlines() if f"{lesson}/metrics.json" in line)
        assert f"{rate:.0f} % of {metrics[f'{key}/n']}" in row and f"interval {low:.0f} to {high:.0f} %" in row
