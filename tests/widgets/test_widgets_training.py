import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from dkto.data.feedback import make_feedback
from dkto.widgets import TrainingView, Tuner
from dkto.widgets.tuner import next_run
from dkto.world.users import SimulatedUser

SMALL = {"max_train_steps": 60, "batch_size": 4, "lora_rank": 2, "checkpoint_every": 20, "warmup_steps": 1}


@pytest.fixture(autouse=True)
def figures_are_closed():
    yield
    plt.close("all")


def until(condition, seconds=300):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_training_is_watched_stopped_at_a_checkpoint_and_gone_on_with(config):
    config = replace(config, max_train_steps=5000, checkpoint_every=10_000)
    view = TrainingView(config, ["a picture"], sample_steps=1)
    view.figure()
    view.start()
    assert view.can_start is False
    with pytest.raises(RuntimeError, match="runs already"):
        view.start()
    until(lambda: view.updates >= 3)
    view.receive({"type": "stop"})
    assert view.wait(300) == "stopped" and view.process.returncode == 0 and view.can_start
    stopped_at = view.step
    assert 0 < stopped_at < 5000 and len(list(config.output_dir.glob("checkpoint-*"))) == 1
    assert view.curves["loss"][0][-1] <= stopped_at and len(view.figure().axes) == 2
    view.receive({"type": "start"})
    until(lambda: view.step > stopped_at)
    view.stop()
    assert view.wait(300) == "stopped"


def test_a_training_that_fails_says_why(config, monkeypatch):
    code = "import sys; sys.exit('dkto: nowhere holds no prepared feedback')"
    monkeypatch.setattr("dkto.training.launch.training_command", lambda *_, **options: [sys.executable, "-c", code])
    view = TrainingView(config)
    view.start()
    assert view.wait(300) == "failed"
    assert "holds no prepared feedback" in view.message and "train.log" in view.message and view.can_start


def test_a_run_gets_a_number_that_nobody_had(tmp_path):
    assert next_run(tmp_path / "new").name == "run-01"
    (tmp_path / "run-02").mkdir()
    assert next_run(tmp_path).name == "run-03", "run-01 was removed"
    (tmp_path / "likes-07.csv").touch()
    (tmp_path / "run-of-ann").touch()
    assert next_run(tmp_path).name == "run-08"
    with ThreadPoolExecutor(8) as pool:
        names = [folder.name for folder in pool.map(next_run, [tmp_path] * 40)]
    assert sorted(names) == [f"run-{number:02d}" for number in range(9, 49)]


def test_the_button_tunes_on_the_likes_and_shows_before_and_after(likes, tiny_pipeline, tmp_path):
    folder = likes.images[0].parent
    brightness = SimulatedUser("likes_bright", lambda image, prompt: float(np.mean(image)), 100.0)
    options = {"model": str(tiny_pipeline), "user": brightness, "sample_steps": 2, "guidance": 1.0, "least": 6}
    tuner = Tuner(lambda: likes, folder, ["a picture 0", "a picture 1"], **options, **SMALL)
    tuner.start()
    assert tuner.wait(300) == "finished", tuner.message
    assert tuner.samples[0]["label"] == "before" and tuner.samples[-1]["label"] == "after"
    assert len(tuner.before) == len(tuner.after) == 2 and tuner.win_rate.n == 2
    assert any(np.asarray(b).tolist() != np.asarray(a).tolist() for b, a in zip(tuner.before, tuner.after, strict=True))
    assert "By the rule of the simulated user likes_bright" in tuner.result and tuner.step == 60
    weights = load_file(folder / "run-01" / "lora" / "pytorch_lora_weights.safetensors")
    assert any(value.abs().sum() > 0 for name, value in weights.items() if "lora_B" in name)
    assert tuner.can_start, "more likes make a new run"
    assert len(tuner.figure().axes) == 1 and (folder / "likes-01.csv").is_file()
    for _ in range(10):
        tuner.judge.receive({"type": "answer", "number": tuner.judge.number, "side": "left"})
    found = tuner.judge.study_result()
    assert (
        found.methods == ("after", "before")
        and found.by_prompt.n == 10
        and tuner.panel.children == (tuner, tuner.judge)
    )
    assert "10 of 10 answers" in tuner.judge.result["text"] and "n=10 by this judge" in tuner.judge.result["text"]
    blind = [np.asarray(Image.open(path)) for path in sorted((folder / "blind" / "before").glob("*.png"))]
    assert len(blind) == 10 and not any(np.array_equal(np.asarray(tuner.before[0]), image) for image in blind), (
        "other noise"
    )


def test_the_button_without_likes_says_so(likes, tmp_path):
    only = make_feedback(likes.images[:1], ["a"], [True])
    tuner = Tuner(lambda: only, tmp_path, ["a"])
    tuner.receive({"type": "start"})
    assert tuner.message == "tuning needs 8 likes and 8 dislikes, got 1 and 0: give 7 more likes and 8 more dislikes"
    assert tuner.state == "ready" and not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="at least one prompt"):
        Tuner(lambda: only, tmp_path, [])
