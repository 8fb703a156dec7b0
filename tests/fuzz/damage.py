"""Seeded damage: what a disk, an editor, another program or an enemy makes of a valid file.

Each function takes a `random.Random` and changes one thing, so that a case's id says all about it.
"""

import csv
import io
import json
import os
import pickle
import struct
import zlib
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

ODD = (None, True, False, 0, -1, 1, 7, 2**53 + 1, 2**63, -(2**63) - 1, 1.5, 1e308, -0.0, float("inf"), float("nan"))
ODD += ("", " ", "x" * 3000, "\x1b[31mred\x1b[0m", "<img src=x onerror=alert(1)>", "../outside/secret.txt", "a\0b")
ODD += ("a\nb", "1", "nan", "like", "no", "1e400", "=cmd()", "Gr\u00fcn", "\u202etxt", "\ud800", "/etc/passwd")
ODD += ([], {}, [[]], {"a": {}}, [1, 2], ["x"], {"stage": "train"})
MAGIC = (b"PK\x03\x04", b"\x89PNG\r\n\x1a\n", b"PAR1", b"\x1f\x8b\x08\x00", b"%PDF-1.4\n", pickle.dumps({"a": 1}))


def damage(rng, path: Path) -> None:
    """Change one file in one way: what it holds, its bytes, or what it is."""
    chance = rng.random()
    if chance < 0.04:
        _as_another_node(rng, path)
    elif chance < 0.34:
        path.write_bytes(damaged_bytes(rng, path.read_bytes()))
    else:
        of_suffix = {".json": _json, ".ipynb": _json, ".yaml": _json, ".jsonl": _jsonl, ".csv": _csv, ".tsv": _csv}
        of_suffix |= {".parquet": _parquet, ".safetensors": _safetensors, ".png": _png, ".txt": _txt}
        of_suffix.get(path.suffix, _bytes)(rng, path)


def _as_another_node(rng, path: Path) -> None:
    kind = rng.choice(["gone", "link out", "link to itself", "folder", "pipe", "link to nothing"])
    secret = path.parent / ".." / "outside" / "secret.txt"
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind != "gone":
        path.symlink_to({"link out": secret, "link to itself": path.name, "link to nothing": "nothing.here"}[kind])


def damaged_bytes(rng, data: bytes) -> bytes:
    """One change that knows nothing of the format."""
    at = rng.randrange(len(data) + 1)
    end = min(len(data), at + rng.choice([1, 2, 8, 64, 1000]))
    match rng.randrange(16):
        case 0:
            return b""
        case 1 | 2:
            return data[:at]
        case 3 | 4 if data:
            at = min(at, len(data) - 1)
            return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
        case 5:
            return data[:at] + data[end:]
        case 6:
            return data[:end] + data[at:]
        case 7:
            return data[:at] + rng.randbytes(end - at) + data[at:]
        case 8:
            return data.replace(b"\n", rng.choice([b"\r\n", b"\r", b"\n\n", b"\0\n"]))
        case 9:
            return b"\xef\xbb\xbf" + data
        case 10:
            return data.decode("latin1").encode("utf-16" if rng.random() < 0.5 else "utf-32")
        case 11:
            return data[:at] + rng.choice([b"\xe4", b"\xff\xfe", b"\0", b"\x1b[2J", b"\xed\xa0\x80"]) + data[at:]
        case 12:
            return rng.choice(MAGIC) + data[at:]
        case 13:
            return data[:at] + data[at:end] * rng.choice([2, 100]) + data[end:]
        case 14:
            return data[:at] + b"[" * rng.choice([10, 3000, 100_000]) + data[at:]
    return rng.randbytes(rng.choice([1, 50, 5000]))


def _bytes(rng, path):
    path.write_bytes(damaged_bytes(rng, path.read_bytes()))


def _txt(rng, path):
    lines = path.read_text().split("\n")
    at = rng.randrange(len(lines))
    lines[at : at + rng.randrange(2)] = [rng.choice(lines) + text_of(odd(rng))]
    path.write_bytes("\n".join(lines).encode("utf-8", "surrogatepass"))


def odd(rng):
    """A value of an unexpected type, size or meaning."""
    return rng.choice(ODD)


def text_of(value) -> str:
    """As a field of a table would hold it."""
    return value if isinstance(value, str) else json.dumps(value)


def damaged_value(rng, value):
    """One change somewhere in a tree of dicts and lists, which is copied."""
    value = json.loads(json.dumps(value))
    places = [None, *_places(value)]
    place = rng.choice(places if len(places) == 1 or rng.random() < 0.05 else places[1:])
    if place is None:
        return rng.choice([odd(rng), [value], {"a": value}])
    holder, key = place
    match rng.randrange(8):
        case 0:
            del holder[key]
        case 1 if isinstance(holder, dict):
            holder[rng.choice([f"{key}x", key.upper(), f" {key}", "", "\x1b[1m"])] = holder.pop(key)
        case 2:
            other, name = rng.choice(places[1:])
            holder[key], other[name] = other[name], holder[key]
        case 3:
            holder[key] = [holder[key]]
        case 4 if isinstance(holder, list):
            holder.insert(key, holder[rng.randrange(len(holder))])
        case 5 if isinstance(holder[key], int | float):
            holder[key] = rng.choice([holder[key] + 1, -holder[key], str(holder[key]), holder[key] * 10**9, 0.5])
        case _:
            holder[key] = odd(rng)
    return value


def _places(value):
    keys = value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in list(keys):
        yield value, key
        yield from _places(value[key])


def damaged_json(rng, text: str) -> str:
    """One change in JSON, or one that makes it none."""
    try:
        value = json.loads(text)
    except ValueError:
        return text[: rng.randrange(len(text) + 1)]
    chance = rng.random()
    if chance < 0.8:
        try:
            return json.dumps(damaged_value(rng, value), indent=rng.choice([None, 2]))
        except RecursionError:
            return text
    keys = list(value) if isinstance(value, dict) else []
    if chance < 0.9 and keys:  # a key that comes twice
        again = json.dumps({rng.choice(keys): odd(rng)})[1:-1]
        return rng.choice([text.rstrip()[:-1] + f", {again}}}", "{" + again + ", " + text.lstrip()[1:]])
    return rng.choice([text + text, text + " x", text.replace('"', "'"), text[:-2], "[" * 5000 + text, "// x\n" + text])


def _json(rng, path):
    path.write_text(damaged_json(rng, path.read_text()))


def _jsonl(rng, path):
    lines = path.read_text().splitlines()
    at = rng.randrange(len(lines))
    match rng.randrange(8):
        case 0:
            lines.insert(at, rng.choice(["", "{", "null", "[]", '{"a": 1}', "x", lines[at], "{" * 2000]))
        case 1:
            del lines[at]
        case 2:
            lines[at] = lines[at][: rng.randrange(len(lines[at]) + 1)]
        case 3:
            lines.append(rng.choice(lines))
        case _:
            lines[at] = damaged_json(rng, lines[at])
    path.write_text("\n".join(line.replace("\n", " ") for line in lines) + "\n" * rng.randrange(2))


def _csv(rng, path):
    separator = "\t" if path.suffix == ".tsv" else ","
    rows = list(csv.reader(io.StringIO(path.read_text()), delimiter=separator))
    at, column = rng.randrange(len(rows)), rng.randrange(len(rows[0]))
    match rng.randrange(12):
        case 0:
            rows = [[*row, row[column]] for row in rows]  # a column that comes twice
            if rng.random() < 0.5:
                rows[at][-1] = text_of(odd(rng))
        case 1:
            rows = [[each for place, each in enumerate(row) if place != column] for row in rows]
        case 2:
            rows[0][column] = rng.choice(["", "x", "Image", " prompt", "label", "caption", "LIKED", rows[0][0]])
        case 3:
            other = rng.randrange(len(rows[0]))
            rows[0][column], rows[0][other] = rows[0][other], rows[0][column]
        case 4:
            rows[at] = rng.choice([rows[at][:-1], [*rows[at], "x"], [], [""] * len(rows[0])])
        case 5:
            rows.insert(at, list(rng.choice(rows)))
        case 6:
            separator = rng.choice([";", "|", "\t", " "])
        case 7:
            path.write_text(path.read_text().replace(",", rng.choice([',"', '",', ", ", ",,"]), rng.choice([1, -1])))
            return
        case _:
            rows[at][column] = text_of(odd(rng))
    out = io.StringIO()
    csv.writer(out, delimiter=separator, lineterminator=rng.choice(["\n", "\r\n"])).writerows(rows)
    path.write_bytes(out.getvalue().encode(rng.choice(["utf-8", "utf-8", "cp1252"]), "replace"))


def _parquet(rng, path):
    table = pq.read_table(path)
    names, columns = table.column_names, [table[name].to_pylist() for name in table.column_names]
    at = rng.randrange(len(names))
    row = rng.randrange(len(table)) if len(table) else 0
    match rng.randrange(10):
        case 0:
            del names[at], columns[at]
        case 1:
            names[at] = rng.choice(["x", "", "IMAGE", "prompt", "liked", "score", names[0]])
        case 2:
            names, columns = [*names, rng.choice(names)], [*columns, columns[at]]
        case 3:
            end = rng.randrange(len(table) + 1)
            columns = [column[row:] if row else column[:end] for column in columns]
        case 4:
            columns = [column + column for column in columns]
        case 5:
            columns[at] = [{"bytes": None, "path": str(value)} for value in columns[at]]
        case 6:
            columns[at] = [str(value) for value in columns[at]]
        case 7:
            columns[at] = [None] * len(columns[at])
        case _ if len(table):
            columns[at][row] = odd(rng)
    try:
        arrays = [pa.array(column) for column in columns]
    except (pa.ArrowException, OverflowError, TypeError, UnicodeError):  # of mixed types: as text
        arrays = [pa.array([None if v is None else ascii(v) for v in column]) for column in columns]
    pq.write_table(pa.Table.from_arrays(arrays, names=names), path)


def _safetensors(rng, path):
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    tensors = [name for name in header if name != "__metadata__"]
    name = rng.choice(tensors)
    match rng.randrange(10):
        case 0:
            length = rng.choice([0, length - 1, length + 1, 2**31, 2**60, 2**64 - 1, len(data)])
            path.write_bytes(length.to_bytes(8, "little") + data[8:])
            return
        case 1:
            del header[name]
        case 2:
            header[f"other.{name}"] = header.pop(name)
        case 3:
            kind = header[name]["dtype"]
            header[name]["dtype"] = rng.choice(["F16", "BF16", "I32", "F64", "X", kind.lower()])
        case 4:
            header[name]["shape"] = rng.choice([[], [0], [2**40], header[name]["shape"][::-1], [-1]])
        case 5:
            body = body[: rng.randrange(len(body) + 1)] + rng.choice([b"", b"\0" * 8])
        case 6:  # not a number, in each precision
            begin, stop = header[name]["data_offsets"]
            body = body[:begin] + b"\xff" * (stop - begin) + body[stop:]
        case 7:
            header["__metadata__"] = rng.choice([{}, {"notes": "x"}, {"notes": "[[1]]"}, {"a": 1}, []])
        case _:
            header = damaged_value(rng, header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


def _png(rng, path):
    data = path.read_bytes()
    bomb = zlib.compress(b"\0" * 80_000_000, 1) if rng.random() < 0.1 else zlib.compress(b"x" * 100)
    chunk = rng.choice([b"zTXtComment\0\0", b"iCCPp\0\0", b"iTXtparameters\0\1\0\0\0", b"tEXtparameters\0", b"eXIf"])
    match rng.randrange(4):
        case 0:
            size = rng.choice([0, 1, 13_000, 2**31 - 1, 2**32 - 1])
            data = data[:16] + struct.pack(">I", size) + data[20:]
            data = data[:29] + struct.pack(">I", zlib.crc32(data[12:29])) + data[33:]
        case 1:
            data = data[:33] + _chunk(chunk + bomb) + data[33:]
        case 2:  # colour type and depth
            data = data[:24] + bytes([rng.choice([1, 2, 4, 8, 16]), rng.randrange(8)]) + data[26:]
            data = data[:29] + struct.pack(">I", zlib.crc32(data[12:29])) + data[33:]
        case _:
            at = rng.randrange(33, len(data))
            data = data[:at] + rng.randbytes(4) + data[at + 4 :]
    path.write_bytes(data)


def _chunk(named: bytes) -> bytes:
    return struct.pack(">I", len(named) - 4) + named + struct.pack(">I", zlib.crc32(named))
