"""Reads the rows for ``sample`` and ``rate``: each row unchanged, and its prompt as text or messages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from ..data import files
from ..data.messages import BadRow, as_messages, as_text, as_tools, is_chat

Messages = list[dict[str, Any]]


class PromptRow(NamedTuple):
    """A row of a file.

    Attributes:
        number: the row's position in the file, counted from 1.
        line: the row unchanged, with all of its columns.
        prompt: a text, or messages with the row's ``system`` message before them.
        tools: the tools for the chat template; None if the row has none.
    """

    number: int
    line: dict[str, Any]
    prompt: str | Messages
    tools: list[dict[str, Any]] | None


def read_prompts(data: Path) -> list[PromptRow]:
    """The rows of a file that has a column ``prompt``.

    Raises:
        ValueError: a row cannot be used (the message names file, row and column), or the file has no row.
        FileNotFoundError: the file does not exist.
    """
    if not data.is_file():
        raise FileNotFoundError(f"{data}: no such file")
    if files.kind_of(data) is None:
        raise ValueError(f"data: got {data}, wanted {files.WANTED}")
    rows = [_row(data, number, text, problem) for number, text, problem in files.records(data)]
    if not rows:
        raise ValueError(f"{data}: no rows, wanted one prompt per row")
    return rows


def _row(data: Path, number: int, text: str | None, problem: str | None) -> PromptRow:
    if text is None:
        raise ValueError(f"{data}: row {number}, {problem}")
    try:
        line = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{data}: row {number}, not JSON: {error}") from None
    if not isinstance(line, dict):
        raise ValueError(f"{data}: row {number}, got {type(line).__name__}, wanted a JSON object")
    try:
        prompt = line.get("prompt")
        system = line.get("system")
        if is_chat(prompt) or system is not None:
            prompt = as_messages("prompt", "user", prompt)
            if system is not None and prompt[0]["role"] != "system":
                prompt = [{"role": "system", "content": as_text("system", system)}, *prompt]
        else:
            prompt = as_text("prompt", prompt)
        tools = None if line.get("tools") is None else as_tools(line["tools"])
    except BadRow as error:
        raise ValueError(f"{data}: row {number}, {error}") from None
    return PromptRow(number, line, prompt, tools)
