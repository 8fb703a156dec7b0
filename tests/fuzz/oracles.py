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
import re
import unicodedata
from collections import Counter
from itertools import combinations
from pathlib import Path

import pyarrow.parquet as pq

MEANING = {"file_name": "image", "image_path": "image", "caption": "prompt", "text": "prompt"}
MEANING |= {"is_desirable": "liked", "label": "liked"}
LIKE = {"1", "1.0", "true", "like", "liked", "yes", "y", "wahr", "ja", "vrai", "oui", "verdadero"}
DISLIKE = {"0", "0.0", "false", "dislike", "disliked", "no", "n", "falsch", "nein", "faux", "non", "falso"}
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
    said = len(found.set_aside) if warned else 0
    return f"{left_out} of {len(rows)} rows left out, {said} said" if left_out > said else None


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
    if given is None or str(given).strip() == "" or given != given:
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
    """Every preference within a ranking, each as often as it was given, and no other."""
    wanted: Counter = Counter()
    there = {file.name for file in path.parent.rglob("*.png")}
    absent = 0
    for prompt, images, goodness in _rankings_in(path, warned):
        absent += sum(Path(image).name not in there for image in images)
        if len(set(images)) != len(images):
            return f"an image twice in a ranking of {prompt!r:.40}"
        for a, b in combinations(range(len(images)), 2):
            if goodness[a] != goodness[b] and {Path(images[a]).name, Path(images[b]).name} <= there:
                won, lost = (a, b) if goodness[a] > goodness[b] else (b, a)
                wanted[Path(images[won]).name, Path(images[lost]).name] += 1
    got = Counter((found.images[c].name, found.images[r].name) for c, r in found.pairs)
    if got - wanted or (wanted - got and not warned):
        return f"{got - wanted} too many, {wanted - got} missing"[:300]
    likes = {image.name for image, like in zip(found.images, found.is_desirable, strict=True) if like}
    if not warned and likes != {a for a, _ in wanted}:
        return "likes are not those that won"
    if absent and not warned and not found.counts.get("images_not_there"):
        return f"{absent} images left out without a word"
    return None


def _rankings_in(path: Path, warned: bool):
    """Rankings; where something was said, those that cannot be understood are left out."""
    if path.suffix == ".json":
        for entry in load(decoded(path)):
            try:
                yield _ranking_of(entry)
            except (UnreadableError, KeyError, TypeError, StopIteration):
                if not warned:
                    raise UnreadableError(f"no ranking: {entry!r:.80}") from None
        return
    groups: dict[str, list[dict]] = {}
    for row in table(path):
        try:
            row = {**row, "rank": float(row["rank"]), "prompt": row["prompt"].strip()}
        except (ValueError, KeyError, AttributeError):
            if not warned:
                raise UnreadableError(f"no row of a ranking: {row!r:.80}") from None
            continue
        groups.setdefault(str(row.get("prompt_id") or row["prompt"]).strip(), []).append(row)
    for rows in groups.values():
        if len({row["prompt"] for row in rows}) > 1:
            raise UnreadableError("a ranking of two prompts")
        yield rows[0]["prompt"], [row["image"] for row in rows], [-row["rank"] for row in rows]


def _ranking_of(entry: dict) -> tuple[str, list, list]:
    images = next(entry[key] for key in ("images", "image_path", "file_path") if key in entry)
    keys = [key for key in ("scores", "human_preference", "rank", "ranks") if key in entry]
    if not isinstance(images, list):
        raise UnreadableError("no list of images")
    if len(keys) != 1:
        raise UnreadableError(f"{keys} say what was good")
    values = entry[keys[0]]
    if len(values) != len(images) or not all(isinstance(image, str) for image in images):
        raise UnreadableError("not one number an image")
    return entry["prompt"], images, _numbers(values, -1 if "rank" in keys[0] else 1)


def _numbers(values, sign):
    if not all(type(value) in (int, float) and math.isfinite(value) for value in values):
        raise UnreadableError(f"no numbers: {values!r:.60}")
    return [sign * value for value in values]


def likes_of_folder(folder: Path, found, warned: bool) -> str | None:
    """Each image of liked/ and disliked/ once, with the prompt beside it, or of its row in metadata."""
    told = {}
    for place in (folder, folder / "liked", folder / "disliked"):
        for path in sorted(each for each in place.glob("metadata.*") if each.is_file()):
            for row in table(path):
                if warned and not (isinstance(row.get("image"), str) and isinstance(row.get("prompt"), str)):
                    continue
                name = (place / str(row["image"]).strip().replace("\\", "/")).resolve()
                if told.setdefault(name, row["prompt"]) != row["prompt"] and not warned:
                    return f"{name.name} has two prompts"
    wanted = []
    for kind in ("liked", "disliked"):
        for path in sorted((folder / kind).iterdir()):
            if path.suffix.lower() in IMAGES and not path.name.startswith("."):
                text = path.with_suffix(".txt")
                if warned and path.resolve() not in told and not text.is_file():
                    continue
                prompt = told[path.resolve()] if path.resolve() in told else decoded(text)
                if path.resolve() not in told and not text.resolve().is_relative_to(folder.resolve()):
                    return f"{text.name} leads out of the folder"
                wanted.append((path.name, prompt.strip(), kind == "liked"))
    got = [
        (i.name, p.strip(), bool(d)) for i, p, d in zip(found.images, found.prompts, found.is_desirable, strict=True)
    ]
    if any("\ufffd" in prompt for _, prompt, _ in wanted):
        return None if warned else "text in another encoding"
    extra = Counter(got) - Counter(wanted)
    missing = Counter(wanted) - Counter(got)
    return f"{extra} too many, {missing} missing"[:300] if extra or (missing and not warned) else None


def prompts(path: Path, found, warned: bool) -> str | None:
    """Every prompt of the file once, in its order."""
    wanted = [" ".join(each.split()) for each in _prompts_in(path)]
    got = [" ".join(each.split()) for each in found.prompts]
    if got != list(dict.fromkeys(wanted)) and not (warned and set(got) <= set(wanted)):
        return f"{set(got) ^ set(wanted)} differ"[:300]
    return None


def _prompts_in(path: Path) -> list[str]:
    if path.suffix == ".txt":
        return [line for line in decoded(path).split("\n") if line.strip()]
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
        for line in decoded(path).split("\n") if path.exists() else []:
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
        if not row.get("has_label", True) or labels not in ((1, 0), (0, 1)) or not isinstance(row["caption"], str):
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
        if len(set(data[uid])) > 1 and not warned:
            return f"{image.name} comes with different images"
        if bool(like) and not won[uid]:
            return f"{image.name} never won"
    return None


def _bytes_of(value):
    return value.get("bytes") if isinstance(value, dict) else value


def records(path: Path, rewards, warned: bool) -> str | None:
    """The rewards of all records, in order."""
    lines = [line for line in decoded(path).split("\n") if line.strip()]
    wanted = []
    for number, line in enumerate(lines, 1):
        try:
            record = load(line)
        except UnreadableError:
            if number < len(lines) and not warned:
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
