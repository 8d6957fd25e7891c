"""Reward data from files, the hub or memory, as rows of a prompt, K responses and their scores."""

from __future__ import annotations

import json
import logging
import os
import re
from typing import NamedTuple

from datasets import Dataset, Features, Json, List, Value, load_dataset

logger = logging.getLogger(__name__)

LAYOUTS = "prompt + responses + scores, prompt + chosen + rejected, or A0, A1, ... + score_A0, score_A1, ..."
_FLOAT32_MAX = 3.4028234e38  # scores become float32, where more is infinite
_IMAGES = ("image", "images")

# Texts and messages in columns of their own: a Json column would take the text "4" for a number. Json, since messages may
# have keys of their own.
_FEATURES = Features(
    {
        "kind": Value("string"),
        "text_prompt": Value("string"),
        "text_responses": List(Value("string")),
        "chat_prompt": Json(),
        "chat_responses": List(Json()),
        "scores": List(Value("float64")),
        "preference": Value("bool"),
        "problem": Value("string"),
    }
)


class Groups(NamedTuple):
    """What :func:`load_groups` read.

    Attributes:
        rows: ``prompt``, ``responses`` (K of them, K its own in each row) and ``scores``. Plain text: strings. Chat:
            ``prompt`` is a list of messages and each response one assistant message. All rows are of one kind.
        preference: all rows came as ``chosen`` + ``rejected``: the scores 1 and 0 say which is better, not by how much.
        skipped: the rows left out (counted from 1) and what is wrong with each.
    """

    rows: Dataset
    preference: bool
    skipped: dict[int, str]


class _BadRow(Exception):
    def __init__(self, column: str | None, problem: str):
        super().__init__(problem if column is None else f"column {column}: {problem}")


def load_groups(
    source: str | os.PathLike | Dataset,
    *,
    split: str = "train",
    skip_bad_rows: bool = False,
    scores_required: bool = True,
) -> Groups:
    r"""Reward or preference data in any of its layouts, checked row by row.

    Args:
        source: a ``.jsonl`` (or ``.json`` with one object a line) or ``.parquet`` file, a ``datasets.Dataset``, or what
            ``datasets.load_dataset`` takes: a name on the hub or a folder. The layouts:

            - ``prompt`` and ``responses`` with ``scores``, two lists of the same length, any length >= 1;
            - ``prompt`` and ``chosen`` with ``rejected`` (scores 1 and 0);
            - ``A0``, ``A1``, ... with ``score_A0``, ``score_A1``, ... (null where a row has fewer), with or without ``prompt``.

            Prompts and responses are texts, or lists of chat messages. A response given as messages may hold the whole
            conversation: its last message is the response, those before it the prompt.
        split: of a hub name or a folder.
        skip_bad_rows: leave bad rows out, and say which, in place of raising.
        scores_required: false takes responses without scores, too; the row's ``scores`` are then null.

    Raises:
        ValueError: a row that cannot be used, by file, row (counted from 1) and column; a source without usable rows.
        FileNotFoundError: no such file.
    """
    name, raw = _open(source, split)
    # A pure function of the row, so that datasets' cache serves later runs and the other processes of this one.
    rows = raw.map(
        _checked,
        fn_kwargs={"scores_required": scores_required},
        remove_columns=raw.column_names,
        features=_FEATURES,
        desc="Checking rows",
    )
    problems = {i: problem for i, problem in enumerate(rows["problem"], start=1) if problem is not None}
    kinds = list(rows["kind"])
    kind = next((kind for kind in kinds if kind is not None), None)
    for i, other in enumerate(kinds, start=1):
        if other not in (kind, None):
            problems[i] = f"column prompt: {other}, where the first row is {kind}; wanted one kind"
    if problems:
        told = [f"row {i}, {problems[i]}" for i in sorted(problems)]
        if not skip_bad_rows:
            raise ValueError(f"{name}: {told[0]}" + (f" ({len(told) - 1} more bad rows)" if len(told) > 1 else ""))
        logger.warning("%s: %d of %d rows skipped, the first of them: %s", name, len(told), len(rows), "; ".join(told[:3]))
    if kind is None:
        raise ValueError(f"{name}: no usable row; wanted {LAYOUTS}")
    rows = rows.select([i for i, other in enumerate(kinds) if other == kind])
    preference = all(rows["preference"])
    rows = rows.select_columns([f"{kind}_prompt", f"{kind}_responses", "scores"])
    return Groups(rows.rename_columns({f"{kind}_{what}": what for what in ("prompt", "responses")}), preference, problems)


def _open(source: str | os.PathLike | Dataset, split: str) -> tuple[str, Dataset]:
    """What errors call the source, and its rows as they stand."""
    if isinstance(source, Dataset):
        return "dataset", source.with_format(None)  # as Python's lists, whatever it is formatted for
    if not isinstance(source, (str, os.PathLike)):
        raise TypeError(f"source: got {type(source).__name__}, wanted a file, a hub name or a datasets.Dataset (one split)")
    name = os.fspath(source)
    suffix = os.path.splitext(name)[1]
    if suffix not in (".jsonl", ".json", ".parquet"):
        return f"{name} ({split})", load_dataset(name, split=split)
    if not os.path.isfile(name):
        raise FileNotFoundError(f"{name}: no such file")
    if suffix == ".parquet":
        return name, load_dataset("parquet", data_files=name, split="train")
    # As lines of text: a JSON reader wants one schema for all rows, and does not say which one is broken.
    return name, load_dataset("text", data_files=name, split="train").rename_column("text", "\n")


def _checked(row: dict, scores_required: bool) -> dict:
    """The row in the one layout; in place of it what is wrong; neither, for an empty line."""
    nothing = dict.fromkeys(_FEATURES)
    try:
        if "\n" in row:
            if not row["\n"].strip():
                return nothing
            row = _parsed(row["\n"])
        return {**nothing, **_group(row, scores_required)}
    except _BadRow as error:
        return {**nothing, "problem": str(error)}


def _parsed(line: str) -> dict:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise _BadRow(None, f"not JSON: {error}") from None
    if not isinstance(row, dict):
        raise _BadRow(None, f"got {type(row).__name__}, wanted a JSON object")
    return row


def _group(row: dict, scores_required: bool) -> dict:
    for column in _IMAGES:
        if row.get(column):
            raise _BadRow(column, "an image, wanted text alone")
    preference = False
    if row.get("responses") is not None:
        responses = _numbered(row, "responses")
        scores = _numbered(row, "scores") if scores_required or row.get("scores") is not None else None
    elif row.get("chosen") is not None or row.get("rejected") is not None:
        responses = {column: row.get(column) for column in ("chosen", "rejected")}
        scores = {"chosen": 1.0, "rejected": 0.0}
        preference = True
    elif answers := [column for column in row if re.fullmatch(r"A\d+", column)]:
        given = [c for c in sorted(answers, key=lambda c: int(c[1:])) if not row[c] is row.get(f"score_{c}") is None]
        responses = {c: row[c] for c in given}
        scores = {f"score_{c}": row.get(f"score_{c}") for c in given}
        if not scores_required and set(scores.values()) == {None}:
            scores = None
    else:
        raise _BadRow(", ".join(c for c in row if row[c] is not None), f"unknown layout; wanted {LAYOUTS}")
    if not responses:
        raise _BadRow("responses" if "responses" in row else ", ".join(answers), "no responses")
    if scores is not None and len(scores) != len(responses):
        raise _BadRow("scores", f"got {len(scores)} scores for {len(responses)} responses")
    for column, score in (scores or {}).items():
        if isinstance(score, bool) or not isinstance(score, (int, float)) or not abs(score) <= _FLOAT32_MAX:
            raise _BadRow(column, f"got {score!r}, wanted a finite number")
    prompt, responses = _texts_or_messages(row.get("prompt"), responses)
    kind = "text" if isinstance(prompt, str) else "chat"
    content = {f"{kind}_prompt": prompt, f"{kind}_responses": responses}
    scores = None if scores is None else list(scores.values())
    return {"kind": kind, **content, "scores": scores, "preference": preference}


def is_used(column: str) -> bool:
    """Is it part of a layout, or refused where it holds something?"""
    return re.fullmatch(r"prompt|responses|scores|chosen|rejected|images?|(score_)?A\d+", column) is not None


def _numbered(row: dict, column: str) -> dict[str, object]:
    if not isinstance(row.get(column), list):
        raise _BadRow(column, f"got {type(row.get(column)).__name__}, wanted a list")
    return {f"{column}[{i}]": value for i, value in enumerate(row[column])}


def _texts_or_messages(prompt: object, responses: dict[str, object]) -> tuple[object, list]:
    if isinstance(prompt, str) and all(isinstance(response, str) for response in responses.values()):
        return _text("prompt", prompt), [_text(column, response) for column, response in responses.items()]
    conversations = {column: _messages(column, "assistant", response) for column, response in responses.items()}
    column, (*turns, _) = next(iter(conversations.items()))
    for other, conversation in conversations.items():
        if conversation[:-1] != turns:
            raise _BadRow(other, f"the messages before the response differ from those of {column}, wanted one prompt")
        if conversation[-1]["role"] != "assistant":
            raise _BadRow(other, f"the last message is of role {conversation[-1]['role']!r}, wanted 'assistant'")
    answers = [conversation[-1] for conversation in conversations.values()]
    # A text beside whole conversations only repeats what they begin with.
    if turns and (prompt is None or isinstance(prompt, str)):
        return turns, answers
    prompt = _messages("prompt", "user", prompt)
    return (turns if turns[: len(prompt)] == prompt else prompt + turns), answers


def _messages(column: str, role: str, value: object) -> list[dict]:
    """A text as a message of ``role``, one message, or a list of them, as a list; its last one holds text."""
    if isinstance(value, str):
        value = {"role": role, "content": value}
    messages = value if isinstance(value, list) else [value]
    if not messages or not all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in messages):
        kind = "missing" if value is None else f"got {type(value).__name__}"
        raise _BadRow(column, f"{kind}, wanted text or messages with role and content")
    _text(column, messages[-1].get("content"))
    # Tables give every message the keys of all, null where it has none.
    return [{key: item for key, item in m.items() if item is not None} for m in messages]


def _text(column: str, value: object) -> str:
    if not isinstance(value, str):
        raise _BadRow(column, "missing text" if value is None else f"got {type(value).__name__}, wanted text")
    if not value.strip():
        raise _BadRow(column, "empty text")
    return value
