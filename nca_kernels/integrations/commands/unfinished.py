"""An output file with one line per row, which a killed command continues when it is started again."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...whole_files import replacing

Row = dict[str, Any]


class UnfinishedFile:
    r"""Collects the lines of ``out`` in ``out.part`` and moves them to ``out`` once all are there, in the order of the input.

    The first line of ``out.part`` holds the settings that determine the output. A command with other settings refuses to continue.
    If a command is killed while it writes a line, half a line is left at the end, and the next start removes it. ``out`` itself is
    always whole.

    Args:
        out: the file to write; it must not exist yet.
        settings: the settings that determine the lines, under the names that the user knows.

    Raises:
        ValueError: ``out`` exists, or ``out.part`` was made with other settings (the message names one).
    """

    def __init__(self, out: Path, settings: Row):
        if out.exists():
            raise ValueError(f"out: {out} exists; wanted a new file (remove it, or name another)")
        self.out = out
        self.part = out.with_name(out.name + ".part")
        self.lines: dict[int, Row] = {}
        out.parent.mkdir(parents=True, exist_ok=True)
        if self.part.exists():
            self._read(settings)
        if not self.part.exists():
            self._append(settings)

    def add(self, row: int, line: Row) -> None:
        """Keep the line of an input row (counted from 1). It is on the disk when this returns."""
        self._append({"row": row, "line": line})
        self.lines[row] = line

    def finish(self) -> None:
        """Write ``out`` and remove ``out.part``."""
        with replacing(self.out) as whole, whole.open("w", encoding="utf-8") as file:
            for row in sorted(self.lines):
                file.write(json.dumps(self.lines[row], ensure_ascii=False) + "\n")
        self.part.unlink()

    def _append(self, value: Row) -> None:
        with self.part.open("a", encoding="utf-8") as file:
            file.write(json.dumps(value, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _read(self, settings: Row) -> None:
        content = self.part.read_bytes()
        end = content.rfind(b"\n") + 1
        if end < len(content):
            os.truncate(self.part, end)
        values = self._values(content[:end])
        made_with = next(values, None)
        if made_with is None:
            self.part.unlink()
            return
        for name, value in json.loads(json.dumps(settings)).items():
            if made_with.get(name) != value:
                raise ValueError(
                    f"{name}: got {value!r}, and {self.part} was begun with {made_with.get(name)!r}; wanted the same, or a new out "
                    "(or remove that file)"
                )
        self.lines = {value["row"]: value["line"] for value in values}

    @staticmethod
    def _values(content: bytes) -> Iterator[Row]:
        for line in content.splitlines():
            yield json.loads(line)
