"""A slice of `make fuzz`, round trips of what the program writes, and the judge of outcomes itself."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dkto.common.files import append_record, read_records, write_records
from dkto.data.feedback import make_feedback, read_feedback, write_feedback
from dkto.data.prompts import load_prompts
from dkto.data.tables import read_text
from dkto.widgets.likelog import LikeLog, Picture
from fuzz.outcome import refusal
from fuzz.report import SHARES, broken

ROOT = Path(__file__).parents[2]
EASY = settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
TEXT = st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1).filter(lambda text: text == text.strip())


@pytest.mark.process
def test_damaged_inputs_are_refused_in_a_sentence_or_taken_as_they_are(tmp_path):
    command = [
        sys.executable,
        "-m",
        "fuzz",
        "72",
        "--seed",
        "0",
        "1",
        "--processes",
        "1",
        "--keep",
        str(tmp_path / "kept"),
    ]
    done = subprocess.run(command, cwd=ROOT / "tests", capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_reader_is_in_the_table():
    from fuzz.readers import READERS

    assert READERS.keys() == SHARES.keys()


def failure_of(act):
    with pytest.raises(Exception) as caught:
        act()
    return refusal(caught.value, ["likes.csv"]).kind


def test_the_judge_tells_a_sentence_from_an_error(tmp_path):
    """A harness that calls everything clear would pass every test."""
    path = tmp_path / "likes.csv"
    path.write_text("image,prompt,liked\na.png,a star,maybe\n")
    assert failure_of(lambda: read_feedback(path)) == "clear"
    assert failure_of(lambda: json.loads("{")) == "unclear sentence"
    assert failure_of(lambda: {}["image"]) == "internal error"
    assert failure_of(lambda: [][0]) == "uncaught"
    assert broken({"a:0:1": ("clear", ""), "a:0:2": ("wrong", "")}) and not broken({"a:0:1": ("clear", "")})
    assert broken({f"a:0:{n}": ("clear" if n else "unclear sentence", "") for n in range(50)})


@EASY
@given(TEXT, st.lists(st.tuples(st.booleans(), st.integers(-1, 2**63 - 1)), min_size=1, max_size=5))
@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_likes_come_back_as_they_were_written(tmp_path, ending, prompt, rows):
    images = [tmp_path / f"{number}.png" for number in range(len(rows))]
    for image in images:
        image.touch()
    liked, pair_ids = zip(*rows, strict=True)
    table = make_feedback(images, [prompt] * len(rows), liked, pair_ids)
    found = read_feedback(write_feedback(table, tmp_path / f"likes.{ending}"))
    assert (found.images, found.prompts) == (table.images, table.prompts)
    assert found.is_desirable.tolist() == list(liked) and found.pair_ids.tolist() == list(pair_ids)


@EASY
@given(st.lists(TEXT, min_size=1, max_size=5, unique=True))
@pytest.mark.parametrize("ending", ["json", "jsonl"])
def test_prompts_come_back_as_they_were_written(tmp_path, ending, texts):
    path = tmp_path / f"p.{ending}"
    lines = [json.dumps({"prompt": text}) for text in texts]
    path.write_text("\n".join(lines) if ending == "jsonl" else json.dumps(texts))
    assert list(load_prompts(path).prompts) == texts


@EASY
@given(st.lists(st.dictionaries(st.text(), st.none() | st.integers() | st.floats(allow_nan=False) | st.text())))
def test_records_come_back_as_they_were_written(tmp_path, records):
    path = tmp_path / "records.jsonl"
    write_records(path, records)
    assert read_records(path) == records
    append_record(path, {"last": "\u2028\x85"})  # lines end at \n alone
    assert read_records(path) == [*records, {"last": "\u2028\x85"}]


@EASY
@given(st.lists(st.sampled_from(["like", "dislike", "skip", "undo", "again"]), max_size=12), st.data())
def test_a_likes_log_opens_as_it_was_left(tmp_path, acts, data):
    path = tmp_path / "likes.jsonl"
    path.unlink(missing_ok=True)
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(bytes([number]))
    pictures = [Picture(tmp_path / f"{number}.png", "a star") for number in range(3)]
    log = LikeLog(pictures, path, "ann")
    for act in acts:
        if act == "undo":
            log.undo()
        elif act == "again":
            log = LikeLog(pictures, path, "ann")
        else:
            log.judge(data.draw(st.integers(0, 2)), act)
    again = LikeLog(pictures, path, "ann")
    assert again.judgements == log.judgements and again.undo() == log.undo()
    assert read_text(path) if log.judgements else True
