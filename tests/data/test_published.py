"""Small files in the schemas of published data, made here, with the counts that they must give."""

import io
import json
import sqlite3
import tarfile

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dkto.cli import main
from dkto.data import published
from dkto.data.feedback import read_feedback
from dkto.data.pairs import convert_pairs
from dkto.data.schemas import SCHEMAS


def jpeg(seed):
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(buffer, "JPEG")
    return buffer.getvalue()


def as_image(seed):
    """As `datasets` writes an image into Parquet."""
    return {"bytes": jpeg(seed), "path": None}


def images(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(folder / name)


TABLES = """
CREATE TABLE survey (id INTEGER, qid INTEGER, rating INTEGER);
CREATE TABLE generations (id INTEGER PRIMARY KEY, sid INTEGER, method INTEGER, prompt TEXT, verified INTEGER);
CREATE TABLE images (id INTEGER PRIMARY KEY, gid INTEGER, idx INTEGER);
CREATE TABLE paths (iid INTEGER, path TEXT);
CREATE TABLE ratings (sid INTEGER, iid INTEGER, rating INTEGER, verified INTEGER);
INSERT INTO generations VALUES (1, 1, 2, 'a star', 1), (2, 1, 2, 'a ring', 1);
INSERT INTO images VALUES (10, 1, 0), (11, 1, 1), (12, 2, 0);
INSERT INTO paths VALUES (10, 'a/0.png'), (11, 'a/1.png'), (12, 'gone.png');
"""
RATED = [(1, 10, 9), (1, 11, 3), (2, 10, 4), (2, 11, 2), (2, 12, 8), (1, 12, None), (1, 99, 5)]


def simulacra(path, ratings, extra=""):
    database = sqlite3.connect(path)
    database.executescript(TABLES + extra)
    database.executemany("INSERT INTO ratings VALUES (?, ?, ?, 1)", ratings)
    database.commit()
    database.close()
    return path


def test_simulacra_is_read_with_each_user_by_their_own_ratings(tmp_path):
    images(tmp_path, "a/0.png", "a/1.png")
    path = simulacra(tmp_path / "sac.sqlite", RATED)
    with pytest.warns(UserWarning, match="set aside: 2, kept: 4; .*'gone.png' does not exist"):
        table = read_feedback(path, score="rating", rule="user_z")
    assert table.prompts == ("a star",) * 4 and table.is_desirable.tolist() == [True, False, True, False]
    assert table.counts["users"] == 2 and table.counts["judgements"] == 4
    with pytest.warns(UserWarning, match="set aside: 2"):
        table = read_feedback(path, score="rating", rule="fixed", threshold=5, partition="mostly")
    assert [image.name for image in table.images] == ["0.png", "1.png"]
    assert table.is_desirable.tolist() == [False, False], "9 and 4 are no majority"
    with pytest.raises(ValueError, match=r"sac\.sqlite holds ratings, not likes: name them by score='rating', and a"):
        read_feedback(path)
    with pytest.raises(
        ValueError, match="needs the columns image, prompt, stars; missing: stars; found: image, prompt"
    ):
        read_feedback(path, score="stars")


def test_a_database_that_is_none_or_another_is_refused(tmp_path, monkeypatch):
    def read(name):
        return read_feedback(tmp_path / name, score="rating")

    (tmp_path / "text.sqlite").write_text("no database at all" * 50)
    with pytest.raises(ValueError, match=r"text\.sqlite cannot be read as a SQLite database: file is not a database"):
        read("text.sqlite")
    view = simulacra(tmp_path / "view.db", [], "DROP TABLE paths; CREATE VIEW paths AS SELECT 10 AS iid, 'x' AS path;")
    with pytest.raises(ValueError, match=r"view\.db must hold the tables .*; paths is missing"):
        read(view.name)
    other = simulacra(tmp_path / "other.sqlite", [], "ALTER TABLE paths RENAME COLUMN path TO file;")
    with pytest.raises(ValueError, match="table paths, needs the columns iid, path; missing: path; found: iid, file"):
        read(other.name)
    whole = simulacra(tmp_path / "whole.sqlite", RATED)
    monkeypatch.setattr(published, "MOST_ROWS", 5)
    with pytest.raises(ValueError, match="table ratings, must have at most 5 rows to be read"):
        read(whole.name)
    monkeypatch.setattr(published, "LARGEST_DATABASE", 100)
    with pytest.raises(ValueError, match="must have at most 100 bytes to be read, got"):
        read(whole.name)


def test_a_path_in_a_database_may_not_leave_its_folder_and_the_file_stays_as_it_was(tmp_path):
    images(tmp_path, "secret.png", "in/a/0.png")
    path = simulacra(
        tmp_path / "in" / "sac.sqlite", RATED[:2], "UPDATE paths SET path = '../secret.png' WHERE iid = 11;"
    )
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"row 2: image '\.\./secret\.png' leaves the folder"):
        read_feedback(path, score="rating")
    assert path.read_bytes() == before and sorted(p.name for p in path.parent.iterdir()) == ["a", "sac.sqlite"]


HUB = "https://hub.example/datasets/some/images/resolve/main/"


def preference(number, *responses, status=None, prompt="a star", **changes):
    files = {f"image_{i}": f"{HUB}{side}/{number}.png" for i, side in ((1, "dev"), (2, "sd"))}
    row = {"id": str(number), "images": files | {"prompt": prompt} | changes, "preference.responses": list(responses)}
    row["preference.responses.users"] = [f"user {i}" for i in range(len(responses))]
    return row | {"preference.responses.status": status or ["submitted"] * len(responses)}


def test_open_image_preferences_both_good_and_both_bad_are_single_judgements(tmp_path):
    images(tmp_path, *(f"{side}/{number}.png" for side in ("dev", "sd") for number in range(4)))
    path = tmp_path / "results.parquet"
    rows = [
        preference(0, "both_good", "image_1", "image_1"),
        preference(1, "both_bad"),
        preference(2, "image_2", "image_1", status=["submitted", "discarded"]),
        preference(3, "image_3"),
        preference(4, "image_1"),
        {**preference(3), "preference.responses": None},
        preference(3, "image_1", status=["draft"]),
    ]
    pq.write_table(pa.Table.from_pylist(rows), path)
    with pytest.warns(UserWarning, match=r"set aside: 5, kept: 6; .*row 5: image 'dev/4\.png' does not exist"):
        table = read_feedback(path)
    likes = {f"{p.parent.name}/{p.stem}": bool(v) for p, v in zip(table.images, table.is_desirable, strict=True)}
    assert likes == {"dev/0": True, "sd/0": True, "dev/1": False, "sd/1": False, "dev/2": False, "sd/2": True}
    assert (table.counts["both_good"], table.counts["both_bad"], table.counts["comparisons"]) == (1, 1, 5)
    assert table.pairs.tolist() == [[0, 1], [0, 1], [5, 4]], "both good and both bad compare nothing"
    with pytest.warns(UserWarning, match="set aside: 5"):
        mostly = read_feedback(path, partition="mostly").is_desirable.tolist()
    assert mostly == [True, False, False, False, False, True]
    with pytest.raises(ValueError, match=r"row 4: a response must be one of image_1, .*, got \['image_3'\]"):
        read_feedback(path, strict=True)
    rows = [preference(0, "image_1", image_2=f"{HUB}../../secret.png")]
    pq.write_table(pa.Table.from_pylist(rows), path)
    with pytest.raises(ValueError, match=r"row 1: image '\.\./\.\./secret\.png' leaves the folder"):
        read_feedback(path)


def test_of_hpdv3_the_first_path_is_the_preferred_one(tmp_path):
    images(tmp_path, "images/a.jpg", "images/b.jpg", "images/c.jpg")
    rows = [("a", "b"), ("b", "c"), ("a", "c")]
    more = {"model1": "x", "model2": "y", "choice_dist": [3, 1], "confidence": 0.9, "source": "z"}
    entries = [{"prompt": "a star", "path1": f"images/{i}.jpg", "path2": f"images/{j}.jpg", **more} for i, j in rows]
    (tmp_path / "train.json").write_text(json.dumps(entries))
    table = read_feedback(tmp_path / "train.json")
    assert table.is_desirable.tolist() == [True, True, False] and len(table.pairs) == 3
    assert read_feedback(tmp_path / "train.json", partition="always").is_desirable.tolist() == [True, False, False]
    (tmp_path / "bad.json").write_text(json.dumps([{**entries[0], "path2": 7}]))
    with pytest.raises(ValueError, match=r"bad\.json, entry 1: image must be a file name, got 7"):
        read_feedback(tmp_path / "bad.json")


def test_single_ratings_of_imagerewarddb_and_evalmuse_are_scores(tmp_path):
    images(tmp_path, "images/a.webp", "images/b.webp")
    rows = [
        {"image_path": f"images/{name}.webp", "prompt": "x", "prompt_id": "1", "rank": rank, "overall_rating": rating}
        for name, rank, rating in (("a", 1, 7), ("b", 2, 2))
    ]
    pd.DataFrame(rows).to_parquet(tmp_path / "metadata.parquet")
    assert read_feedback(tmp_path / "metadata.parquet").is_desirable.tolist() == [True, False]
    table = read_feedback(tmp_path / "metadata.parquet", score="overall_rating", weight_scale=1.0)
    assert table.is_desirable.tolist() == [True, False] and table.weights.tolist() == [3.5, 3.5]
    entries = [
        {"prompt_id": f"T2I_{i}", "prompt": "x", "img_path": f"images/{name}.webp", "total_score": score}
        for i, (name, score) in enumerate((("a", 4.2), ("b", 1.5)))
    ]
    (tmp_path / "train_list.json").write_text(json.dumps([{**e, "element_score": {"star": 1.0}} for e in entries]))
    table = read_feedback(tmp_path / "train_list.json", score="total_score", rule="fixed", threshold=3)
    assert table.is_desirable.tolist() == [True, False]


RICH = {"alignment_score": 4.5, "coherence_score": 3.0}
RATINGS = {"image_text_alignment_rating": 5, "fidelity_rating": 7}


def rich(seed, image, prompt):
    return {image: as_image(seed), prompt: "a star", **RICH, "style_score": 2.0 + seed, "style_score_norm": seed / 4}


ROWS = {
    "rapidata_rich": lambda i: rich(i, "image", "prompt") | {"word_scores": "[]", "coherence_heatmap": None},
    "rapidata_rich_32k": lambda i: rich(i, "image_name", "sentence"),
    "image_reward_db": lambda i: {"image": as_image(i), "prompt": "a star", **RATINGS, "overall_rating": 3 + i},
    "vision_reward_db": lambda i: (
        {"image": jpeg(i), "internal_id": f"v{i}", "prompt": "a star", "url": "u"}
        | {"annotation": {"symmetry": i - 1, "color aesthetic": 1}}
    ),
    "evalmuse": lambda i: {"image": as_image(i), "prompt": "a star", "total_score": str(1.5 * i)},
}
ASKED = {
    "rapidata_rich": "style_score_norm",
    "rapidata_rich_32k": "style_score",
    "image_reward_db": "overall_rating",
    "vision_reward_db": "symmetry",
    "evalmuse": "total_score",
}


@pytest.mark.parametrize("name", ROWS)
def test_images_with_scores_are_unpacked_and_read_by_a_rule(name, tmp_path, capsys):
    bad = {key: (None if key in ("image", "image_name") else value) for key, value in ROWS[name](9).items()}
    pq.write_table(pa.Table.from_pylist([*map(ROWS[name], range(4)), bad]), tmp_path / "s.parquet")
    with pytest.warns(UserWarning, match="rows set aside: 1 of 5, most of them as: image .* must be bytes"):
        assert main(["unpack", str(tmp_path / "s.parquet"), "--output-dir", str(tmp_path / "out")]) == 0
    path = tmp_path / "out" / "scores.parquet"
    assert f"scores are in {path}" in (said := capsys.readouterr().out) and f'"scores/{ASKED[name]}": 4' in said
    table = read_feedback(path, score=ASKED[name])
    assert table.is_desirable.tolist() == [False, False, True, True] and table.prompts == ("a star",) * 4
    assert [image.read_bytes() for image in table.images] == [jpeg(i) for i in range(4)]


def test_votes_of_rapidata_go_to_the_majority(tmp_path):
    def row(first, second, votes):
        sides = {"image1": as_image(first), "image2": as_image(second)}
        paths = {"image1_path": f"flux/{first}.jpg", "image2_path": f"sd3/{second}.jpg"}
        return {"prompt": "a star", **sides, **paths, "votes_image1": votes[0], "votes_image2": votes[1]}

    rows = [row(1, 2, (7, 3)), row(1, 3, (2, 8)), row(4, 5, (5, 5)), row(6, 7, (0, 0))]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "s.parquet")
    with pytest.warns(UserWarning, match="1 of 4 rows are set aside.*whole numbers, not both 0"):
        table = read_feedback(convert_pairs(tmp_path / "s.parquet", tmp_path / "out"))
    assert table.is_desirable.tolist() == [True, False, True] and table.pairs.tolist() == [[0, 1], [2, 0]]


def test_chosen_images_of_the_binarised_set_are_liked(tmp_path):
    rows = [{"id": "1", "prompt": "a star", "chosen": as_image(1), "rejected": as_image(2), "category": "x"}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "s.parquet")
    table = read_feedback(convert_pairs(tmp_path / "s.parquet", tmp_path / "out"))
    assert table.is_desirable.tolist() == [True, False] and table.images[0].read_bytes() == jpeg(1)


def tar(path, members):
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            if isinstance(data, tarfile.TarInfo):
                archive.addfile(data)
                continue
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return path


def civitai(key, hearts, seed, **changes):
    about = {"id": key, "meta": {"prompt": "a star"}, "stats": {"likeCount": 3, "heartCountAllTime": hearts}}
    return [(f"{key}.jpg", jpeg(seed)), (f"{key}.json", json.dumps(about | changes).encode())]


def test_reactions_of_civitai_are_scores(tmp_path):
    link = tarfile.TarInfo("5.jpg")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    members = [*civitai(1, 0, 1), *civitai(2, 5, 2), *civitai("../../3", 9, 3), *civitai(4, 9, 4, meta=None)]
    members += [("5.jpg", link), ("5.json", b"{}"), ("6.json", b"not JSON"), ("6.jpg", jpeg(6)), ("7.txt", b"x")]
    source = tmp_path / "shards"
    source.mkdir()
    tar(source / "00000.tar", members)
    with pytest.warns(UserWarning, match="rows set aside: 3 of 6"):
        path = convert_pairs(source, tmp_path / "out", files="*.tar")
    with pytest.warns(UserWarning, match="1 of 3 scores lie on the threshold 5"):
        table = read_feedback(path, score="heart")
    assert [image.stem for image in table.images] == ["civitai-1", "civitai-3"]
    assert table.is_desirable.tolist() == [False, True]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "shards"]
    (source / "00001.tar").write_bytes(b"no archive")
    with pytest.raises(ValueError, match=r"00001\.tar cannot be read as an uncompressed \.tar"):
        convert_pairs(source, tmp_path / "more", files="*.tar")


def test_unknown_columns_and_mixed_shards_are_refused(tmp_path):
    shards = tmp_path / "shards"
    shards.mkdir()
    pq.write_table(pa.Table.from_pylist([{"image": as_image(1), "prompt": "x", "stars": 1}]), shards / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet is no form that is known; to be .* missing: .*; found: image"):
        convert_pairs(shards, tmp_path / "one")
    pq.write_table(pa.Table.from_pylist([ROWS["evalmuse"](1)]), shards / "a.parquet")
    row = {"prompt": "a star", "chosen": as_image(1), "rejected": as_image(2)}
    pq.write_table(pa.Table.from_pylist([row]), shards / "b.parquet")
    with pytest.raises(ValueError, match="shards with scores and shards with comparisons need a folder each"):
        convert_pairs(shards, tmp_path / "two")


def test_every_form_of_the_table_is_tested_here():
    elsewhere = {"pick_a_pic", "rapidata_votes", "open_image_preferences", "civitai"}
    assert set(SCHEMAS) == set(ROWS) | elsewhere
