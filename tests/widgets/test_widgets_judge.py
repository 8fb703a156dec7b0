import matplotlib.pyplot as plt
import numpy as np
import pytest
from PIL import Image

from dkto.common.files import write_json
from dkto.evaluation.metrics import win_rate
from dkto.evaluation.study import StudySession, make_study
from dkto.plotting import plot_preferences
from dkto.widgets import Judge

METHODS = ("secret_ours", "secret_theirs")


@pytest.fixture(autouse=True)
def figures_are_closed():
    yield
    plt.close("all")


@pytest.fixture
def study(tmp_path):
    """Six prompts in two styles; ours draws bright pictures, theirs dark ones."""
    prompts = [f"prompt {number}" for number in range(6)]
    for name, level in zip(METHODS, (200, 40), strict=True):
        folder = tmp_path / name
        folder.mkdir()
        about = {"system": {}, "prompts": prompts, "images_per_prompt": 1, "seed": 0}
        write_json(folder / "manifest.json", about)
        for number in range(len(prompts)):
            Image.fromarray(np.full((8, 8, 3), level + number, np.uint8)).save(folder / f"p{number:05d}-s0.png")
    folders = {name: tmp_path / name for name in METHODS}
    return make_study(folders, tmp_path / "study", ["ann", "bob"], ["a", "b"] * 3, per_style=3)


def brighter(judge):
    """The side whose picture is ours, seen from its pixels alone."""
    from io import BytesIO

    levels = [np.asarray(Image.open(BytesIO(side))).mean() for side in (judge.left, judge.right)]
    return "left" if levels[0] > levels[1] else "right"


def test_a_judge_answers_every_pair_and_sees_the_result_at_the_end(study):
    judge = Judge(study, "ann")
    for number in range(6):
        assert judge.answered == number and judge.result == {}
        judge.receive({"type": "answer", "number": judge.number, "side": brighter(judge)})
    assert judge.number == -1 and judge.left == b""
    assert judge.result["rows"][0] == ["all prompts", "100%", "61% to 100%", "6"]
    assert "secret_ours is preferred to secret_theirs" in judge.result["text"]
    assert judge.result["chart"].startswith(b"\x89PNG")


def test_nothing_that_is_sent_before_the_end_names_a_method(study):
    judge = Judge(study, "ann")
    judge.answer("left")
    state = repr({name: value for name, value in judge.get_state().items() if not name.startswith("_")})
    assert "secret" not in state and str(study) not in state


def test_undo_comes_back_and_a_second_key_for_the_same_pair_counts_once(study):
    judge = Judge(study, "bob")
    first = judge.number
    for _ in range(2):
        judge.receive({"type": "answer", "number": first, "side": "left"})
    assert judge.answered == 1 and judge.number != first
    judge.receive({"type": "undo"})
    assert judge.answered == 0 and judge.number == first
    judge.receive({"type": "answer", "number": first, "side": "middle"})
    assert judge.message == "not kept: side must be left or right, got 'middle'"


def test_after_the_names_are_shown_no_answer_is_taken_back(study):
    judge = Judge(study, "bob")
    while judge.number >= 0:
        judge.answer("left")
    judge.receive({"type": "undo"})
    assert judge.answered == 6 and judge.result and "no answer changes now" in judge.message


def test_the_same_refusal_twice_is_told_twice(study):
    judge, told = Judge(study, "ann"), []
    judge.observe(lambda change: told.append(change.new), "message")
    for _ in range(2):
        judge.receive({"type": "answer", "number": judge.number, "side": "middle"})
    assert [bool(text) for text in told] == [True, False, True]


def test_an_answer_is_kept_though_the_next_picture_is_damaged_and_no_pair_is_shown_under_anothers_number(study):
    judge = Judge(study, "ann")
    following = judge.session.plan["order"][1]
    for letter in "ab":
        (study / "images" / f"q{following:03d}-{letter}.png").write_bytes(b"no picture")
    judge.receive({"type": "answer", "number": judge.number, "side": "left"})
    assert judge.message.startswith("all answers are kept, but the next pair cannot be shown: image ")
    assert (judge.number, judge.prompt, judge.left, judge.right, judge.answered) == (-1, "", b"", b"", 1)
    judge.receive({"type": "undo"})
    assert judge.message == "" and judge.number == judge.session.plan["order"][0]


def test_a_judge_without_the_key_keeps_all_answers_and_learns_no_result(study):
    (study / "key.json").unlink()
    judge = Judge(study, "ann")
    for _ in range(6):
        judge.receive({"type": "answer", "number": judge.number, "side": "left"})
    assert judge.answered == 6 == len(StudySession(study, "ann").answers) and judge.result == {}
    assert "all answers are kept, but the result cannot be shown" in judge.message
    assert "key.json is missing" in Judge(study, "ann").message


def test_a_judge_goes_on_where_he_stopped(study):
    Judge(study, "ann").answer("right")
    assert Judge(study, "ann").answered == 1 and len(StudySession(study, "bob").answers) == 0


def test_bars_carry_the_interval_of_each_comparison():
    ax = plot_preferences(
        [("ours", "base", win_rate([1, 1, 1, 0], [0, 0, 0, 1])), ("ours", "$dpo$", win_rate([1], [0]))]
    )
    heights = [bar.get_height() for bar in ax.patches]
    assert heights == [75, 25, 100, 0]
    assert [label.get_text() for label in ax.get_xticklabels()] == [
        "ours\n75 %",
        "base\n25 %",
        "ours\n100 %",
        "$dpo$\n0 %",
    ]
    assert ax.get_xlabel() == "n = 4, 1 prompts"
    with pytest.raises(ValueError, match="at least one comparison"):
        plot_preferences([])
