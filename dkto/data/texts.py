"""Text that people bring: how a file is decoded, and what counts as a prompt.

Files are UTF-8, with or without a byte order mark, or UTF-16 with one, and end their lines in any way. A spreadsheet
may also be Windows-1252, as Excel writes it, where no other code page could be meant.
"""

import codecs
import io
import re
import struct
import unicodedata
import warnings
import zlib
from pathlib import Path

from dkto.common.files import refuse_other_than_file
from dkto.common.names import shown

NO_VALUE = frozenset({"", "nan", "none", "null", "<na>"})  # what programs write for a field without a value
LONGEST_CHUNK = 1 << 20  # bytes of a PNG's text, packed or not; a longer one is passed over unread
MOST_CHUNKS = 1000  # of a PNG before its pixels
_LETTERS = bytes(
    byte for byte in range(0xC0, 0x100) if bytes([byte]).decode("cp1252") == bytes([byte]).decode("cp1250")
)
_ASCII = bytes(range(1, 0x80))


def open_text(path: Path, *, spreadsheet: bool = False) -> io.TextIOWrapper:
    """A file of text, for reading line by line.

    Args:
        path: the file.
        spreadsheet: take Windows-1252 too, with a warning, if every letter that is not ASCII is the same in the
            code page of Central Europe, and they do not follow each other, as those of other alphabets would.

    Raises:
        ValueError: if it is no text in one of these encodings; the sentence names file and line.
    """
    refuse_other_than_file(path, "text")
    data = path.read_bytes()
    encoding = "utf-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    try:
        at = data.decode(encoding).find("\0")
    except UnicodeDecodeError as error:
        if not spreadsheet or encoding == "utf-16" or not _is_western(data):
            line = len(re.findall(rb"\r\n?|\n", data[: error.start])) + 1
            found = f"line {line} holds the byte {data[error.start]:#04x}; save the file as UTF-8"
            raise ValueError(f"{path} cannot be read as UTF-8 text: {found}") from None
        warnings.warn(f"{path} is not UTF-8 and is read as Windows-1252: save it as UTF-8 to be sure", stacklevel=3)
        return io.TextIOWrapper(io.BytesIO(data), "cp1252")
    if at >= 0:
        line = data[:at].count(b"\n") + 1
        raise ValueError(f"{path} cannot be read as UTF-8 text: line {line} holds a NUL sign; save the file as UTF-8")
    return io.TextIOWrapper(io.BytesIO(data), encoding)


def read_text(path: Path) -> str:
    """The text of a file, without a byte order mark; every line ends in a line feed."""
    return open_text(path).read()


def _is_western(data: bytes) -> bool:
    alone = not re.search(rb"[\x80-\xff][\x80-\xde\xe0-\xff]|[\x80-\xff]{3}", data)  # a sharp s may follow an umlaut
    return alone and b"\0" not in data and not data.translate(None, _LETTERS + _ASCII)


def clean_prompt(value: object) -> str:
    """A prompt without the blanks around it; "" where the value is no prompt.

    >>> clean_prompt(" a red star "), clean_prompt(None), clean_prompt("nan"), clean_prompt("a\\0")
    ('a red star', '', '', '')
    """
    if not isinstance(value, str):
        return ""
    text = value.strip().strip("\ufeff").strip()
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:  # half of a pair of surrogates, from JSON
            return ""
    return "" if "\0" in text or text.casefold() in NO_VALUE else text


def check_prompt(value: object, where: str) -> str:
    """`clean_prompt` of a value that must be a prompt.

    >>> check_prompt("", "x.csv, row 2")
    Traceback (most recent call last):
    ValueError: x.csv, row 2: prompt must be text, got ''
    """
    if prompt := clean_prompt(value):
        return prompt
    raise ValueError(f"{where}: prompt must be text, got {shown(value)}")


def same_prompt(prompt: str) -> str:
    """What two prompts share that are the same but for case, blanks and the form of accents.

    >>> same_prompt(" A red  Star") == same_prompt("a red star")
    True
    """
    return " ".join(unicodedata.normalize("NFC", prompt).casefold().split())


def prompt_of_image(text: str) -> str:
    """The prompt in the text of one image; what AUTOMATIC1111's web UI adds to it is left out.

    >>> prompt_of_image("a red star\\nNegative prompt: blurry\\nSteps: 20, Sampler: Euler a")
    'a red star'
    """
    return clean_prompt(re.split(r"^(?:Negative prompt:|Steps: \d+, )", text, maxsplit=1, flags=re.MULTILINE)[0])


def prompt_in_png(path: Path) -> str:
    """The prompt that AUTOMATIC1111's web UI wrote into a PNG file, in its text `parameters`; "" if there is none."""
    with path.open("rb") as file:
        if file.read(8) != b"\x89PNG\r\n\x1a\n":
            return ""
        for _ in range(MOST_CHUNKS):
            head = file.read(8)
            if len(head) < 8 or head[4:] in (b"IDAT", b"IEND"):
                break
            length = struct.unpack(">I", head[:4])[0]
            if head[4:] in (b"tEXt", b"zTXt", b"iTXt") and length <= LONGEST_CHUNK:
                name, _, rest = file.read(length).partition(b"\0")
                if name == b"parameters":
                    return prompt_of_image(_chunk_text(head[4:], rest))
                length = 0
            file.seek(length + 4, io.SEEK_CUR)
    return ""


def _chunk_text(kind: bytes, rest: bytes) -> str:
    packed, data, encoding = kind == b"zTXt", rest[kind == b"zTXt" :], "latin-1"
    if kind == b"iTXt":
        packed, data, encoding = rest[:1] == b"\1", rest[2:].split(b"\0", 2)[-1], "utf-8"
    try:
        return (zlib.decompressobj().decompress(data, LONGEST_CHUNK) if packed else data).decode(encoding)
    except (zlib.error, UnicodeDecodeError):
        return ""
