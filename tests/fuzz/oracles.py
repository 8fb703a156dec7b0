"""Second readers, with json, csv, pyarrow and Pillow alone: they contradict what was taken of a file.

Each check returns what is wrong with what was accepted, or None; what it fails at should not have been accepted. They
allow what the pages promise (case and blanks of headers, empty rows, synonyms, separators of a spreadsheet) and nothing
else.
"""

import ast
import csv
import io
import json
import math
import os
import re
import unicodedata
from collections import Counter
from itertools import combinations
from pathlib import Path

import pyarrow.parquet as pq
from PIL import Image

MEANING = {"file_name": "image", "image_path": "image", "caption": "prompt", "text": "prompt"}
MEANING |= {"is_desirable": "liked", "label": "liked"}
LIKE = {"1", "1.0", "true", "like", "liked", "yes", "y", "wahr", "ja", "vrai", "oui", "verdadero"}
DISLIKE = {"0", "0.0", "false", "dislike", "disliked", "no", "n", "falsch", "nein", "faux", "non", "falso"}
BLANK = {"", "nan", "none", "null", "<na>"}  # pandas writes these for a field without a value; the pages take them so
IMAGES = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp")


class UnreadableError(ValueError):
    """A second reader would have refused it."""


def load(text: str) -> object:
    """JSON in which no key comes twice."""

    def once(pairs):
        if len(dict(pairs)) != len(pairs):
            raise UnreadableError(f"a key comes twice in {[key for key, _ in pairs]}")
        return dict(pairs)

    try:
        return json.loads(text, object_pairs_hook=once)
    except (json.JSONDecodeError, RecursionError) as error:
        raise UnreadableError(str(error)) from error


def decoded(path: Path) -> str:
    """Text as UTF-8, or as a spreadsheet of Windows writes it."""
    if not path.is_file():
        raise UnreadableError(f"{path.name} is no file")
    data = path.read_bytes()
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return data.decode("utf-16", "replace").removeprefix("\ufeff")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return data.decode("cp1252", "replace")


def table(path: Path) -> list[dict]:
    """The rows of a table by meaning of the column; wholly empty ones are left out."""
    if path.suffix == ".jsonl":
        rows = [load(line) for line in re.split(r"[\r\n]", decoded(path)) if line.strip()]
        if not all(isinstance(row, dict) for row in rows):
            raise UnreadableError("a line is no object")
        return [_named(list(row), list(row.values())) for row in rows]
    if path.suffix == ".parquet":
        found = pq.read_table(path)
        columns = [column.to_pylist() for column in found.columns]
        return [_named(found.column_names, list(row)) for row in zip(*columns, strict=True)]
    text = decoded(path)
    head = text.lstrip("\r\n").splitlines()[0] if text.strip() else ""
    separator = max(",;\t", key=head.count)
    rows = list(csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True))
    rows = [row for row in rows if any(field.strip() for field in row)]
    if any(len(row) != len(rows[0]) and any(row[len(rows[0]) :]) for row in rows):
        raise UnreadableError("a row has other fields than the header")
    return [_named(rows[0], row) for row in rows[1:]]


def _named(header, row):
    names = [str(name).strip().lower() for name in header]
    names = [MEANING.get(name, name) for name in names]
    for name in ("image", "prompt", "liked", "pair_id", "rank", "prompt_id"):
        if names.count(name) > 1:
            raise UnreadableError(f"two columns mean {name}")
    return dict(zip(names, row, strict=False))


def liked(value: object) -> bool:
    text = str(value).strip().lower()
    if text not in LIKE | DISLIKE:
        raise UnreadableError(f"{value!r} is neither a like nor a dislike")
    return text in LIKE


def is_blank(value: object) -> bool:
    return value is None or value != value or str(value).strip().lower() in BLANK


def is_prompt(value: object) -> bool:
    """Text that can be written, without NUL, and more than blanks."""
    return (
        isinstance(value, str)
        and not is_blank(value.strip().strip("\ufeff"))
        and not re.search("[\0\ud800-\udfff]", value)
    )


def said_of(found, warned: bool) -> int:
    """How many rows were set aside aloud."""
    return len(found.set_aside) if warned else 0


def words(text: str) -> list[str]:
    return unicodedata.normalize("NFC", text).split()


def same_name(path: Path, name: object) -> bool:
    last = str(name).strip().replace("\\", "/").rsplit("/", 1)[-1]
    return unicodedata.normalize("NFC", path.name) == unicodedata.normalize("NFC", last)


def likes_of_table(path: Path, found, warned: bool) -> str | None:
    """Every row of a FeedbackTable is a row of the file, in its order, and none is gone without a word."""
    rows, at, left_out = table(path), 0, 0
    pair_ids = found.pair_ids.tolist()
    for number, (image, prompt, like) in enumerate(zip(found.images, found.prompts, found.is_desirable, strict=True)):
        while at < len(rows) and not _same_like(rows[at], image, prompt, bool(like), pair_ids[number]):
            at, left_out = at + 1, left_out + 1
        if at == len(rows):
            return f"row {number} ({image.name}, {prompt!r:.40}, {like}, {pair_ids[number]}) is not in the file"
        at += 1
    left_out += len(rows) - at
    said = said_of(found, warned)
    return f"{left_out} of {len(rows)} rows left out, {said} said" if left_out != said else None


def likes_of_scores(path: Path, found, warned: bool, threshold: float) -> str | None:
    """Every row of a FeedbackTable has a score in the file, on the right side of the threshold."""
    rows, at = table(path), 0
    for image, prompt, like in zip(found.images, found.prompts, found.is_desirable, strict=True):
        while at < len(rows) and not _same_score(rows[at], image, prompt, bool(like), threshold):
            at += 1
        if at == len(rows):
            return f"{image.name}, {prompt!r:.40}, {like} is not in the file"
        at += 1
    return None if warned or len(found) == len(rows) else f"{len(rows) - len(found)} rows left out without a word"


def _same_score(row: dict, image: Path, prompt: str, like: bool, threshold: float) -> bool:
    given = row.get("prompt")
    if not same_name(image, row.get("image")) or not isinstance(given, str) or words(given) != words(prompt):
        return False
    try:
        score = float(row.get("rating"))
    except (TypeError, ValueError):
        return False
    return math.isfinite(score) and score != threshold and like == (score > threshold)


def _same_like(row: dict, image: Path, prompt: str, like: bool, pair_id: int) -> bool:
    given = row.get("prompt")
    if not same_name(image, row.get("image")) or not isinstance(given, str) or words(given) != words(prompt):
        return False
    try:
        if liked(row.get("liked")) != like:
            return False
    except UnreadableError:
        return False
    given = row.get("pair_id")
    if is_blank(given):
        return pair_id == -1
    try:
        exact = int(given) if isinstance(given, str) else given
    except ValueError:
        exact = float(given)
    return exact == pair_id


def pairs_of_table(path: Path, found, warned: bool) -> str | None:
    """The comparisons beside a table, number by number; a file that is gone leaves none."""
    if not path.exists():
        return None
    rows = pq.read_table(path).select(["chosen_row", "rejected_row"]).to_pydict()
    wanted = [[int(v) if isinstance(v, str) else v for v in pair] for pair in zip(*rows.values(), strict=True)]
    if any(isinstance(each, bool) or each is None or each != int(each) for pair in wanted for each in pair):
        return "a row that is no whole number"
    got = found.pairs.tolist()
    if any(c == r for c, r in got) and not warned:
        return "an image is preferred to itself"
    return None if got == wanted else f"{len(got)} pairs differ from the {len(wanted)} of the file"


def rankings(path: Path, found, warned: bool) -> str | None:
    """Every preference within a ranking, each as often as it was given, and no other; what is set aside is counted."""
    wanted: Counter = Counter()
    there = {file.name for file in path.parent.rglob("*.png")}
    absent: set[str] = set()
    understood, left_out = _rankings_in(path)
    if left_out and not warned:
        return f"{left_out} left out without a word"
    for prompt, images, goodness in understood:
        absent |= {image for image in images if Path(image).name not in there}
        if len(set(images)) != len(images):
            return f"an image twice in a ranking of {prompt!r:.40}"
        for a, b in combinations(range(len(images)), 2):
            if goodness[a] != goodness[b] and {Path(images[a]).name, Path(images[b]).name} <= there:
                won, lost = (a, b) if goodness[a] > goodness[b] else (b, a)
                wanted[Path(images[won]).name, Path(images[lost]).name] += 1
    got = Counter((found.images[c].name, found.images[r].name) for c, r in found.pairs)
    if got != wanted:
        return f"{got - wanted} too many, {wanted - got} missing"[:300]
    if {image.name for image, like in zip(found.images, found.is_desirable, strict=True) if like} != {
        a for a, _ in wanted
    }:
        return "likes are not those that won"
    if left_out + len(absent) != said_of(found, warned) or found.counts.get("images_not_there") != len(absent):
        return f"{left_out} rows and {len(absent)} images left out, {said_of(found, warned)} said"
    return None


def _rankings_in(path: Path) -> tuple[list[tuple[str, list, list]], int]:
    """The rankings that can be understood, and how many entries or rows cannot."""
    understood, left_out = [], 0
    if path.suffix == ".json":
        for entry in load(decoded(path)):
            try:
                understood.append(_ranking_of(entry))
            except (UnreadableError, KeyError, TypeError, StopIteration):
                left_out += 1
        return understood, left_out
    rows = []
    for row in table(path):
        try:
            row = {**row, "rank": float(row["rank"])}
            good = math.isfinite(row["rank"]) and is_prompt(row["prompt"]) and row["image"].strip()
        except (ValueError, KeyError, AttributeError, TypeError):
            good = False
        rows += [{**row, "prompt": row["prompt"].strip()}] if good else []
        left_out += not good
    # a row without its prompt_id belongs to the others of its prompt, as the pages promise
    ids: dict[str, str] = {}
    for row in rows:
        if not is_blank(row.get("prompt_id")):
            ids.setdefault(row["prompt"], row["prompt_id"])
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        given = ids.get(row["prompt"]) if is_blank(row.get("prompt_id")) else row["prompt_id"]
        groups.setdefault((given, "" if given else row["prompt"]), []).append(row)
    for rows in groups.values():
        if len({row["prompt"] for row in rows}) > 1:
            raise UnreadableError("a ranking of two prompts")
        understood.append((rows[0]["prompt"], [row["image"] for row in rows], [-row["rank"] for row in rows]))
    return understood, left_out


def _ranking_of(entry: dict) -> tuple[str, list, list]:
    images = next(entry[key] for key in ("images", "image_path", "file_path") if key in entry)
    keys = [key for key in ("scores", "human_preference", "rank", "ranks") if key in entry]
    if not isinstance(images, list):
        raise UnreadableError("no list of images")
    if len(keys) != 1:
        raise UnreadableError(f"{keys} say what was good")
    values = entry[keys[0]]
    if len(values) != len(images) or not all(isinstance(image, str) and image.strip() for image in images):
        raise UnreadableError("not one number an image")
    if not is_prompt(entry["prompt"]):
        raise UnreadableError("no prompt")
    return entry["prompt"].strip(), images, _numbers(values, -1 if "rank" in keys[0] else 1)


def _numbers(values, sign):
    if not all(type(value) in (int, float) and math.isfinite(value) for value in values):
        raise UnreadableError(f"no numbers: {values!r:.60}")
    return [sign * value for value in values]


def likes_of_folder(folder: Path, found, warned: bool) -> str | None:
    """Each image of liked/ and disliked/ once, with the prompt beside it, or of its row in metadata."""
    told, left_out = {}, 0
    for place in (folder, folder / "liked", folder / "disliked"):
        for path in sorted(each for each in place.glob("metadata.*") if each.is_file()):
            for row in table(path):
                name = row.get("image")
                image = place / name.strip().replace("\\", "/") if isinstance(name, str) else place
                image = image.resolve() if os.path.isfile(image) else None  # false too for what can be no name
                prompt = row.get("prompt") if is_prompt(row.get("prompt")) else None
                left_out += image is None or prompt is None
                if image and told.setdefault(image, prompt) != prompt:  # which one is right, nobody knows
                    told[image] = None
                    left_out += prompt is not None
    wanted = []
    for kind in ("liked", "disliked"):
        for path in sorted((folder / kind).iterdir()):
            if path.suffix.lower() in IMAGES and not path.name.startswith("."):
                prompt = told.get(path.resolve())
                if path.resolve() not in told:
                    prompt = _prompt_beside(path.with_suffix(".txt"), folder)
                    left_out += prompt is None
                if prompt is not None:
                    wanted.append((path.name, prompt.strip(), kind == "liked"))
    got = [
        (i.name, p.strip(), bool(d)) for i, p, d in zip(found.images, found.prompts, found.is_desirable, strict=True)
    ]
    if Counter(got) != Counter(wanted):
        return f"{Counter(got) - Counter(wanted)} too many, {Counter(wanted) - Counter(got)} missing"[:300]
    said = said_of(found, warned)
    return f"{left_out} images or rows left out, {said} said" if left_out != said else None


def _prompt_beside(text: Path, folder: Path) -> str | None:
    """What a text holds; None where it is no file of UTF-8 or UTF-16, or blank."""
    if not text.is_file():
        return None
    if not text.resolve().is_relative_to(folder.resolve()):
        raise UnreadableError(f"{text.name} leads out of the folder")
    data = text.read_bytes()
    try:
        found = data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError:
        return None
    return re.sub("\r\n?", "\n", found) if is_prompt(found) else None


def prompts(path: Path, found, warned: bool) -> str | None:
    """Every prompt of the file once, in its order."""
    wanted = [" ".join(each.split()) for each in _prompts_in(path)]
    got = [" ".join(each.split()) for each in found.prompts]
    if got != list(dict.fromkeys(wanted)) and not (warned and set(got) <= set(wanted)):
        return f"{set(got) ^ set(wanted)} differ"[:300]
    return None


def _prompts_in(path: Path) -> list[str]:
    if path.suffix == ".txt":
        return [line for line in re.split("[\r\n]", decoded(path)) if line.strip()]  # lines end in any way
    if path.suffix == ".json":
        value = load(decoded(path))
        if isinstance(value, dict):
            value = [each for group in value.values() for each in group]
        return [each if isinstance(each, str) else _prompt_of(each) for each in value]
    return [_prompt_of(row) for row in table(path)]


def _prompt_of(row: dict) -> str:
    found = row.get("prompt")
    if not isinstance(found, str) or not found.strip():
        raise UnreadableError(f"no prompt in {row!r:.60}")
    return found


def like_log(path: Path, found, warned: bool) -> str | None:
    """Judgements by replaying the lines; one that is no event must be said."""
    state: dict[str, str] = {}
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    for number, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            event = load(line.decode("utf-8" if number else "utf-8-sig"))
            known = event["event"] in ("like", "dislike", "skip", "undo") and isinstance(event["session"], str)
        except (UnreadableError, ValueError, KeyError, TypeError):
            event, known = {}, False
        if not known:
            if number < len(lines) - 1 and not warned:
                return f"line {number + 1} is no event, and nothing is said: {line[:80]!r}"
            continue
        index = {n: i for i, n in enumerate(found._names)}.get(event.get("image"))
        other = index is None or event["prompt"] != found.pictures[index].prompt  # of another list
        if other or event["session"] != found.session or event.get("sha256") != found._hashes[index]:
            continue
        state.pop(event["image"], None)
        if event["event"] != "undo":
            state[event["image"]] = event["event"]
    got = {found._names[index]: judgement for index, judgement in found.judgements.items()}
    return None if got == state else f"{got} is not {state}"


def study(folder: Path, found, warned: bool) -> str | None:
    """Who was chosen, from key, questions and lines alone."""
    about, key = (load(decoded(folder / name)) for name in ("questions.json", "key.json"))
    wanted = []
    for judge, plan in about["judges"].items():
        last: dict[int, str] = {}
        path = folder / "answers" / f"{judge}.jsonl"
        for line in re.split("[\r\n]", decoded(path)) if path.exists() else []:  # an old Mac ends a line by \\r
            try:
                each = load(line) if line.strip() else None
            except UnreadableError:
                if not warned:
                    return f"a line of {judge} is left out without a word"
                continue
            if each is not None:
                if each["choice"] not in ("left", "right", "undone") or type(each["question"]) is not int:
                    return f"{each} is no answer"
                last[each["question"]] = each["choice"]
        for number, side in last.items():
            if side != "undone":
                left, ours = plan["left"][number], key["a_is_ours"][number]
                if left not in ("a", "b") or type(ours) is not bool or type(about["prompts"][number]) is not str:
                    return f"question {number} has {left!r}, {ours!r}"
                wanted.append((judge, number, about["prompts"][number], (side == "left") == ((left == "a") == ours)))
    if len(key["methods"]) != 2 or not all(isinstance(name, str) for name in key["methods"]):
        return f"methods are {key['methods']!r:.60}"
    got = list(found[["judge", "question", "prompt", "ours"]].itertuples(index=False, name=None))
    return None if sorted(got) == sorted(wanted) else f"{len(got)} answers differ from {len(wanted)}"


def tensors(path: Path) -> dict[str, tuple[str, tuple, bytes]]:
    """Type, shape and bytes of each tensor of a safetensors file."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = load(data[8 : 8 + length].decode())
    body = data[8 + length :]
    header.pop("__metadata__", None)
    return {n: (h["dtype"], tuple(h["shape"]), body[slice(*h["data_offsets"])]) for n, h in header.items()}


def same_tensors(path: Path, pristine: Path) -> str | None:
    """A file that was taken has the names and shapes that were written, and numbers only."""
    import numpy as np

    got, wanted = tensors(path), tensors(pristine)
    for name in wanted | got:
        if name not in got or name not in wanted or got[name][1] != wanted[name][1]:
            return f"{path.name}: tensor {name} is {got.get(name, ('', 'missing'))[1]}"
        kind = {"F32": np.float32, "F16": np.float16, "F64": np.float64}.get(got[name][0])
        if kind and not np.isfinite(np.frombuffer(got[name][2], kind)).all():
            return f"{path.name}: tensor {name} is not finite"
    return None


def run(folder: Path, found, warned: bool) -> str | None:
    """One row a run, with the status, parameters and metrics of its files."""
    rows = {row["run"]: row for _, row in found.iterrows()}
    for path in sorted(each for each in folder.rglob("run.json") if each.is_file() or each.is_symlink()):
        if path.parent.name not in rows:
            if warned:
                continue
            return f"{path.parent.name} is not in the table"
        record, row = load(decoded(path)), rows[path.parent.name]
        if record["status"] not in ("finished", "failed", "running"):
            return f"status {record['status']!r:.60}"
        wanted = {f"parameter.{key}": value for key, value in record["parameters"].items()}
        result = path.with_name("metrics.json")
        if record["status"] == "finished" and result.is_file():
            metrics = load(decoded(result))["metrics"]
            if not all(type(value) in (int, float) and math.isfinite(value) for value in metrics.values()):
                return f"metrics {metrics!r:.80} are no numbers"
            wanted |= {f"metric.{key}": value for key, value in metrics.items()}
        for name, value in wanted.items():
            got = row[name]
            if got is not value and got != value and not (value is None and got != got):
                return f"{name} is {got!r:.40}, not {value!r:.40}"
    return None


def notebook(path: Path, found, warned: bool) -> str | None:
    """The annotated literals of the one cell that is tagged."""
    cells = [c for c in load(decoded(path))["cells"] if "parameters" in c.get("metadata", {}).get("tags", [])]
    if len(cells) != 1 or cells[0].get("cell_type", "code") != "code":
        return f"{len(cells)} cells of parameters"
    wanted = {}
    for line in ast.parse("".join(cells[0]["source"])).body:
        if line.target.id in wanted:
            return f"{line.target.id} twice"
        wanted[line.target.id] = (ast.unparse(line.annotation), ast.literal_eval(line.value))
    got = {name: (each.type_name, each.default) for name, each in found.items()}
    return None if repr(got) == repr(wanted) else f"{got!r:.100} is not {wanted!r:.100}"


def sweep(path: Path, found, warned: bool) -> str | None:
    """As many runs as grid and list make, each with its values."""
    import yaml

    text = decoded(path)
    try:
        content = load(text)
    except UnreadableError:
        content = yaml.safe_load(text)
    grid, entries = content.get("grid", {}), content.get("list", [{}])
    points = [{}]
    for name, values in grid.items():
        points = [{**point, name: value} for point in points for value in values]
    points = [{**entry, **point} for entry in entries for point in points]
    if len(found.runs) != len(points):
        return f"{len(found.runs)} runs, not {len(points)}"
    shared = content.get("parameters", {})
    for run, point in zip(found.runs, points, strict=True):
        for name, value in {**shared, **point}.items():
            name = name.rpartition(".")[2]
            if run.parameters[name] != value and str(run.parameters[name]).lower() != str(value).lower():
                try:
                    same = float(run.parameters[name]) == float(value)
                except (TypeError, ValueError):
                    same = isinstance(value, str) and load(value) == run.parameters[name]
                if not same:
                    return f"{name} is {run.parameters[name]!r:.40}, not {value!r:.40}"
    return None


def scores(folder: Path, found, true, warned: bool) -> str | None:
    """Each score is the stored one of its image, or what the scorer gives."""
    import numpy as np

    if found.shape != true.shape or not np.isfinite(found).all():
        return f"scores {found.tolist()!r:.100}"
    stored: dict = {}
    for path in (folder / "scores").glob("*.parquet"):
        frame = pq.read_table(path).to_pydict()
        for row in zip(*(frame[name] for name in ("prompt", "image", "score")), strict=True):
            stored.setdefault(row[:2], []).append(row[2])
    for key, value in np.ndenumerate(found):
        held = [each for each in stored.get(key, []) if isinstance(each, float)]
        if not any(abs(value - each) < 1e-6 for each in [true[key], *held]):
            return f"score of {key} is {value}"
        if len({round(each, 6) for each in held}) > 1:
            return f"two scores of {key}: {held}"
    return None


def unpacked(source: Path, table_path: Path, found, warned: bool) -> str | None:
    """Who won at least once of the rows that carry two images, with the bytes they came with."""
    rows = pq.read_table(source).to_pylist()
    won, data = {}, {}
    for row in rows:
        labels = (row["label_0"], row["label_1"])
        # a tie says nothing of who won, but brings its images
        if (
            not row.get("has_label", True)
            or labels not in ((1, 0), (0, 1), (0.5, 0.5))
            or not is_prompt(row["caption"])
        ):
            continue
        sides = [(row[f"image_{i}_uid"], row[f"jpg_{i}"]) for i in (0, 1)]
        if all(isinstance(uid, str) and isinstance(_bytes_of(jpg), bytes) for uid, jpg in sides):
            for (uid, jpg), label in zip(sides, labels, strict=True):
                won[uid] = won.get(uid, False) or label == 1
                data.setdefault(uid, []).append(_bytes_of(jpg))
    for image, like in zip(found.images, found.is_desirable, strict=True):
        uid = next((uid for uid in data if uid == image.stem), None)
        if uid is None:
            if image.stem.startswith("uid-"):
                continue
            return f"{image.name} is in no row"
        if image.read_bytes() not in data[uid]:
            return f"{image.name} has other bytes"
        if len(set(filter(_is_whole, data[uid]))) > 1 and not warned:  # whole bytes take the place of damaged ones
            return f"{image.name} comes with different images"
        if bool(like) and not won[uid]:
            return f"{image.name} never won"
    return None


def _is_whole(data: bytes) -> bool:
    try:
        Image.open(io.BytesIO(data)).load()
    except Exception:  # a decoder raises whatever the bytes lead it to
        return False
    return True


def _bytes_of(value):
    return value.get("bytes") if isinstance(value, dict) else value


def records(path: Path, rewards, warned: bool) -> str | None:
    """The rewards of all records, in order."""
    text = decoded(path)
    lines = [line for line in text.split("\n") if line.strip()]
    wanted = []
    for number, line in enumerate(lines, 1):
        try:
            record = load(line)
        except UnreadableError as error:
            cut = number == len(lines) and not text.endswith("\n") and "twice" not in str(error)
            if not cut and not warned:
                return f"line {number} is left out without a word"
            continue
        for key in ("reward/desirable", "reward/undesirable"):
            if key in record:
                if type(record[key]) not in (int, float):
                    return f"{key} is {record[key]!r:.40}"
                wanted.append(float(record[key]))
    return None if [float(each) for each in rewards] == wanted else f"{list(rewards)} is not {wanted}"[:200]


def value_of(text: str, x: float) -> float:
    """A formula by Python's own floats."""
    functions = {"abs": abs, "arctan": math.atan, "log": math.log, "relu": lambda v: max(v, 0.0)}
    functions |= {n: getattr(math, n) for n in ("exp", "expm1", "log1p", "sinh", "sqrt", "tanh")}
    functions |= {"sigmoid": lambda v: 1 / (1 + math.exp(-v)), "logsigmoid": lambda v: -math.log1p(math.exp(-v))}
    functions |= {"softplus": lambda v: math.log1p(math.exp(v)), "maximum": max, "minimum": min}
    operators = {ast.Add: lambda a, b: a + b, ast.Sub: lambda a, b: a - b, ast.Mult: lambda a, b: a * b}
    operators |= {ast.Div: lambda a, b: a / b, ast.Pow: lambda a, b: a**b}

    def of(node):
        match node:
            case ast.Name(id="x"):
                return x
            case ast.Name(id=name):
                return {"pi": math.pi, "e": math.e}[name]
            case ast.Constant(value=number):
                return number
            case ast.UnaryOp(op=op, operand=inner):
                return -of(inner) if isinstance(op, ast.USub) else of(inner)
            case ast.BinOp(left=left, op=op, right=right):
                return operators[type(op)](of(left), of(right))
            case ast.Call(func=ast.Name(id=name), args=arguments):
                return functions[name](*map(of, arguments))
        raise UnreadableError(ast.dump(node))

    return of(ast.parse(text.strip(), mode="eval").body)
