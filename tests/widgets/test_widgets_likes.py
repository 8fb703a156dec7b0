import json
import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from io import BytesIO
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
        with nullcontext() if cut == 1 else pytest.warns(UserWarning, match=r"likes.jsonl, line 2 was cut short"):
            again = LikeLog(pictures, path, "ann")
        assert again.judgements == ({0: "like", 1: "like"} if cut == 1 else {0: "like"})
        again.judge(2, "dislike")
        with nullcontext() if cut == 1 else pytest.warns(UserWarning, match=r"line 2 was cut short"):
            last = LikeLog(pictures, path, "ann")
        assert last.judgements[2] == "dislike"


GOOD = {"session": "a", "event": "like", "image": "a.png", "sha256": "0", "prompt": "a star"}


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("[3]", r"line 2: expected an object, got \[3\]"),
        ("{}", r"line 2: session must be text, got nothing"),
        (GOOD | {"event": "lik\x1b[2Je"}, r"line 2: event must be one of like, dislike, skip, undo, got 'lik\\x1b"),
        (GOOD | {"event": ["like"]}, r"line 2: event must be one of"),
        (GOOD | {"session": "another", "event": None}, r"line 2: event must be one of .*, got None"),
        (GOOD | {"image": 3}, r"line 2: image must be text, got 3"),
        (GOOD | {"sha256": None}, r"line 2: sha256 must be text, got None"),
        ("x" * 300, r"line 2 is damaged, got 'xxx.*\.\.\.: mend it, or remove the line"),
        ('{"session": "a" "event": "like"}', r"line 2 is damaged"),
        ("\xff", r"line 2 is damaged"),
        ("[" * 3000, r"line 2 is damaged"),
    ],
)
def test_lines_that_are_no_events_are_refused_with_their_number(tmp_path, line, sentence):
    line = line if isinstance(line, str) else json.dumps(line)
    (tmp_path / "log.jsonl").write_text(f"{json.dumps(GOOD)}\n{line}\n", encoding="latin-1")
    with pytest.raises(ValueError, match=rf"log.jsonl, {sentence}") as caught:
        read_events(tmp_path / "log.jsonl", "a")
    assert str(caught.value).isprintable()


def test_a_like_is_of_this_image_and_this_prompt(pictures, tmp_path):
    log = LikeLog(pictures, tmp_path / "likes.jsonl", "ann")
    for index in range(3):
        log.judge(index, "like")
    stamp = pictures[1].image.stat()
    pictures[1].image.write_bytes(pictures[1].image.read_bytes()[::-1])
    os.utime(pictures[1].image, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    pictures[2] = Picture(pictures[2].image, "another prompt", 2)
    with pytest.warns(UserWarning, match=r"2 images of .*likes.jsonl or their prompts have changed .*'pool/1.png'"):
        assert LikeLog(pictures, tmp_path / "likes.jsonl", "ann").judgements == {0: "like"}


def test_a_log_opens_in_time_that_grows_with_its_pictures(pictures, tmp_path):
    """20,000 judgements of one picture each: a search in a list for each takes a minute, hashing a second."""
    many = [Picture(pictures[0].image, f"prompt {number}") for number in range(20_000)]
    digest = LikeLog(many[:1], tmp_path / "likes.jsonl", "ann")._hashes[0]
    about = {"session": "ann", "event": "like", "image": "pool/0.png", "sha256": digest}
    lines = [json.dumps(about | {"prompt": picture.prompt}) for picture in [*many, *many]]
    (tmp_path / "likes.jsonl").write_text("\n".join(lines) + "\n")
    began = time.process_time()
    assert len(LikeLog(many, tmp_path / "likes.jsonl", "ann").judgements) == 20_000
    assert time.process_time() - began < 5


def test_links_are_not_followed_out_of_a_folder(pictures, tmp_path):
    folder, secret = pictures[0].image.parent, tmp_path / "secret.txt"
    secret.write_text("my password")
    for picture in pictures:
        picture.image.with_suffix(".txt").write_text("a star")
    (folder / "0.txt").unlink()
    (folder / "0.txt").symlink_to(secret)
    with pytest.raises(ValueError, match=r"image '0.txt' leaves the folder"):
        pictures_in(folder)
    (folder / "0.txt").unlink()
    (folder / "0.txt").symlink_to("1.txt")
    assert pictures_in(folder)[0].prompt == "a star"
    (tmp_path / "other.png").write_bytes(pictures[0].image.read_bytes())
    (folder / "9.png").symlink_to(tmp_path / "other.png")
    (folder / "9.txt").write_text("a star")
    with pytest.raises(ValueError, match=r"9.png is a link that leaves the folder"):
        pictures_in(folder)
    with pytest.raises(ValueError, match=r"9.png must lie in the folder of the log"):
        LikeLog([Picture(folder / "9.png", "x")], folder / "likes.jsonl", "ann")
    (folder / "log.jsonl").symlink_to(secret)
    with pytest.raises(ValueError, match=r"the log .*log.jsonl is a link that leaves its folder"):
        LikeLog(pictures, folder / "log.jsonl", "ann")
    os.mkfifo(folder / "pipe.jsonl")
    (folder / "loop.jsonl").symlink_to("loop.jsonl")
    for name, sentence in (("pipe", "is no log of likes: expected a file"), ("loop", "is a link that leaves")):
        with pytest.raises(ValueError, match=rf"{name}.jsonl {sentence}"):
            LikeLog(pictures, folder / f"{name}.jsonl", "ann")
    os.mkfifo(folder / "pipe.png")
    with pytest.raises(FileNotFoundError, match=r"pipe.png does not exist"):
        LikeLog([Picture(folder / "pipe.png", "x")], folder / "likes.jsonl", "ann")
    assert secret.read_text() == "my password"


def test_prompts_beside_images_are_utf_8_and_droppings_are_no_pictures(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("\ufeffa star\n")
    (tmp_path / "._a.png").write_bytes(b"x")
    assert [(picture.image.name, picture.prompt) for picture in pictures_in(tmp_path)] == [("a.png", "a star")]
    (tmp_path / "a.txt").write_bytes(b"Gr\xfcn")
    with pytest.raises(ValueError, match=r"a.txt cannot be read as UTF-8 text: line 1 holds the byte 0xfc; save"):
        pictures_in(tmp_path)


WRITER = """
import sys
from pathlib import Path
from dkto.widgets.likelog import append_event
number = 0
while True:
    append_event(Path(sys.argv[1]), sys.argv[2], event="skip", image="a", sha256="b", prompt="c", number=number)
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
    assert "2 images judged more than once, 1 of them liked and disliked" in str(merged)
    read = read_feedback(write_feedback(merged.table, tmp_path / "table.csv"))
    assert read.is_desirable.tolist() == merged.table.is_desirable.tolist() and read.prompts[0] == ATTACK


def test_nothing_judged_is_no_table(pictures, tmp_path):
    with pytest.raises(ValueError, match="nothing was liked or disliked yet"):
        LikeLog(pictures, tmp_path / "likes.jsonl", "ann").feedback()


def test_wrong_pictures_and_judgements_are_refused(pictures, tmp_path):
    with pytest.raises(ValueError, match="at least one image"):
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
    with pytest.raises(ValueError, match="image must be 0 to 4, got 9"):
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
    with pytest.raises(ValueError, match="holds no image"):
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
    assert widget.message == "not kept: image must be 0 to 4, got 99"
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


def test_the_strip_the_mirror_and_what_is_missing_follow_the_judgements(tmp_path):
    """Dark grounds are liked: the mirror says so, from pixels alone, once there are enough of each."""
    pool = []
    for number in range(20):
        path = tmp_path / f"{number}.png"
        Image.new("RGB", (64, 64), (20, 20, 20) if number % 2 else (240, 240, 240)).save(path)
        pool.append(Picture(path, f"a toy of a {'star' if number % 3 else 'ring'}"))
    widget = Likes(pool, tmp_path / "likes.jsonl")
    assert widget.missing == "8 more likes and 8 more dislikes" and widget.mirror == []
    for number in range(16):
        widget.judge(number, "like" if number % 2 else "dislike")
    assert widget.missing == ""
    assert [[one["index"] for one in widget.strip[kind]] for kind in ("like", "dislike")] == [
        list(range(1, 16, 2)),
        list(range(0, 16, 2)),
    ]
    assert widget.mirror == [
        "background black, seen: 8 of 8 liked, 0 of 8 disliked",
        "background white, seen: 0 of 8 liked, 8 of 8 disliked",
    ]
    widget.undo()
    assert widget.missing == "1 more like" and len(widget.strip["like"]) == 7


def test_large_images_are_sent_as_small_copies(tmp_path):
    """A key sends six images ahead and a strip: of an image of 1,024 pixels some kilobytes each, and no megabytes."""
    noise = np.random.default_rng(0).integers(0, 256, (1024, 1024, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    widget = Likes([Picture(tmp_path / "a.png", "a cat")], tmp_path / "likes.jsonl")
    assert Image.open(BytesIO(widget.shown[0]["image"])).size == (640, 640)
    widget.judge(0, "like")
    sent = widget.strip["like"][0]["image"]
    assert Image.open(BytesIO(sent)).size == (96, 96) and len(sent) < 20_000 < noise.size


def test_bytes_of_a_picture_hold_nothing_but_pixels(tmp_path):
    from PIL.PngImagePlugin import PngInfo

    note = PngInfo()
    note.add_text("method", "kto")
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png", pnginfo=note)
    assert b"kto" in (tmp_path / "a.png").read_bytes()
    assert b"kto" not in png_bytes(Image.open(tmp_path / "a.png"))
