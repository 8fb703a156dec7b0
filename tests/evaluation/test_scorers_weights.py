import hashlib
import multiprocessing
import pickle
import re
import shlex

import pytest
import torch
from safetensors.torch import load_file, save_file

from dkto.evaluation.scorers.__main__ import main
from dkto.evaluation.scorers.weights import (
    PUBLISHED_FILES,
    check_sha256,
    convert,
    model_folder,
    read_converted,
    weights_folder,
)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("DKTO_WEIGHTS", str(tmp_path / "weights"))
    return tmp_path / "weights"


@pytest.fixture
def pickled(tmp_path):
    """A pickle as its authors would publish it, and its hash."""
    path = tmp_path / "HPS_v2_compressed.pt"
    torch.save({"state_dict": {"a": torch.arange(3.0)}, "epoch": 1}, path)
    return path, hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_pickle_is_converted_once_and_read_as_safetensors(pickled, folder, capsys):
    path, sha256 = pickled
    assert main(["convert", "hps_v2", str(path), "--sha256", sha256.upper()]) == 0
    assert "converted to" in capsys.readouterr().out
    path.unlink()
    assert read_converted("hps_v2")["a"].tolist() == [0, 1, 2]
    assert sorted(file.name for file in folder.iterdir()) == ["checked", "hps_v2.json", "hps_v2.safetensors"]


def test_a_damaged_file_is_noticed_when_it_is_read(pickled, folder):
    convert("hps_v2", *pickled)
    read_converted("hps_v2")
    save_file({"a": torch.zeros(3)}, folder / "hps_v2.safetensors")
    with pytest.raises(ValueError, match=r"hps_v2\.safetensors is damaged or another file: its sha256 is"):
        read_converted("hps_v2")


def test_weights_without_their_note_are_refused(pickled, folder):
    convert("hps_v2", *pickled)
    (folder / "hps_v2.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"hps_v2\.json, which `convert` writes with its hash, is missing"):
        read_converted("hps_v2")


def hash_again_and_again(path, sha256, stamps):
    for _ in range(100):
        for stamp in stamps.glob("*.json"):
            stamp.unlink(missing_ok=True)
        check_sha256(path, sha256)


def test_several_processes_may_hash_one_file_at_once(tmp_path, folder):
    path = tmp_path / "x"
    path.write_bytes(b"abc")
    context = multiprocessing.get_context("fork")
    arguments = (path, hashlib.sha256(b"abc").hexdigest(), folder / "checked")
    workers = [context.Process(target=hash_again_and_again, args=arguments) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0, 0]


def test_where_no_stamp_can_be_kept_the_file_is_hashed_again(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("DKTO_WEIGHTS", str(tmp_path / "file" / "below"))
    path = tmp_path / "x"
    path.write_bytes(b"abc")
    check_sha256(path, hashlib.sha256(b"abc").hexdigest())
    with pytest.raises(ValueError, match="is damaged or another file"):
        check_sha256(path, "0" * 64)


def test_a_file_is_hashed_once_for_as_long_as_it_does_not_change(tmp_path, monkeypatch):
    path = tmp_path / "x"
    path.write_bytes(b"abc")
    expected = hashlib.sha256(b"abc").hexdigest()
    check_sha256(path, expected)
    monkeypatch.setattr("dkto.evaluation.scorers.weights.file_sha256", lambda path: "0" * 64)
    check_sha256(path, expected)
    path.write_bytes(b"abcd")
    with pytest.raises(ValueError, match=r"its sha256 is 0000.*expected ba78"):
        check_sha256(path, expected)


class Wicked:
    def __reduce__(self):
        return print, ("code ran",)


def test_a_pickle_that_would_run_code_is_refused(tmp_path, capsys):
    path = tmp_path / "x.pt"
    path.write_bytes(pickle.dumps({"a": Wicked()}, protocol=2))
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(ValueError, match="holds something else than weights, or is damaged"):
        convert("image_reward", path, sha256)
    assert "code ran" not in capsys.readouterr().out
    torch.save({"a": "text"}, path)
    with pytest.raises(ValueError, match="holds something else than weights by name"):
        convert("image_reward", path, hashlib.sha256(path.read_bytes()).hexdigest())
    assert not list(weights_folder().glob("*.safetensors"))


def test_wrong_hashes_names_and_files_are_named(pickled, tmp_path, capsys):
    path, sha256 = pickled
    with pytest.raises(ValueError, match=rf"not known here: pass the one that https://.* \(this file has {sha256}\)"):
        convert("hps_v2", path)
    with pytest.raises(ValueError, match=r"is damaged or another file: its sha256 is .*expected 21dd590f"):
        convert("laion_aesthetics", path)
    with pytest.raises(ValueError, match=r"linearMSE\.pth is known to be 21dd590f\w+, got --sha256 "):
        convert("laion_aesthetics", path, sha256)
    with pytest.raises(KeyError, match="no published file 'clip'; known: hps_v2, hps_v2_1, clip_h14, image_r"):
        convert("clip", path)
    with pytest.raises(FileNotFoundError, match=r"does not exist: download HPS_v2_compressed\.pt from https"):
        convert("hps_v2", tmp_path / "nothing.pt")
    assert main(["convert", "hps_v2", str(path)]) == 2
    assert capsys.readouterr().err.startswith(
        "dkto.evaluation.scorers: the sha256 of HPS_v2_compressed.pt is not known here"
    )
    with pytest.raises(ValueError, match=r"HPS_v2_compressed\.pt is a pickle, which is not loaded: run `python -m"):
        read_converted("hps_v2", str(path))


def test_what_the_hub_stores_is_checked_against_its_own_hash(tmp_path, monkeypatch):
    snapshot, blobs = tmp_path / "snapshot", tmp_path / "blobs"
    snapshot.mkdir()
    blobs.mkdir()
    save_file({"a": torch.zeros(2)}, blobs / "part")
    sha256 = hashlib.sha256((blobs / "part").read_bytes()).hexdigest()
    (blobs / "part").rename(blobs / sha256)
    (snapshot / "model.safetensors").symlink_to(blobs / sha256)
    monkeypatch.setattr(
        "dkto.evaluation.scorers.weights.snapshot_download", lambda source, allow_patterns: str(snapshot)
    )
    assert load_file(model_folder("owner/name", "x", ("*",)) / "model.safetensors")["a"].shape == (2,)
    save_file({"a": torch.ones(2)}, blobs / "other")
    (blobs / "other").replace(blobs / sha256)
    with pytest.raises(ValueError, match="is damaged or another file"):
        model_folder("owner/name", "x", ("*",))


def test_a_folder_filled_by_the_hubs_command_is_checked_too(tmp_path):
    save_file({"a": torch.zeros(2)}, tmp_path / "model.safetensors")
    note = tmp_path / ".cache" / "huggingface" / "download" / "model.safetensors.metadata"
    note.parent.mkdir(parents=True)
    sha256 = hashlib.sha256((tmp_path / "model.safetensors").read_bytes()).hexdigest()
    note.write_text(f"{'c' * 40}\n{sha256}\n1700000000.0\n")
    assert model_folder(str(tmp_path), "x", ("model*.safetensors",)) == tmp_path
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=rf"is damaged or another file: its sha256 is .*expected {sha256}"):
        model_folder(str(tmp_path), "x", ("model*.safetensors",))


def test_a_folder_that_lacks_a_file_is_named_with_what_fetches_it(tmp_path, folder):
    place = folder / "owner" / "name"
    place.mkdir(parents=True)
    (place / "config.json").touch()
    needed = ("config.json", "model*.safetensors")
    with pytest.raises(FileNotFoundError) as caught:
        model_folder("owner/name", "pickscore", needed, ("x.index.json",))
    assert str(caught.value) == (
        f"scorer pickscore needs model*.safetensors of the model 'owner/name', {place} has none: run `hf download "
        "owner/name --include 'config.json' --include 'model*.safetensors' --include 'x.index.json' "
        f"--local-dir {place}`"
    )
    with pytest.raises(FileNotFoundError, match=r"has none$"):
        model_folder(str(place), "pickscore", needed)


@pytest.mark.parametrize("name", PUBLISHED_FILES)
def test_the_command_that_is_told_can_be_run(name, tmp_path, capsys):
    """It asks for the hash where the project knows none, and refuses this file where it knows one."""
    with pytest.raises(FileNotFoundError) as caught:
        read_converted(name)
    python, module, package, *arguments = shlex.split(re.search("`(.*)`", str(caught.value)).group(1))
    assert (python, module, package) == ("python", "-m", "dkto.evaluation.scorers")
    published, path, state = PUBLISHED_FILES[name], tmp_path / "download", {"a": torch.arange(3.0)}
    torch.save({"state_dict": state} if name.startswith("hps") else state, path)
    known = {published.file: str(path), "HASH": hashlib.sha256(path.read_bytes()).hexdigest()}
    done = main([known.get(argument, argument) for argument in arguments])
    if published.sha256:
        assert done != 0 and "is damaged or another file" in capsys.readouterr().err
    else:
        assert done == 0 and "converted to" in capsys.readouterr().out


def test_every_published_pickle_says_where_it_is_found():
    assert all(file.url.startswith("https://") and file.size for file in PUBLISHED_FILES.values())
