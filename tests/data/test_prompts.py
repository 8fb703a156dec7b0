import json
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest

from dkto.data.prompts import HUB_SETS, PROMPT_SETS, WORLD_SETS, PromptSet, check_disjoint, load_prompts, read_prompts
from dkto.world.scenes import STYLES, parse, prompts_for, split_of


def test_the_worlds_test_prompts_are_by_style_and_none_is_a_training_prompt():
    found = load_prompts("world_test", count=200)
    assert Counter(found.styles) == dict.fromkeys(STYLES, 50) and len(set(found.prompts)) == 200
    assert [parse(prompt).style for prompt in found.prompts] == list(found.styles)
    training = set(prompts_for("train", 3000)) | set(prompts_for("validation", 300))
    assert not training & set(found.prompts)
    assert {split_of(prompt) for prompt in found.prompts} == {"test"}
    assert {split_of(prompt) for prompt in load_prompts("world_validation", count=40).prompts} == {"validation"}


def test_neutral_world_prompts_ask_for_no_red():
    found = load_prompts("world_neutral")
    assert len(found) > 20 and not any("red " in p or "pink" in p or "on a grey" not in p for p in found.prompts)
    assert load_prompts("world_neutral", count=8).prompts == found.prompts[:8]
    assert len(load_prompts("neutral", count=3)) == 3


FILES = {
    "x.txt": "a star\n\n a ring \na star\n",
    "x.tsv": 'Prompt\tCategory\tChallenge\na star\tOutdoor Scenes\tBasic\na sign "STOP"\tArts\tBasic\n',
    "x.csv": "caption,style\na star,icon\n",
    "x.json": json.dumps(["a star", "a ring"]),
    "rows.json": json.dumps([{"prompt": "a star", "style": "toy"}]),
    "by_style.json": json.dumps({"toy": ["a star"], "icon": ["a ring"]}),
    "x.jsonl": '{"text": "a star"}\n{"text": "a ring"}\n',
}
EXPECTED = {
    "x.txt": [("a star", ""), ("a ring", "")],
    "x.tsv": [("a star", "Outdoor Scenes"), ('a sign "STOP"', "Arts")],
    "x.csv": [("a star", "icon")],
    "x.json": [("a star", ""), ("a ring", "")],
    "rows.json": [("a star", "toy")],
    "by_style.json": [("a star", "toy"), ("a ring", "icon")],
    "x.jsonl": [("a star", ""), ("a ring", "")],
}


@pytest.mark.parametrize("name", FILES)
def test_every_format_is_read(tmp_path, name):
    (tmp_path / name).write_text(FILES[name])
    found = load_prompts(tmp_path / name)
    assert list(zip(found.prompts, found.styles, strict=True)) == EXPECTED[name]


def test_parquet_and_folders_are_read(tmp_path):
    pd.DataFrame({"caption": ["a star", "a star", "a ring"], "jpg_0": [b"1", b"2", b"3"]}).to_parquet(
        tmp_path / "x.parquet"
    )
    assert read_prompts(tmp_path / "x.parquet").prompts == ("a star", "a ring")
    folder = tmp_path / "hps"
    folder.mkdir()
    for style in ("anime", "photo"):
        (folder / f"{style}.json").write_text(json.dumps([f"{style} {i}" for i in range(5)]))
    found = load_prompts(folder)
    assert Counter(found.styles) == {"anime": 5, "photo": 5}
    assert Counter(load_prompts(folder, count=4).styles) == {"anime": 2, "photo": 2}


def test_taking_is_even_repeatable_and_in_order():
    whole = PromptSet("x", tuple("abcdefgh"), tuple("1111" + "2222"))
    some = whole.take(5, seed=3)
    assert some == whole.take(5, seed=3) and sorted(some.prompts) == list(some.prompts)
    assert Counter(some.styles) == {"1": 3, "2": 2}
    assert whole.take(0) is whole
    assert {whole.take(2, seed=s).prompts for s in range(20)} > {whole.take(2).prompts}
    with pytest.raises(ValueError, match=r"count must be in \[1, 8\], got 9"):
        whole.take(9)


def test_a_style_with_few_prompts_gives_all_and_the_others_what_it_lacks():
    whole = PromptSet("x", tuple(map(str, range(12))), tuple("aaaaaa" + "bbbbb" + "c"))
    assert Counter(whole.take(9).styles) == {"a": 4, "b": 4, "c": 1}
    assert Counter(whole.take(11).styles) == {"a": 5, "b": 5, "c": 1}
    assert whole.take(12) == whole


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A local folder that stands for the hub."""
    asked = []

    def download(hub_id, file, repo_type):
        asked.append((hub_id, file, repo_type))
        path = tmp_path / hub_id / file
        if not path.exists():
            raise OSError("offline")
        return str(path)

    class Files:
        def glob(self, pattern):
            asked.append(pattern)
            return [str(path) for path in tmp_path.glob(pattern.removeprefix("datasets/"))]

        def open(self, path):
            return open(path, "rb")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setattr("huggingface_hub.HfFileSystem", Files)
    return tmp_path, asked


def test_the_papers_sets_come_from_the_hub_with_their_styles(hub):
    folder, asked = hub
    place = folder / "zhwang/HPDv2/benchmark"
    place.mkdir(parents=True)
    for style in ("anime", "concept-art", "paintings", "photo"):
        (place / f"{style}.json").write_text(json.dumps([f"{style} {i}" for i in range(30)]))
    found = load_prompts("hps_v2", count=100)
    assert Counter(found.styles) == dict.fromkeys(("anime", "concept-art", "paintings", "photo"), 25)
    assert asked[0] == ("zhwang/HPDv2", "benchmark/anime.json", "dataset")
    mirror = folder / "me/copy"
    mirror.mkdir(parents=True)
    (mirror / "PartiPrompts.tsv").write_text(FILES["x.tsv"])
    assert load_prompts("parti_prompts", hub_id="me/copy").styles == ("Outdoor Scenes", "Arts")
    data = folder / "pickapic-anonymous/pickapic_v1/data"
    data.mkdir(parents=True)
    for part, captions in enumerate((["a", "b"], ["b", "c"])):
        frame = pd.DataFrame({"caption": captions, "jpg_0": [b"x", b"y"]})
        frame.to_parquet(data / f"test-0000{part}-of-00002.parquet")
    assert load_prompts("pick_a_pic_test").prompts == ("a", "b", "c")


@pytest.mark.parametrize("name", HUB_SETS)
def test_without_the_hub_one_sentence_says_what_to_do(hub, name):
    with pytest.raises(FileNotFoundError, match=rf"prompt set {name} cannot be fetched from the hub's .*hub_id, or"):
        load_prompts(name)


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("x.csv", "words\na\n", r"x\.csv needs a column prompt, caption or text, got words"),
        ("x.csv", "prompt,style\na,b\n,b\n", r"x\.csv, row 2: prompt must be text, got ''"),
        ("x.json", "{", r"x\.json cannot be read as JSON"),
        ("x.json", '{"prompt": ["a"], "style": ["toy"]}', r"x\.json holds columns: write a list of rows"),
        ("x.json", "3", r"x\.json must hold a list of prompts, a list of rows, or lists of prompts by style"),
        ("x.json", '["a", 3]', "must hold a list of prompts"),
        ("x.json", '{"toy": ["a", " "]}', "row 2: prompt must be text, got ' '"),
        (
            "x.json",
            '[{"prompt": "a", "style": ["toy", "icon"]}]',
            r"x\.json, row 1: style must be text, got \['toy', 'icon'\]",
        ),
        ("x.txt", "\n \n", r"x\.txt holds no prompt"),
        ("x.csv", "", r"x\.csv holds no prompt"),
        (
            "x.csv",
            "prompt,style\na dog, running,photo\n",
            r"x\.csv, row 1: expected 2 fields as in the header, got 3; a f",
        ),
        ("x.csv", "prompt\na\na dog, running\n", r"x\.csv, row 2: expected 1 fields as in the header, got 2"),
        ("x.csv", 'prompt\n"a\n', r"x\.csv cannot be read as CSV: unexpected end of data"),
        ("x.csv", "prompt,prompt\na,b\n", r"x\.csv names the column 'prompt' more than once"),
        ("x.tsv", "prompt\tstyle\na\n", r"x\.tsv, row 1: expected 2 fields as in the header, got 1"),
        ("x.jsonl", '{"prompt": "a"}\n3\n', r"x\.jsonl must hold a list of prompts, a list of rows"),
        ("x.jsonl", '{"prompt": "a"}\n{\n', r"x\.jsonl, line 2, cannot be read as JSON"),
        ("x.parquet", "no parquet", r"x\.parquet cannot be read as Parquet"),
        ("x.pdf", "", r"prompts must be a \.txt, \.json, .* file, got x\.pdf"),
    ],
)
def test_files_that_are_wrong_are_named(tmp_path, name, text, sentence):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=sentence):
        load_prompts(tmp_path / name)


def test_what_spreadsheets_write_is_read_as_it_stands(tmp_path):
    tsv = 'prompt\tstyle\r\n"NA" on a sign\tphoto\r\n"a dog\tphoto\r\n"say ""hi"""\tphoto\r\nNA\tphoto\r\n'
    (tmp_path / "x.tsv").write_bytes(b"\xef\xbb\xbf" + tsv.encode())
    found = read_prompts(tmp_path / "x.tsv")
    assert found.prompts == ('"NA" on a sign', '"a dog', 'say "hi"', "NA") and set(found.styles) == {"photo"}
    (tmp_path / "x.csv").write_bytes('\ufeffprompt,style\r\n"a dog, running",photo\r\nNA,\r\n'.encode())
    assert read_prompts(tmp_path / "x.csv") == PromptSet("x", ("a dog, running", "NA"), ("photo", ""))
    (tmp_path / "x.txt").write_bytes("\ufeffa dog\u2028running\r\nNA\n".encode())
    assert read_prompts(tmp_path / "x.txt").prompts == ("a dog\u2028running", "NA")


@pytest.mark.parametrize(("name", "count"), [*((name, -1) for name in WORLD_SETS), ("world_test", 100_000)])
def test_a_world_set_says_how_many_prompts_it_has(name, count):
    with pytest.raises(ValueError, match=rf"count must be in \[0, \d+\] for prompt set {name}, .* got {count}"):
        load_prompts(name, count=count)


def test_judged_prompts_were_not_used_before():
    check_disjoint(judged=["a", "b"], validation=["c"], training=[])
    with pytest.raises(ValueError, match="judged and validation prompts must differ, but share 2 of 3, the first 'b'"):
        check_disjoint(judged=["a", "b", "b", "c"], validation=["c", "b"])
    some, more = (load_prompts("world_validation", count=count, seed=0).prompts for count in (4, 8))
    with pytest.raises(ValueError, match="judged and training prompts must differ, but share 4 of 8"):
        check_disjoint(judged=more, validation=[], training=some)
    assert {split_of(prompt) for prompt in load_prompts("world_train", count=40).prompts} == {"train"}


def test_parquet_without_prompts_is_refused(tmp_path):
    pd.DataFrame({"jpg": [b"1"]}).to_parquet(tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=r"needs a column prompt, caption or text, got jpg"):
        load_prompts(tmp_path / "x.parquet")


def test_unknown_sets_get_the_nearest():
    with pytest.raises(FileNotFoundError, match=r"did you mean 'world_test'\? known: world_test, "):
        load_prompts("world_tets")
    with pytest.raises(ValueError, match=r"hub_id is for the sets hps_v2, .*, pick_a_pic_validation, got it with"):
        load_prompts("world_test", hub_id="a/b")
    assert set(PROMPT_SETS) >= {"world_test", "hps_v2"} and not Path("hps_v2").exists()


def test_prompts_of_composition_are_six_kinds_and_geneval_s_own_file_is_read_by_tag(tmp_path):
    found = load_prompts("composition")
    assert len(found) == len(set(found.prompts)) == 120 and len(set(found.styles)) == 6
    assert load_prompts("composition", count=12).styles.count("number") == 2
    assert {"a photo of an apple", "a photo of two apples", "a photo of an orange book"} <= set(found.prompts)
    rows = [
        {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
        {"tag": "colors", "include": [{"class": "cup", "count": 1, "color": "red"}], "prompt": "a photo of a red cup"},
    ]
    (tmp_path / "evaluation_metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert load_prompts(tmp_path / "evaluation_metadata.jsonl").styles == ("single_object", "colors")


def test_a_list_of_prompts_with_empty_paths_beside_them_is_read(tmp_path):
    """As the test prompts of Pick-a-Pic v2 lie in the repositories that compare on them."""
    row = {"gen_image_path": "", "raw_image_path": "", "metadata": {}}
    (tmp_path / "papv2.json").write_text(json.dumps([{"prompt": p, **row} for p in ("a star", "a ring", "a star")]))
    assert load_prompts(tmp_path / "papv2.json").prompts == ("a star", "a ring")
