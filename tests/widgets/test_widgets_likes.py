import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
from PIL import Image

from dkto.data.feedback import read_feedback, write_feedback
from dkto.widgets import Likes
from dkto.widgets.base import png_bytes
from dkto.widgets.likelog import LikeLog, Picture, merge_likes, pictures_in, read_events

ROOT = Path(__file__).parents[2]
ATTACK = "<img src=x onerror=alert(1)>"


@pytest.fixture(autouse=True)
def figures_are_closed():
    yield
    plt.close("all")


@pytest.fixture
def pictures(tmp_path):
    found = []
    for number in range(5):
        path = tmp_path / "pool" / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), 40 * number, np.uint8)).save(path)
        found.append(Picture(path, f"picture {number}" if number else ATTACK, seed=number))
    return found


def test_every_event_is_on_disk_with_session_time_prompt_seed_and_hash(pictures, tmp_path):
    log = LikeLog(pictures, tmp_path / "likes.jsonl", "ann")
    log.judge(0, "like")
    log.judge(1, "skip")
    log.undo()
    lines = [json.loads(line) for line in (tmp_path / "likes.jsonl").read_text().splitlines()]
    assert [line["event"] for line in lines] == ["like", "skip", "undo"]
    assert lines[0] | {"time": "", "sha256": ""} == {
        "session": "ann",
        "time": "",
        "event": "like",
        "prompt": ATTACK,
        "seed": 0,
        "image": "pool/0.png",
        "sha256": "",
    }
    assert len(lines[0]["sha256"]) == 64 and lines[0]["time"].endswith("Z")


def test_a_new_log_goes_on_where_the_last_one_stopped(pictures, tmp_path):
    log = LikeLog(pictures, tmp_path / "likes.jsonl", "ann")
    for index, judgement in enumerate(("like", "dislike", "skip", "like")):
        log.judge(index, judgement)
    log.undo()
    log.judge(0, "dislike")
    again = LikeLog(pictures, tmp_path / "likes.jsonl", "ann")
    assert again.judgements == {0: "dislike", 1: "dislike", 2: "skip"} == log.judgements
    assert again.next_picture() == 3
    assert [again.undo() for _ in range(4)] == [0, 2, 1, None]
    assert LikeLog(pictures, tmp_path / "likes.jsonl", "bob").judgements == {}


def test_a_line_that_a_crash_cut_is_skipped_and_spoils_no_other(pictures, tmp_path):
    path = tmp_path / "likes.jsonl"
    log = LikeLog(pictures, path, "ann")
    log.judge(0, "like")
    log.judge(1, "like")
    whole = path.read_bytes()
    for cut in (1, 20, 60):
        path.write_bytes(whole[:-cut])
        again = LikeLog(pictures, path, "ann")
        assert again.judgements == ({0: "like", 1: "like"} if cut == 1 else {0: "like"})
        again.judge(2, "dislike")
        last = LikeLog(pictures, path, "ann")
        assert last.judgements[2] == "dislike"


def test_events_that_are_no_events_are_refused_with_their_line(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"session": "a"}\n[3]\n')
    with pytest.raises(ValueError, match=r"log.jsonl, line 2: expected an object with a session"):
        read_events(tmp_path / "log.jsonl", "a")


WRITER = """
import sys
from pathlib import Path
from dkto.widgets.likelog import append_event
number = 0
while True:
    append_event(Path(sys.argv[1]), sys.argv[2], number=number)
    print(number, flush=True)
    number += 1
"""


def test_a_killed_writer_loses_nothing_that_it_reported(tmp_path):
    """Two real processes append to one file and are killed; every event they reported is whole in it."""
    path = tmp_path / "log.jsonl"
    command = [sys.executable, "-c", WRITER, str(path)]
    writers = {
        name: subprocess.Popen([*command, name], stdout=subprocess.PIPE, cwd=ROOT, env=os.environ | {"PYTHONPATH": "."})
        for name in "ab"
    }
    reported = {}
    time.sleep(0.1)
    for name, process in writers.items():
        reported[name] = [int(process.stdout.readline()) for _ in range(30)]
    for name, process in writers.items():
        process.send_signal(signal.SIGKILL)
        reported[name] += [int(line) for line in process.stdout.read().split(b"\n")[:-1]]
        process.wait()
        assert [event["number"] for event in read_events(path, name)][: len(reported[name])] == reported[name]


def test_sessions_merge_and_contradictions_are_counted(pictures, tmp_path):
    ann, bob = (LikeLog(pictures, tmp_path / "likes.jsonl", name) for name in ("ann", "bob"))
    for index, judgement in enumerate(("like", "dislike", "like")):
        ann.judge(index, judgement)
    for index, judgement in enumerate(("dislike", "dislike", "skip", "like")):
        bob.judge(index, judgement)
    merged = merge_likes([ann, bob])
    assert (merged.judged_twice, merged.contradictions) == (2, 1)
    assert merged.sessions == {"ann": 3, "bob": 3}
    assert merged.table.is_desirable.tolist() == [True, False, True, False, False, True]
    assert "2 pictures judged more than once, 1 of them liked and disliked" in str(merged)
    read = read_feedback(write_feedback(merged.table, tmp_path / "table.csv"))
    assert read.is_desirable.tolist() == merged.table.is_desirable.tolist() and read.prompts[0] == ATTACK


def test_nothing_judged_is_no_table(pictures, tmp_path):
    with pytest.raises(ValueError, match="nothing was liked or disliked yet"):
        LikeLog(pictures, tmp_path / "likes.jsonl", "ann").feedback()


def test_wrong_pictures_and_judgements_are_refused(pictures, tmp_path):
    with pytest.raises(ValueError, match="at least one picture"):
        LikeLog([], tmp_path / "likes.jsonl", "ann")
    with pytest.raises(ValueError, match="must lie in the folder of the log"):
        LikeLog(pictures, tmp_path / "elsewhere" / "likes.jsonl", "ann")
    with pytest.raises(FileNotFoundError, match=r"gone.png does not exist"):
        LikeLog([Picture(tmp_path / "gone.png", "x")], tmp_path / "likes.jsonl", "ann")
    with pytest.raises(ValueError, match="session must be a name"):
        LikeLog(pictures, tmp_path / "likes.jsonl", " ")
    log = LikeLog(pictures, tmp_path / "likes.jsonl", "ann")
    with pytest.raises(ValueError, match="judgement must be one of like, dislike, skip, got 'love'"):
        log.judge(0, "love")
    with pytest.raises(ValueError, match="picture must be 0 to 4, got 9"):
        log.judge(9, "like")
    for settings, sentence in (({"view": "wall"}, "view must be one of"), ({"page_size": 0}, "page_size must be")):
        with pytest.raises(ValueError, match=sentence):
            Likes(pictures, tmp_path / "likes.jsonl", **settings)


def test_pictures_of_a_folder_have_their_prompts(pictures, tmp_path):
    folder = pictures[0].image.parent
    with pytest.raises(FileNotFoundError, match=r"0.png has no prompt: expected it in 0.txt"):
        pictures_in(folder)
    for picture in pictures:
        picture.image.with_suffix(".txt").write_text(picture.prompt + "\n")
    assert [picture.prompt for picture in pictures_in(folder)] == [picture.prompt for picture in pictures]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no picture"):
        pictures_in(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        pictures_in(tmp_path / "nowhere")


def test_pictures_drawn_by_the_project_know_prompt_and_seed(tmp_path):
    folder = tmp_path / "drawn"
    folder.mkdir()
    (folder / "manifest.json").write_text(json.dumps({"prompts": ["a", "b"], "images_per_prompt": 1, "seed": 7}))
    Image.new("RGB", (8, 8)).save(folder / "p00000-s0.png")
    with pytest.raises(FileNotFoundError, match=r"is not complete \(p00001-s0.png is missing\)"):
        pictures_in(folder)
    Image.new("RGB", (8, 8)).save(folder / "p00001-s0.png")
    assert pictures_in(folder)[1] == Picture(folder / "p00001-s0.png", "b", 7)


def test_the_widget_shows_the_next_picture_and_says_what_it_could_not_keep(pictures, tmp_path):
    widget = Likes(pictures, tmp_path / "likes.jsonl", session="ann")
    assert widget.current == 0 and widget.shown[0]["prompt"] == ATTACK
    for index, judgement in enumerate(("like", "dislike")):
        widget.receive({"type": "judge", "index": index, "judgement": judgement})
    assert widget.current == 2 and widget.counts == {"like": 1, "dislike": 1, "skip": 0}
    widget.receive({"type": "undo"})
    assert widget.current == 1
    widget.receive({"type": "judge", "index": 99, "judgement": "like"})
    assert widget.message == "not kept: picture must be 0 to 4, got 99"
    for index in range(5):
        widget.judge(index, "skip")
    assert widget.current == -1 and widget.shown == []


def test_the_grid_turns_pages_and_comes_back_to_what_was_undone(pictures, tmp_path):
    widget = Likes(pictures, tmp_path / "likes.jsonl", view="grid", page_size=2)
    assert widget.pages == 3 and [item["index"] for item in widget.shown] == [0, 1]
    widget.judge(1, "like")
    widget.page = 2
    assert [item["index"] for item in widget.shown] == [4]
    widget.undo()
    assert widget.page == 0 and widget.current == 1


def test_the_static_figure_has_liked_above_disliked(pictures, tmp_path):
    widget = Likes(pictures, tmp_path / "likes.jsonl")
    assert len(widget.figure().axes) == 1
    widget.judge(0, "like")
    assert len(widget.figure().axes) == 1
    widget.judge(1, "dislike")
    assert [ax.get_yticklabels()[0].get_text() for ax in widget.figure().axes] == ["liked", "disliked"]


def test_bytes_of_a_picture_hold_nothing_but_pixels(tmp_path):
    from PIL.PngImagePlugin import PngInfo

    note = PngInfo()
    note.add_text("method", "kto")
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png", pnginfo=note)
    assert b"kto" in (tmp_path / "a.png").read_bytes()
    assert b"kto" not in png_bytes(Image.open(tmp_path / "a.png"))
