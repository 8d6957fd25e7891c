"""Paths into a row: a column, or with dots a value inside it.

A list on the path stands for all its items, and ``#`` for 0, 1, 2, ...
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from .messages import BadRow

Path = str
Found = dict[str, Any]  # the values at a path, each under the name that errors use
Row = Mapping[str, Any]

# The names to which a user may map a source's own; the first layouts of the table read them.
TARGETS = (
    *("prompt", "system", "tools", "responses", "scores", "finished", "chosen", "rejected", "score_chosen", "score_rejected"),
    *("completion", "label", "response", "score"),
)


def as_paths(paths: Path | tuple[Path, ...] | None) -> tuple[Path, ...]:
    return () if paths is None else (paths,) if isinstance(paths, str) else paths


def find(row: Row, path: Path) -> Found:
    """All values at a path; none if a column is missing. A null is a value."""
    if "#" in path:
        pattern = re.compile(re.escape(path).replace(r"\#", r"(\d+)"))
        numbers = [(int(match[1]), name) for name in row if (match := pattern.fullmatch(name))]
        return {name: row[name] for _, name in sorted(numbers)}
    if path in row:
        return {path: row[path]}
    head, _, rest = path.partition(".")
    if not rest or head not in row:
        return {}
    return _inside(row[head], rest, head)


def _inside(value: Any, path: Path, name: str) -> Found:
    if isinstance(value, Mapping):
        return {f"{name}.{inner}": found for inner, found in find(value, path).items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        found: Found = {}
        for i, item in enumerate(value):
            # An item without the key still counts: responses and scores are matched by position.
            found |= _inside(item, path, f"{name}[{i}]") or {f"{name}[{i}].{path}": None}
        return found
    return {}


def listed(row: Row, path: Path | tuple[Path, ...]) -> Found:
    """The items of the list at a path, each with its position; or the values at several paths, null for a missing one."""
    if isinstance(path, tuple):
        return {name: value for each in path for name, value in (find(row, each) or {each: None}).items()}
    found = find(row, path)
    if path in found:
        value = found[path]
        if not isinstance(value, (list, tuple)):
            raise BadRow(path, f"got {type(value).__name__}, wanted a list")
        return {f"{path}[{i}]": item for i, item in enumerate(value)}
    if not found and "#" not in path:
        raise BadRow(path, "got NoneType, wanted a list")
    return found


def mapped(row: Row, columns: Mapping[str, Path] | None) -> Row:
    """The row under the names that ``columns`` gives. If it names responses or scores, columns of other names are dropped."""
    if not columns:
        return row
    renamed: dict[str, object] = {}
    for ours, path in columns.items():
        found = find(row, path)
        if not found and ours not in ("system", "tools", "finished"):
            raise BadRow(path, f"missing, wanted as {ours} by columns")
        if found:
            renamed[ours] = found[path] if path in found else _whole(found, path, row)
    if set(columns) <= {"prompt", "system", "tools"}:
        return {**row, **renamed}
    kept = ("chat_template_kwargs", "image", "images", *TARGETS)
    return {**{name: row[name] for name in kept if name in row}, **renamed}


def _whole(found: Found, path: Path, row: Row) -> object:
    """The values at a dotted path: a list if the path goes through a list, otherwise the one value."""
    value: object = row
    for key in path.split("."):
        if not isinstance(value, Mapping):
            return list(found.values())
        value = value.get(key)
    return value
