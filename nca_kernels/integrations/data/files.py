"""Reads files of rows record by record: JSON Lines, JSON arrays, CSV and Parquet, compressed or not, in any Unicode encoding.

``datasets`` also reads such files, but it needs one schema for all rows, guesses types (a text like a date becomes a date) and does
not say at which row it failed. Here a record is a JSON text or a problem, and no type is guessed.
"""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from datasets import Features

from .nulls import as_row

Record = tuple[int, str | None, str | None]  # row (counted from 1), JSON text, what is wrong

_KINDS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
_OPENERS = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": lambda path: pa.input_stream(path, compression="zstd"),
}
WANTED = f"{', '.join(_KINDS)}, also with {', '.join(_OPENERS)}"
_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
# Files of data repositories that are not data.
_NOT_DATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "config.json")


def kind_of(path: Path) -> str | None:
    """The suffix that says how to read a file, without that of its compression; None for other files."""
    stem = path.with_suffix("") if path.suffix.lower() in _OPENERS else path
    return stem.suffix.lower() if stem.suffix.lower() in _KINDS else None


def data_files(folder: Path, split: str) -> list[Path]:
    """The files of a folder that belong to a split, by their names, as in ``datasets``; if no name has a split, all are "train".

    Raises:
        ValueError: no data file, or none of that split.
    """
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and kind_of(path) and path.name not in _NOT_DATA]
    paths = [path for path in paths if not any(part.startswith((".", "__")) for part in path.relative_to(folder).parts)]
    if not paths:
        raise ValueError(f"{folder}: no data in this folder, wanted files of {WANTED}")
    by_split: dict[str, list[Path]] = {}
    named = re.compile(rf"(?:^|[^A-Za-z0-9])({re.escape(split)})(?:[^A-Za-z0-9]|$)")
    for path in paths:
        name = path.relative_to(folder).as_posix()
        by_split.setdefault(split if named.search(name) else _split_of(name), []).append(path)
    if set(by_split) == {""} and split == "train":
        return paths
    if split not in by_split:
        found = ", ".join(sorted(filter(None, by_split))) or "files whose names tell no split, which are train"
        raise ValueError(f"{folder}: no split {split!r}, it has {found}")
    return by_split[split]


def _split_of(name: str) -> str:
    words = re.split(r"[^A-Za-z0-9]+", name.lower())
    return next((split for split, marks in _SPLITS.items() if any(mark in words for mark in marks)), "")


def records(path: Path) -> Iterator[Record]:
    """The records of a file, in its order."""
    kind = kind_of(path)
    if kind == ".parquet":
        yield from _parquet(path)
        return
    row = 0
    try:
        with _opened(path) as file:
            reader = _csv(file, "\t" if kind == ".tsv" else ",") if kind in (".csv", ".tsv") else _json(file, kind)
            for row, text, problem in reader:
                yield row, text, problem
    # In a file that is cut off or damaged, the records before the damage are good; no later one can be read.
    except (EOFError, gzip.BadGzipFile, lzma.LZMAError, pa.ArrowException, UnicodeError) as error:
        yield row + 1, None, f"cannot be read ({error}); nothing after it is read"
    except OSError as error:
        if error.errno is not None:
            raise
        yield row + 1, None, f"cannot be read ({error}); nothing after it is read"


def _opened(path: Path) -> IO[bytes]:
    opener: Any = _OPENERS.get(path.suffix.lower())
    return io.BufferedReader(opener(str(path)) if opener else open(path, "rb", buffering=0))


def _encoding(file: Any) -> str:
    """The Unicode encoding by the first bytes: by their byte order mark, or by their zeros, since JSON and CSV begin with ASCII."""
    start = file.peek(4)[:4]
    for mark, name in ((codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"), (codecs.BOM_UTF8, "utf-8-sig")):
        if start.startswith(mark):
            return name
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    return json.detect_encoding(start) if len(start) == 4 and 0 in start else "utf-8"


def _json(file: Any, kind: str | None) -> Iterator[Record]:
    encoding = _encoding(file)
    if encoding == "utf-8-sig":
        file.read(len(codecs.BOM_UTF8))
        encoding = "utf-8"
    start = file.peek(64).decode(encoding, errors="ignore").lstrip("\ufeff \t\r\n")
    if start.startswith("[") or (kind == ".json" and _is_one_value(file, encoding)):
        yield from _array(file.read().decode(encoding))
    elif encoding == "utf-8":
        for row, line in enumerate(file, start=1):  # bytes: a line that is not UTF-8 is the only bad one
            yield from _line(row, line)
    else:
        for row, text in enumerate(io.TextIOWrapper(file, encoding, newline="\n"), start=1):
            if text.strip():
                yield row, text, None


def _line(row: int, line: bytes) -> Iterator[Record]:
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        yield row, None, f"not UTF-8: byte {line[error.start]:#04x} at {error.start}; save the file as UTF-8"
        return
    if text.strip():
        yield row, text, None


def _is_one_value(file: Any, encoding: str) -> bool:
    """Whether a .json file is one value over several lines, so that its first line is not a whole value."""
    first = file.peek(1 << 16).decode(encoding, errors="ignore").lstrip("\ufeff").lstrip()
    line, newline, _ = first.partition("\n")
    try:
        json.loads(line)
    except ValueError:
        return bool(newline) and line.strip() in ("{", "[")
    return False


def _past(pattern: re.Pattern[str], text: str, at: int) -> int:
    """The end of what matches the pattern at this position."""
    found = pattern.match(text, at)
    return at if found is None else found.end()


def _array(text: str) -> Iterator[Record]:
    """The items of a JSON array, or consecutive values, one by one, so that an error names the position of a broken one."""
    decoder, space = json.JSONDecoder(), re.compile(r"[\s,]*")
    text = text.lstrip("\ufeff")
    at = _past(re.compile(r"\s*\[?"), text, 0)
    row = 0
    while True:
        at = _past(space, text, at)
        if at == len(text) or text[at] == "]":
            rest = text[at + 1 :].strip()
            if (at == len(text) or rest) and text.lstrip().startswith("["):
                problem = f"{rest[:20]!r} follows the end of the array" if rest else "the array has no end"
                yield row + 1, None, f"not JSON: {problem}"
            return
        row += 1
        try:
            _, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            yield row, None, f"not JSON: {error}; nothing after it is read"
            return
        yield row, text[at:end], None
        at = end


def _csv(file: Any, delimiter: str) -> Iterator[Record]:
    encoding = _encoding(file)
    # Bytes that are invalid in the encoding become surrogates, which valid text does not contain, and only their row is bad.
    lenient = "surrogateescape" if encoding.startswith("utf-8") else "strict"
    csv.field_size_limit(sys.maxsize)
    reader = csv.reader(io.TextIOWrapper(file, encoding, errors=lenient, newline=""), delimiter=delimiter)
    header = next(reader, [])
    row = 0
    while True:
        row += 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield row, None, f"not CSV: {error}"
            continue
        if not cells:
            continue
        if len(cells) != len(header):
            yield row, None, f"got {len(cells)} cells, wanted {len(header)}, as many as the header has"
        elif any("\udc80" <= letter <= "\udcff" for cell in cells for letter in cell):
            yield row, None, "not UTF-8; save the file as UTF-8"
        else:
            yield row, json.dumps({name: cell or None for name, cell in zip(header, cells, strict=True)}), None


def _parquet(path: Path) -> Iterator[Record]:
    try:
        file = pq.ParquetFile(path)
        features = Features.from_arrow_schema(file.schema_arrow)
        row = 0
        for batch in file.iter_batches(batch_size=1000):
            for item in batch.to_pylist():
                row += 1
                yield row, as_json(as_row(features.decode_example(item), features)), None
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        yield 1, None, f"not Parquet: {error}"


def as_json(row: dict) -> str:
    """A row as a JSON text; a value that JSON cannot express becomes a list or a text."""
    return json.dumps(row, default=_plain)


def _plain(value: object) -> object:
    return value.tolist() if hasattr(value, "tolist") else str(value)


def digest(path: Path) -> str:
    """A hash of the file's bytes, by which a cache identifies the file."""
    made = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            made.update(block)
    return made.hexdigest()


def expanded(name: str | os.PathLike[str]) -> Path:
    return Path(os.path.expanduser(os.fspath(name)))
