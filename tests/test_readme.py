"""What the front pages say is so: the Python and the commands run, links lead somewhere, figures are the kept runs'."""

import json
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from dkto.cli import main
from dkto.evaluation import tango_interval
from dkto.models import FAMILIES
from dkto.objective import methods, newer_methods
from dkto.paper.seeds import pool_metrics
from dkto.workshop.results import PAGE, TABLES, figure, results_page

ROOT = Path(__file__).parent.parent
KEPT = ROOT / "papermill_runs" / "reference"
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "papermill_runs/RESULTS.md")]
PAGES += [ROOT / "papermill_runs/README.md", *sorted((ROOT / "notebooks").glob("*.md"))]
PAGES += [ROOT / "tests" / "benchmarks" / "README.md", ROOT / "SECURITY.md"]
LINK = re.compile(r"\]\(([^)\s#]+)[^)]*\)")
# a figure of a kept run: what is shown, the run, the key of its metrics.json as the link's title
FIGURE = re.compile(
    r'\[((?:[^\[\]]|\[[^\]]*\])*)\]\(papermill_runs/reference/(\S+)/(?:notebook|metrics)\.\w+ "(\S+)"\)'
)


def section(title, text=README):
    return text.split(f"\n## {title}\n")[1].split("\n## ")[0]


def table_rows(text):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:2] == "| "][1:]


def test_the_ten_lines_turn_likes_into_a_redder_image(tmp_path, monkeypatch):
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


def test_four_commands_go_from_twenty_likes_to_images(tmp_path, monkeypatch):
    """As they stand, but with fewer steps and images: what is appended comes last and counts."""
    (block,) = re.findall(r"```bash\n(.*?)```", section("Your own likes"), flags=re.S)
    commands = [shlex.split(line.removeprefix(".venv/bin/dkto "), comments=True) for line in block.strip().splitlines()]
    assert [command[0] for command in commands] == ["prepare", "train", "check", "generate"]
    lines = (ROOT / "notebooks" / "likes" / "likes.csv").read_text().splitlines(keepends=True)
    shutil.copytree(ROOT / "notebooks" / "likes", tmp_path / "likes")
    monkeypatch.chdir(tmp_path / "likes")
    Path("likes.csv").write_text("".join(lines[:21]))
    Path("prompts.txt").write_text("a toy of a large yellow star on a grey background\n")
    fewer = {"train": ["--max-train-steps", "2", "--batch-size", "4"], "generate": ["--images-per-prompt", "1"]}
    fewer["check"] = ["--count", "1", "--samples", "4"]
    for command in commands:
        assert main([*command, *fewer.get(command[0], [])]) == 0
    assert Path("out/run/lora/pytorch_lora_weights.safetensors").is_file()
    assert len(list(Path("out/images").glob("*.png"))) == 1


GUIDE = (ROOT / "notebooks" / "your_own_likes.md").read_text()
SHORT = {  # what comes last counts: a few steps and images of tiny pipelines, whose layers are narrow
    "calibrate": "--steps 1 --samples 4 --lora-rank 2 --learning-rate 1e-2 --batch-size 8",
    "train": "--max-train-steps 1 --lora-rank 2 --learning-rate 1e-2 --batch-size 8",
    "check": "--count 1 --draws 1",
    "generate": "--steps 2 --images-per-prompt 1",
}


@pytest.mark.parametrize(
    ("source", "family"),
    [
        ("tiny_sdxl", "sdxl"),
        pytest.param("tiny_pipeline", "sd15", marks=pytest.mark.slow),
        pytest.param("tiny_sd3", "sd3", marks=pytest.mark.slow),
        pytest.param("tiny_qwen_image", "qwen-image", marks=pytest.mark.slow),
        pytest.param("tiny_z_image", "z-image", marks=pytest.mark.slow),
        pytest.param("tiny_klein", "flux2-klein", marks=pytest.mark.slow),
    ],
)
@pytest.mark.filterwarnings("ignore:this processor does not compute")
def test_every_command_of_the_guide_runs_on_each_family(source, family, request, tmp_path, monkeypatch):
    """Word for word, but for the model, a scorer without downloads, and what `SHORT` appends."""
    monkeypatch.setattr("dkto.models.families.SMALL_SIDE", 0)  # tiny images are the small world's alone otherwise
    monkeypatch.setitem(FAMILIES, family, replace(FAMILIES[family], steps=2))
    monkeypatch.chdir(tmp_path)
    rows = []
    for number in range(48):
        liked = number % 2
        Image.new("RGB", (20, 20), (200 * liked + 20, 90, 5 * number)).save(f"{number}.png")
        rows.append((f"{number}.png", f"a red circle {number // 4}", liked, number % 7, number % 3))
    table = pd.DataFrame(rows, columns=["image", "prompt", "liked", "rating", "user"])
    table[["image", "prompt", "liked"]].to_csv("likes.csv", index=False)
    table.drop(columns="liked").to_csv("ratings.csv", index=False)
    Path("prompts.txt").write_text("a blue square\n")
    other = {"stabilityai/stable-diffusion-xl-base-1.0": str(request.getfixturevalue(source))}
    other |= {"pickscore": "world_redness"} | ({} if family in ("sd15", "sdxl") else {"kohya": "diffusers"})
    lines = "".join(re.findall(r"```bash\n(.*?)```", GUIDE, flags=re.S)).splitlines()
    most = f"--batch-size {max(8, 2 * FAMILIES[family].gradient_accumulation)}"
    names = []
    for line in lines:
        program, name, *words = [other.get(word, word) for word in shlex.split(line)]
        assert (
            program == "dkto"
            and main([name, *words, *SHORT.get(name, "").replace("--batch-size 8", most).split()]) == 0
        ), line
        names.append(name)
    assert set(names) == {"feedback", "prepare", "calibrate", "train", "check", "shuffle", "export", "generate"}
    config = json.loads(Path("out/run/training.json").read_text())["config"]
    assert config["max_train_steps"] == 1 and config["beta"] == 2500.0
    wanted = FAMILIES[family].training()
    assert all(config[name] == wanted[name] for name in ("gradient_accumulation", "precision", "warmup_steps"))
    assert Path("out/run/check/index.html").is_file() and len(load_file("out/my_likes.safetensors")) > 4
    found = json.loads(Path("out/checked/check.json").read_text())
    assert {"margin", "over_shuffled"} <= found.keys() and len(found["win_rates"]) == 3
    assert len(list(Path("out/images").glob("*.png"))) == 1


def test_the_guides_table_is_that_of_the_code():
    rows = {row[0]: row[1:] for row in table_rows(section("4. Train", GUIDE))}
    assert rows.keys() == {each.title for each in FAMILIES.values()}
    for each in FAMILIES.values():
        rank, rate, beta, steps, batch, parts = rows[each.title][:6]
        assert (int(rank), float(rate), float(beta)) == (each.lora_rank, each.learning_rate, each.beta)
        assert [int(steps), int(batch), int(parts)] == [
            each.max_train_steps,
            each.batch_size,
            each.gradient_accumulation,
        ]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_to_files(page):
    targets = [target for target in LINK.findall(page.read_text()) if not target.startswith("http")]
    for target in targets:
        assert (page.parent / target).exists(), target


def test_the_front_page_is_short_and_names_every_room():
    words = re.sub(r"\]\([^)]*\)", "]", README).split()
    assert len(words) <= 1300
    named = [line.split()[0] for line in section("Layout").split("```")[1].strip().splitlines()]
    rooms = {f"dkto/{path.parent.name}" for path in (ROOT / "dkto").glob("*/__init__.py")}
    assert {name for name in named if name.startswith("dkto/")} == rooms - {"dkto/common"}
    assert all((ROOT / name).is_dir() for name in named)


def test_every_lesson_is_listed():
    listed = {Path(target).name for target in LINK.findall((ROOT / "notebooks" / "README.md").read_text())}
    others = {"solutions", "pages", ".ipynb_checkpoints"}
    there = {path.name for path in (ROOT / "notebooks").rglob("*.ipynb") if not others & {*path.parts}}
    assert there <= listed and f"[{len(there)} notebooks](notebooks/README.md)" in README


def test_an_objective_is_one_function_and_one_entry():
    """The example of CONTRIBUTING.md, among the names of the modules that it is written for."""
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), flags=re.S)
    names = {**vars(newer_methods), **vars(methods), "METHODS": {}}
    exec(compile(code, "CONTRIBUTING.md", "exec"), names)
    ((name, method),) = names["METHODS"].items()
    assert name == "squared" and method.settings == ("beta", "desirable_fraction")
    policy = torch.tensor([0.2, 0.4], requires_grad=True)
    felt = method.loss(methods.Errors(policy, torch.tensor([0.3, 0.3])), torch.tensor([True, False]), beta=5.0)
    felt.loss.backward()
    assert felt.loss.item() == pytest.approx(0.25) and policy.grad[0] > 0 > policy.grad[1]


def test_the_example_table_reads():
    from dkto import read_feedback

    table = read_feedback(ROOT / "notebooks" / "likes" / "likes.csv")
    assert table.is_desirable.any() and not table.is_desirable.all()


def test_figures_of_the_front_page_are_those_of_the_kept_runs():
    """Each link's text is read again from the run that it leads to, under the key that is its title."""
    found = FIGURE.findall(section("What we found"))
    assert len(found) >= 20
    for shown, folder, key in found:
        assert shown == figure(folder, key), key
    sentences = re.findall(r"^\d\. (.*)$", section("What we found"), flags=re.M)
    assert len(sentences) == 8 and all(FIGURE.search(sentence) for sentence in sentences)
    prose = FIGURE.sub("", "\n".join(sentences))
    assert not re.findall(r"\d+ %|\d\.\d", prose.replace("95 %", "").replace("Flipping 30 %", "")), "not linked"


def test_what_is_called_open_is_undecided_after_holms_correction_and_the_rest_is_not():
    rows = table_rows(section("What we found"))
    assert 5 <= len(rows) <= 10
    for against, here, _ in rows:
        ((_, folder, key),) = FIGURE.findall(here)
        metrics = json.loads((KEPT / folder / "metrics.json").read_text())["metrics"]
        assert (metrics[f"{key}/holm"] >= 0.05) == against.endswith("open"), against
        assert against.endswith("open") or not metrics[f"{key}/low"] <= 0.5 <= metrics[f"{key}/high"], against


def test_who_is_beaten_and_what_is_left_open_is_as_the_front_page_says():
    """KTO wins over every control and every method but Diffusion-DPO; the utilities are open; seeds alone agree."""
    seeds = pd.read_csv(KEPT / "paper_full" / "seeds.csv").set_index("opponent")
    decided = seeds["holm"] < 0.05
    assert set(seeds.index[~decided]) == {"dpo", "kto_loss_averse", "kto_risk_seeking"}
    assert (seeds.loc[decided, ["low", "t_low"]] > 0.5).to_numpy().all() and len(seeds) == 12
    assert (seeds["ties"] == 0).all()


def test_kept_intervals_are_those_of_the_kept_counts_and_seeds():
    """Tango's of wins, ties and losses, and the mixed model's of each seed's rate, as the library computes them."""
    folder = KEPT / "paper_full"
    metrics = json.loads((folder / "metrics.json").read_text())["metrics"]
    paths = list(folder.glob("*/win_rates*.csv"))
    assert len(paths) == 2 * metrics["seeds"] >= 8
    for path in paths:
        table = pd.read_csv(path)
        ends = [tango_interval(*map(int, counts)) for counts in table[["wins", "ties", "losses"]].to_numpy()]
        assert np.abs(table[["low", "high"]].to_numpy() - np.array(ends)).max() < 1e-9, path
    start = len("seed-0/")
    seeds = [
        {key[start:]: metrics[key] for key in metrics if key.startswith(f"seed-{seed}/")}
        for seed in range(metrics["seeds"])
    ]
    pooled = {key: value for key, value in pool_metrics(seeds).items() if "orderings" not in key}
    assert len(pooled) > 500 and {key: metrics[key] for key in pooled} == pytest.approx(pooled)


def test_nothing_ties_where_the_page_says_so():
    """But for the base at its best guidance against the base where that is the plain scale: the same images."""
    for folder, scorer in (("40_win_rates", "world_clean"), ("52_a_specific_user", "world_redness")):
        metrics = json.loads((KEPT / folder / "metrics.json").read_text())["metrics"]
        keys = [key for key in metrics if key.startswith("win_rate/") and key.endswith(f"/{scorer}")]
        assert len(keys) >= 4
        for key in keys:
            n, ties = metrics[f"{key}/n"], metrics[f"{key}/ties"]
            assert ties == (n if "/base_best_guidance_vs_base/" in key else 0), key
            wins = round(metrics[key] * n - ties / 2)
            ends = [metrics[f"{key}/low"], metrics[f"{key}/high"]]
            assert ends == pytest.approx(tango_interval(wins, ties, n - wins - ties)), key


def test_the_papers_win_rates_are_those_of_the_kept_card():
    card = pd.read_csv(ROOT / "papermill_runs" / "reference" / "paper_full" / "cards.csv").set_index("claim")["paper"]
    shown = {FIGURE.findall(here)[0][2].split("/")[1]: paper for _, here, paper in table_rows(section("What we found"))}
    shown = {name.replace("_vs_", " over "): paper for name, paper in shown.items() if paper}
    assert (
        shown == {claim: card[claim].split(" (")[0].replace("NeurIPS version ", "") for claim in shown}
        and len(shown) >= 5
    )


def test_scale_and_cost_are_those_of_the_benchmarks():
    rows = table_rows(section("Scale and cost"))
    assert len(rows) == 5
    benchmarks = (ROOT / "tests" / "benchmarks" / "README.md").read_text()
    for _, figures in rows:
        for number in re.findall(r"[\d.]+ \[[^\]]+\]|[\d.]+", figures):
            assert number in benchmarks, number


def test_the_results_page_is_what_the_kept_runs_give():
    assert PAGE.read_text() == results_page(), "make results"
    assert sum(len(table.rows) for table in TABLES) >= 60


def test_a_missing_key_is_named():
    with pytest.raises(KeyError, match=r"40_win_rates/metrics.json has no 'win_rate/kto_vs_nobody'"):
        figure("40_win_rates", "win_rate/kto_vs_nobody")


def test_the_seed_made_again_is_as_near_the_former_one_as_the_notes_say():
    """Eleven win-rates of version 0.1 within one point, on the same sides of one half."""
    kept = ROOT / "papermill_runs" / "reference" / "paper_0_1"
    former, again = pd.read_csv(kept / "seeds.csv"), pd.read_csv(kept / "win_rate_tables-0" / "win_rates.csv")
    again = again[(again["method"] == "kto") & (again["scorer"] == "world_utility")].set_index("opponent")["win_rate"]
    former = former.set_index("opponent")["seed 0"]
    assert set(again.index) == set(former.index) and len(again) == 11
    assert ((again - former).abs().round(3) <= 0.01).all() and ((again > 0.5) == (former > 0.5)).all()


def test_what_a_class_should_see_is_what_the_kept_runs_saw():
    page = (ROOT / "notebooks" / "TEACHING.md").read_text()
    for lesson, key in (("61_teach_by_likes", "win_rate"), ("62_judge_blind", "study/ours_vs_theirs")):
        metrics = json.loads((ROOT / "papermill_runs" / "reference" / lesson / "metrics.json").read_text())["metrics"]
        rate, low, high = (100 * metrics[f"{key}{end}"] for end in ("", "/low", "/high"))
        row = next(line for line in page.splitlines() if f"{lesson}/metrics.json" in line)
        assert f"{rate:.0f} % of {metrics[f'{key}/n']}" in row and f"interval {low:.0f} to {high:.0f} %" in row
