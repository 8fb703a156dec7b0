"""Synthetic shards in the schema of Pick-a-Pic v2; a real local server stands where the hub would."""

import io
import json
import os
import subprocess
import sys
import threading
import zlib
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dkto.common.processes import sole_writer
from dkto.data.feedback import read_feedback
from dkto.data.images import load_image
from dkto.data.pairs import convert_pairs


def picture(seed, size=16, quality=90, format="JPEG"):
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format=format, quality=quality)
    return buffer.getvalue()


def pair(first, second, label, prompt="a star", **changes):
    row = {
        "jpg_0": picture(zlib.crc32(first.encode())),
        "jpg_1": picture(zlib.crc32(second.encode())),
        "label_0": float(label),
        "label_1": 1 - float(label),
        "caption": prompt,
        "image_0_uid": first,
        "image_1_uid": second,
        "has_label": True,
        "model_0": "not read",
    }
    return row | changes


def write_shard(path, rows, group=1000):
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=group)
    return path


@pytest.fixture
def shards(tmp_path):
    folder = tmp_path / "shards"
    folder.mkdir()
    write_shard(folder / "train-0.parquet", [pair("a", "b", 1), pair("b", "c", 1), pair("a", "d", 0.5)])
    write_shard(folder / "train-1.parquet", [pair("e", "c", 1, "a cross"), pair("a", "e", 0), pair("f", "g", 1)])
    return folder


def names(table):
    return {path.stem: bool(like) for path, like in zip(table.images, table.is_desirable, strict=True)}


def test_pairs_become_likes_with_each_image_once(shards, tmp_path, capsys):
    path = convert_pairs(shards, tmp_path / "out")
    table = read_feedback(path)
    assert names(table) == {"a": True, "b": True, "c": False, "e": True, "f": True, "g": False}
    assert load_image(table.images[0]).size == (16, 16)
    chosen = [(table.images[i].stem, table.images[j].stem) for i, j in table.pairs]
    assert chosen == [("a", "b"), ("b", "c"), ("e", "c"), ("e", "a"), ("f", "g")]
    counts = json.loads(path.with_suffix(".json").read_text())
    assert (counts["comparisons"], counts["ties"], counts["duplicates_by_name"]) == (6, 1, 5)
    assert counts["images_left_out"] == 1, "d has only a tie"
    assert (counts["desirable"], counts["undesirable"]) == (4, 2)
    assert (counts["desirable/at_least_once"], counts["desirable/always"]) == (4, 2)
    assert counts["the paper's counts for all of Pick-a-Pic v2"] == {"desirable": 237530, "undesirable": 690538}
    files = [p for p in (tmp_path / "out" / "images").rglob("*") if p.is_file()]
    assert len(files) == 7 and all(p.suffix == ".jpg" for p in files)


def test_another_rule_reads_no_image_again_and_keeps_the_first_table(shards, tmp_path):
    first = convert_pairs(shards, tmp_path / "out")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*.*") if p.parent.name != "out"}
    second = convert_pairs(shards, tmp_path / "out", partition="always", ties="liked")
    assert {p: p.stat().st_mtime_ns for p in before} == before and first.exists() and second != first
    assert names(read_feedback(second)) == {
        "a": False, "b": False, "c": False, "d": True, "e": True, "f": True, "g": False
    }  # fmt: skip


def test_a_shard_that_changed_is_not_taken_for_the_one_that_was_unpacked(shards, tmp_path):
    convert_pairs(shards, tmp_path / "out")
    first = sorted(Path(shards).glob("*.parquet"))[0]
    write_shard(first, [pair("other", "pictures", 1)])
    with pytest.raises(ValueError, match=r"was unpacked into .* before it changed: choose another output_dir"):
        convert_pairs(shards, tmp_path / "out")


def test_a_shard_without_rows_adds_nothing(shards, tmp_path):
    expected = names(read_feedback(convert_pairs(shards, tmp_path / "one")))
    empty = pa.Table.from_pylist([pair("a", "b", 1)]).slice(0, 0)
    pq.write_table(empty, Path(shards) / "z-empty.parquet")
    assert names(read_feedback(convert_pairs(shards, tmp_path / "two"))) == expected


@pytest.mark.process
def test_a_call_after_a_kill_goes_on_with_the_shards_that_are_missing(shards, tmp_path):
    expected = read_feedback(convert_pairs(shards, tmp_path / "whole")).to_frame()["prompt"].tolist()
    code = (
        "import os, signal, sys, dkto.data.pairs as pairs\n"
        "write, left = pairs._write_image, [8]\n"
        "def dying(*arguments):\n"
        "    left[0] -= 1\n"
        "    if not left[0]: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return write(*arguments)\n"
        "pairs._write_image = dying\n"
        "pairs.convert_pairs(sys.argv[1], sys.argv[2])\n"
    )
    out = tmp_path / "cut"
    killed = subprocess.run([sys.executable, "-c", code, str(shards), str(out)], check=False, capture_output=True)
    assert killed.returncode == -9
    (done,) = (out / "votes").glob("*.parquet")
    stamp = done.stat().st_mtime_ns
    path = convert_pairs(shards, out)
    assert done.stat().st_mtime_ns == stamp
    assert read_feedback(path).to_frame()["prompt"].tolist() == expected
    assert not list(out.rglob("*.part"))


def test_names_cannot_leave_the_folder(tmp_path):
    uids = ["../../evil", "/etc/evil", "a/b", "..", "ok-1", "nul\0", "x" * 300]
    rows = [pair(uid, f"other{i}", 1) for i, uid in enumerate(uids)]
    write_shard(tmp_path / "s.parquet", rows)
    table = read_feedback(convert_pairs(tmp_path / "s.parquet", tmp_path / "deep" / "out"))
    assert len(table) == 14 and table.is_desirable.sum() == 7
    files = list(tmp_path.rglob("*.jpg"))
    assert len(files) == 14 and all(p.is_relative_to(tmp_path / "deep" / "out" / "images") for p in files)


def test_rows_that_cannot_be_used_are_set_aside_with_their_reason(tmp_path, monkeypatch):
    monkeypatch.setattr("dkto.data.images.MAX_PIXELS", 400)
    rows = [
        pair("a", "b", 1),
        pair("a", "c", 1, jpg_1=b"no picture"),
        pair("a", "d", 1, jpg_1=None),
        pair("a", "e", 1, jpg_1=picture(1, size=32)),
        pair("a", "f", 1, has_label=False),
        pair("a", "g", 1, jpg_1=picture(2, format="GIF")),
        pair("a", "h", 1, image_1_uid=None),
    ]
    write_shard(tmp_path / "s.parquet", rows)
    with pytest.warns(UserWarning, match="6 of 7 rows are set aside, most of them as: image 'c' cannot be read"):
        path = convert_pairs(tmp_path / "s.parquet", tmp_path / "out")
    assert names(read_feedback(path)) == {"a": True, "b": False}
    skipped = [json.loads(line) for line in (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()]
    assert [line["row"] for line in skipped] == [2, 3, 4, 5, 6, 7] and skipped[0]["shard"] == "s.parquet"
    reasons = (
        "'c' cannot be read: it is no JPEG, PNG, WEBP",
        "must be bytes, got None",
        "32 x 32 pixels, more than 400",
        "no label",
        "'g' cannot be read: it is no",
        "uid",
    )
    for line, words in zip(skipped, reasons, strict=True):
        assert words in line["reason"]
    counts = json.loads(path.with_suffix(".json").read_text())
    assert counts["rows_without_label"] == 1 and counts["rows_set_aside"] == 5


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"label_1": 0.7}, r"label_0 and label_1 must be 1 and 0, 0 and 1, or 0\.5 and 0\.5, got \(1\.0, 0\.7\)"),
        ({"label_0": None, "label_1": None}, r"label_0 and label_1 must be .*, got \(None, None\)"),
        ({"caption": None}, "caption must be text, got None"),
        ({"caption": "  "}, "caption must be text, got b?'  '"),
    ],
)
def test_a_bad_row_is_set_aside_and_named_when_strict(tmp_path, change, sentence):
    write_shard(tmp_path / "s.parquet", [pair("c", "d", 1), pair("a", "b", 1, **change)])
    with pytest.warns(UserWarning, match=f"1 of 2 rows are set aside, most of them as: {sentence}; see .*skipped"):
        table = read_feedback(convert_pairs(tmp_path / "s.parquet", tmp_path / "out"))
    assert names(table) == {"c": True, "d": False}
    for folder in ("out", "strict"):
        with pytest.raises(ValueError, match=rf"s\.parquet, row 2: {sentence}"):
            convert_pairs(tmp_path / "s.parquet", tmp_path / folder, strict=True)


def test_where_no_row_can_be_used_the_commonest_reason_is_said(tmp_path):
    rows = [pair(f"a{i}", f"b{i}", 1, jpg_1="text" if i else None) for i in range(4)]
    for row in rows:
        row["jpg_1"] = None if row["jpg_1"] is None else row["jpg_1"].encode()
    write_shard(tmp_path / "s.parquet", rows)
    text = "no image got a like or a dislike; 4 of 4 rows were set aside, most of them as: image 'b1' cannot be read"
    with pytest.raises(ValueError, match=text):
        convert_pairs(tmp_path / "s.parquet", tmp_path / "out")


def test_a_jpeg_of_two_images_is_unpacked(tmp_path):
    """As telephones write them; Pillow calls the format MPO."""
    file = io.BytesIO()
    first, second = (Image.open(io.BytesIO(picture(seed))) for seed in (1, 2))
    first.save(file, "MPO", save_all=True, append_images=[second])
    write_shard(tmp_path / "s.parquet", [pair("a", "b", 1, jpg_0=file.getvalue())])
    table = read_feedback(convert_pairs(tmp_path / "s.parquet", tmp_path / "out"))
    assert names(table) == {"a": True, "b": False} and load_image(table.images[0]).size == (16, 16)


def test_images_as_bytes_and_path_are_read(tmp_path):
    """As `datasets` writes them; a path is not followed."""
    rows = [pair("a", "b", 1), pair("c", "d", 1)]
    for row in rows:
        for name in ("jpg_0", "jpg_1"):
            row[name] = {"bytes": row[name], "path": "/etc/hostname"}
    rows[1]["jpg_0"]["bytes"] = None
    write_shard(tmp_path / "s.parquet", rows)
    with pytest.warns(UserWarning, match="image 'c' must be bytes, got None"):
        assert names(read_feedback(convert_pairs(tmp_path / "s.parquet", tmp_path / "out"))) == {"a": True, "b": False}


def test_a_caption_that_is_not_utf_8_sets_its_row_aside(tmp_path):
    table = pa.Table.from_pylist([pair("a", "b", 1), pair("c", "d", 1)])
    captions = pa.array([b"gr\xfcn", "grün".encode()]).view(pa.string())
    table = table.set_column(table.schema.names.index("caption"), "caption", captions)
    pq.write_table(table, tmp_path / "s.parquet")
    with pytest.warns(UserWarning, match=r"caption must be text, got b'gr\\xfcn'"):
        found = read_feedback(convert_pairs(tmp_path / "s.parquet", tmp_path / "out"))
    assert names(found) == {"c": True, "d": False} and set(found.prompts) == {"grün"}


def test_a_damaged_shard_is_named(tmp_path):
    path = write_shard(tmp_path / "s.parquet", [pair("a", "b", 1)] * 40)
    data = bytearray(path.read_bytes())
    data[20 : len(data) // 2] = bytes(len(data) // 2 - 20)
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"s\.parquet cannot be read as Parquet: "):
        convert_pairs(path, tmp_path / "out")


def test_one_uid_of_two_images_is_no_image_of_both(tmp_path):
    write_shard(tmp_path / "s.parquet", [pair("a", "b", 1), pair("a", "c", 1, jpg_0=picture(99))])
    with pytest.warns(UserWarning, match="image 'a' is another one than that of the same uid before"):
        assert names(read_feedback(convert_pairs(tmp_path / "s.parquet", tmp_path / "out"))) == {"a": True, "b": False}


@pytest.mark.parametrize("damage", ["empty", "cut", "no stamp"])
def test_damaged_votes_and_images_are_made_again(shards, tmp_path, damage):
    """A kill or a power cut, after which the shard changed: its former likes are not kept."""
    expected = names(read_feedback(convert_pairs(shards, tmp_path / "out")))
    votes = sorted((tmp_path / "out" / "votes").glob("*.parquet"))[0]
    data = {"empty": b"", "cut": votes.read_bytes()[:-9]}.get(damage)
    (tmp_path / "out" / "images" / "a" / "a.jpg").write_bytes(b"")
    if data is None:
        pd.read_parquet(votes).to_parquet(votes)
    else:
        votes.write_bytes(data)
    assert names(read_feedback(convert_pairs(shards, tmp_path / "out"))) == expected
    assert load_image(tmp_path / "out" / "images" / "a" / "a.jpg").size == (16, 16)
    write_shard(shards / "train-0.parquet", [pair("b", "a", 1)])
    with pytest.raises(ValueError, match="before it changed"):
        convert_pairs(shards, tmp_path / "out")


def test_a_shard_that_was_edited_in_place_is_noticed(shards, tmp_path):
    convert_pairs(shards, tmp_path / "out")
    path = shards / "train-0.parquet"
    data, before = bytearray(path.read_bytes()), path.stat()
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(ValueError, match="before it changed"):
        convert_pairs(shards, tmp_path / "out")


def test_a_folder_that_another_call_fills_is_refused(shards, tmp_path):
    with sole_writer(tmp_path / "out"), pytest.raises(BlockingIOError, match=r"is being written by process \d+"):
        convert_pairs(shards, tmp_path / "out")


def test_a_column_that_is_there_twice_is_refused(tmp_path):
    """One of the two would be taken in silence."""
    table = pa.Table.from_pylist([pair("a", "b", 1)])
    pq.write_table(table.append_column("jpg_1", table["jpg_0"]), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet names the column 'jpg_1' more than once"):
        convert_pairs(tmp_path / "a.parquet", tmp_path / "out")


def test_a_pipe_is_no_shard(tmp_path):
    os.mkfifo(tmp_path / "a.parquet")
    for source in (tmp_path, tmp_path / "a.parquet"):
        with pytest.raises(ValueError, match=r"a\.parquet.* must be a (parquet )?file, but it is none"):
            convert_pairs(source, tmp_path / "out")


def test_bad_sources_are_named(shards, tmp_path):
    row = pair("a", "b", 1)
    del row["jpg_1"]
    write_shard(tmp_path / "s.parquet", [row])
    with pytest.raises(ValueError, match=r"missing: jpg_1; found: jpg_0, label_0"):
        convert_pairs(tmp_path / "s.parquet", tmp_path / "o1")
    (tmp_path / "t.parquet").write_text("no parquet")
    with pytest.raises(ValueError, match=r"t\.parquet cannot be read as Parquet"):
        convert_pairs(tmp_path / "t.parquet", tmp_path / "o2")
    with pytest.raises(FileNotFoundError, match=r"folder .* holds no parquet file that matches 'test-\*'"):
        convert_pairs(shards, tmp_path / "o3", files="test-*")
    with pytest.raises(FileNotFoundError, match=r"holds no parquet file"):
        convert_pairs(tmp_path / "none-*.parquet", tmp_path / "o3")
    with pytest.raises(FileNotFoundError, match=r"'some/one' are neither a parquet file, .* that can be reached"):
        convert_pairs("some/one", tmp_path / "o3")
    with pytest.raises(ValueError, match="ties must be one of"):
        convert_pairs(shards, tmp_path / "o3", ties="toss")
    convert_pairs(shards, tmp_path / "o4", files="train-0*")
    with pytest.raises(ValueError, match=r"holds pairs of another run \(files differ\)"):
        convert_pairs(shards, tmp_path / "o4")
    assert names(read_feedback(convert_pairs(str(shards / "train-1*"), tmp_path / "o5"))).keys() == set("aecfg")


@pytest.mark.process
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from /proc")
def test_memory_does_not_grow_with_the_shards(tmp_path):
    """Six shards of 20 MB take no more than one does; measured in processes of their own."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "shards"
    folder.mkdir()
    header = picture(0)
    for number in range(6):
        rows = []
        for i in range(100):
            body = header + rng.bytes(100_000)  # what follows the header is not looked at
            rows.append(pair(f"{number}x{2 * i}", f"{number}x{2 * i + 1}", i % 2, jpg_0=body, jpg_1=body))
        write_shard(folder / f"{number}.parquet", rows, group=25)
    code = (
        "import re, sys; from pathlib import Path; from dkto.data.pairs import convert_pairs\n"
        "peak = lambda: int(re.search(r'VmHWM:\\s+(\\d+)', Path('/proc/self/status').read_text())[1])\n"
        "before = peak(); convert_pairs(sys.argv[1], sys.argv[2], files=sys.argv[3]); print(peak() - before)"
    )
    grown = {}
    for files in ("0*", "*"):
        call = [sys.executable, "-c", code, str(folder), str(tmp_path / f"out{len(files)}"), files]
        grown[files] = int(subprocess.run(call, capture_output=True, text=True, check=True).stdout) / 1024
    assert grown["*"] < grown["0*"] + 20, grown  # MB, of 120 MB in all


class FakeHub(BaseHTTPRequestHandler):
    """The two questions that are asked of the hub: which files, and one file (with its length and hash)."""

    asked: list[str] = []  # noqa: RUF012

    def __init__(self, *arguments, folder: Path, **options):
        self.folder = folder
        super().__init__(*arguments, **options)

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        self.asked.append(self.path)
        if self.path.startswith("/api/datasets/some/pairs/tree/main"):
            found = [
                {"type": "file", "path": f"data/{p.name}", "size": p.stat().st_size, "oid": "0" * 40}
                for p in sorted(self.folder.glob("*"))
            ]
            data, headers = json.dumps(found).encode(), {"Content-Type": "application/json"}
        elif self.path.startswith("/datasets/some/pairs/resolve/main/data/"):
            data = (self.folder / self.path.rsplit("/", 1)[1]).read_bytes()
            headers = {"ETag": f'"{len(data)}"', "X-Repo-Commit": "1" * 40}
        else:
            self.send_error(404)
            return
        self.send_response(200)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, *arguments):
        pass


@pytest.mark.process
def test_a_hub_id_is_fetched_shard_by_shard_and_leaves_no_shard_behind(shards, tmp_path):
    (shards / "README.md").write_text("not a shard")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(FakeHub, folder=shards))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        code = "import sys; from dkto.data.pairs import convert_pairs; print(convert_pairs('some/pairs', sys.argv[1]))"
        hub = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_OFFLINE": "0"}
        environment = os.environ | hub | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_TELEMETRY": "1"}
        call = [sys.executable, "-c", code, str(tmp_path / "out")]
        done = subprocess.run(call, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
    finally:
        server.shutdown()
        server.server_close()
    assert names(read_feedback(done.stdout.strip())) == names(read_feedback(convert_pairs(shards, tmp_path / "local")))
    assert {path.parent.name for path in (tmp_path / "out").rglob("train-*.parquet")} == {"votes"}
    assert not any("README" in path for path in FakeHub.asked)
