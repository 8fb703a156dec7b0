import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dkto.data.feedback import FeedbackTable, describe_feedback, make_feedback, read_feedback, write_feedback
from dkto.data.images import load_image


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


def test_the_authors_own_table_is_read_under_both_partitions(folder):
    """`train_processed_v3.csv` names images of another folder and the split of each."""
    (folder / "table").mkdir()
    text = "file_name,caption,split\na.png,x,exclusive_win\nb.png,y,intersections\na.png,1234,exclusive_lose\n"
    source = csv(folder / "table", text)
    table = read_feedback(source, image_folder=folder)
    assert table.is_desirable.tolist() == [True, True, False] and table.prompts == ("x", "y", "1234")
    assert "exclusive_win: 1" in str(table) and "partition: liked if preferred at least once" in str(table)
    strict = read_feedback(source, image_folder=folder, partition="always")
    assert strict.is_desirable.tolist() == [True, False, False]
    with pytest.raises(ValueError, match="partition must be one of at_least_once, always, got 'mostly'"):
        read_feedback(source, image_folder=folder, partition="mostly")


def test_options_that_do_not_apply_are_refused(folder):
    source = csv(folder, "image,prompt,liked\na.png,x,1\n")
    with pytest.raises(ValueError, match=r"partition='always' has no meaning here: likes\.csv holds likes already"):
        read_feedback(source, partition="always")
    with pytest.raises(ValueError, match="ties='liked' has no meaning here"):
        read_feedback(source, ties="liked")
    for name in ("liked", "disliked"):
        (folder / name).mkdir()
    with pytest.raises(ValueError, match=r"image_folder=.* has no meaning here: .* is a folder"):
        read_feedback(folder, image_folder=folder)


def test_rankings_of_one_row_per_image_and_of_one_entry_per_prompt_agree(folder):
    """ImageRewardDB's metadata and HPDv2's test.json, with a tie and an image that is not there."""
    Image.new("RGB", (8, 8)).save(folder / "c.png")
    names, ranks = ["a.png", "b.png", "c.png", "gone.png"], [1, 2, 2, 3]
    rows = pd.DataFrame({"image_path": names, "prompt_id": "7", "prompt": "x", "rank": ranks})
    rows.to_parquet(folder / "metadata.parquet")
    (folder / "test.json").write_text(json.dumps([{"prompt": "x", "image_path": names, "rank": ranks}]))
    for name in ("metadata.parquet", "test.json"):
        with pytest.warns(UserWarning, match=r"set aside: 1, kept: 3; .*ranking 1: image 'gone\.png' does not exist"):
            table = read_feedback(folder / name)
        assert [path.name for path in table.images] == names[:3]
        assert table.is_desirable.tolist() == [True, False, False]
        assert table.pairs.tolist() == [[0, 1], [0, 2]]
        assert table.counts["images_not_there"] == 1 and table.counts["ties"] == 1
        with pytest.warns(UserWarning, match="set aside: 1"):
            assert read_feedback(folder / name, ties="liked").is_desirable.tolist() == [True, True, True]
        with pytest.raises(FileNotFoundError, match=r"ranking 1: image 'gone\.png' does not exist"):
            read_feedback(folder / name, strict=True)


def test_rankings_without_any_image_and_out_of_the_folder(folder):
    def ranked(*names):
        entries = [{"prompt": "x", "file_path": list(names), "human_preference": [1, 0]}]
        (folder / "train.json").write_text(json.dumps(entries))
        return read_feedback(folder / "train.json")

    assert ranked("a.png", "b.png").is_desirable.tolist() == [True, False]
    with pytest.raises(FileNotFoundError, match=r"none of its images exists in .*, for instance 'e\.png'"):
        ranked("e.png", "f.png")
    with pytest.raises(ValueError, match=r"ranking 1: image '\.\./a\.png' leaves the folder"):
        ranked("a.png", "../a.png")


def test_a_link_out_of_the_folder_is_refused_and_one_within_is_followed(folder, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside") / "secret.png"
    Image.new("RGB", (4, 4)).save(outside)
    (folder / "link.png").symlink_to(outside)
    with pytest.raises(ValueError, match=r"row 1: image 'link\.png' leaves the folder"):
        read_feedback(csv(folder, "image,prompt,liked\nlink.png,x,1\n"))
    (folder / "link.png").unlink()
    (folder / "link.png").symlink_to(folder / "a.png")
    assert read_feedback(csv(folder, "image,prompt,liked\nlink.png,x,1\n")).images[0].name == "a.png"
    (folder / "way").symlink_to(outside.parent)
    with pytest.raises(ValueError, match="leaves the folder"):
        read_feedback(csv(folder, "image,prompt,liked\nway/secret.png,x,1\n"))


@pytest.mark.parametrize("place", ["above", "within"])
def test_folders_with_a_metadata_file(tmp_path, place):
    for name in ("liked", "disliked"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (4, 4)).save(tmp_path / name / "x.png")
    prompts = {"liked": "a, b", "disliked": "c"}
    if place == "above":
        rows = [{"file_name": f"{name}/x.png", "text": prompt} for name, prompt in prompts.items()]
        (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        for name, prompt in prompts.items():
            (tmp_path / name / "metadata.csv").write_text(f'file_name,caption\nx.png,"{prompt}"\n')
    table = read_feedback(tmp_path)
    assert table.prompts == ("a, b", "c") and table.is_desirable.tolist() == [True, False]


def test_an_image_with_two_prompts_has_none(tmp_path):
    """In one file or in two: which one is right, nobody knows. The same prompt twice is no contradiction."""
    for name in ("liked", "disliked"):
        (tmp_path / name).mkdir()
        for image in ("x.png", "y.png"):
            Image.new("RGB", (4, 4)).save(tmp_path / name / image)
    rows = [
        ("liked/x.png", "a"),
        ("liked/y.png", "b"),
        ("liked/x.png", "c"),
        ("liked/y.png", "b"),
        ("disliked/x.png", "d"),
    ]
    lines = (json.dumps({"file_name": name, "text": prompt}) + "\n" for name, prompt in rows)
    (tmp_path / "metadata.jsonl").write_text("".join(lines))
    (tmp_path / "disliked" / "metadata.csv").write_text("file_name,caption\nx.png,other\ny.png,e\n")
    with pytest.warns(
        UserWarning, match="set aside: 2, kept: 2; .*row 3: 'x.png' has another prompt in an earlier row"
    ):
        table = read_feedback(tmp_path)
    assert [(path.name, prompt) for path, prompt in zip(table.images, table.prompts, strict=True)] == [
        ("y.png", "b"),
        ("y.png", "e"),
    ]
    with pytest.raises(ValueError, match=r"metadata\.jsonl, row 3.*another prompt in an earlier row: keep one of them"):
        read_feedback(tmp_path, strict=True)


def test_metadata_without_captions(tmp_path):
    for name in ("liked", "disliked"):
        (tmp_path / name).mkdir()
    (tmp_path / "metadata.csv").write_text("file_name,tags\nliked/x.png,y\n")
    with pytest.raises(ValueError, match=r"metadata\.csv needs .* prompt; missing: prompt; found: file_name, tags"):
        read_feedback(tmp_path)


def test_a_broken_line_is_numbered(folder):
    (folder / "likes.jsonl").write_text('{"image": "a.png", "prompt": "x", "liked": 1}\n{"image": \n')
    with pytest.raises(ValueError, match=r"likes\.jsonl, line 2, cannot be read as JSON: "):
        read_feedback(folder / "likes.jsonl")


def test_comparisons_and_pair_ids_give_pairs_and_survive_the_way_to_disk(folder):
    """One id may hold a whole ranking; one image may stand in many comparisons, which ids cannot tell."""
    paths = [folder / "a.png", folder / "b.png"] * 3
    table = make_feedback(paths, ["x"] * 6, [1, 0, 1, 1, 0, 0], [0, 0, 0, 1, 1, -1])
    assert sorted(map(tuple, table.pairs.tolist())) == [(0, 1), (2, 1), (3, 4)]
    many = replace(table, comparisons=np.array([[0, 1], [2, 1], [3, 0]]))
    for name in ("out.csv", "out.parquet"):
        assert read_feedback(write_feedback(many, folder / name)).pairs.tolist() == [[0, 1], [2, 1], [3, 0]]
    assert many.subset([3, 1, 0]).pairs.tolist() == [[2, 1], [0, 2]]
    with pytest.raises(ValueError, match="comparisons must be rows of 6 images, got rows 0 to 6"):
        replace(table, comparisons=np.array([[0, 6]]))
    with pytest.raises(ValueError, match=r"written as \.csv or \.parquet, got 'out\.txt'"):
        write_feedback(many, folder / "out.txt")
    (folder / "few.csv").write_text("image,prompt,liked\na.png,x,1\n")
    (folder / "out.pairs.parquet").rename(folder / "few.pairs.parquet")
    with pytest.raises(ValueError, match=r"few\.pairs\.parquet names rows of few\.csv as it was before it was sorted"):
        read_feedback(folder / "few.csv")


@given(st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=30), st.floats(0, 1), st.integers(0, 5))
def test_a_split_shares_no_prompt_and_loses_no_row(prompts, fraction, seed):
    table = make_feedback([f"{i}.png" for i in range(len(prompts))], prompts, [1] * len(prompts))
    try:
        train, held_out = table.split_by_prompt(fraction, seed)
    except ValueError as error:  # the draw holds out every prompt
        assert "leaves no liked image" in str(error) and fraction < 1
        return
    assert not set(train.prompts) & set(held_out.prompts) and len(train) + len(held_out) == len(table)
    assert set(train.images) | set(held_out.images) == set(table.images)


def test_a_split_depends_on_the_prompt_alone():
    prompts = [f"prompt {i}" for i in range(2000)]
    table = make_feedback(["a.png"] * 2000, prompts, [1] * 2000)
    _, held_out = table.split_by_prompt(0.1)
    assert abs(len(held_out) - 200) < 60  # four standard deviations of the binomial are 54
    shouted = make_feedback(["a.png"] * 2000, [f"  {p.upper()} " for p in prompts], [1] * 2000).split_by_prompt(0.1)[1]
    assert [p.strip().lower() for p in shouted.prompts] == list(held_out.prompts)
    assert table.split_by_prompt(0.1, seed=1)[1].prompts != held_out.prompts
    with pytest.raises(ValueError, match=r"held_out_fraction must be in \[0, 1\], got 2"):
        table.split_by_prompt(2)


def test_a_camera_s_orientation_is_applied(tmp_path):
    picture, exif = Image.new("RGB", (6, 4), "red"), Image.Exif()
    exif[0x0112] = 6  # taken with the camera turned by a quarter
    picture.save(tmp_path / "turned.jpg", exif=exif)
    assert load_image(tmp_path / "turned.jpg").size == (4, 6)


def test_a_written_table_reads_back_the_same(folder):
    table = make_feedback([folder / "a.png", folder / "b.png"], ['says "hi"', "$5, <b>"], ["like", 0], [3, 4])
    back = read_feedback(write_feedback(table, folder / "out.csv"))
    assert back.prompts == table.prompts and back.pair_ids.tolist() == [3, 4]
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
        ("image,prompt,liked\nc.png,x,1\n", FileNotFoundError, "row 1: image 'c.png' does not exist"),
        ("image,prompt,liked\n../a.png,x,1\n", ValueError, "row 1: image '../a.png' leaves the folder"),
        ("image,prompt,liked\n/etc/passwd,x,1\n", ValueError, "leaves the folder"),
        ("image,prompt,liked\n,x,1\n", ValueError, "row 1: image must be a file name, got ''"),
        ("image,prompt,liked\n", ValueError, "holds no feedback"),
        ("", ValueError, "missing: image, prompt, liked; found: none"),
        ('image,prompt,liked\na.png,"x,1\n', ValueError, "likes.csv cannot be read as CSV: unexpected end of data"),
        (
            "image,prompt,liked\na.png,a dog, running,1\n",
            ValueError,
            "row 1: expected 3 fields as in the header, got 4;",
        ),
        ("image,prompt,liked\na.png,x\n", ValueError, "row 1: expected 3 fields as in the header, got 2"),
        ("image,prompt,prompt,liked\na.png,x,y,1\n", ValueError, "names the column 'prompt' more than once"),
        ("image,file_name,prompt,liked\na.png,a.png,x,1\n", ValueError, "two columns for image: image and file_name"),
        ("image,prompt,liked,pair_id\na.png,x,1,7\nb.png,x,0,1.5\n", ValueError, "row 2: pair_id must be an integer"),
        ("image,prompt,split\na.png,x,exclusive\n", ValueError, "row 1: split must be one of exclusive_win, inter"),
        ("image,prompt,rank\na.png,x,first\n", ValueError, "row 1: rank must be a number, 1 for the best, got 'first'"),
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
    with pytest.raises(ValueError, match=r"must be a \.csv, \.tsv, \.jsonl, \.parquet or \.json file"):
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
    monkeypatch.setattr("dkto.data.images.MAX_PIXELS", 99)
    Image.new("RGB", (10, 10)).save(tmp_path / "big.png")
    with pytest.raises(ValueError, match="10 x 10 pixels, more than 99"):
        load_image(tmp_path / "big.png")


def test_tables_refuse_unequal_lengths():
    with pytest.raises(ValueError, match="must have one length, got 1, 2, 1 and 1"):
        FeedbackTable((None,), ("a", "b"), np.array([True]), np.array([-1]))


def test_a_user_who_contradicts_himself_turns_likes_and_comparisons():
    likes = [True, False] * 500
    table = make_feedback([f"{i}.png" for i in range(1000)], [f"p{i // 2}" for i in range(1000)], likes)
    compared = replace(table, comparisons=np.arange(1000).reshape(500, 2))
    turned = compared.flipped(0.3, seed=1)
    share = (turned.is_desirable != compared.is_desirable).mean()
    swapped = (turned.comparisons[:, 0] != compared.comparisons[:, 0]).mean()
    assert 0.25 < share < 0.35 and 0.22 < swapped < 0.38
    assert (np.sort(turned.comparisons, axis=1) == compared.comparisons).all() and turned.images == table.images
    assert (compared.flipped(0.3, seed=1).is_desirable == turned.is_desirable).all()
    assert (table.flipped(0.0).is_desirable == table.is_desirable).all() and table.flipped(0.3).comparisons is None
    with pytest.raises(ValueError, match=r"rate must be in \[0, 0\.5\], got 0\.6"):
        table.flipped(0.6)


def test_a_contradiction_turns_a_comparison_and_leaves_none_out():
    """Likes that are turned one by one would make both pictures of a pair liked, and the pair be lost."""
    table = make_feedback(
        [f"{i}.png" for i in range(1000)],
        [f"p{i // 2}" for i in range(1000)],
        [True, False] * 500,
        np.arange(1000) // 2,
    )
    turned = table.flipped(0.3, seed=1)
    assert len(turned.pairs) == len(table.pairs) == 500
    assert 0.22 < (turned.pairs[:, 0] != table.pairs[:, 0]).mean() < 0.38
    assert table.flipped(0.0).comparisons is None


def test_shuffled_likes_keep_images_and_class_sizes():
    table = make_feedback([f"{i}.png" for i in range(40)], ["p"] * 40, [i < 20 for i in range(40)])
    control = table.shuffled_likes(0)
    assert control.images == table.images
    assert control.is_desirable.sum() == 20
    assert (control.is_desirable != table.is_desirable).any()
    assert (control.is_desirable == table.shuffled_likes(0).is_desirable).all()


def test_comparisons_of_a_former_table_are_not_taken_for_this_one(folder):
    images = [folder / "a.png", folder / "b.png"]
    compared = FeedbackTable(tuple(images), ("x", "y"), np.array([True, False]), np.array([-1, -1]), np.array([[0, 1]]))
    write_feedback(compared, folder / "out.csv")
    assert read_feedback(folder / "out.csv").pairs.tolist() == [[0, 1]]
    write_feedback(make_feedback(images, ["x", "y"], [0, 1]), folder / "out.csv")
    assert len(read_feedback(folder / "out.csv").pairs) == 0


def test_a_file_of_another_kind_under_an_images_name_is_not_decoded(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.eps")
    (tmp_path / "a.eps").rename(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"image .*a\.png cannot be read"):
        load_image(tmp_path / "a.png")


def test_a_prompt_that_is_none_and_one_out_of_the_folder_are_refused(tmp_path):
    folder = tmp_path / "likes"
    for name in ("liked", "disliked"):
        (folder / name).mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(folder / name / "x.png")
    (folder / "metadata.jsonl").write_text('{"file_name": "liked/x.png", "caption": null}\n')
    with pytest.raises(ValueError, match=r"metadata\.jsonl, row 1: prompt must be text, got None"):
        read_feedback(folder)
    (folder / "metadata.jsonl").unlink()
    (tmp_path / "secret.txt").write_text("a secret")
    (folder / "liked" / "x.txt").symlink_to(tmp_path / "secret.txt")
    (folder / "disliked" / "x.txt").write_text("a star")
    with pytest.raises(ValueError, match=r"image 'liked/x\.txt' leaves the folder"):
        read_feedback(folder)


def test_gamma_of_one_draws_one_class_of_two(folder):
    table = make_feedback([folder / "a.png", folder / "b.png"], ["x", "y"], [0, 1])
    text = describe_feedback(table, held_out_fraction=0.0, desirable_fraction=1.0)
    assert "gamma 1.0: only liked images are drawn" in text
