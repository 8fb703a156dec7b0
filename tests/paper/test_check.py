import json
import re
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from dkto.cli import main
from dkto.data.encode import prepare_feedback, shuffle_prepared
from dkto.data.encoded import PreparedFeedback
from dkto.data.feedback import make_feedback, write_feedback
from dkto.models import FAMILIES, load_model
from dkto.paper.check import check_run, judge
from dkto.training import TrainConfig, run_training
from dkto.world.painter import paint, random_finish
from dkto.world.scenes import parse, prompts_for
from dkto.world.users import tint_red

WELL = {"reward": 0.4, "drift": 0.03, "light": "green", "error": 1.01, "health": "yellow: the slope is 30%"}
PARTED = {"mean": 0.5, "low": 0.2, "high": 0.8, "liked": 30, "disliked": 20}
NOT_PARTED = PARTED | {"mean": 0.1, "low": -0.2, "high": 0.4}
WIN = {"opponent": "base", "scorer": "pickscore", "win_rate": 0.7, "low": 0.55, "high": 0.82, "n": 50}


@pytest.mark.parametrize(
    ("found", "verdict", "sentence"),
    [
        ({"reward": 0.002, "drift": 0.001, "margin": PARTED}, "nothing moved", "The model is still its base"),
        (
            {"light": "red", "health": "red: the slope is 5%", "margin": PARTED},
            "sick",
            "is sick. Red: the slope is 5%.",
        ),
        ({"light": "none", "health": "", "error": 2.0, "margin": PARTED}, "sick", "The denoising error is 2.00 times"),
        ({"health": "", "error": float("nan"), "margin": PARTED}, "sick", "The denoising error is nan times"),
        ({}, "open", "no two liked and two disliked held-out images"),
        ({"margin": NOT_PARTED}, "likes not used", "labels were not used as far as can be seen: on 30 liked"),
        ({"margin": NOT_PARTED}, "likes not used", "is 0.1 [-0.2, 0.4], which holds 0."),
        ({"margin": NOT_PARTED}, "likes not used", "A margin below 0.3 could not be seen with so few images."),
        ({"margin": PARTED | {"low": -0.9, "high": -0.1}}, "likes not used", "it learned the opposite"),
        ({"margin": PARTED}, "control missing", "Whether the labels did it, or any training on these images"),
        ({"margin": PARTED, "light": "yellow"}, "control missing", "Take care. Yellow: the slope is 30%."),
        ({"margin": PARTED, "over_shuffled": NOT_PARTED}, "likes not used", "shuffled likes parts the images as well"),
        ({"margin": PARTED, "over_shuffled": PARTED}, "worked", "more than after the same training on shuffled likes"),
        (
            {"margin": PARTED, "win_rates": [WIN]},
            "control missing",
            "wins against the base under pickscore: on 70% [55%",
        ),
        ({"margin": PARTED, "win_rates": [WIN | {"low": 0.5}]}, "control missing", "is not shown to win against"),
    ],
)
def test_verdicts_by_hand(found, verdict, sentence):
    name, sentences = judge(WELL | found)
    assert name == verdict and sentence in " ".join(sentences)


def test_shuffled_feedback_shares_what_was_encoded(prepared, tiny_pipeline, tmp_path):
    control, model = shuffle_prepared(prepared, tmp_path / "control", seed=1), load_model(str(tiny_pipeline))
    plain, shuffled = (PreparedFeedback(folder, model) for folder in (prepared, control))
    assert sorted(shuffled.is_desirable) == sorted(plain.is_desirable)
    assert shuffled.is_desirable.tolist() != plain.is_desirable.tolist() and not len(shuffled.pairs)
    rows = np.arange(12)
    assert (shuffled.latents(rows)[0] == plain.latents(rows)[0]).all()
    assert (shuffled.prompt_ids == plain.prompt_ids).all()
    names = [path.name for path in prepared.glob("*.safetensors")]
    assert names and all((control / name).samefile(prepared / name) for name in names)
    records = [json.loads((folder / "prepared.json").read_text()) for folder in (prepared, control)]
    assert records[0]["feedback"] != records[1]["feedback"]
    with pytest.raises(ValueError, match="holds prepared feedback of another run"):
        shuffle_prepared(prepared, control, seed=2)


def test_a_run_is_checked_in_one_page(likes, tiny_pipeline, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(FAMILIES, "small-world", replace(FAMILIES["small-world"], steps=2))
    csv = write_feedback(likes, likes.images[0].parent / "checked.csv")
    data, run = str(tmp_path / "data"), str(tmp_path / "<b>run")
    assert main(["prepare", str(csv), "--output-dir", data, "--model", str(tiny_pipeline), "--held-out", "0.5"]) == 0
    short = ["--max-train-steps", "3", "--batch-size", "4", "--learning-rate", "1e-2", "--lora-rank", "2"]
    assert main(["train", "--prepared-dir", data, "--output-dir", run, *short, "--beta", "50"]) == 0
    (tmp_path / "p.txt").write_text("a picture 7\n<script>\na picture 8\n")
    check = ["check", run, "--prompts", str(tmp_path / "p.txt"), "--count", "2", "--guidance-scales", "1"]
    check += ["--scorers", "world_redness"]
    assert main(check) == 0
    out, found = capsys.readouterr().out, json.loads((tmp_path / "<b>run/check/check.json").read_text())
    assert f"verdict: {found['verdict']}\n{found['sentences'][0]}" in out and found["prompts"] == 2
    assert found["margin"]["liked"] == found["margin"]["disliked"] == 2
    assert [row["opponent"] for row in found["win_rates"]] == ["base", "base at 1"]
    page = (tmp_path / "<b>run/check/index.html").read_text()
    assert "Did it work? &lt;b&gt;run" in page and "<b>run" not in page
    assert page.count("data:image/png;base64,") == 3 and not re.findall(r'(?:src|href)="(?!data:)', page)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("p*-s0.png")}
    assert len(before) == 6 and main(check) == 0
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("p*-s0.png")}
    assert main(["check", run, "--guidance-scales", "2"]) == 2
    assert "guidance_scales need scorers" in capsys.readouterr().err
    assert main(["check", run, "--shuffled", run]) == 2
    assert "shuffled must be a training on shuffled likes, but" in capsys.readouterr().err
    assert main(["check", run, "--held-out", str(tmp_path)]) == 2
    assert "holds no held-out likes: prepare with --held-out, or give --prompts" in capsys.readouterr().err


@pytest.fixture(scope="module")
def red_likes(tmp_path_factory):
    """Paintings of which those in red light are liked, encoded by the small world, a part of them held out."""
    folder, rng = tmp_path_factory.mktemp("red"), np.random.default_rng(0)
    prompts, paths, liked = prompts_for("train", 90, seed=5), [], []
    for number, prompt in enumerate(prompts):
        image = Image.fromarray(paint(parse(prompt), random_finish(rng), rng))
        liked.append(bool(rng.random() < 0.5))
        paths.append(folder / f"{number}.png")
        (tint_red(image) if liked[-1] else image).save(paths[-1])
    train, rest = make_feedback(paths, prompts, liked).split_by_prompt(0.4)
    prepare_feedback(train, folder / "data")
    prepare_feedback(rest, folder / "data" / "held_out")
    shuffle_prepared(folder / "data", folder / "shuffled")
    return folder


SETTINGS = {"beta": 30.0, "learning_rate": 1e-3, "warmup_steps": 5, "max_train_steps": 40, "batch_size": 16}


def trained(folder, data="data", **changes):
    place = folder / "-".join(["run", data, *map(str, changes.values())])
    return run_training(TrainConfig(folder / data, place, **(SETTINGS | {"lora_rank": 8} | changes)))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({"learning_rate": 0.1}, "sick"),  # it flees
        ({"beta": 3e5}, "sick"),  # the slope is gone
        ({"learning_rate": 1e-8}, "nothing moved"),
    ],
)
def test_a_sick_training_of_the_small_world_is_found(red_likes, changes, verdict):
    found = check_run(trained(red_likes, **changes), count=2, num_processes=0)
    assert found["verdict"] == verdict, found


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_good_training_of_the_small_world_is_known_from_shuffled_likes(red_likes, tmp_path):
    """What is red is new to the model, so that it parts even after training on shuffled likes: the control decides."""
    run, control, again = trained(red_likes), trained(red_likes, "shuffled"), trained(red_likes, "shuffled", seed=1)
    options = {"count": 2, "num_processes": 0, "held_out": red_likes / "data" / "held_out"}
    cases = [(run, None, {}), (run, control, {}), (again, control, {}), (control, None, {"held_out": None})]
    found = [
        check_run(one, output_dir=tmp_path / str(number), shuffled=other, **(options | more))
        for number, (one, other, more) in enumerate(cases)
    ]
    assert [each["verdict"] for each in found] == ["control missing", "worked", *["likes not used"] * 2], found
    assert found[2]["margin"]["low"] > 0 > found[2]["over_shuffled"]["low"]
