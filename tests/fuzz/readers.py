"""Every public reader: a small valid input, what is damaged in it, the call, and what must hold of what it takes."""

import json
import random
import shutil
import sqlite3
import tarfile
from contextlib import closing
from dataclasses import fields, replace
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from finished_runs import leave
from PIL import Image
from tiny_models import make_tiny_sd
from tiny_study import PROMPT_STYLES, draw_folders, finish

from dkto.common.files import file_sha256
from dkto.common.tensors import weights_fingerprint, write_tensors
from dkto.data.encode import prepare_feedback
from dkto.data.encoded import PreparedFeedback
from dkto.data.feedback import make_feedback, read_feedback, write_feedback
from dkto.data.images import load_image
from dkto.data.pairs import convert_pairs
from dkto.data.prompts import load_prompts
from dkto.evaluation.manifest import image_path
from dkto.evaluation.scorers.weights import read_converted
from dkto.evaluation.scoring import score_images
from dkto.evaluation.study import StudySession, make_study
from dkto.evaluation.study_answers import read_answers, study_result
from dkto.models import load_model
from dkto.models.system import System
from dkto.objective.formula import compile_expression
from dkto.paper.train_all import read_settings, settings_origin
from dkto.runs.notebooks import declared_parameters
from dkto.runs.record import source_hash
from dkto.runs.sweeps import CHECKOUT, read_sweep
from dkto.runs.table import read_runs
from dkto.runs.yaml12 import read_yaml
from dkto.training.config import TrainConfig
from dkto.training.loop import train
from dkto.widgets import Explorer, Likes
from dkto.widgets.explorer import rewards_of_text
from dkto.widgets.likelog import LikeLog, Picture, pictures_in
from fuzz import oracles
from fuzz.damage import damage, damaged_bytes, damaged_json, damaged_value, odd
from fuzz.outcome import Shown

READERS: dict[str, "Reader"] = {}
PROMPTS = ["a star", "a ring, red", "a dot"]


class Reader:
    """One kind of input. `make` fills a folder once; a case gets a copy, in which one of `damaged` is changed."""

    name = ""
    damaged: tuple[str, ...] = ()  # files, or patterns
    places: tuple[str, ...] = ()  # words, beside the names of the files, that say where a mistake is

    def __init_subclass__(cls) -> None:
        READERS[cls.name] = cls()

    def make(self, folder: Path) -> None:
        """Write the valid input."""

    def spoil(self, rng: random.Random, folder: Path) -> object:
        """Change one thing; returns the value to be read where it is no file."""
        found = sorted(path for pattern in self.damaged for path in folder.glob(pattern) if path.is_file())
        damage(rng, rng.choice(found))
        return None

    def read(self, folder: Path, value: object) -> object:
        raise NotImplementedError

    def check(self, folder: Path, value: object, found: object, warned: bool) -> str | None:
        """What is wrong with what was accepted."""


BASE = Path()  # where the shared parts are made, see `use`


def use(folder: Path) -> None:
    """Make shared parts and valid inputs below this folder."""
    global BASE
    BASE = folder
    (folder / "outside").mkdir(parents=True)
    (folder / "outside" / "secret.txt").write_text("a secret that is no prompt")


@cache
def valid(name: str) -> Path:
    """The valid input of a reader, made once."""
    folder = BASE / "valid" / name
    folder.mkdir(parents=True)
    READERS[name].make(folder)
    return folder


@cache
def model() -> Path:
    return make_tiny_sd(BASE / "model")


@cache
def encoded() -> Path:
    return prepare_feedback(_table(BASE / "likes"), BASE / "prepared", str(model()))


@cache
def trained(lora_rank: int) -> Path:
    """A folder with a checkpoint after four steps; the training is not over."""
    folder = BASE / f"run-{lora_rank}"
    run = train(_config(folder, lora_rank))
    for _ in range(5):
        next(run)
    run.close()
    return folder


def _config(folder: Path, lora_rank: int):
    sizes = {"warmup_steps": 2, "max_train_steps": 8, "batch_size": 4, "checkpoint_every": 2}
    more = {"beta": 500.0, "learning_rate": 1e-3, "lora_rank": lora_rank}
    return TrainConfig(encoded(), folder, model=str(model()), **sizes, **more)


def _images(folder: Path, count: int) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{number}.png" for number in range(count)]
    for number, path in enumerate(paths):
        Image.fromarray(np.random.default_rng(number).integers(0, 255, (20, 24, 3), np.uint8)).save(path)
    return paths


def _table(folder: Path, **more):
    return make_feedback(_images(folder, 6), [PROMPTS[i % 3] for i in range(6)], [i % 2 for i in range(6)], **more)


def _rows() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "image": [f"{i}.png" for i in range(6)],
            "prompt": [PROMPTS[i % 3] for i in range(6)],
            "liked": ["like", "dislike"] * 3,
            "pair_id": [0, 0, 2**53, 2**53, -1, -1],
        }
    )


def _write(frame: pd.DataFrame, path: Path) -> None:
    match path.suffix:
        case ".csv":
            frame.to_csv(path, index=False)
        case ".jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in frame.to_dict("records")))
        case ".parquet":
            frame.to_parquet(path, index=False)


class _Feedback(Reader):
    name = "feedback"

    def make(self, folder):
        _images(folder, 6)
        _write(_rows(), folder / self.damaged[0])

    def read(self, folder, value):
        return read_feedback(folder / self.damaged[0])

    def check(self, folder, value, found, warned):
        return oracles.likes_of_table(folder / self.damaged[0], found, warned)


del READERS["feedback"]


class FeedbackCSV(_Feedback):
    name, damaged = "feedback.csv", ("likes.csv",)


class FeedbackJSONL(_Feedback):
    name, damaged = "feedback.jsonl", ("likes.jsonl",)


class FeedbackParquet(_Feedback):
    name, damaged = "feedback.parquet", ("likes.parquet",)


class FeedbackScores(Reader):
    name, damaged, how = "feedback.scores", ("ratings.csv",), {"rule": "fixed", "threshold": 4.5}

    def make(self, folder):
        images = [path.name for path in _images(folder, 6)]
        rows = {"image": images, "prompt": [PROMPTS[i % 3] for i in range(6)], "rating": [1, 9, 4.5, 3, 7, 8]}
        _write(pd.DataFrame(rows | {"user": ["ann", "bob"] * 3}), folder / "ratings.csv")

    def read(self, folder, value):
        return read_feedback(folder / self.damaged[0], score="rating", **self.how)

    def check(self, folder, value, found, warned):
        return oracles.likes_of_scores(folder / "ratings.csv", found, warned, 4.5)


class FeedbackDatabase(FeedbackScores):
    name, damaged = "feedback.sqlite", ("ratings.sqlite",)

    def make(self, folder):
        paths = _images(folder, 6)
        with closing(sqlite3.connect(folder / "ratings.sqlite")) as database:
            database.executescript(
                "CREATE TABLE generations (id, prompt); CREATE TABLE images (id, gid);"
                "CREATE TABLE paths (iid, path); CREATE TABLE ratings (sid, iid, rating)"
            )
            database.executemany("INSERT INTO generations VALUES (?, ?)", enumerate(PROMPTS))
            for i, path in enumerate(paths):
                database.execute("INSERT INTO images VALUES (?, ?)", (i, i % 3))
                database.execute("INSERT INTO paths VALUES (?, ?)", (i, path.name))
                database.execute("INSERT INTO ratings VALUES (?, ?, ?)", (i % 2, i, i + 1))
            database.commit()

    def check(self, folder, value, found, warned):
        if found.is_desirable.dtype != bool or not set(found.images) <= set(map(Path.resolve, folder.iterdir())):
            return f"images {found.images!r:.80}"
        return None if all(map(str.strip, found.prompts)) else "an empty prompt"


class Pairs(Reader):
    name, damaged = "pairs.parquet", ("likes.pairs.parquet",)

    def make(self, folder):
        table = replace(_table(folder), comparisons=np.array([[1, 0], [3, 2], [5, 0]]))
        write_feedback(table, folder / "likes.parquet")

    def read(self, folder, value):
        return read_feedback(folder / "likes.parquet")

    def check(self, folder, value, found, warned):
        return oracles.pairs_of_table(folder / self.damaged[0], found, warned)


class RankingsJSON(_Feedback):
    name, damaged = "rankings.json", ("rankings.json",)

    def make(self, folder):
        _images(folder, 6)
        one = {"prompt": "a star", "images": ["0.png", "1.png", "2.png"], "scores": [2, 0.5, 0.5]}
        two = {"prompt": "a ring", "image_path": ["3.png", "4.png", "5.png"], "rank": [1, 2, 3]}
        (folder / "rankings.json").write_text(json.dumps([one, two]))

    def check(self, folder, value, found, warned):
        return oracles.rankings(folder / self.damaged[0], found, warned)


class RankingsCSV(RankingsJSON):
    name, damaged = "rankings.csv", ("ranks.csv",)

    def make(self, folder):
        _images(folder, 6)
        frame = {"image": [f"{i}.png" for i in range(6)], "prompt": ["a star"] * 3 + ["a ring"] * 3}
        _write(pd.DataFrame({**frame, "rank": [1, 2, 3, 2, 1, 2], "prompt_id": list("aaabbb")}), folder / "ranks.csv")


class FolderText(Reader):
    name, damaged = "folder.txt", ("*liked/*.txt",)

    def make(self, folder):
        for kind in ("liked", "disliked"):
            for path in _images(folder / kind, 2):
                path.with_suffix(".txt").write_text(f"a {kind} star\n")

    def read(self, folder, value):
        return read_feedback(folder)

    def check(self, folder, value, found, warned):
        return oracles.likes_of_folder(folder, found, warned)


class FolderMetadata(FolderText):
    name, damaged = "folder.metadata", ("metadata.*", "*liked/metadata.*")

    def make(self, folder):
        for kind, ending in (("liked", "csv"), ("disliked", "jsonl")):
            rows = [{"file_name": path.name, "caption": f"a {kind} star"} for path in _images(folder / kind, 2)]
            _write(pd.DataFrame(rows), folder / kind / f"metadata.{ending}")


class Prompts(Reader):
    name, damaged = "prompts", ("p.*",)

    def make(self, folder):
        frame = pd.DataFrame({"prompt": PROMPTS, "style": ["x", "y", ""]})
        for ending in ("csv", "jsonl", "parquet"):
            _write(frame, folder / f"p.{ending}")
        (folder / "p.txt").write_text("\n".join(PROMPTS) + "\n")
        (folder / "p.tsv").write_text("Prompt\tCategory\n" + "".join(f"{prompt}\tx\n" for prompt in PROMPTS))
        (folder / "p.json").write_text(json.dumps({"x": PROMPTS[:2], "y": PROMPTS[2:]}))

    def spoil(self, rng, folder):
        path = rng.choice(sorted(folder.glob("p.*")))
        damage(rng, path)
        return path

    def read(self, folder, value):
        return load_prompts(value)

    def check(self, folder, value, found, warned):
        return oracles.prompts(value, found, warned)


class ImageFile(Reader):
    name, damaged = "image", ("0.png", "x.jpg", "x.webp", "x.bmp")

    def make(self, folder):
        image = Image.open(_images(folder, 1)[0])
        for ending in ("jpg", "webp", "bmp"):
            image.save(folder / f"x.{ending}")

    def spoil(self, rng, folder):
        path = folder / rng.choice([self.damaged[0], *self.damaged])
        damage(rng, path)
        return path

    def read(self, folder, value):
        return load_image(value)

    def check(self, folder, value, found, warned):
        with Image.open(value) as image:
            sizes = (image.size, image.size[::-1])
        return None if found.mode == "RGB" and found.size in sizes else f"{found.mode} of {found.size}"


class Unpack(Reader):
    name, damaged = "unpack", ("shard.parquet",)

    def make(self, folder):
        rows = []
        data = [path.read_bytes() for path in _images(folder / "made", 4)]
        for i, j, label in ((0, 1, 1.0), (1, 2, 0.0), (2, 3, 0.5), (0, 3, 1.0)):
            images = {"jpg_0": data[i], "jpg_1": data[j], "image_0_uid": f"u{i}", "image_1_uid": f"u{j}"}
            rows.append(
                {**images, "label_0": label, "label_1": 1 - label, "caption": PROMPTS[i % 3], "has_label": True}
            )
        shutil.rmtree(folder / "made")
        _write(pd.DataFrame(rows), folder / "shard.parquet")

    def read(self, folder, value):
        return read_feedback(convert_pairs(folder / "shard.parquet", folder / "out"))

    def check(self, folder, value, found, warned):
        warned = warned or (folder / "out" / "skipped.jsonl").stat().st_size > 0
        return oracles.unpacked(folder / "shard.parquet", folder, found, warned)


class UnpackScores(Unpack):
    name = "unpack.scores"

    def make(self, folder):
        data = [path.read_bytes() for path in _images(folder / "made", 4)]
        rows = [{"image": data[i], "prompt": PROMPTS[i % 3], "annotation": {"hands": i - 2}} for i in range(4)]
        shutil.rmtree(folder / "made")
        _write(pd.DataFrame(rows), folder / "shard.parquet")

    def read(self, folder, value):
        shard = folder / self.damaged[0]
        return read_feedback(convert_pairs(shard, folder / "out"), score="hands", rule="fixed", threshold=-0.5)

    def check(self, folder, value, found, warned):
        rows = pq.read_table(folder / "shard.parquet").to_pylist()
        for image, like in zip(found.images, found.is_desirable, strict=True):
            marks = [row["annotation"]["hands"] for row in rows if row["image"] == image.read_bytes()]
            if not any(like == (float(mark) > -0.5) for mark in marks):
                return f"{image.name} is liked: {like}, its marks are {marks}"
        return None if warned or len(found) == len(rows) else f"{len(rows) - len(found)} rows left out without a word"


class UnpackTar(UnpackScores):
    name, damaged = "unpack.tar", ("shard.tar",)

    def make(self, folder):
        with tarfile.open(folder / "shard.tar", "w") as archive:
            for i, path in enumerate(_images(folder / "made", 4)):
                about = {"meta": {"prompt": PROMPTS[i % 3]}, "stats": {"heartCount": i}}
                Image.open(path).save(folder / "made" / f"{i}.jpg")
                (folder / "made" / f"{i}.json").write_text(json.dumps(about))
                for ending in ("jpg", "json"):
                    archive.add(folder / "made" / f"{i}.{ending}", f"{i}.{ending}")
        shutil.rmtree(folder / "made")

    def read(self, folder, value):
        shard = folder / self.damaged[0]
        return read_feedback(convert_pairs(shard, folder / "out"), score="heart", rule="fixed", threshold=1.5)

    def check(self, folder, value, found, warned):
        archive = (folder / "shard.tar").read_bytes()
        strange = [path.name for path in found.images if path.read_bytes() not in archive]
        return f"images {strange} are not in the archive" if strange else None


class Preferences(Reader):
    name, damaged = "preferences.parquet", ("results.parquet",)

    def make(self, folder):
        rows = []
        for i, response in enumerate(("image_1", "image_2", "both_good")):
            _images(folder / f"{i}", 2)
            sides = {f"image_{side}": f"https://hub/datasets/a/b/resolve/main/{i}/{side - 1}.png" for side in (1, 2)}
            responses = {"preference.responses": [response], "preference.responses.status": ["submitted"]}
            rows.append({"images": {**sides, "prompt": PROMPTS[i]}, **responses})
        pq.write_table(pa.Table.from_pylist(rows), folder / "results.parquet")

    def read(self, folder, value):
        return read_feedback(folder / "results.parquet")

    def check(self, folder, value, found, warned):
        liked = set()
        for row in pq.read_table(folder / "results.parquet").to_pylist():
            for response in row["preference.responses"] or ():
                sides = [response] if response in ("image_1", "image_2") else []
                sides = ["image_1", "image_2"] if response == "both_good" else sides
                liked |= {row["images"][side].rpartition("/")[2] for side in sides}
        wrong = [p for p, like in zip(found.images, found.is_desirable, strict=True) if like and p.name not in liked]
        return f"{wrong[0].name} is liked by nobody" if wrong else None


class LikeLogFile(Reader):
    name, damaged = "likelog", ("likes.jsonl",)

    def make(self, folder):
        log = self._open(folder, _images(folder / "pool", 4))
        for index, judgement in enumerate(("like", "dislike", "skip", "like", "like")):
            log.judge(index % 4, judgement)
        log.undo()
        self._open(folder, sorted((folder / "pool").iterdir()), "bob").judge(0, "like")

    def _open(self, folder, paths, session="ann"):
        return LikeLog([Picture(path, f"prompt {path.stem}") for path in paths], folder / "likes.jsonl", session)

    def read(self, folder, value):
        return self._open(folder, sorted((folder / "pool").iterdir()))

    def check(self, folder, value, found, warned):
        return oracles.like_log(folder / "likes.jsonl", found, warned)


class Messages(Reader):
    name = "messages"
    places = ("judgement", "side", "index", "name", "utility", "type", "number", "message", "reward")

    def make(self, folder):
        LikeLogFile().make(folder)

    def spoil(self, rng, folder):
        base = rng.choice(
            [
                {"type": "judge", "index": 1, "judgement": "like"},
                {"type": "undo"},
                {"type": "utility", "name": "mine", "formula": "tanh(x)"},
                {"type": "rewards", "name": "mine.csv", "text": "reward,liked\n1,like\n"},
            ]
        )
        message = damaged_value(rng, base)
        return base["type"], message if isinstance(message, dict) else {**base, "index": message}

    def read(self, folder, value):
        kind, message = value
        if kind in ("judge", "undo"):
            widget = Likes(READERS["likelog"].read(folder, None).pictures, folder / "likes.jsonl", session="ann")
        else:
            widget = Explorer()
        widget.receive(message)
        if widget.message:
            raise Shown(widget.message)
        return widget

    def check(self, folder, value, found, warned):
        log = getattr(found, "likes", None)
        return log and oracles.like_log(folder / "likes.jsonl", log, warned)


class StudyQuestions(Reader):
    name, damaged = "study.questions", ("questions.json", "key.json")

    def make(self, folder):
        made = folder / "made"
        made.mkdir()
        make_study(draw_folders(made), folder, ["ann", "bob"], PROMPT_STYLES, per_style=1)
        finish(StudySession(folder, "ann"), lambda pair: True)
        StudySession(folder, "bob").answer(1, "left")
        shutil.rmtree(made)

    def read(self, folder, value):
        study_result(folder)
        return read_answers(folder)

    def check(self, folder, value, found, warned):
        for name in ("questions.json", "key.json"):
            written = (valid(self.name) / name).read_text()
            if not warned and oracles.load(oracles.decoded(folder / name)) != oracles.load(written):
                return f"{name} with another value was taken"
        return oracles.study(folder, found, warned)


class StudyAnswers(StudyQuestions):
    name, damaged = "study.answers", ("answers/*.jsonl",)


class Manifest(Reader):
    name, damaged = "manifest", ("manifest.json",)

    def make(self, folder):
        about = {"system": {}, "prompts": PROMPTS, "images_per_prompt": 2, "seed": 0}
        (folder / "manifest.json").write_text(json.dumps(about))
        for number, path in enumerate(_images(folder, 6)):
            path.rename(image_path(folder, number // 2, number % 2))

    def read(self, folder, value):
        return pictures_in(folder)

    def check(self, folder, value, found, warned):
        if not (folder / "manifest.json").exists():
            return "images without their prompts"
        return self._same(folder / "manifest.json", found)

    @staticmethod
    def _same(path, found):
        about = oracles.load(oracles.decoded(path))
        wanted = [p for p in about["prompts"] for _ in range(about["images_per_prompt"])]
        good = [each.prompt for each in found] == wanted and {each.seed for each in found} == {about["seed"]}
        return None if good and type(about["seed"]) is int else f"{found!r:.100}"


def _redness(images, prompts):
    return np.array([np.asarray(image, np.float64)[..., 0].mean() for image in images])


class Scores(Reader):
    name, damaged = "scores", ("scores/*.parquet", "scores/*.json")

    def make(self, folder):
        Manifest().make(folder)
        self.read(folder, None)

    def read(self, folder, value):
        return score_images(folder, _redness)

    def check(self, folder, value, found, warned):
        paths = [[image_path(folder, p, i) for i in range(2)] for p in range(3)]
        true = np.array([[_redness([Image.open(path)], [])[0] for path in row] for row in paths])
        return oracles.scores(folder, found, true, warned)


class Expression(Reader):
    name, places = "expression", ("formula", "utility")
    parts = ("x", "2", "sigmoid(x)", "tanh(x / 2)", "x ** 3", "exp(x)", "minimum(x, 1)", "log(x)", "-x", "pi", "1e6")
    parts += ("relu(x) * 2", "maximum(x, -1)", "softplus(x)")
    hostile = ("__import__('os').system('id')", "9**9**9", "x" * 500, "(" * 150 + "x" + ")" * 150, "lambda: x", "")
    hostile += ("x.__class__", "open('/etc/passwd')", "[x for x in (1,)]", "x if x else 1", "f'{x}'", "x\0", "\x1b[31m")
    hostile += (
        "x ** x",
        "1e309 * x",
        "0x10 * x",
        "1j * x",
        "True * x",
        "x @ x",
        "~x",
        "x; x",
        "x = 1",
        "sigmoid(x, x)",
    )

    def spoil(self, rng, folder):
        left, right = rng.choice(self.parts), rng.choice(self.parts)
        text = f"{left} {rng.choice('+-*/')} {right}"
        if rng.random() < 0.4:
            text = rng.choice([rng.choice(self.hostile), f"{text} + {rng.choice(self.hostile)}"])
        if rng.random() < 0.5:
            text = damaged_bytes(rng, text.encode()).decode("latin1")
        return text

    def read(self, folder, value):
        compiled = compile_expression(value)
        at = torch.tensor([-1.25, 0.5, 3.0], dtype=torch.float64)
        return at, compiled(at)

    def check(self, folder, value, found, warned):
        for x, y in zip(*(each.tolist() for each in found), strict=True):
            try:
                wanted = oracles.value_of(value, x)
            except (ValueError, ZeroDivisionError, OverflowError):
                continue
            except Exception as error:
                return f"accepted, but {error}"
            if isinstance(wanted, complex) or y != y:
                continue
            if abs(y - wanted) > 1e-6 * max(1, abs(wanted)):
                return f"{y} at {x}, not {wanted}"
        return None


class Config(Reader):
    name = "config"

    def make(self, folder):
        self.places = tuple(field.name for field in fields(type(_any_config())))

    def spoil(self, rng, folder):
        values = {field.name: getattr(_any_config(), field.name) for field in fields(_any_config())}
        values = {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}
        for _ in range(rng.choice([1, 1, 2])):
            name = rng.choice(sorted(values))
            values[name] = rng.choice([odd(rng), values[rng.choice(sorted(values))]])
        return values

    def read(self, folder, value):
        config = TrainConfig(**value)
        config.fingerprint()
        return config

    def check(self, folder, value, found, warned):
        for field in fields(found):
            held = getattr(found, field.name)
            kinds = {int: (int,), float: (int, float), bool: (bool,), str: (str,), Path: (Path,)}.get(
                field.type, (str,)
            )
            if type(held) not in kinds and not (field.type is Path and isinstance(held, Path)):
                return f"{field.name} is {held!r:.60}"
            if isinstance(held, float) and held - held != 0:
                return f"{field.name} is {held}"
        return None


@cache
def _any_config():
    return TrainConfig("prepared", "run")


class Settings(Reader):
    name, damaged, places = "settings", ("settings.json",), ("settings",)

    def make(self, folder):
        shutil.copy(CHECKOUT / "papermill_runs" / "paper_settings.json", folder / "settings.json")

    def read(self, folder, value):
        found = read_settings(folder / "settings.json")
        settings_origin(found)
        return found

    def check(self, folder, value, found, warned):
        return self._same(folder / "settings.json", found)

    @staticmethod
    def _same(path, found):
        raw = oracles.load(oracles.decoded(path))
        if type(found["guidance"]) not in (int, float) or not all(
            isinstance(v, dict) for v in found["settings"].values()
        ):
            return f"guidance {found['guidance']!r:.40}, settings {found['settings']!r:.60}"
        return None if repr(raw["settings"]) == repr(found["settings"]) else "settings differ"


class Yaml(Reader):
    name = "yaml"
    texts = (
        "notebook: a.ipynb\ngrid:\n  beta: [1, 10]\n  seed: [0, 1]\nlist:\n  - {rate: 1e-7, name: no}\n",
        '{"a": [1, 2.5, "x", null, true], "b": {"c": "1:30"}}',
        "a: &x [1]\nb: *x\n",
    )
    hostile = (
        "!!python/object/apply:os.system ['id']",
        "!!bool x",
        "!!timestamp x",
        "!!set x",
        "!!int x",
        "? [a]\n: b",
    )
    hostile += (
        "&a [*a]",
        "a: &a [x,x]\nb: &b [*a,*a]\nc: [*b,*b]",
        "<<: 1",
        "[" * 3000,
        "{" * 3000,
        "- " * 3000,
        "%YAML 9",
    )
    hostile += (
        "a: 1\na: 2",
        "{[1]: 2}",
        "{{a: 1}: 2}",
        "--- a\n--- b",
        "a: |\n  x",
        "\t- a",
        "a: !!binary x",
        "*z",
        "@a",
    )

    def spoil(self, rng, folder):
        text = rng.choice(self.texts)
        if rng.random() < 0.4:
            at = rng.randrange(len(text) + 1)
            text = rng.choice([rng.choice(self.hostile), text[:at] + rng.choice(self.hostile) + text[at:]])
        elif text.startswith("{") and rng.random() < 0.5:
            return damaged_json(rng, text)
        else:
            text = damaged_bytes(rng, text.encode()).decode("latin1")
        return text

    def read(self, folder, value):
        return read_yaml(value)

    def check(self, folder, value, found, warned):
        try:
            wanted = oracles.load(value)
        except oracles.UnreadableError:
            return "a key comes twice" if '"' in value and "comes twice" in _why(value) else None
        if "Infinity" in value or "NaN" in value or "\\u" in value or "\x7f" in value:
            return None
        return None if json.dumps(found, default=repr) == json.dumps(wanted) or found == wanted else f"{found!r:.100}"


def _why(text):
    try:
        oracles.load(text)
    except oracles.UnreadableError as error:
        return str(error)
    return ""


class Notebook(Reader):
    name, damaged = "notebook", ("tiny.ipynb",)

    def make(self, folder):
        shutil.copy(Path(__file__).parents[1] / "files" / "tiny_train.ipynb", folder / "tiny.ipynb")

    def spoil(self, rng, folder):
        path = folder / "tiny.ipynb"
        if rng.random() < 0.5:
            damage(rng, path)
            return
        notebook = json.loads(path.read_text())
        lines = next(c for c in notebook["cells"] if c["metadata"].get("tags"))["source"]
        at = rng.randrange(len(lines))
        value = rng.choice(
            [repr(odd(rng)), "int(1)", "[1] * 10**10", "9**9**9", "x", "-1", "1 + 1", "'a' 'b'", "(1,)", "..."]
        )
        kind = rng.choice(["int", "float", "str", "bool", "list", "dict", "X"])
        line = f"{rng.choice(['beta', 'seed', 'b c', 'x', 'output_dir'])}: {kind} = {value}\n"
        lines[at : at + rng.randrange(2)] = [
            rng.choice([line, line.replace("=", ""), f"  {line}", "import os\n", "(" * 200 + "\n"])
        ]
        path.write_text(json.dumps(notebook))

    def read(self, folder, value):
        source_hash(folder / "tiny.ipynb")
        return declared_parameters(folder / "tiny.ipynb")

    def check(self, folder, value, found, warned):
        return oracles.notebook(folder / "tiny.ipynb", found, warned)


class Sweep(Reader):
    name, damaged = "sweep", ("s.yaml",)

    def make(self, folder):
        Notebook().make(folder)
        content = {"notebook": "tiny.ipynb", "parameters": {"likes": "many"}}
        content |= {"grid": {"beta": [1, 10], "seed": [0, 1]}, "list": [{"slow_seed": 3}, {"slow_seed": 4}]}
        (folder / "s.yaml").write_text(json.dumps(content, indent=1))

    def spoil(self, rng, folder):
        path = folder / "s.yaml"
        if rng.random() < 0.1:
            many = list(range(200))
            bombs = [{"grid": dict.fromkeys(("beta", "seed", "failing_seed", "slow_seed"), many)}]
            bombs += [{"grid": {"seed": "x" * 10**6}}, {"resources": {"hours": [[["x"] * 1000] * 1000]}}]
            path.write_text(json.dumps({"notebook": "tiny.ipynb", **rng.choice(bombs)}))
        elif rng.random() < 0.1:
            aliases = "".join(f"x{i + 1}: &a{i + 1} [{f'*a{i},' * 9}]\n" for i in range(9))
            path.write_text(f"notebook: tiny.ipynb\nx0: &a0 [1]\n{aliases}list: *a9\n")
        else:
            damage(rng, path)
        if path.is_file() and not path.is_symlink():
            whole = str(folder / "tiny.ipynb").encode()
            path.write_bytes(path.read_bytes().replace(b"tiny.ipynb", whole))

    def read(self, folder, value):
        return read_sweep(folder / "s.yaml", folder / "out")

    def check(self, folder, value, found, warned):
        return oracles.sweep(folder / "s.yaml", found, warned)


class RunRecord(Reader):
    name, damaged = "run.json", ("one/run.json",)

    def make(self, folder):
        for number, name in enumerate(("one", "two")):
            leave(folder / name, beta=1.5 + number, likes="many", seed=number)

    def read(self, folder, value):
        return read_runs(folder)

    def check(self, folder, value, found, warned):
        return oracles.run(folder, found, warned)


class RunMetrics(RunRecord):
    name, damaged = "metrics.json", ("one/metrics.json",)


class TrainingRecord(Reader):
    name, damaged = "training.json", ("training.json",)

    def make(self, folder):
        shutil.copy(trained(2) / "training.json", folder)
        (folder / "lora").mkdir()

    def read(self, folder, value):
        return System.of_run(folder)

    def check(self, folder, value, found, warned):
        return self._same(folder / "training.json", found)

    @staticmethod
    def _same(path, found):
        config = oracles.load(oracles.decoded(path))["config"]
        good = isinstance(found.model, str) and found.model == config["model"]
        if not isinstance(config.get("objective", ""), str) or not isinstance(config.get("csft_style", ""), str):
            return f"objective {config['objective']!r:.40}"
        return None if good else f"model {found.model!r:.60}"


class StepRecords(Reader):
    name, damaged, places = "metrics.jsonl", ("metrics.jsonl",), ("reward", "record")

    def make(self, folder):
        for name in ("training.json", "metrics.jsonl"):
            shutil.copy(trained(2) / name, folder)

    def read(self, folder, value):
        return Explorer.of_run(folder)

    def check(self, folder, value, found, warned):
        given = _rewards_in(oracles.decoded(folder / "metrics.jsonl"))
        return oracles.records(folder / "metrics.jsonl", given, warned) or self._same(given, found)

    @staticmethod
    def _same(given, found):
        rewards = np.frombuffer(found.gaps, np.float32).astype(float) * found.beta
        # the page holds them as float32
        close = len(rewards) == len(given) and np.isfinite(rewards).all() and np.allclose(rewards, given, 1e-4, 1e-6)
        return None if close else f"{rewards.tolist()} is not {given}"


def _rewards_in(text):
    found = []
    for line in filter(str.strip, text.split("\n")):
        try:
            record = json.loads(line)
        except ValueError:
            continue
        keys = ("reward/desirable", "reward/undesirable")
        found += [float(record[key]) for key in keys if isinstance(record, dict) and key in record]
    return found


class ExplorerText(Reader):
    name, damaged, places = "explorer", ("r.csv", "r.jsonl"), ("reward", "liked")

    def make(self, folder):
        (folder / "r.csv").write_text("reward,liked\n1.5,like\n-2,dislike\n0.25,1\n")
        (folder / "r.jsonl").write_text('{"reward/desirable": 1.5}\n{"reward/undesirable": -2, "loss": 1}\n')

    def spoil(self, rng, folder):
        path = folder / rng.choice(self.damaged)
        (rng.choice([damage, lambda r, p: p.write_bytes(damaged_bytes(r, p.read_bytes()))]))(rng, path)
        return (path.name, path.read_bytes().decode("utf-8", "replace")) if path.is_file() else (path.name, "")

    def read(self, folder, value):
        return rewards_of_text(value[1], value[0])

    def check(self, folder, value, found, warned):
        path = folder / value[0]
        path.unlink(missing_ok=True)
        path.write_text(value[1], newline="")
        if path.suffix == ".jsonl":
            return oracles.records(path, found[0], warned)
        return self._same(path, found)

    @staticmethod
    def _same(path, found):
        rows = oracles.table(path)
        wanted = [(float(row["reward"]), oracles.liked(row["liked"])) for row in rows]
        got = list(zip(found[0].tolist(), found[1].tolist(), strict=True))
        return None if got == wanted else f"{got} is not {wanted}"


class PreparedRecord(Reader):
    name, damaged = "prepared.json", ("prepared.json", "index.parquet", "pairs.npy")

    def make(self, folder):
        shutil.copytree(encoded(), folder, dirs_exist_ok=True)

    def read(self, folder, value):
        data = PreparedFeedback(folder, load_model(str(model())))
        rows = np.arange(len(data))
        return data, data.latents(rows), data.conditioning(rows), data.sizes(rows), data.pairs

    def check(self, folder, value, found, warned):
        data, latents, conditioning, _, pairs = found
        index = pq.read_table(folder / "index.parquet").to_pydict()
        if not all(torch.isfinite(each).all() for each in (*latents, *conditioning.values())):
            return "numbers that are not finite"
        if data.is_desirable.dtype != bool or type(data.has_flips) is not bool:
            return f"labels of {data.is_desirable.dtype}, flips {data.has_flips!r:.40}"
        pristine = pq.read_table(encoded() / "index.parquet").to_pydict()
        if index != pristine:
            return f"index {index!r:.100}"
        if (
            pairs.dtype.kind != "i"
            or pairs.ndim != 2
            or (len(pairs) and not 0 <= pairs.min() <= pairs.max() < len(data))
        ):
            return f"pairs {pairs!r:.60}"
        shards = sorted(folder.glob("*.safetensors"))
        return next(filter(None, (oracles.same_tensors(path, encoded() / path.name) for path in shards)), None)


class PreparedShard(PreparedRecord):
    name, damaged = "prepared.shard", ("*.safetensors",)


class PrepareAgain(PreparedRecord):
    name, damaged = "prepare.again", ("*.safetensors", "*.json", "*.parquet", "*.npy")

    def read(self, folder, value):
        prepare_feedback(_table(BASE / "likes"), folder, str(model()))
        return super().read(folder, value)


class Resume(Reader):
    name, damaged = "resume", ("metrics.jsonl", "training.json", "checkpoint-*4/*.json")
    rank = 2

    def make(self, folder):
        shutil.copytree(trained(self.rank), folder, dirs_exist_ok=True, symlinks=True)

    def read(self, folder, value):
        run = train(_config(folder, self.rank))
        record = next(run)
        run.close()
        return record

    def check(self, folder, value, found, warned):
        if found["global_step"] != 5 and not warned:
            return f"goes on at {found['global_step']}"
        steps = [
            record["global_step"] for record in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        ]
        if steps != list(range(1, found["global_step"] + 1)) and not warned:
            return f"records of steps {steps}"
        if not np.isfinite(found["loss"]):
            return f"loss {found['loss']}"
        paths = [] if warned else sorted(folder.glob("checkpoint-*4/*.safetensors"))
        pristine = trained(self.rank)
        found = (oracles.same_tensors(path, pristine / path.relative_to(folder)) for path in paths)
        return next(filter(None, found), None)


class CheckpointWeights(Resume):
    name, damaged = "checkpoint.weights", ("checkpoint-*4/*.safetensors", "checkpoint-*4/unet/*")
    rank = 0


class ScorerWeights(Reader):
    name, damaged = "weights", ("laion.safetensors", "laion.json")

    def make(self, folder):
        path = folder / "laion.safetensors"
        write_tensors(path, {"weight": torch.arange(8.0), "bias": torch.ones(2)})
        about = {"published": "x.pth", "published_sha256": "0" * 64, "sha256": file_sha256(path)}
        (folder / "laion.json").write_text(json.dumps(about))

    def read(self, folder, value):
        return read_converted("laion_aesthetics", str(folder / "laion.safetensors"))

    def check(self, folder, value, found, warned):
        path = folder / "laion.safetensors"
        same = path.read_bytes() == (valid(self.name) / path.name).read_bytes()
        return None if same else "weights with another hash"


class Fingerprint(Reader):
    name, damaged = "fingerprint", ("w.safetensors",)

    def make(self, folder):
        write_tensors(folder / "w.safetensors", {"weight": torch.arange(8.0), "bias": torch.ones(2)})

    def read(self, folder, value):
        return weights_fingerprint([folder / "w.safetensors"])

    def check(self, folder, value, found, warned):
        pristine = valid(self.name) / "w.safetensors"
        same = (folder / "w.safetensors").read_bytes() == pristine.read_bytes()
        alike = found == weights_fingerprint([pristine]).replace(valid(self.name).name, folder.name)
        return "other bytes, the same hash" if alike and not same else None


class Adapter(Reader):
    name, damaged = "adapter", ("*.safetensors",)

    def make(self, folder):
        shutil.copy(trained(2) / "checkpoint-00000004" / "pytorch_lora_weights.safetensors", folder)

    def read(self, folder, value):
        system = System(model=str(model()), lora=str(folder / "pytorch_lora_weights.safetensors"))
        system.fingerprint()
        return {name: p.detach() for name, p in system.load().unet.named_parameters()}

    def check(self, folder, value, found, warned):
        if not all(torch.isfinite(each).all() for each in found.values()):
            return "weights that are not finite"
        path = folder / "pytorch_lora_weights.safetensors"
        return oracles.same_tensors(path, valid(self.name) / path.name)
