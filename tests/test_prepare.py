import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from dkto.feedback import load_image, make_feedback
from dkto.models import load_model
from dkto.prepare import PreparedFeedback, prepare_feedback, to_pixel_values


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


def test_prompts_are_encoded_once_with_the_empty_one_first(prepared, likes, tiny_pipeline):
    model = load_model(str(tiny_pipeline))
    stored = load_file(prepared / "prompts.safetensors")["encoder_hidden_states"]
    assert stored.shape == (4, 24, 16)
    expected = model.encode_prompts(*model.load_text(), ["", likes.prompts[2]])["encoder_hidden_states"]
    data = PreparedFeedback(prepared, model)
    torch.testing.assert_close(stored[0].float(), expected[0], atol=2e-3, rtol=2e-3)
    rows = data.conditioning(np.array([2]))["encoder_hidden_states"]
    torch.testing.assert_close(rows[0], expected[1], atol=2e-3, rtol=2e-3)


def test_a_second_call_does_only_what_is_missing(likes, tiny_pipeline, tmp_path, monkeypatch):
    monkeypatch.setattr("dkto.prepare.SHARD_ROWS", 5)
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


def test_a_corrupt_image_is_named_and_nothing_half_written_stays(likes, tiny_pipeline, tmp_path):
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"not a picture")
    table = make_feedback([*likes.images[:2], bad], ["a", "b", "c"], [1, 0, 1])
    with pytest.raises(ValueError, match=r"image .*bad\.png cannot be read"):
        prepare_feedback(table, tmp_path / "p", str(tiny_pipeline))
    assert not list((tmp_path / "p").glob("latents-*"))


def test_a_folder_of_other_feedback_is_refused(prepared, likes, tiny_pipeline):
    with pytest.raises(ValueError, match=r"holds encoded feedback of another run \(feedback differ\)"):
        prepare_feedback(likes.shuffled_likes(1), prepared, str(tiny_pipeline))


def test_missing_and_incomplete_folders_and_other_models(prepared, tiny_pipeline, tmp_path):
    model = load_model(str(tiny_pipeline))
    with pytest.raises(FileNotFoundError, match=r"prepared\.json is missing"):
        PreparedFeedback(tmp_path, model)
    about = json.loads((prepared / "prepared.json").read_text())
    (tmp_path / "prepared.json").write_text(json.dumps(about))
    with pytest.raises(FileNotFoundError, match=r"latents-00000\.safetensors is missing"):
        PreparedFeedback(tmp_path, model)
    (tmp_path / "prepared.json").write_text(json.dumps(about | {"model": "other"}))
    with pytest.raises(ValueError, match="was prepared with the VAE and text encoder other"):
        PreparedFeedback(tmp_path, model)


def test_csft_prompts_carry_the_like_and_may_be_asked_for_later(likes, tiny_pipeline, tmp_path):
    model = load_model(str(tiny_pipeline))
    folder = prepare_feedback(likes, tmp_path, str(tiny_pipeline))
    tokenizer, encoder = model.load_text()
    for style, (liked, disliked) in {
        "prefix": ("good image, ", "bad image, "),
        "negative": ("", "Weird image. "),
    }.items():
        prepare_feedback(likes, folder, str(tiny_pipeline), csft=style)
        rows = np.array([0, 1, 3, 5])
        found = PreparedFeedback(folder, model).conditioning(rows, np.array([False, False, False, True]), csft=style)
        texts = [liked + "a picture 0", disliked + "a picture 1", disliked + "a picture 0", ""]
        expected = model.encode_prompts(tokenizer, encoder, texts)
        for name, values in expected.items():
            torch.testing.assert_close(found[name], values, atol=2e-3, rtol=2e-3)
    with pytest.raises(ValueError, match="csft must be one of prefix, negative, got 'suffix'"):
        prepare_feedback(likes, folder, str(tiny_pipeline), csft="suffix")


def test_pairs_have_one_liked_and_one_disliked_side(likes, tiny_pipeline, tmp_path):
    """In a ranking every liked side goes over every disliked one; likes alone and rows without number give none."""
    numbers = [0, 0, 1, 1, 1, 2, 3, -1, 3, -1, -1, -1]
    table = replace(likes, pair_ids=np.array(numbers))
    data = PreparedFeedback(prepare_feedback(table, tmp_path, str(tiny_pipeline)), load_model(str(tiny_pipeline)))
    assert sorted(map(tuple, data.pairs.tolist())) == [(0, 1), (2, 3), (4, 3)]
