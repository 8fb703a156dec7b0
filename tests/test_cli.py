import inspect
import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pandas as pd
import pytest
from PIL import Image

from dkto.cli import COMMANDS, main
from dkto.common.commands import command_line
from dkto.data.feedback import write_feedback
from dkto.models import FAMILIES

NAMES = [function.__name__.replace("_", "-") for function in COMMANDS]
OPTIONS = {
    "feedback": "SOURCE --image-folder --partition --ties --score --rule --threshold --weight-scale --held-out --gamma",
    "unpack": "SOURCE --output-dir --partition --ties --files",
    "prepare": "SOURCE --image-folder --partition --ties --output-dir --model --batch-size --flip --held-out --strict "
    "--num-processes --csft",
    "shuffle": "FOLDER --output-dir --seed",
    "check": "--output-dir --held-out --prompts --count --images-per-prompt --scorers --shuffled --guidance "
    "--guidance-scales --samples --draws --seed --num-processes",
    "export": "OUTPUT --format --model",
    "calibrate": "--prepared-dir --steps --samples --wanted-slope --threads --recipe",
    "memory": "--models --lora-ranks --cards --overhead-gb --precision --gradient-checkpointing --measure",
    "train": "--prepared-dir --output-dir --objective --beta --lora-rank --threads --recipe",
    "train-online": "--prompts-file --output-dir --objective --reward --threads",
    "generate": "PROMPTS --output-dir --count --model --unet --lora --guidance --steps --images-per-prompt --seed "
    "--num-processes --batch-size --precision --vae-slicing",
    "score": "FOLDER --scorers --num-processes",
    "evaluate": "OURS THEIRS --scorers",
    "run": "NOTEBOOK OUTPUT --parameters --gpus --cards",
    "sweep": "PATH --dry-run --output-dir --profile --cores --retries --redo",
    "demo": "--output-dir",
    "paper": "--output-dir --profile --settings-file --steps",
    "paper-search": "--output-dir --user --tries --train-steps --keep",
}


@pytest.mark.parametrize("name", NAMES)
def test_every_command_has_help_on_every_option(name, capsys):
    with pytest.raises(SystemExit) as end:
        main([name, "--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert f"usage: dkto {name}" in text
    assert set(OPTIONS[name].split()) <= set(re.findall(r"--[a-z-]+|[A-Z]{4,}", text))
    function = next(function for function in COMMANDS if function.__name__ == name.replace("-", "_"))
    for option in inspect.signature(command_line(function)).parameters.values():
        (about,) = [each for each in get_args(option.annotation) if hasattr(each, "help")] or [None]
        assert len((about.help or "").split()) > 1, f"{name} {option.name} has no help"


def test_the_list_of_commands_and_a_slip_of_the_keys(capsys):
    assert main(["--help"]) == main([]) == 0
    assert re.findall(r"^  ([a-z-]+) +[A-Z]", capsys.readouterr().out, re.M) == NAMES * 2 and set(NAMES) == set(OPTIONS)
    with pytest.raises(SystemExit):  # what counts as given is read from the words: none may be cut short
        main(["train", "--prepared-dir", "p", "--output-dir", "o", "--lora-ran", "2"])
    capsys.readouterr()
    assert main(["trian", "--beta", "1"]) == 2
    assert capsys.readouterr().err.startswith(
        "dkto: there is no command 'trian'; did you mean 'train'? known: feedback"
    )


def test_a_command_imports_what_it_calls_and_no_more():
    """A sweep starts many runs; and who reads likes waits for no model."""
    code = "import sys\nfrom dkto.cli import main\nfor name in ('run', 'sweep', 'feedback', 'unpack', 'evaluate'):\n"
    code += "    try:\n        main([name, '--help'])\n    except SystemExit:\n        pass\n"
    code += "print([name for name in ('torch', 'diffusers', 'transformers', 'matplotlib') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_from_a_csv_to_tuned_weights_and_images(likes, tiny_pipeline, tmp_path, capsys):
    csv = write_feedback(likes, likes.images[0].parent / "likes.csv")
    prepared, run, images = (str(tmp_path / name) for name in ("prepared", "run", "images"))
    model = ["--model", str(tiny_pipeline)]  # given once: training and drawing find it
    assert main(["prepare", str(csv), "--output-dir", prepared, *model]) == 0
    options = ["--lora-rank", "2", "--max-train-steps", "2", "--batch-size", "4", "--learning-rate", "1e-3"]
    assert main(["train", "--prepared-dir", prepared, "--output-dir", run, *options]) == 0
    assert json.loads(Path(run, "training.json").read_text())["config"]["model"] == str(tiny_pipeline)
    (tmp_path / "prompts.txt").write_text("a picture 0\n\na picture 1\n")
    options = ["--lora", f"{run}/lora", "--steps", "2", "--images-per-prompt", "1"]
    assert main(["generate", str(tmp_path / "prompts.txt"), "--output-dir", images, *options]) == 0
    assert json.loads(Path(images, "manifest.json").read_text())["system"]["model"] == str(tiny_pipeline)
    out = capsys.readouterr().out
    assert "12 images, 6 liked, 6 disliked, 3 prompts" in out and f"images are in {images}" in out
    assert sorted(p.name for p in (tmp_path / "images").glob("*.png")) == ["p00000-s0.png", "p00001-s0.png"]
    assert main(["score", images, "--scorers", "world_redness"]) == 0
    assert main(["evaluate", images, images, "--scorers", "world_redness"]) == 0
    assert "0.5" in capsys.readouterr().out
    again = str(tmp_path / "again" / "images")
    options = ["--count", "2", "--steps", "2", "--images-per-prompt", "1", "--unet", f"{tiny_pipeline}/unet"]
    assert main(["generate", str(tmp_path / "prompts.txt"), "--output-dir", again, *model, *options]) == 0
    assert main(["evaluate", images, again, "--scorers", "world_redness"]) == 0
    table = capsys.readouterr().out
    assert images in table and again in table  # folders of one name are told apart


def test_large_images_do_not_become_those_of_the_small_world(tmp_path, capsys):
    table = ["image,prompt,liked"]
    for number in range(3):
        Image.new("RGB", (300, 260 + number)).save(tmp_path / f"{number}.png")
        table.append(f"{number}.png,a star,{number % 2}")
    (tmp_path / "likes.csv").write_text("\n".join(table))
    out = str(tmp_path / "out")
    assert main(["prepare", str(tmp_path / "likes.csv"), "--output-dir", out]) == 2
    sentence = (
        "for images of 261 pixels on the shorter side: left out, it is 'small-world', which would shrink them to 64"
    )
    assert f"model must be given, as 'stabilityai/stable-diffusion-xl-base-1.0', {sentence}" in capsys.readouterr().err
    assert not Path(out).exists()
    assert main(["train", "--prepared-dir", out, "--output-dir", f"{out}/run"]) == 2
    assert f"{out} holds no prepared feedback (prepared.json is missing): run prepare" in capsys.readouterr().err
    assert main(["generate", "world_test", "--output-dir", out]) == 2
    assert "--model must name what draws, as 'stabilityai" in capsys.readouterr().err


def test_what_is_not_given_fits_the_models_family(tiny_sdxl, tmp_path, monkeypatch):
    drawn = []

    def draw(pipeline, prompts, generators, system):
        drawn.append((len(prompts), pipeline.vae.use_slicing, system.guidance, system.precision))
        return [Image.new("RGB", (16, 16)) for _ in prompts]

    monkeypatch.setattr("dkto.evaluation.generate.draw", draw)
    (tmp_path / "prompts.txt").write_text("one\ntwo\nthree\nfour\nfive\n")
    generate = ["generate", str(tmp_path / "prompts.txt"), "--model", str(tiny_sdxl), "--images-per-prompt", "1"]
    assert main([*generate, "--output-dir", str(tmp_path / "a")]) == 0
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    family = FAMILIES["sdxl"]
    assert family.drawing() == {"guidance": 5.0, "steps": 30, "precision": "bfloat16"}
    assert FAMILIES["small-world"].drawing() == {"guidance": 3.0, "steps": 15, "precision": "float32"}
    monkeypatch.undo()
    monkeypatch.setattr("dkto.evaluation.generate.draw", draw)
    given = ["--batch-size=25", "--no-vae-slicing", "--guidance", "3.0", "--steps", "15"]  # as if none were given
    assert main([*generate, "--output-dir", str(tmp_path / "b"), *given]) == 0
    assert drawn == [(4, True, 5.0, "float32"), (1, True, 5.0, "float32"), (5, False, 3.0, "float32")]


def test_likes_are_described_and_held_out(likes, tiny_pipeline, tmp_path, capsys):
    csv = write_feedback(likes, likes.images[0].parent / "likes.csv")
    assert main(["feedback", str(csv), "--gamma", "0.5"]) == 0
    out = capsys.readouterr().out
    assert "liked: 50.0 % of the images" in out and "drawn 1 times as often" in out
    options = ["--model", str(tiny_pipeline), "--held-out", "0.5", "--flip", "--strict"]
    assert main(["prepare", str(csv), "--output-dir", str(tmp_path / "p"), *options]) == 0
    parts = [json.loads((tmp_path / "p" / name / "summary.json").read_text()) for name in ("", "held_out")]
    assert [part["rows"] for part in parts] == [8, 4] and [part["prompts"] for part in parts] == [3, 2]
    assert main(["feedback", str(csv), "--partition", "always"]) == 2
    assert "holds likes already" in capsys.readouterr().err


def test_pairs_are_unpacked(tmp_path, capsys):
    pixels = io.BytesIO()
    Image.new("RGB", (8, 8)).save(pixels, "PNG")
    row = {"jpg_0": pixels.getvalue(), "jpg_1": pixels.getvalue(), "label_0": 0.0, "label_1": 1.0, "caption": "x"}
    row |= {"image_0_uid": "a", "image_1_uid": "b"}
    pd.DataFrame([row]).to_parquet(tmp_path / "s.parquet")
    assert main(["unpack", str(tmp_path / "s.parquet"), "--output-dir", str(tmp_path / "o"), "--ties", "liked"]) == 0
    out = capsys.readouterr().out
    assert '"desirable": 1' in out and "237530" in out
    assert main(["feedback", out.split()[-1]]) == 0
    assert "2 images, 1 liked, 1 disliked" in capsys.readouterr().out


def test_mistakes_end_in_one_sentence_and_code_2(tmp_path, capsys):
    assert main(["prepare", str(tmp_path / "none.csv"), "--output-dir", str(tmp_path / "p")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("dkto: feedback source") and "does not exist" in error and error.count("\n") == 1
    assert main(["score", str(tmp_path)]) == 2
    assert "manifest.json is missing" in capsys.readouterr().err
    assert main(["generate", "world_tests", "--output-dir", str(tmp_path / "i")]) == 2
    assert "did you mean 'world_test'?" in capsys.readouterr().err
    assert main(["run", "notebooks/40_win_rates.ipynb", str(tmp_path / "o.ipynb"), "--parameters", "prompt=3"]) == 2
    error = capsys.readouterr().err
    assert "has no parameter 'prompt'" in error and "did you mean 'prompts'?" in error


def test_the_shipped_sweeps_and_pages_name_commands_that_exist():
    root = Path(__file__).parent.parent
    pages = [root / "README.md", *(root / "notebooks").glob("*.md"), *(root / "papermill_runs").glob("*.md")]
    pages += (root / "papermill_runs").rglob("*.yaml")
    named = {word for page in pages for word in re.findall(r"(?:^#\s+|[`;]\s*)dkto ([a-z-]+)", page.read_text(), re.M)}
    assert {"unpack", "prepare", "sweep"} <= named <= set(NAMES)


@pytest.mark.parametrize("given", [["prompts"], ["prompts=3", "prompts=4"]])
def test_a_parameter_is_a_name_with_a_value_and_comes_once(given, capsys):
    assert main(["run", "notebooks/40_win_rates.ipynb", "out.ipynb", "--parameters", *given]) == 2
    assert f"dkto: --parameters takes NAME=VALUE, each name once, got '{given[-1]}'" in capsys.readouterr().err


def test_a_missing_extra_is_one_sentence(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    sweep = ["sweep", "papermill_runs/sweeps/toy_headline.yaml", "--output-dir", str(tmp_path)]
    assert main(sweep) == 2 and "dkto: dkto sweep runs on Snakemake: pip install" in capsys.readouterr().err
