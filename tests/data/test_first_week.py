"""What people bring in their first week: exports of spreadsheets, folders of other programs, ids that are long."""

import json
import os
import struct
import unicodedata
import zlib

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from dkto.data.feedback import make_feedback, read_feedback
from dkto.data.prompts import check_disjoint, load_prompts
from dkto.data.texts import LONGEST_CHUNK, prompt_in_png
from dkto.training.config import OnlineConfig

PARAMETERS = "a red star\nNegative prompt: blurry\nSteps: 20, Sampler: Euler a"


@pytest.fixture
def folder(tmp_path):
    for name in ("a.png", "b.png"):
        Image.new("RGB", (8, 8), "red").save(tmp_path / name)
    return tmp_path


def read(folder, data, name="likes.csv", **options):
    (folder / name).write_bytes(data.encode() if isinstance(data, str) else data)
    return read_feedback(folder / name, **options)


@pytest.mark.parametrize(
    "data",
    [
        "Image;Prompt ;LIKED\r\na.png;grün, rot;WAHR\r\n;;\r\nb.png;x;FALSCH\r\n;;\r\n".encode("utf-8-sig"),
        "sep=;\nimage;prompt;liked\na.png;grün, rot;vrai\nb.png;x;faux\n",
        "image\tprompt\tliked\na.png\tgrün, rot\t1\nb.png\tx\t0\n".encode("utf-16"),
        '\ufeffimage,prompt,liked,,\ra.png," grün, rot ",yes,,\rb.png,x,no,,\r',
    ],
)
def test_spreadsheets_are_read_with_their_separator_encoding_and_words(folder, data):
    table = read(folder, data)
    assert table.prompts == ("grün, rot", "x") and table.is_desirable.tolist() == [True, False]


def test_windows_1252_is_taken_where_it_can_be_told_and_only_there(folder):
    table = "image;prompt;liked\na.png;{};1\nb.png;x;0\n"
    with pytest.warns(UserWarning, match=r"likes\.csv is not UTF-8 and is read as Windows-1252"):
        assert read(folder, table.format("süßer Bär").encode("cp1252")).prompts[0] == "süßer Bär"
    for text, page in (
        ("звезда", "cp1251"),
        ("żółw", "cp1250"),
        ("Bär", "mac_roman"),
        ("星空", "gbk"),
        ("Bär", "cp850"),
    ):
        with pytest.raises(ValueError, match=r"likes\.csv cannot be read as UTF-8 text: line 2 holds the byte 0x"):
            read(folder, table.format(text).encode(page))


def test_rows_that_cannot_be_used_are_set_aside_with_their_reason(folder):
    rows = ["a.png,x,1", "gone1.png,x,0", ",,", "b.png,,0", "b.png,y,", "b.png,y,maybe", "b.png,y,0", "gone2.png,x,0"]
    data = "\n".join(["image,prompt,liked", *rows])
    with pytest.warns(UserWarning, match=r"set aside: 5, kept: 2; .*row 2: image 'gone1\.png' does .* \(and 1 more"):
        table = read(folder, data)
    assert [path.name for path in table.images] == ["a.png", "b.png"] and table.is_desirable.tolist() == [True, False]
    assert sorted(each["source_row"] for each in table.set_aside) == [2, 4, 5, 6, 8]
    assert "rows or images set aside: 5: " in str(table) and len(table.split_by_prompt(0.0)[0].set_aside) == 5
    with pytest.raises(ValueError, match=r"likes\.csv, row 4: prompt must be text, got ''"):
        read(folder, data, strict=True)


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        ("image,prompt,liked\na.png,x,1\nb.png,x,-1\n", r"row 2: liked must be 0/1, .*, got '-1'"),
        ("image,prompt,liked\na.png,x,like\nb.png,x,hate\n", r"row 2: liked must be .*, got 'hate'"),
        ("image,prompt,liked, Liked\na.png,x,1,0\n", r"names the column 'liked' more than once: 'liked' and ' Liked'"),
        (
            "image,prompt,liked\na.png,nan,1\nb.png,,0\n",
            r"each of 2 is set aside: .*row 1: prompt must be text, got 'nan'",
        ),
        ("image,prompt,rank,prompt_id\na.png,x,1,7\nb.png,y,2,7\n", "row 1: its prompt_id stands for two prompts"),
    ],
)
def test_what_means_something_else_is_refused_as_a_whole(folder, data, sentence):
    with pytest.raises(ValueError, match=sentence):
        read(folder, data)


BIG = [2**53, 2**53 + 1, 2**63 - 1, -1]


@pytest.mark.parametrize("name", ["likes.csv", "likes.jsonl", "likes.parquet", "likes.json"])
def test_pair_ids_are_exact_in_64_bits(folder, name):
    frame = pd.DataFrame({"image": ["a.png"] * 4, "prompt": list("wxyz"), "liked": 1})
    frame["pair_id"] = pd.array([*BIG[:3], None], dtype="Int64")
    rows = frame.astype(object).where(frame.notna(), None).to_dict("records")
    if name.endswith("parquet"):
        frame.to_parquet(folder / name)
    elif name.endswith("csv"):
        frame.to_csv(folder / name, index=False)
    else:
        lines = [json.dumps(row, default=int) for row in rows]
        (folder / name).write_text("\n".join(lines) if name.endswith("jsonl") else f"[{','.join(lines)}]")
    assert read_feedback(folder / name).pair_ids.tolist() == BIG


@pytest.mark.parametrize("value", ["9223372036854775808", "1.5", "1e5", "1,000", "-2", "x"])
def test_ids_that_are_none_are_refused_by_their_row(folder, value):
    with pytest.raises(ValueError, match=r"likes\.csv, row 2: pair_id must be an integer"):
        read(folder, f'image,prompt,liked,pair_id\na.png,x,1,7\nb.png,x,0,"{value}"\n')


def test_a_float_that_lost_its_last_digits_is_no_id(folder):
    frame = pd.DataFrame({"image": ["a.png"], "prompt": "x", "liked": 1, "pair_id": [2.0**53]})
    frame.to_parquet(folder / "x.parquet")
    with pytest.raises(ValueError, match=r"row 1: pair_id must be an integer .*, got 9007199254740992\.0"):
        read_feedback(folder / "x.parquet")
    with pytest.raises(ValueError, match="row 1: pair_id must be an integer"):
        make_feedback(["a.png"], ["x"], [1], [1.5])


def test_ids_that_join_prompts_or_too_many_images_are_said(folder, monkeypatch):
    with pytest.warns(UserWarning, match="1 pair ids join images of different prompts, the first 7"):
        read(folder, "image,prompt,liked,pair_id\na.png,x,1,7\nb.png,y,0,7\n")
    monkeypatch.setattr("dkto.data.feedback.MOST_PAIRS", 3)
    table = make_feedback(["a.png"] * 4, ["x"] * 4, [1, 1, 0, 0], [0] * 4)
    assert table.count_pairs() == 4
    with pytest.raises(ValueError, match="its values make 4 pairs, over 3"):
        table.pairs  # noqa: B018


def test_ranking_rows_without_prompt_id_are_ranked_by_their_prompt(folder):
    with pytest.warns(
        UserWarning, match=r"1 of 4 rows have no prompt_id, the first is row 2; they are ranked by their"
    ):
        table = read(folder, "image,prompt,rank,prompt_id\na.png,x,1,7\nb.png,x,2,\n" + "a.png,y,2,8\nb.png,y,1,8\n")
    assert table.counts["comparisons"] == 2 and len(table) == 2


def test_images_inside_a_table_and_absent_columns_are_said_in_the_files_own_words(folder):
    frame = pd.DataFrame({"image": [{"bytes": b"x" * 999, "path": None}], "text": "x", "label": 1})
    frame.to_parquet(folder / "x.parquet")
    with pytest.raises(
        ValueError, match=r"column 'image' holds .*; images inside a table are unpacked first"
    ) as caught:
        read_feedback(folder / "x.parquet")
    assert len(str(caught.value)) < 400
    frame.rename(columns={"image": "img"}).to_parquet(folder / "x.parquet")
    with pytest.raises(ValueError, match="missing: image; found: img, text, label"):
        read_feedback(folder / "x.parquet")


def test_names_of_other_systems_are_found_and_lead_out_of_no_folder(folder):
    (folder / "img").mkdir()
    (folder / "a.png").rename(folder / "img" / unicodedata.normalize("NFD", "Grün.png"))
    assert len(read(folder, "image,prompt,liked\nimg\\Grün.png,x,1\nb.png,x,0\n")) == 2
    with pytest.raises(ValueError, match="leaves the folder"):
        read(folder, "image,prompt,liked\n..\\a.png,x,1\n")


def liked_folder(tmp_path, **files):
    for name in ("liked", "disliked"):
        (tmp_path / name).mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "disliked" / "b.png")
    (tmp_path / "disliked" / "b.txt").write_text("a red star")
    for name, data in files.items():
        (tmp_path / "liked" / name.replace("__", ".")).write_bytes(data)
    return tmp_path / "liked"


def test_a_folder_is_read_without_droppings_and_what_is_left_out_is_named(tmp_path):
    liked = liked_folder(
        tmp_path, a__txt=b"\xef\xbb\xbfa red star\n", d__gif=b"x", d__txt=b"x", c__png=b"", c__txt=b"gr\xfcn"
    )
    Image.new("RGB", (4, 4)).save(liked / "a.jfif", format="JPEG")
    for name in ("._a.png", ".DS_Store", "Thumbs.db"):
        (liked / name).write_bytes(b"x")
    (liked / "2024-05").mkdir()
    with pytest.warns() as warned:
        table = read_feedback(tmp_path)
    assert table.prompts == ("a red star", "a red star") and table.is_desirable.tolist() == [True, False]
    said = sorted(str(each.message) for each in warned)
    assert any(
        "2 files or folders in it are not read: 'liked/2024-05/', 'liked/d.gif'; read are .bmp" in s for s in said
    )
    assert any("set aside: 1, kept: 2; " in s and "c.txt cannot be read as UTF-8 text: line 1" in s for s in said)


@pytest.mark.parametrize("kind", ["tEXt", "zTXt", "iTXt", "beside"])
def test_a_prompt_of_the_web_ui_is_read_without_what_it_adds(tmp_path, kind):
    liked, info = liked_folder(tmp_path), PngInfo()
    if kind == "iTXt":
        info.add_itxt("parameters", PARAMETERS, zip=True)
    elif kind != "beside":
        info.add_text("parameters", PARAMETERS, zip=kind == "zTXt")
    else:
        (liked / "a.txt").write_text(PARAMETERS)
    Image.new("RGB", (4, 4)).save(liked / "a.png", pnginfo=info)
    assert read_feedback(tmp_path).prompts == ("a red star", "a red star")


def test_a_bomb_of_text_in_a_png_is_passed_over(tmp_path):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + bytes(4)

    packed = b"parameters\0\0" + zlib.compress(bytes(50 * LONGEST_CHUNK))
    path = tmp_path / "a.png"
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"tEXt", b"parameters\0" + b"x" * LONGEST_CHUNK) + chunk(b"zTXt", packed)
    )
    assert prompt_in_png(path) == ""


def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "likes.csv")
    with pytest.raises(ValueError, match=r"likes\.csv must be a file or a folder"):
        read_feedback(tmp_path / "likes.csv")


@pytest.mark.parametrize("name", ["x.txt", "x.csv", "x.jsonl"])
def test_training_reads_prompts_as_drawing_does(tmp_path, name):
    text = {
        "x.txt": "\ufeffa star\n",
        "x.csv": "\ufeffStyle;Prompt\nicon;a star\n",
        "x.jsonl": '\ufeff{"text": "a star"}\n',
    }
    (tmp_path / name).write_text(text[name])
    config = OnlineConfig(prompts_file=tmp_path / name, output_dir=tmp_path / "out")
    assert config.prompts() == list(load_prompts(tmp_path / name).prompts) == ["a star"]
    (tmp_path / name).write_bytes(b"prompt\ngr\xfc\xfcn\n")
    with pytest.raises(ValueError, match=rf"{name} cannot be read as UTF-8 text: line 2 holds the byte 0xfc"):
        config.prompts()


def test_a_folder_of_prompts_names_what_it_leaves_out_and_follows_no_link_out_of_it(tmp_path):
    folder = tmp_path / "prompts"
    folder.mkdir()
    (folder / "icon.txt").write_text("a star\n")
    (folder / "more.doc").write_text("x")
    with pytest.warns(UserWarning, match=r"1 files or folders in it are not read: 'more\.doc'"):
        assert load_prompts(folder).prompts == ("a star",)
    (tmp_path / "secret.txt").write_text("x")
    (folder / "toy.txt").symlink_to(tmp_path / "secret.txt")
    with pytest.raises(ValueError, match=r"'toy\.txt' leaves the folder"):
        load_prompts(folder)


def test_one_idea_of_the_same_prompt_serves_splits_and_judging():
    with pytest.raises(ValueError, match="share 1 of 1"):
        check_disjoint(judged=["a  red Star "], training=["a red star"])
    forms = [unicodedata.normalize(form, "Grün") for form in ("NFC", "NFD")]
    for seed in range(20):
        prompts = [*forms, *(f"prompt {number}" for number in range(20))]
        held = make_feedback(["a.png"] * 22, prompts, [1, 0] * 11).split_by_prompt(0.5, seed)[1]
        assert len({*forms} & {*held.prompts}) in (0, 2) and 0 < len(held) < 22


def test_reading_does_not_look_up_an_image_twice(folder, monkeypatch):
    looked = []
    monkeypatch.setattr("dkto.data.folders.os.lstat", lambda path, stat=os.lstat: looked.append(path) or stat(path))
    table = read(folder, "image,prompt,liked\n" + "a.png,x,1\nb.png,y,0\n" * 500)
    assert (
        len([path for path in looked if str(path).endswith(".png")]) == 2
        and len(table) == 1000
        and np.unique(table.is_desirable).size == 2
    )
