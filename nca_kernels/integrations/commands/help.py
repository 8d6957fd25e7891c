"""The keys of a run, for ``nca-kernels train --help``, from the dataclasses that define them."""

from __future__ import annotations

import inspect
import re
import textwrap
import types
from dataclasses import MISSING, Field, fields
from typing import Any, Union, get_args, get_origin, get_type_hints

from transformers import TrainingArguments

from ..training.config import NCAConfig
from .run_config import Sources

WIDTH = 118
_COLUMN = 34


def train_keys() -> str:
    """The keys by group, each with its type, its default and what it does."""
    inherited = {field.name: field for field in fields(TrainingArguments)}
    ours = [field for field in fields(NCAConfig) if field.init and field.name not in inherited]
    changed = [
        field for field in fields(NCAConfig) if field.name in inherited and _default(field) != _default(inherited[field.name])
    ]
    groups = {
        "Model and data": _lines(Sources, list(fields(Sources))),
        "Loss, rows and reference": _lines(NCAConfig, ours),
        "Keys of transformers.TrainingArguments with another default here": _lines(NCAConfig, changed),
    }
    told = "".join(f"\n{name}:\n{lines}" for name, lines in groups.items())
    others = sorted(set(inherited) - {field.name for field in changed})
    names = textwrap.fill(", ".join(others), WIDTH, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)
    return f"{told}\nThe other keys of transformers.TrainingArguments:\n{names}\n"


def _lines(kind: type, keys: list[Field[Any]]) -> str:
    hints, documented = get_type_hints(kind), _documented(kind)
    lines = []
    for key in keys:
        default = _default(key)
        told = "" if default is MISSING else f" = {default!r}" if default is not None else ""
        head = f"  {key.name}: {_type(hints[key.name])}{told}"
        about = documented.get(key.name) or str(key.metadata.get("help", ""))
        body = textwrap.wrap(about, WIDTH - _COLUMN, break_on_hyphens=False) or [""]
        if len(head) >= _COLUMN:
            lines.append(head)
            head = ""
        lines.append(f"{head:<{_COLUMN}}{body[0]}".rstrip())
        lines += [" " * _COLUMN + line for line in body[1:]]
    return "".join(f"{line}\n" for line in lines)


def _documented(kind: type) -> dict[str, str]:
    """The description of each key in the Args of the docstring, as plain text."""
    args = re.search(r"^Args:\n((?:    .*\n|\n)+)", (inspect.getdoc(kind) or "") + "\n", re.MULTILINE)
    found: dict[str, str] = {}
    for entry in re.split(r"^    (?=\w)", args.group(1) if args else "", flags=re.MULTILINE):
        names, colon, about = entry.partition(": ")
        if colon:
            plain = re.sub(r"(?::\w+:)?`{1,2}~?([^`]*)`{1,2}", r"\1", " ".join(about.split()))
            found.update(dict.fromkeys(names.strip().split(", "), plain))
    return found


def _default(field: Field[Any]) -> Any:
    if field.default_factory is not MISSING:
        return field.default_factory()
    return field.default


def _type(hint: Any) -> str:
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(_type(each) for each in get_args(hint) if each is not type(None))
    return hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint).replace("typing.", "")
