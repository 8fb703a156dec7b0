import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dkto.feedback import BiasedSampler, FeedbackTable, load_image, make_feedback, read_feedback, write_feedback


@pytest.fixture
def folder(tmp_path):
    for name in ("a.png", "b.png"):
        Image.new("RGB", (8, 8), "red").save(tmp_path / name)
    return tmp_path


def csv(folder, text):
    path = folder / "likes.csv"
    path.write_text(text)
    return path


def test_csv_is_read_with_every_spelling_of_like(folder):
    rows = [("a.png", v) for v in ("1", "true", "Like", "LIKED")] + [("b.png", v) for v in ("0", "False", "dislike")]
    path = csv(folder, "image,prompt,liked\n" + "".join(f'{n},"a, b",{v}\n' for n, v in rows))
    table = read_feedback(path)
    assert table.is_desirable.tolist() == [True] * 4 + [False] * 3
    assert set(table.prompts) == {"a, b"}
    assert table.pair_ids.tolist() == [-1] * 7


def test_synonyms_of_columns_and_jsonl_and_parquet_agree(folder):
    rows = [{"file_name": "a.png", "caption": "x", "label": True}, {"file_name": "b.png", "caption": "y", "label": 0}]
    jsonl, parquet = folder / "likes.jsonl", folder / "likes.parquet"
    jsonl.write_text("".join(json.dumps(row) + "\n" for row in rows))
    pd.DataFrame({"image": ["a.png", "b.png"], "prompt": ["x", "y"], "liked": [1, 0]}).to_parquet(parquet)
    one, two = read_feedback(jsonl), read_feedback(parquet)
    assert one.images == two.images and one.prompts == two.prompts == ("x", "y")
    assert one.is_desirable.tolist() == two.is_desirable.tolist() == [True, False]


def test_folders_are_read_with_prompts_beside_the_images(tmp_path):
    for name in ("liked", "disliked"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (4, 4)).save(tmp_path / name / "x.png")
        (tmp_path / name / "x.txt").write_text(f"a {name} star\n")
    table = read_feedback(tmp_path)
    assert table.prompts == ("a liked star", "a disliked star")
    assert table.is_desirable.tolist() == [True, False]


def test_a_written_table_reads_back_the_same(folder):
    table = make_feedback([folder / "a.png", folder / "b.png"], ['says "hi"', "$5, <b>"], ["like", 0], [3, 3])
    back = read_feedback(write_feedback(table, folder / "out.csv"))
    assert back.prompts == table.prompts and back.pair_ids.tolist() == [3, 3]
    assert back.is_desirable.tolist() == [True, False]
    assert [p.name for p in back.images] == ["a.png", "b.png"]


@pytest.mark.parametrize(
    ("text", "error", "sentence"),
    [
        (
            "image,prompt\na.png,x\n",
            ValueError,
            "needs the columns image, prompt, liked; missing: liked; found: image, prompt",
        ),
        (
            "image,prompt,liked\na.png,x,maybe\n",
            ValueError,
            "likes.csv, row 1: liked must be 0/1, true/false or like/dislike, got 'maybe'",
        ),
        ("image,prompt,liked\na.png,x,1\nc.png,x,1\n", FileNotFoundError, "row 2: image 'c.png' does not exist"),
        ("image,prompt,liked\n../a.png,x,1\n", ValueError, "row 1: image '../a.png' leaves the folder"),
        ("image,prompt,liked\n/etc/passwd,x,1\n", ValueError, "leaves the folder"),
        ("image,prompt,liked\n,x,1\n", ValueError, "row 1: image must be a file name, got ''"),
        ("image,prompt,liked\n", ValueError, "holds no feedback"),
        ("", ValueError, "cannot be read as CSV"),
    ],
)
def test_bad_files_are_named_in_one_sentence(folder, text, error, sentence):
    with pytest.raises(error) as caught:
        read_feedback(csv(folder, text))
    assert sentence in str(caught.value)


def test_missing_source_and_unknown_suffix_and_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_feedback(tmp_path / "nothing.csv")
    (tmp_path / "likes.xlsx").write_text("x")
    with pytest.raises(ValueError, match=r"must be a \.csv, \.jsonl or \.parquet file"):
        read_feedback(tmp_path / "likes.xlsx")
    (tmp_path / "liked").mkdir()
    with pytest.raises(ValueError, match="disliked/ is missing"):
        read_feedback(tmp_path)


def test_prompt_file_missing_in_a_folder(tmp_path):
    for name in ("liked", "disliked"):
        (tmp_path / name).mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "liked" / "x.png")
    with pytest.raises(FileNotFoundError, match=r"x\.png has no prompt: expected it in x\.txt"):
        read_feedback(tmp_path)


def test_a_damaged_image_is_named(tmp_path):
    path = tmp_path / "broken.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\nnonsense")
    with pytest.raises(ValueError, match=r"image .*broken\.png cannot be read"):
        load_image(path)
    Image.new("RGB", (64, 64), "blue").save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:60])
    with pytest.raises(ValueError, match=r"image .*cut\.png cannot be read"):
        load_image(tmp_path / "cut.png")


def test_a_huge_image_is_refused_before_decoding(tmp_path, monkeypatch):
    monkeypatch.setattr("dkto.feedback.MAX_PIXELS", 99)
    Image.new("RGB", (10, 10)).save(tmp_path / "big.png")
    with pytest.raises(ValueError, match="10 x 10 pixels, more than 99"):
        load_image(tmp_path / "big.png")


def test_tables_refuse_unequal_lengths():
    with pytest.raises(ValueError, match="must have one length, got 1, 2, 1 and 1"):
        FeedbackTable((None,), ("a", "b"), np.array([True]), np.array([-1]))


def test_shuffled_likes_keep_images_and_class_sizes():
    table = make_feedback([f"{i}.png" for i in range(40)], ["p"] * 40, [i < 20 for i in range(40)])
    control = table.shuffled_likes(0)
    assert control.images == table.images
    assert control.is_desirable.sum() == 20
    assert (control.is_desirable != table.is_desirable).any()
    assert (control.is_desirable == table.shuffled_likes(0).is_desirable).all()


def test_the_sampler_draws_classes_at_gamma_and_rows_evenly():
    is_desirable = np.arange(20) < 5
    sampler = BiasedSampler(is_desirable, 0.8, seed=0)
    rows = np.concatenate([sampler.rows(step, 50) for step in range(200)])
    share = is_desirable[rows].mean()
    assert abs(share - 0.8) < 4 * (0.8 * 0.2 / len(rows)) ** 0.5
    counts = np.bincount(rows[is_desirable[rows]], minlength=5)[:5]
    assert counts.min() > 0.85 * counts.mean()


@given(step=st.integers(0, 10**6), seed=st.integers(0, 2**32 - 1))
def test_a_draw_depends_only_on_seed_and_step(step, seed):
    is_desirable = np.arange(9) % 2 == 0
    one, two = (BiasedSampler(is_desirable, 0.5, seed).rows(step, 8) for _ in range(2))
    assert (one == two).all() and one.min() >= 0 and one.max() < 9


def test_steps_and_seeds_differ():
    is_desirable = np.arange(1000) % 2 == 0
    sampler = BiasedSampler(is_desirable, 0.5, 0)
    assert (sampler.rows(0, 16) != sampler.rows(1, 16)).any()
    assert (sampler.rows(0, 16) != BiasedSampler(is_desirable, 0.5, 1).rows(0, 16)).any()


@pytest.mark.parametrize(("liked", "missing"), [(True, "disliked"), (False, "liked")])
def test_one_class_only_is_refused_unless_gamma_asks_for_it_alone(liked, missing):
    with pytest.raises(ValueError, match=f"one class only: no {missing} image among 4"):
        BiasedSampler(np.full(4, liked), 0.8, 0)
    assert BiasedSampler(np.full(4, liked), float(liked), 0).rows(0, 3).max() < 4


def test_gamma_outside_its_range():
    with pytest.raises(ValueError, match=r"desirable_fraction must be in \[0, 1\], got 1.2"):
        BiasedSampler(np.array([True, False]), 1.2, 0)
