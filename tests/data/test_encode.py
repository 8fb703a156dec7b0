"""The way to disk and back, with a real tiny pipeline, real processes really killed, and folders of a million rows."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from dkto.common.processes import sole_writer
from dkto.data import encode
from dkto.data.decode import to_pixel_values
from dkto.data.encode import prepare_feedback
from dkto.data.encoded import PreparedFeedback, shard_path
from dkto.data.feedback import make_feedback, write_feedback
from dkto.data.images import decode_image, load_image, open_image
from dkto.models import load_model

needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="children and memory are read in /proc")


def test_pixel_values_are_centred_and_scaled():
    picture = Image.new("RGB", (40, 20), (255, 0, 127))
    values = to_pixel_values(picture, 10)
    assert values.shape == (3, 10, 10)
    torch.testing.assert_close(values.mean((1, 2)), torch.tensor([1.0, -1.0, -0.0039]), atol=1e-3, rtol=0)


def test_latents_are_the_vaes_own(prepared, likes, tiny_pipeline):
    model = load_model(str(tiny_pipeline))
    data = PreparedFeedback(prepared, model)
    mean, std = data.latents(np.array([5, 0]))
    picture = to_pixel_values(load_image(likes.images[5]), 16)[None]
    expected_mean, expected_std = model.encode_images(model.load_vae(), picture)
    torch.testing.assert_close(mean[:1], expected_mean, atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(std[:1], expected_std, atol=2e-3, rtol=2e-3)
    assert data.is_desirable.tolist() == likes.is_desirable.tolist() and len(data) == 12


def test_a_picture_that_was_compared_several_times_is_encoded_once(likes, tiny_pipeline, tmp_path, monkeypatch):
    decoded = []

    def open_(path, name):
        decoded.append(path)
        if Path(path) == likes.images[3]:
            raise ValueError(f"image {path} is broken")
        return open_image(path, name)

    monkeypatch.setattr("dkto.data.decode.open_image", open_)
    twice = make_feedback([*likes.images] * 2, [*likes.prompts] * 2, [*likes.is_desirable, *~likes.is_desirable])
    with pytest.warns(UserWarning, match="2 of 24 images are set aside"):
        folder = prepare_feedback(twice, tmp_path, str(tiny_pipeline))
    assert len(decoded) == len(likes) == 12
    skipped = [json.loads(line) for line in (folder / "skipped.jsonl").read_text().splitlines()]
    assert [line["row"] for line in skipped] == [4, 16]
    data = PreparedFeedback(folder, load_model(str(tiny_pipeline)))
    first, second = data.latents(np.arange(11))[0], data.latents(np.arange(11, 22))[0]
    assert torch.equal(first, second) and len(first.unique(dim=0)) == 11
    assert (data.is_desirable[:11] != data.is_desirable[11:]).all()


def test_prompts_are_encoded_once_with_the_empty_one_first(prepared, likes, tiny_pipeline):
    model = load_model(str(tiny_pipeline))
    stored = load_file(prepared / "prompts-00000.safetensors")["encoder_hidden_states"]
    assert stored.shape == (4, 24, 16)
    expected = model.encode_prompts(*model.load_text(), ["", likes.prompts[2]])["encoder_hidden_states"]
    data = PreparedFeedback(prepared, model)
    torch.testing.assert_close(stored[0].float(), expected[0], atol=2e-3, rtol=2e-3)
    rows = data.conditioning(np.array([2]))["encoder_hidden_states"]
    torch.testing.assert_close(rows[0], expected[1], atol=2e-3, rtol=2e-3)


def test_a_second_call_does_only_what_is_missing(likes, tiny_pipeline, tmp_path, monkeypatch):
    monkeypatch.setattr("dkto.data.encode.SHARD_ROWS", 5)
    folder = prepare_feedback(likes, tmp_path / "p", str(tiny_pipeline))
    shards = sorted(folder.glob("latents-*.safetensors"))
    assert len(shards) == 3
    before = [path.stat().st_mtime_ns for path in shards]
    whole = shards[1].read_bytes()
    shards[1].unlink()
    prepare_feedback(likes, folder, str(tiny_pipeline))
    after = [path.stat().st_mtime_ns for path in shards]
    assert after[0] == before[0] and after[2] == before[2] and after[1] != before[1]
    assert shards[1].read_bytes() == whole
    mean, _ = PreparedFeedback(folder, load_model(str(tiny_pipeline))).latents(np.arange(12))
    assert mean.shape == (12, 4, 8, 8)


def test_other_comparisons_of_the_same_likes_are_other_feedback(likes, tiny_pipeline, tmp_path):
    prepare_feedback(likes, tmp_path, str(tiny_pipeline))
    other = replace(likes, pair_ids=np.arange(len(likes)) // 2)
    with pytest.raises(ValueError, match="holds encoded feedback of another run"):
        prepare_feedback(other, tmp_path, str(tiny_pipeline))


def test_a_thread_of_pixels_is_refused_before_it_is_blown_up():
    with pytest.raises(ValueError, match="image of 1 x 20000 pixels is too long: 512 x 10240000 at 512"):
        to_pixel_values(Image.new("RGB", (1, 20_000)), 512)


@pytest.fixture
def spoilt(likes, tmp_path):
    """Twelve rows of which the second is no picture, the fifth is cut short and the eighth is not there."""
    folder = tmp_path / "spoilt"
    folder.mkdir()
    paths = [shutil.copy(path, folder / path.name) for path in likes.images]
    paths[1].write_bytes(b"not a picture")
    paths[4].write_bytes(paths[4].read_bytes()[:200])
    paths[7].unlink()
    return make_feedback(paths, likes.prompts, likes.is_desirable.tolist(), pair_ids=[i // 2 for i in range(12)])


def test_images_that_cannot_be_read_are_set_aside(spoilt, likes, tiny_pipeline, tmp_path, monkeypatch):
    monkeypatch.setattr("dkto.data.encode.SHARD_ROWS", 5)
    with pytest.warns(UserWarning, match=r"3 of 12 images are set aside, see .*skipped\.jsonl"):
        folder = prepare_feedback(spoilt, tmp_path / "p", str(tiny_pipeline), batch_size=2)
    skipped = [json.loads(line) for line in (folder / "skipped.jsonl").read_text().splitlines()]
    assert [line["row"] for line in skipped] == [2, 5, 8]
    assert skipped[0]["image"] == str(spoilt.images[1]) and "cannot be read" in skipped[0]["reason"]
    assert "does not exist" in skipped[2]["reason"]
    data, kept = PreparedFeedback(folder, load_model(str(tiny_pipeline))), [0, 2, 3, 5, 6, 8, 9, 10, 11]
    assert data.is_desirable.tolist() == spoilt.is_desirable[kept].tolist()
    assert data.pairs.tolist() == [[1, 2], [5, 6], [7, 8]], "pairs of rows 2-3, 8-9 and 10-11 by their new numbers"
    whole = PreparedFeedback(
        prepare_feedback(likes, tmp_path / "w", str(tiny_pipeline)), load_model(str(tiny_pipeline))
    )
    for part, expected in zip(data.latents(np.arange(9)), whole.latents(np.array(kept)), strict=True):
        torch.testing.assert_close(part, expected, atol=2e-3, rtol=2e-3)
    for name, values in data.conditioning(np.arange(9)).items():
        torch.testing.assert_close(values, whole.conditioning(np.array(kept))[name])
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["rows"], summary["kept"], summary["skipped"], summary["desirable"]) == (12, 9, 3, 5)


def test_strict_raises_at_the_first_and_leaves_nothing_half_written(spoilt, tiny_pipeline, tmp_path):
    with pytest.raises(ValueError, match=r"image .*01\.png cannot be read"):
        prepare_feedback(spoilt, tmp_path / "p", str(tiny_pipeline), strict=True)
    assert not list((tmp_path / "p").glob("latents-*"))
    with pytest.warns(UserWarning, match="3 of 12"):
        prepare_feedback(spoilt, tmp_path / "p", str(tiny_pipeline))
    with pytest.raises(ValueError, match=r"3 of 12 images cannot be used; the first: image .*01\.png cannot be read"):
        prepare_feedback(spoilt, tmp_path / "p", str(tiny_pipeline), strict=True)
    with pytest.raises(ValueError, match=r"1 of 1 images cannot be used; the first: image .*01\.png"):
        prepare_feedback(spoilt.subset([1]), tmp_path / "q", str(tiny_pipeline))


def test_an_image_whose_latents_are_not_finite_is_set_aside(likes, tiny_pipeline, tmp_path, monkeypatch):
    from dkto.models import StableDiffusion

    encode = StableDiffusion.encode_images

    def burst(self, vae, pixel_values):
        mean, std = encode(self, vae, pixel_values)
        return torch.where(pixel_values.mean((1, 2, 3), keepdim=True) > 0, mean, torch.inf), std

    monkeypatch.setattr(StableDiffusion, "encode_images", burst)
    with pytest.warns(UserWarning, match="6 of 12 images are set aside"):
        folder = prepare_feedback(likes, tmp_path, str(tiny_pipeline))
    reasons = [json.loads(line)["reason"] for line in (folder / "skipped.jsonl").read_text().splitlines()]
    assert all("the VAE's output is not finite" in reason for reason in reasons)
    with pytest.raises(ValueError, match="the VAE's output is not finite"):
        prepare_feedback(likes, tmp_path / "strict", str(tiny_pipeline), strict=True)


def test_transparent_and_16_bit_images_are_encoded_rightly_and_counted(likes, tiny_pipeline, tmp_path):
    """A sticker on hidden green, a 16-bit photograph, and both as plain files of the same content."""
    grey = np.random.default_rng(0).integers(0, 256, (20, 24), dtype=np.uint8)
    sticker = np.full((20, 24, 4), (0, 255, 0, 0), np.uint8)
    sticker[5:10, 5:10] = (255, 0, 0, 255)
    plain = np.where(sticker[..., 3:] == 255, sticker[..., :3], 255).astype(np.uint8)
    images = {"16.png": grey.astype(np.uint16) * 257, "8.png": grey, "sticker.png": sticker, "plain.png": plain}
    for name, pixels in images.items():
        Image.fromarray(pixels).save(tmp_path / name)
    table = make_feedback([tmp_path / name for name in images], ["x"] * 4, [1, 0, 1, 0])
    folder = prepare_feedback(table, tmp_path / "p", str(tiny_pipeline))
    mean, _ = PreparedFeedback(folder, load_model(str(tiny_pipeline))).latents(np.arange(4))
    assert torch.equal(mean[0], mean[1]) and torch.equal(mean[2], mean[3]) and not torch.equal(mean[0], mean[2])
    assert json.loads((folder / "summary.json").read_text())["composited on white"] == 1


def test_damaged_shards_are_refused_by_name_and_made_again(likes, tiny_pipeline, tmp_path, small_shards):
    model, folder = load_model(str(tiny_pipeline)), tmp_path / "p"
    prepare_feedback(likes, folder, str(tiny_pipeline), csft="prefix")
    empty, cut, huge = (shard_path(folder, "latents", number) for number in (0, 1, 2))
    few, other = (shard_path(folder, kind, 1) for kind in ("prompts", "csft-prefix-liked"))
    whole = {path: path.read_bytes() for path in (empty, cut, huge, few, other)}
    empty.write_bytes(b"")
    cut.write_bytes(whole[cut][:-20])
    huge.write_bytes(b"\xff" * 7 + b"\x10" + whole[huge][8:])
    one_row = {name: values[:1].clone() for name, values in load_file(few).items()}
    for path in (few, other):
        path.unlink()  # it is mapped
        save_file(one_row, path)
    data = PreparedFeedback(folder, model)
    for path, row in {empty: 0, cut: 2, huge: 4}.items():
        with pytest.raises(
            ValueError, match=rf"{path.name} cannot be read .*: run prepare again, which makes it again"
        ):
            data.latents(np.array([row]))
    with pytest.raises(
        ValueError, match=r"prompts-00001\.safetensors should hold 2 rows, got \{1\}: run prepare again"
    ):
        data.conditioning(np.array([2]))
    prepare_feedback(likes, folder, str(tiny_pipeline))
    assert {path: path.read_bytes() for path in whole} == whole


def test_a_shard_of_other_names_is_refused_by_name(prepared, tiny_pipeline, tmp_path):
    path = shard_path(shutil.copytree(prepared, tmp_path / "p"), "prompts", 0)
    path.write_bytes(path.read_bytes().replace(b"encoder_hidden_states", b"Encoder_hidden_states"))
    data = PreparedFeedback(path.parent, load_model(str(tiny_pipeline)))
    with pytest.raises(ValueError, match=r"prompts-00000\.safetensors, row 2: encoder_hidden_states cannot be read"):
        data.conditioning(np.array([0]))


@pytest.mark.parametrize("name", ["prepared.json", "index.parquet", "pairs.npy"])
@pytest.mark.parametrize("content", [b"", b"PAR1\x93NUMPY{"])
def test_a_damaged_small_file_is_named(prepared, tiny_pipeline, tmp_path, name, content):
    folder = shutil.copytree(prepared, tmp_path / "p")
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name} (is no|holds no) "):
        PreparedFeedback(folder, load_model(str(tiny_pipeline))).pairs  # noqa: B018


@pytest.mark.parametrize("name", ["prepared.json", "index.parquet", "pairs.npy", "latents-00000.safetensors"])
def test_a_pipe_among_prepared_feedback_is_refused(prepared, tiny_pipeline, tmp_path, name):
    """It would be waited for."""
    folder = shutil.copytree(prepared, tmp_path / "p")
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises((ValueError, FileNotFoundError), match=rf"{name}.* (folder or a pipe|is missing)"):
        data = PreparedFeedback(folder, load_model(str(tiny_pipeline)))
        data.pairs, data.latents(np.array([0]))


def test_what_another_program_shortened_or_changed_is_found_by_the_summary(prepared, tiny_pipeline, tmp_path):
    """Without the schema's metadata, which few programs keep."""
    folder, model = shutil.copytree(prepared, tmp_path / "p"), load_model(str(tiny_pipeline))
    path = folder / "index.parquet"
    index = pd.read_parquet(path)
    index[1:].to_parquet(path, index=False)
    with pytest.raises(
        ValueError, match=r"index\.parquet must hold 12 rows as summary\.json says, got 11: run prepare"
    ):
        PreparedFeedback(folder, model)
    index.assign(is_desirable=True).to_parquet(path, index=False)
    with pytest.raises(
        ValueError, match=r"index\.parquet must hold 6 likes as summary\.json says, got 12: run prepare"
    ):
        PreparedFeedback(folder, model)
    index.to_parquet(path, index=False)
    np.save(folder / "pairs.npy", np.array([[0, 1]]))
    with pytest.raises(ValueError, match=r"pairs\.npy must hold 0 pairs as summary\.json says, got 1\): run prepare"):
        PreparedFeedback(folder, model).pairs  # noqa: B018


def test_a_bit_that_changed_on_disk_is_found(prepared, tiny_pipeline, tmp_path):
    """In latents, embeddings and pairs, wherever it lies in their values."""
    model, rows = load_model(str(tiny_pipeline)), np.arange(12)
    for name, at in (("latents-00000", -1), ("latents-00000", -2000), ("prompts-00000", -700)):
        folder = shutil.copytree(prepared, tmp_path / f"{name}{at}")
        (path,) = folder.glob(f"{name}.*")
        data = bytearray(path.read_bytes())
        data[at] ^= 4
        path.write_bytes(data)
        with pytest.raises(ValueError, match=rf"{path.name}.* run prepare again"):  # {at}
            data = PreparedFeedback(folder, model)
            data.latents(rows), data.conditioning(rows)
    folder = shutil.copytree(prepared, tmp_path / "pairs")
    np.save(folder / "pairs.npy", np.array([[0, 1]]))
    with pytest.raises(ValueError, match=r"pairs\.npy .*they are not those that were written with index\.parquet"):
        PreparedFeedback(folder, model).pairs  # noqa: B018


def test_an_index_or_pairs_of_other_rows_are_refused(prepared, tiny_pipeline, tmp_path):
    folder, model = shutil.copytree(prepared, tmp_path / "p"), load_model(str(tiny_pipeline))
    np.save(folder / "pairs.npy", np.array([[0, 12]]))
    index = pd.read_parquet(folder / "index.parquet")
    index.to_parquet(folder / "index.parquet", index=False)
    with pytest.raises(ValueError, match=r"pairs\.npy .*they name rows outside \[0, 12\)\): run prepare again"):
        PreparedFeedback(folder, model).pairs  # noqa: B018
    for column, value in {"prompt_id": 4, "row": 12}.items():
        index.assign(**{column: index[column].where(index[column] < index[column].max(), value)}).to_parquet(
            folder / "index.parquet"
        )
        with pytest.raises(ValueError, match=rf"index\.parquet: {column} must be in \[0, {value}\)"):
            PreparedFeedback(folder, model)
    for values in ({"rows": 10**18}, {"rows": -1}, {"flip": 1}, {"prompt_shard_rows": "x"}):
        (folder / "prepared.json").write_text(json.dumps(json.loads((prepared / "prepared.json").read_text()) | values))
        with pytest.raises((ValueError, FileNotFoundError), match=r"prepared\.json: \w+ must be|is not complete"):
            PreparedFeedback(folder, model)


def test_images_that_were_replaced_are_noticed(likes, tiny_pipeline, tmp_path):
    """The same names, sizes in bytes and times, and other pixels: what was encoded is of other images."""
    paths = [tmp_path / path.name.replace(".png", ".bmp") for path in likes.images]
    for number, path in enumerate(paths):
        Image.new("RGB", (20, 20), (number, 0, 0)).save(path)
    table = make_feedback(paths, likes.prompts, likes.is_desirable.tolist())
    folder = prepare_feedback(table, tmp_path / "p", str(tiny_pipeline))
    prepare_feedback(table, folder, str(tiny_pipeline))
    before, data = paths[7].stat(), bytearray(paths[7].read_bytes())
    data[len(data) // 2] ^= 255
    paths[7].write_bytes(data)
    os.utime(paths[7], ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(ValueError, match=r"holds encoded feedback of another run \(images, feedback differ\)"):
        prepare_feedback(table, folder, str(tiny_pipeline))
    with pytest.raises(ValueError, match=r"\(images, feedback differ\)"):
        prepare_feedback(table.subset(np.arange(12)[::-1]), folder, str(tiny_pipeline))


def test_a_folder_that_another_call_fills_is_refused(likes, tiny_pipeline, tmp_path):
    with sole_writer(tmp_path / "p"), pytest.raises(BlockingIOError, match=r"is being written by process \d+"):
        prepare_feedback(likes, tmp_path / "p", str(tiny_pipeline))


def test_large_images_are_decoded_one_at_a_time(likes, tiny_pipeline, tmp_path, monkeypatch):
    monkeypatch.setattr("dkto.data.decode.LARGE_PIXELS", 24 * 20 - 1)
    running, most = [], []

    def decode(image):
        running.append(1)
        most.append(len(running))
        time.sleep(0.005)
        try:
            return decode_image(image)
        finally:
            running.pop()

    monkeypatch.setattr("dkto.data.decode.decode_image", decode)
    prepare_feedback(likes, tmp_path / "one", str(tiny_pipeline))
    assert len(most) == 12 and max(most) == 1
    monkeypatch.setattr("dkto.data.decode.LARGE_PIXELS", 24 * 20)
    prepare_feedback(likes, tmp_path / "several", str(tiny_pipeline))
    assert max(most) > 1


@pytest.mark.skipif(sys.platform != "linux", reason="the limit of a file's size stands for a full disk")
def test_a_full_disk_is_said_with_the_file(likes, tiny_pipeline, tmp_path):
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(OSError, match=r"p/(prompts|latents)-00000\.safetensors could not be written: "):
            prepare_feedback(likes, tmp_path / "p", str(tiny_pipeline))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list((tmp_path / "p").glob("*.part"))
    assert PreparedFeedback(prepare_feedback(likes, tmp_path / "p", str(tiny_pipeline)), load_model(str(tiny_pipeline)))


def test_long_prompts_are_cut_counted_and_listed(likes, tiny_pipeline, tmp_path):
    table = replace(likes, prompts=("a red star " * 20, *likes.prompts[1:]))
    with pytest.warns(UserWarning, match=r"1 of 5 prompts are longer than the text encoder takes and are cut, see .*"):
        folder = prepare_feedback(table, tmp_path, str(tiny_pipeline))
    (line,) = [json.loads(text) for text in (folder / "truncated.jsonl").read_text().splitlines()]
    prompts = pd.read_parquet(folder / "prompts.parquet")["prompt"]
    assert prompts[line["prompt_id"]] == table.prompts[0] and prompts[0] == ""
    assert re.match(r"\d+ tokens, 24 are taken: a red star", line["tokens"])
    assert json.loads((folder / "summary.json").read_text())["truncated"] == 1


def test_mirrored_images_are_there_when_asked_for(likes, prepared, tiny_pipeline, tmp_path):
    model = load_model(str(tiny_pipeline))
    data = PreparedFeedback(prepare_feedback(likes, tmp_path, str(tiny_pipeline), flip=True), model)
    mean, std = data.latents(np.array([3, 3]), np.array([False, True]))
    pixel_values = to_pixel_values(load_image(likes.images[3]), 16)[None]
    for row, side in ((0, pixel_values), (1, pixel_values.flip(-1))):
        for found, expected in zip((mean, std), model.encode_images(model.load_vae(), side), strict=True):
            torch.testing.assert_close(found[row], expected[0], atol=2e-3, rtol=2e-3)
    assert not torch.allclose(mean[0], mean[1], atol=1e-2)
    plain = PreparedFeedback(prepared, model)
    assert data.has_flips and not plain.has_flips
    plain.latents(np.array([3]), np.array([False]))
    with pytest.raises(ValueError, match="holds no mirrored images: prepare it with flip=True"):
        plain.latents(np.array([3]), np.array([True]))
    with pytest.raises(ValueError, match=r"\(flip differ\)"):
        prepare_feedback(likes, prepared, str(tiny_pipeline), flip=True)


def test_dropped_prompts_are_the_empty_one(prepared, tiny_pipeline):
    data = PreparedFeedback(prepared, load_model(str(tiny_pipeline)))
    rows, dropped = np.array([0, 1, 2]), np.array([False, True, False])
    plain, found = (data.conditioning(rows, d)["encoder_hidden_states"] for d in (None, dropped))
    empty = load_file(prepared / "prompts-00000.safetensors")["encoder_hidden_states"][0].float()
    torch.testing.assert_close(found, torch.stack([plain[0], empty, plain[2]]))


def test_a_model_that_is_told_of_sizes_gets_them(likes, prepared, tiny_pipeline):
    """SDXL's time ids are made of the original size and the crop; pictures here are 24 x 20, shown at 16 x 16."""
    model = load_model(str(tiny_pipeline))
    model.image_conditioning = lambda sizes: {"time_ids": torch.cat([sizes, torch.full((len(sizes), 2), 16)], 1)}
    found = PreparedFeedback(prepared, model).conditioning(np.array([4, 0]))
    assert found.keys() == {"encoder_hidden_states", "time_ids"}
    assert found["time_ids"].tolist() == [[20, 24, 0, 1, 16, 16]] * 2


def test_csft_prompts_carry_the_like_and_may_be_asked_for_later(likes, tiny_pipeline, tmp_path):
    model = load_model(str(tiny_pipeline))
    folder = prepare_feedback(likes, tmp_path, str(tiny_pipeline))
    tokenizer, encoder = model.load_text()
    rows, dropped = np.array([0, 1, 3, 5]), np.array([False, False, False, True])
    with pytest.raises(FileNotFoundError, match="run prepare again with csft='prefix'"):
        PreparedFeedback(folder, model).conditioning(rows, csft="prefix")
    for style, (liked, disliked) in {
        "prefix": ("good image, ", "bad image, "),
        "negative": ("", "Weird image. "),
    }.items():
        prepare_feedback(likes, folder, str(tiny_pipeline), csft=style)
        found = PreparedFeedback(folder, model).conditioning(rows, dropped, csft=style)
        texts = [liked + "a picture 0", disliked + "a picture 1", disliked + "a picture 0", ""]
        expected = model.encode_prompts(tokenizer, encoder, texts)
        for name, values in expected.items():
            torch.testing.assert_close(found[name], values, atol=2e-3, rtol=2e-3)
    with pytest.raises(ValueError, match="csft must be one of prefix, negative, got 'suffix'"):
        prepare_feedback(likes, folder, str(tiny_pipeline), csft="suffix")
    with pytest.raises(ValueError, match="feedback must hold at least one image to encode, got none"):
        prepare_feedback(likes.subset([]), folder, str(tiny_pipeline))


def test_pairs_have_one_liked_and_one_disliked_side(likes, tiny_pipeline, tmp_path):
    """A ranking of three gives every liked side over every disliked one; likes alone give none."""
    numbers = [0, 0, 1, 1, 1, 2, 3, -1, 3, -1, -1, -1]
    table = replace(likes, pair_ids=np.array(numbers))
    data = PreparedFeedback(prepare_feedback(table, tmp_path, str(tiny_pipeline)), load_model(str(tiny_pipeline)))
    assert sorted(map(tuple, data.pairs.tolist())) == [(0, 1), (2, 3), (4, 3)]


SLOW_PREPARE = """
import sys, time
import dkto.data.encode as prepare
from dkto.data.feedback import read_feedback
prepare.SHARD_ROWS = prepare.PROMPT_SHARD_ROWS = 2
run = prepare._Job.run
def slowly(self, task):
    time.sleep(float(sys.argv[4]))
    run(self, task)
prepare._Job.run = slowly
if __name__ == "__main__":
    prepare.prepare_feedback(read_feedback(sys.argv[1]), sys.argv[2], sys.argv[3], num_processes=int(sys.argv[5]))
"""


def assert_same_shards(folder, expected):
    """Equal but for the last bit, which the number of CPU threads may change."""
    names = sorted(path.name for path in expected.glob("*.safetensors"))
    assert sorted(path.name for path in folder.glob("*.safetensors")) == names and len(names) == 8
    for name in names:
        torch.testing.assert_close(load_file(folder / name), load_file(expected / name), atol=2e-3, rtol=2e-3)
    assert (folder / "index.parquet").read_bytes() == (expected / "index.parquet").read_bytes()


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr("dkto.data.encode.SHARD_ROWS", 2)
    monkeypatch.setattr("dkto.data.encode.PROMPT_SHARD_ROWS", 2)


@pytest.fixture(scope="module")
def whole(likes, tiny_pipeline, tmp_path_factory):
    """What one process writes that nobody kills."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dkto.data.encode.SHARD_ROWS", 2)
        patch.setattr("dkto.data.encode.PROMPT_SHARD_ROWS", 2)
        return prepare_feedback(likes, tmp_path_factory.mktemp("whole"), str(tiny_pipeline))


def slow_call(likes, model, output_dir, seconds, processes):
    table = write_feedback(likes, likes.images[0].parent / "likes.csv")
    script = output_dir.with_name("slow.py")
    script.write_text(SLOW_PREPARE)
    return [str(script), str(table), str(output_dir), str(model), str(seconds), str(processes)]


@needs_proc
def test_a_kill_loses_no_shard_and_leaves_no_worker(likes, tiny_pipeline, tmp_path, whole, small_shards):
    """SIGKILL to a run of two workers in the middle; they end with it; a second call encodes only what is missing."""
    cut = tmp_path / "cut"
    call = [sys.executable, *slow_call(likes, tiny_pipeline, cut, 0.5, 2)]
    process = subprocess.Popen(call, stderr=subprocess.DEVNULL)
    while len(list(cut.glob("*.safetensors"))) < 3 and process.poll() is None:
        time.sleep(0.02)
    children = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    process.kill()
    assert process.wait() == -signal.SIGKILL
    deadline = time.monotonic() + 20
    while any(map(_alive, children)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(children) >= 2 and not any(map(_alive, children)), "a worker outlives the process that started it"
    before = {path: path.stat().st_mtime_ns for path in cut.glob("*.safetensors")}
    assert 3 <= len(before) < 8
    with pytest.raises(FileNotFoundError, match=r"is not complete \(latents-0000\d\.safetensors is missing\)"):
        PreparedFeedback(cut, load_model(str(tiny_pipeline)))
    prepare_feedback(likes, cut, str(tiny_pipeline))
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert_same_shards(cut, whole)


def _alive(pid):
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False


@pytest.mark.slow
def test_two_launched_processes_share_the_shards(likes, tiny_pipeline, tmp_path, whole, monkeypatch):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    call = [*launch, *slow_call(likes, tiny_pipeline, tmp_path / "launched", 0, 1)]
    done = subprocess.run(call, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert_same_shards(tmp_path / "launched", whole)


def test_launched_processes_start_no_others(likes, tmp_path, monkeypatch):
    monkeypatch.setattr("dkto.data.encode._Launch", lambda: SimpleNamespace(count=2, rank=1))
    with pytest.raises(ValueError, match="num_processes must be 1 among 2 launched processes, got 3"):
        prepare_feedback(likes, tmp_path, num_processes=3)


def test_another_vae_is_noticed(likes, prepared, tiny_pipeline, tmp_path):
    other = shutil.copytree(tiny_pipeline, tmp_path / "other")
    path = other / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights["encoder.conv_in.weight"] *= 1.01
    save_file(weights, path)
    with pytest.raises(ValueError, match=r"was prepared with the VAE and text encoder .* prepare again"):
        PreparedFeedback(prepared, load_model(str(other)))
    with pytest.raises(ValueError, match=r"\(model differ\)"):
        prepare_feedback(likes, prepared, str(other))


MEASURE_START = """
import re, sys
from pathlib import Path
from types import SimpleNamespace
from dkto.data.sampler import BiasedSampler
from dkto.models import load_model
from dkto.data.encoded import PreparedFeedback
model = load_model(sys.argv[2])
read = lambda key: int(re.search(key + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024
before = read("VmRSS")
data = PreparedFeedback(sys.argv[1], model)
rows = BiasedSampler(data.is_desirable, 0.8, 0).rows(0, 32)
grown = read("VmHWM") - before
data.latents(rows), data.conditioning(rows)
print(len(data), grown)
"""


@needs_proc
def test_a_million_rows_are_opened_without_reading_them(prepared, tiny_pipeline, tmp_path, sparse_copy):
    """The whole of Pick-a-Pic: 928,068 rows, as many as the paper counts, in sparse shards."""
    folder = sparse_copy(prepared, tmp_path / "million", 928_068)
    call = [sys.executable, "-c", MEASURE_START, str(folder), str(tiny_pipeline)]
    rows, grown = subprocess.run(call, check=True, capture_output=True, text=True).stdout.split()
    assert int(rows) == 928_068
    assert float(grown) < 150, f"{grown} MB"
    assert shard_path(folder, "latents", 1812).exists() and os.stat(folder / "index.parquet").st_size < 10_000_000


def test_a_folder_of_other_feedback_is_refused(prepared, likes, tiny_pipeline):
    with pytest.raises(ValueError, match=r"holds encoded feedback of another run \(feedback differ\)"):
        prepare_feedback(likes.shuffled_likes(1), prepared, str(tiny_pipeline))


@pytest.mark.parametrize("name", ["feedback.parquet", "prompts.parquet"])
def test_a_pipe_that_takes_the_place_of_the_plan_is_not_waited_for(name, likes, tiny_pipeline, tmp_path, monkeypatch):
    write = encode._write_plan

    def swapped(feedback, folder, *more):
        write(feedback, folder, *more)
        (folder / name).unlink()
        os.mkfifo(folder / name)

    monkeypatch.setattr(encode, "_write_plan", swapped)
    with pytest.raises(ValueError, match=rf"{name} is no table: expected a file, got a folder or a pipe: put the file"):
        prepare_feedback(likes, tmp_path, str(tiny_pipeline))


def test_missing_and_incomplete_folders_and_other_models(prepared, tiny_pipeline, tmp_path):
    model = load_model(str(tiny_pipeline))
    with pytest.raises(FileNotFoundError, match=r"prepared\.json is missing"):
        PreparedFeedback(tmp_path, model)
    about = json.loads((prepared / "prepared.json").read_text())
    (tmp_path / "prepared.json").write_text(json.dumps(about))
    with pytest.raises(FileNotFoundError, match=r"latents-00000\.safetensors is missing"):
        PreparedFeedback(tmp_path, model)
    (tmp_path / "prepared.json").write_text(json.dumps(about | {"model": "other"}))
    with pytest.raises(ValueError, match="was prepared with the VAE and text encoder 'other'"):
        PreparedFeedback(tmp_path, model)
