import json
import os
import subprocess
import sys
import threading
from contextlib import suppress

import pytest
import torch

from dkto.common import files
from dkto.common.files import claim, keep_records, read_json, read_records, write_json
from dkto.common.machine import accelerators, hardware, peak_memory_mb, versions
from dkto.common.tensors import write_tensors


def test_json_is_whole_or_absent(tmp_path):
    path = tmp_path / "run.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="Out of range float"):
        write_json(path, {"a": float("nan")})
    assert json.loads(path.read_text()) == {"a": 1}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('{"a": 1', "Expecting ',' delimiter"),
        ("\xff", "'utf-8' codec can't decode"),
        ("[1]", r"expected an object, got \[1\]"),
        ('{"b": 1}', "a is missing"),
        ('{"a": ["\\ud83d\\ude00", {"\\udE00": 1}]}', r"'\\ude00' in it is half a sign: remove it"),
    ],
)
def test_what_is_wrong_with_a_json_file_is_said_with_its_name(text, problem, tmp_path):
    path = tmp_path / "run.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=rf"run\.json is no record of a run: {problem}"):
        read_json(path, "record of a run", ["a"])
    path.write_text('{"a": "\\ud83d\\ude00"}')
    assert read_json(path, "record of a run", ["a"]) == {"a": "\U0001f600"}
    with pytest.raises(FileNotFoundError, match=r"no\.json"):
        read_json(tmp_path / "no.json", "record of a run")


def test_a_line_cut_by_a_kill_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"global_step": 1}\n{"global_step": 2}\n{"global_st')
    assert [r["global_step"] for r in read_records(path)] == [1, 2]
    keep_records(path, 1)
    assert path.read_text() == '{"global_step": 1}\n'
    keep_records(tmp_path / "none.jsonl", 1)


def test_a_folder_is_claimed_once(tmp_path):
    claim(tmp_path / "m.json", {"seed": 0, "prompts": ["a"]}, "images")
    claim(tmp_path / "m.json", {"seed": 0, "prompts": ["a"]}, "images")
    with pytest.raises(ValueError, match=r"holds images of another run \(seed, prompts differ\)"):
        claim(tmp_path / "m.json", {"seed": 1, "prompts": ["b"]}, "images")


def test_of_two_claims_at_the_same_instant_one_holds(tmp_path):
    """Eight threads at a gate, each for something else: one folder is claimed once, and no part is left."""
    for turn in range(20):
        path, gate, won = tmp_path / f"{turn}.json", threading.Barrier(8), []

        def want(number, path=path, gate=gate, won=won):
            gate.wait()
            with suppress(ValueError):
                claim(path, {"seed": number}, "images")
                won.append(number)

        threads = [threading.Thread(target=want, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert won == [read_json(path, "claim")["seed"]]
    assert not list(tmp_path.glob("*.part"))


def test_without_hard_links_a_claim_is_exclusive_too(tmp_path, monkeypatch):
    monkeypatch.setattr("os.link", lambda *_: (_ for _ in ()).throw(PermissionError(1, "Operation not permitted")))
    claim(tmp_path / "m.json", {"seed": 0}, "images")
    with pytest.raises(ValueError, match="another run"):
        claim(tmp_path / "m.json", {"seed": 1}, "images")
    assert [path.name for path in tmp_path.iterdir()] == ["m.json"]


def test_only_the_last_record_may_be_cut(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"global_step": 1}\n{"glo\n{"global_step": 3}\n')
    for read in (read_records, lambda path: keep_records(path, 3)):
        with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2 is no record .*got '{\"glo': remove this line"):
            read(path)
    path.write_text('{"global_step": 1}\n[]\n')
    with pytest.raises(ValueError, match=r"line 2 is no record \(expected an object\)"):
        read_records(path)
    for whole in ('{"loss": 1, "loss": 2}', "[]"):  # not cut: a kill leaves no JSON
        path.write_text('{"global_step": 1}\n' + whole)
        with pytest.raises(ValueError, match=r"line 2 is no record"):
            read_records(path)
    path.write_text('{"global_step": 1}\n{"global_step": 2}\n{"glo\n')
    assert keep_records(path, 1) == [1]  # what is damaged is written again
    assert path.read_text() == '{"global_step": 1}\n'
    for step in ("1", "0", '"2"', "true", "null", "2.5"):
        path.write_text(f'{{"global_step": 1}}\n{{"global_step": {step}}}\n')
        with pytest.raises(
            ValueError, match=r"line 2: global_step must be a whole number above 1, got .*: remove this"
        ):
            keep_records(path, 3)
    path.write_text('{"global_step": 1}\n' * 3000 + '{"global_step": 7}\n{"glo')
    assert files.last_record(path) == {"global_step": 7} and files.last_record(tmp_path / "none") is None


@pytest.mark.parametrize(
    ("number", "remedy"),
    [(28, "make room and call again"), (5, "the disk or its"), (13, "choose"), (21, "remove what")],
)
def test_what_the_disk_refuses_is_a_sentence_with_file_and_remedy(number, remedy, tmp_path, monkeypatch):
    def refused(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("os.fsync", refused)
    for write in (write_json, files.append_record):
        with pytest.raises(OSError, match=rf"^\S+a\.json could not be written: {os.strerror(number)}; {remedy}"):
            write(tmp_path / "a.json", {"a": 1})


def test_versions_and_hardware_are_named():
    assert {"python", "dkto", "torch", "diffusers"} <= set(versions())
    assert hardware()["cores"] >= 1


def test_cards_are_named_without_loading_torch(tmp_path, monkeypatch):
    command = tmp_path / "nvidia-smi"
    command.write_text("#!/bin/sh\necho NVIDIA A100\necho NVIDIA A100\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    assert accelerators() == ["NVIDIA A100", "NVIDIA A100"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    found = hardware()
    assert found["accelerators"] == "NVIDIA A100, NVIDIA A100" and found["visible_accelerators"] == "1"
    command.write_text("#!/bin/sh\nexit 9\n")
    assert accelerators() == []


def test_peak_memory_is_of_this_program_alone(tmp_path):
    """The parent holds 300 MB when it starts a program that holds little."""
    code = "from dkto.common.machine import peak_memory_mb; print(peak_memory_mb())"
    held = b"x" * (300 * 2**20)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 5 < float(done.stdout) < 250 < peak_memory_mb() and held


def test_what_a_dead_process_left_is_removed_and_modes_follow_the_umask(tmp_path):
    code = "import os, sys; from pathlib import Path; from dkto.common.files import write_atomically as w\n"
    code += f"w(Path({str(tmp_path)!r}) / 'a.txt', lambda part: (part.write_text('half'), os.kill(os.getpid(), 9)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == -9
    (left,) = tmp_path.iterdir()
    files._CLEARED.discard(tmp_path)
    before = os.umask(0o027)
    try:
        files.write_json(tmp_path / "b.json", {})
        write_tensors(tmp_path / "c.safetensors", {"x": torch.ones(2)})
        files.write_atomically(tmp_path / "folder", lambda part: (part.mkdir(mode=0o700), (part / "d").write_text("")))
    finally:
        os.umask(before)
    assert not left.exists()
    modes = {path.name: oct(path.stat().st_mode)[-3:] for path in tmp_path.rglob("*")}
    assert modes == {"b.json": "640", "c.safetensors": "640", "folder": "750", "d": "640"}


def test_what_is_not_written_to_its_end_leaves_nothing(tmp_path):
    with pytest.raises(OSError, match="no room"):
        files.write_atomically(tmp_path / "a", _fail)
    assert list(tmp_path.iterdir()) == []


def _fail(part):
    part.write_text("half")
    raise OSError("no room")
