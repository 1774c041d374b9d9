"""From a path to text: finds the file, unpacks it, and names what is wrong with its bytes."""

from __future__ import annotations

import codecs
import difflib
import gzip
import re
import zlib
from pathlib import Path
from typing import NoReturn

from tunefork.data.rows import Finding
from tunefork.data.values import listed
from tunefork.errors import DataError, MissingFileError

TEXT_FORMATS = ("csv", "tsv", "json", "jsonl")
TABLE_FORMATS = ("xlsx", "parquet")
ACCEPTED = "csv, tsv, json, jsonl (each also with .gz), xlsx or parquet"

_GZIP = b"\x1f\x8b"
_MAGIC = {
    _GZIP: "gzip-compressed data; add `.gz` to its name",
    b"PK\x03\x04": "a zip archive; unpack it, or name it .xlsx if it is a workbook",
    b"PAR1": "Parquet data; name it .parquet",
    b"\xd0\xcf\x11\xe0": "an old or encrypted Office file; save it as .xlsx or .csv",
    b"BZh": "bzip2-compressed data; unpack it first",
    b"\xfd7zXZ": "xz-compressed data; unpack it first",
    b"\x28\xb5\x2f\xfd": "zstd-compressed data; unpack it first",
    b"version https://git-lfs": "a Git LFS pointer, not the data; run `git lfs pull`",
    b"%PDF": "a PDF document; export the rows as CSV",
}
_WIDE_MARKS = {  # UTF-32 first: its mark begins with UTF-16's
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
_MARKUP = re.compile(r"\s*<(!doctype|html|head|body|\?xml|!--)", re.IGNORECASE)


def find_file(path: str) -> tuple[Path, str]:
    """The file and its format (`csv`, `jsonl` …).

    Raises MissingFileError when there is none, DataError for a folder or an extension that is not read.
    """
    file = Path(path).expanduser()
    if not file.exists():
        _refuse_missing(path, file)
    if file.is_dir():
        inside = sorted(p.name for p in file.iterdir() if p.is_file() and format_of(p.name))
        hint = f"Try one of the files in it: {listed(inside)}." if inside else f"It holds no file of {ACCEPTED}."
        raise DataError(f"Rows must come from a file. Received the folder `{path}`. {hint}")
    if not file.is_file():
        raise DataError(
            f"Rows must come from a file. Received `{path}`, a pipe or device. Try saving it to a file first."
        )
    kind = format_of(file.name)
    if kind is None:
        ending = "".join(file.suffixes[-2:]) if file.name.lower().endswith(".gz") else file.suffix
        shown = f"`{ending}`" if ending else "no extension"
        raise DataError(
            f"A file of rows must be {ACCEPTED}. Received {shown} (`{path}`). Try converting it; a plain text becomes "
            'jsonl, {"text": …} a line.'
        )
    return file, kind


def format_of(name: str) -> str | None:
    """The format a file's name stands for, or None."""
    parts = name.lower().split(".")
    if len(parts) > 2 and parts[-1] == "gz":
        return parts[-2] if parts[-2] in TEXT_FORMATS else None
    return parts[-1] if len(parts) > 1 and parts[-1] in TEXT_FORMATS + TABLE_FORMATS else None


def _refuse_missing(path: str, file: Path) -> NoReturn:
    on_hub = format_of(path) is None and re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?(@\S+)?", path)
    hub_hint = f" For a data set of the Hugging Face hub, try `hub:{path}`." if on_hub else ""
    if not file.parent.is_dir():
        raise MissingFileError(
            f"A file of rows must exist. Received `{path}`: there is no folder `{file.parent}`.{hub_hint}"
        )
    siblings = sorted(p.name for p in file.parent.iterdir())
    readable = [name for name in siblings if format_of(name)]
    near = difflib.get_close_matches(file.name, siblings, n=1, cutoff=0.75)  # the shared `.csv` alone is not near
    if near:
        hint = f" Did you mean `{near[0]}`?"
    else:
        hint = hub_hint or (f" Its folder holds {listed(readable, 6)}." if readable else "")
    raise MissingFileError(f"A file of rows must exist. Received `{path}`, which does not.{hint}")


def read_text(file: Path, path: str) -> tuple[str, list[Finding]]:
    """The file's text, unpacked, without a byte-order mark.

    Raises DataError for what is empty, damaged, compressed in another way, not UTF-8, or a web page.
    """
    data = _unpacked(read_bytes(file, path), path) if file.name.lower().endswith(".gz") else read_bytes(file, path)
    for magic, what in _MAGIC.items():
        if data.startswith(magic):
            raise DataError(f"`{path}` must be text. Received {what}.")
    text, findings = _decoded(data, path)
    if not text.strip():
        raise DataError(f"`{path}` must hold rows. Received a file of {len(data)} bytes without any text.")
    if _MARKUP.match(text):
        raise DataError(
            f"`{path}` must hold rows. Received a web page or XML ({' '.join(text[:60].split())!r} …). "
            "Try downloading the raw file: what was saved may be an error or login page."
        )
    return text, findings


def read_bytes(file: Path, path: str) -> bytes:
    """All bytes. Raises DataError when the system refuses, or there are none."""
    try:
        data = file.read_bytes()
    except OSError as error:
        raise DataError(
            f"`{path}` must be readable. Received: {error.strerror or error}. Check its permissions."
        ) from error
    if not data:
        raise DataError(f"`{path}` must hold rows. Received an empty file (0 bytes).")
    return data


def _unpacked(data: bytes, path: str) -> bytes:
    if not data.startswith(_GZIP):
        raise DataError(f"`{path}` must be gzip-compressed, as its name says. Received other data. Try without `.gz`.")
    try:
        return gzip.decompress(data)
    except EOFError as error:
        raise DataError(
            f"`{path}` must be a whole gzip file. Received one that ends early, after {len(data):,} bytes. "
            "Try downloading or packing it again."
        ) from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise DataError(
            f"`{path}` must be an intact gzip file. Received a damaged one ({error}). "
            "Try `gzip -t`, then fetch it again."
        ) from error


def _decoded(data: bytes, path: str) -> tuple[str, list[Finding]]:
    findings: list[Finding] = []
    for mark, encoding in _WIDE_MARKS.items():
        if data.startswith(mark):
            raise DataError(_not_utf8(path, f"{encoding} (its first bytes say so)", encoding))
    if data.startswith(codecs.BOM_UTF8):
        data = data[len(codecs.BOM_UTF8) :]
        findings.append(
            Finding("info", "byte-order-mark", f"`{path}` starts with a UTF-8 byte-order mark, which was skipped.")
        )
    head = data[:4096]
    if head.count(0) * 5 > len(head):
        encoding = "UTF-16LE" if head[1::2].count(0) > head[0::2].count(0) else "UTF-16BE"
        raise DataError(_not_utf8(path, "mostly NUL bytes, as in UTF-16 or binary data", encoding))
    try:
        return data.decode(), findings
    except UnicodeDecodeError as error:
        commands = sum(byte < 32 and byte not in b"\t\n\r\f" for byte in head)
        if commands * 50 > len(head):
            raise DataError(
                f"`{path}` must be text. Received binary data, whatever its name says: {commands} of the first "
                f"{len(head):,} bytes are control characters. Try exporting the rows as CSV from where they come."
            ) from error
        line = data.count(b"\n", 0, error.start) + 1
        received = f"byte 0x{data[error.start]:02x} at offset {error.start:,}, line {line:,}"
        raise DataError(_not_utf8(path, received, "WINDOWS-1252")) from error


def _not_utf8(path: str, received: str, encoding: str) -> str:
    source = f"zcat {path} | iconv -f {encoding} -t UTF-8" if path.lower().endswith(".gz") else ""
    command = source or f"iconv -f {encoding} -t UTF-8 {path}"
    suffix = Path(path.removesuffix(".gz")).suffix  # the format is told from the name
    return f"`{path}` must be UTF-8 text. Received {received}. Try: {command} > converted{suffix}"
