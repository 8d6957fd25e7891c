"""Loads reward data from files, the hub or memory, as rows of a prompt, K responses and their scores."""

from __future__ import annotations

import json
import logging
import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from datasets import Dataset, Features, Json, List, Value, load_dataset, load_from_disk
from datasets.exceptions import DatasetsError

from ..._version import __version__
from .files import WANTED as WANTED_FILES
from .files import as_json, data_files, digest, expanded, kind_of, records
from .group import group_of
from .layouts import LAYOUTS, WANTED, Layout, typed
from .messages import BadRow
from .nulls import as_row
from .paths import TARGETS, Row, mapped

logger = logging.getLogger(__name__)

Source: TypeAlias = "str | os.PathLike | Dataset | list[dict]"

# Texts and messages are separate columns: a Json column would read the text "4" as a number. Messages are Json, since their
# keys may differ.
_FEATURES = Features(
    {
        "file": Value("string"),
        "row": Value("int64"),
        "layout": Value("string"),
        "others": Value("string"),
        "score_count": Value("int64"),
        "kind": Value("string"),
        "promoted": Value("bool"),
        "text_prompt": Value("string"),
        "text_responses": List(Value("string")),
        "chat_prompt": Json(),
        "chat_responses": List(Json()),
        "scores": List(Value("float64")),
        "tools": List(Json()),
        "finished": List(Value("bool")),
        "template_kwargs": Json(),
        "desirable": List(Value("bool")),
        "dropped": List(Value("string")),
        "problem": Value("string"),
    }
)
_RAW = Features({"file": Value("string"), "row": Value("int64"), "json": Value("string"), "problem": Value("string")})
# Columns that the result has only if some row has them.
OPTIONAL = ("tools", "finished", "template_kwargs", "desirable")


class Groups(NamedTuple):
    """The result of :func:`load_groups`.

    Attributes:
        rows: ``prompt``, ``responses`` (K of them; K may differ from row to row) and ``scores``. Plain text: strings. Chat:
            ``prompt`` is a list of messages and each response one assistant message. All rows are of one kind. Further columns, if
            some row has them: ``tools``, ``template_kwargs``, ``finished`` (false: the response was cut off, and gets no end token)
            and ``desirable`` (the labels of KTO data).
        preference: the rows say which response is better, not by how much: their scores are 1 and 0.
        skipped: the rows left out (counted from 1; with the file's name, if there are several files) and what is wrong with each.
        dropped: the responses left out of rows that are kept, by row as in ``skipped``.
        layout: the layout or layouts that were found, with the columns that identify them.
        origins: ``file`` and ``row`` of each row.
    """

    rows: Dataset
    preference: bool
    skipped: dict[int | str, str]
    dropped: dict[int | str, list[str]]
    layout: str
    origins: Dataset


def load_groups(
    source: Source,
    *,
    split: str = "train",
    config_name: str | None = None,
    columns: Mapping[str, str] | None = None,
    skip_bad_rows: bool = False,
    scores_required: bool = True,
) -> Groups:
    r"""Load reward or preference data in any of its layouts, and check it row by row.

    Args:
        source: a file (JSON Lines, a JSON array, CSV or Parquet, also compressed), a folder of such files, a name on the hub, a
            ``datasets.Dataset``, or a list of rows. ``docs/data.md`` has the layouts. A layout is found by its columns. A file has
            one; if several fit, it is the one with the most scores. Prompts and responses are texts, or chat messages; a response
            given as messages may hold the whole conversation.
        split: of a hub name or a folder.
        config_name: of a hub name that has several configurations.
        columns: our names with the source's, ``{"prompt": "question", "responses": "completions.text"}``; a dot goes inside a
            column.
        skip_bad_rows: leave out bad rows and bad responses, with a warning, and do not raise. An empty response, or one without a
            score among others that have one, is left out in any case.
        scores_required: if false, responses may have no scores; the row's ``scores`` are then null.

    Returns:
        See :class:`Groups`.

    Raises:
        ValueError: a row that cannot be used, with file, row (counted from 1) and column; a source without usable rows.
        FileNotFoundError: no such file.
        TypeError: a source, or ``columns``, of another type.

    Example:
        >>> load_groups([{"question": "1 + 1 =", "chosen": " 2", "rejected": " 3"}], columns={
        ...     "prompt": "question", "chosen": "chosen", "rejected": "rejected"}).rows[0]["responses"]
        [' 2', ' 3']
    """
    columns = _checked_columns(columns)
    name, raw = _open(source, split, config_name)
    options = {"scores_required": scores_required, "skip": skip_bad_rows, "columns": columns}
    rows = _converted(raw, options)
    # Scores of two layouts rarely have the same unit. Without scores there is no unit to mix.
    forced = _one_layout_a_file(rows) if scores_required else None
    # If some texts have a system message or tools, all rows become chats.
    chat = any(rows["promoted"]) and "text" in set(rows["kind"])
    if forced or chat:
        rows = _converted(raw, {**options, "forced": forced, "chat": chat})
    rows = rows.filter(lambda layout, problem: layout is not None or problem is not None, input_columns=["layout", "problem"])
    return _groups(name, rows, skip_bad_rows, one_unit=scores_required)


def source_rows(source: Source, *, split: str = "train", config_name: str | None = None) -> list[dict]:
    """The unchanged rows of a source of :func:`load_groups`, with all their columns; empty lines are skipped.

    Raises:
        ValueError: a record that is not a row, with file and row.
    """
    name, raw = _open(source, split, config_name)
    if raw.features != _RAW:
        return [as_row(row, raw.features) for row in raw]
    rows = []
    for record in raw:
        if record["problem"] is not None:
            raise ValueError(f"{record['file'] or name}: row {record['row']}, {record['problem']}")
        if record["json"] is not None:
            rows.append(_parsed(record["json"]))
    return rows


def _checked_columns(columns: Mapping[str, str] | None) -> dict[str, str] | None:
    if columns is None:
        return None
    if not isinstance(columns, Mapping) or not all(isinstance(item, str) for pair in columns.items() for item in pair):
        raise TypeError(f"columns: got {columns!r}, wanted our names with the source's, such as {{prompt: question}}")
    if unknown := set(columns) - set(TARGETS):
        raise ValueError(f"columns: got {', '.join(sorted(unknown))}, wanted of {', '.join(TARGETS)}")
    return dict(columns)


def _open(source: Source, split: str, config_name: str | None) -> tuple[str, Dataset]:
    """The name of the source in errors, and its unchanged rows."""
    if isinstance(source, Dataset):
        return "dataset", source.with_format(None)  # as Python lists, for a data set of any format
    if isinstance(source, list):
        return "rows", _of_list(source)
    if not isinstance(source, (str, os.PathLike)):
        raise TypeError(f"source: got {type(source).__name__}, wanted a file, a hub name, a list or a datasets.Dataset (one split)")
    name, path = os.fspath(source), expanded(os.fspath(source))
    if path.is_file():
        if kind_of(path) is None:
            raise ValueError(f"{name}: unknown kind of file, wanted {WANTED_FILES}")
        return name, _of_files([path], [name])
    if path.is_dir() and config_name is None:
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            return f"{name} ({split})", _of_disk(path, split)
        paths = data_files(path, split)
        return f"{name} ({split})", _of_files(paths, [str(each) for each in paths])
    if kind_of(path) is not None or name.startswith((".", "/", "~")) and not path.exists():
        raise FileNotFoundError(f"{name}: no such file")
    try:
        return f"{name} ({split})", load_dataset(str(path) if path.is_dir() else name, config_name, split=split)
    except DatasetsError as error:
        raise ValueError(f"{name} ({split}): {error}") from error


def _of_disk(path: Path, split: str) -> Dataset:
    found = load_from_disk(str(path))
    if isinstance(found, Dataset):
        return found
    if split not in found:
        raise ValueError(f"{path}: no split {split!r}, it has {', '.join(found)}")
    return found[split]


def _of_list(rows: list[dict]) -> Dataset:
    """The rows as JSON texts: a table would give every object the keys of all objects."""
    for i, row in enumerate(rows, start=1):
        if not isinstance(row, Mapping):
            raise ValueError(f"row {i}: got {type(row).__name__}, wanted a mapping of columns")
    n = len(rows)
    values = {"file": [None] * n, "row": list(range(1, n + 1)), "json": [as_json(dict(row)) for row in rows], "problem": [None] * n}
    return Dataset.from_dict(values, features=_RAW)


def _of_files(paths: list[Path], names: list[str]) -> Dataset:
    if all(path.stat().st_size == 0 for path in paths):
        raise ValueError(f"{names[0]}: empty file")
    # The digests are for the cache of datasets, which identifies a generator by its arguments.
    files = [(str(path), name, digest(path)) for path, name in zip(paths, names, strict=True)]
    try:
        return Dataset.from_generator(_raw_rows, features=_RAW, gen_kwargs={"files": files, "version": __version__})
    except DatasetsError as error:
        raise error.__cause__ or error from None


def _raw_rows(files: list[tuple[str, str, str]], version: str) -> Iterator[dict]:
    found = False
    for path, name, _ in files:
        for row, text, problem in records(Path(path)):
            found = True
            yield {"file": name, "row": row, "json": text, "problem": problem}
    if not found:  # datasets cannot make a table without rows
        yield {"file": files[0][1], "row": 1, "json": None, "problem": None}


def _converted(raw: Dataset, options: dict[str, Any]) -> Dataset:
    # A pure function of the row, so that later runs and the other processes of this run can use datasets' cache.
    return raw.map(
        _converted_row,
        with_indices=True,
        fn_kwargs={"features": None if raw.features == _RAW else dict(raw.features), "version": __version__, **options},
        remove_columns=raw.column_names,
        features=_FEATURES,
        desc="Checking rows",
    )


def _converted_row(
    row: dict,
    index: int,
    *,
    features: dict | None,
    version: str,
    columns: dict[str, str] | None,
    scores_required: bool,
    skip: bool,
    forced: dict[str, str] | None = None,
    chat: bool = False,
) -> dict:
    """The row in the common form, or what is wrong with it; neither for an empty line."""
    origin: dict[str, Any] = {**dict.fromkeys(_FEATURES), "row": index + 1}
    try:
        if features is None:
            origin.update(file=row["file"], row=row["row"])
            if row["problem"] is not None:
                raise BadRow(None, row["problem"])
            if row["json"] is None:
                return origin
            values: Row = _parsed(row["json"])
            cells = kind_of(Path(row["file"] or "")) in (".csv", ".tsv")
        else:
            values, cells = as_row(row, features), False
        values = mapped(values, columns)
        layout = (forced or {}).get(origin["file"] or "")
        wanted = next((each for each in LAYOUTS if each.name == layout), None)
        made = group_of(typed(values) if cells else values, wanted, chat=chat, skip=skip, scores_required=scores_required)
        return {**origin, **made}
    except BadRow as error:
        return {**origin, "problem": str(error)}


def _parsed(line: str) -> dict:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BadRow(None, f"not JSON: {error}") from None
    if not isinstance(row, dict):
        raise BadRow(None, f"got {type(row).__name__}, wanted a JSON object")
    return row


def _one_layout_a_file(rows: Dataset) -> dict[str, str] | None:
    """If rows of a file fit different layouts best: for each file the layout that keeps the most scores, then the most rows."""
    found: dict[str, Counter] = defaultdict(Counter)
    rows_of: dict[str, Counter] = defaultdict(Counter)
    for batch in rows.select_columns(["file", "layout", "score_count"]).iter(batch_size=10_000):
        for file, layout, count in zip(batch["file"], batch["layout"], batch["score_count"], strict=True):
            if layout is not None:
                found[file or ""][layout] += count
                rows_of[file or ""][layout] += 1
    if all(len(layouts) == 1 for layouts in found.values()):
        return None
    order = {layout.name: -i for i, layout in enumerate(LAYOUTS)}
    return {file: max(scores, key=lambda name: (scores[name], rows_of[file][name], order[name])) for file, scores in found.items()}


def _groups(name: str, rows: Dataset, skip_bad_rows: bool, *, one_unit: bool) -> Groups:
    problems = {i: problem for i, problem in enumerate(rows["problem"]) if problem is not None}
    _refuse_mixtures(rows, problems, one_unit)
    report(name, rows.select_columns(["file", "row"]), problems, skip_bad_rows)
    kept = [i for i, kind in enumerate(rows["kind"]) if kind is not None and i not in problems]
    if not kept:
        raise ValueError(f"{name}: no usable row; wanted {WANTED}")
    several = len(set(rows["file"])) > 1
    skipped = {_key(rows[i], several): problem for i, problem in sorted(problems.items())}
    rows = rows.select(kept)
    dropped = {_key(rows[i], several): left_out for i, left_out in enumerate(rows["dropped"]) if left_out}
    if dropped:
        responses = sum(map(len, dropped.values()))
        row, left_out = next(iter(dropped.items()))
        logger.warning(
            "%s: %d responses in %d rows left out, the first: row %s, %s", name, responses, len(dropped), row, left_out[0]
        )
    layouts = [_layout(each) for each in dict.fromkeys(rows["layout"])]
    described = _described(layouts, rows)
    logger.info("%s: layout %s", name, described)
    if any(layout.single for layout in layouts):
        rows = _joined(rows)
    kind = rows[0]["kind"]
    origins = Dataset.from_dict({"file": [file or name for file in rows["file"]], "row": list(rows["row"])})
    optional = [column for column in OPTIONAL if any(value is not None for value in rows[column])]
    rows = rows.select_columns([f"{kind}_prompt", f"{kind}_responses", "scores", *optional])
    rows = rows.rename_columns({f"{kind}_{what}": what for what in ("prompt", "responses")})
    return Groups(rows, all(layout.unit == "preference" for layout in layouts), skipped, dropped, described, origins)


def report(name: str, origins: Dataset, problems: Mapping[int, str], skip_bad_rows: bool) -> None:
    """Raise for the first bad row, with file and row; with ``skip_bad_rows``, warn with the number of rows left out.

    Args:
        name: the name of the source.
        origins: ``file`` and ``row`` of each row.
        problems: what is wrong, by index.
    """
    if not problems:
        return
    first = sorted(problems)[:3]
    told = [f"row {origins[i]['row']}, {problems[i]}" for i in first]
    if not skip_bad_rows:
        others = f" ({len(problems) - 1} more bad rows)" if len(problems) > 1 else ""
        raise ValueError(f"{origins[first[0]]['file'] or name}: {told[0]}{others}")
    logger.warning("%s: %d of %d rows skipped, the first of them: %s", name, len(problems), len(origins), "; ".join(told))


def _key(row: dict, several: bool) -> int | str:
    return f"{row['file']}: row {row['row']}" if several else row["row"]


def _layout(name: str) -> Layout:
    return next(layout for layout in LAYOUTS if layout.name == name)


def _described(layouts: list[Layout], rows: Dataset) -> str:
    others = next((other for other in rows["others"] if other), None)
    return "; ".join(layout.described() for layout in layouts) + (f" (also fits {others}, with fewer scores)" if others else "")


def _refuse_mixtures(rows: Dataset, problems: dict[int, str], one_unit: bool) -> None:
    """Add to the problems: texts among chats, and scores of one kind among scores of another."""
    kinds, layouts = rows["kind"], rows["layout"]
    kind = next((kind for i, kind in enumerate(kinds) if kind is not None and i not in problems), None)
    units = Counter(_layout(each).unit for i, each in enumerate(layouts) if each is not None and i not in problems)
    unit = "scores" if units["scores"] else next(iter(units), None)
    for i, (other, layout) in enumerate(zip(kinds, layouts, strict=True)):
        if i in problems or other is None:
            continue
        if other != kind:
            problems[i] = f"column prompt: {other}, where the first row is {kind}; wanted one kind"
        elif one_unit and _layout(layout).unit != unit:
            problems[i] = f"column {_layout(layout).columns()}: a {_layout(layout).unit} among rows of {unit}; wanted one kind"


def _joined(rows: Dataset) -> Dataset:
    """Join consecutive rows of one response each to the same prompt into one row."""
    starts, last = [], object()
    for i, prompt in enumerate(rows["chat_prompt"] if rows[0]["kind"] == "chat" else rows["text_prompt"]):
        if prompt != last:
            starts.append(i)
        last = prompt
    spans = list(zip(starts, [*starts[1:], len(rows)], strict=True))
    return Dataset.from_generator(_joined_rows, features=_FEATURES, gen_kwargs={"rows": rows, "spans": [spans]})


def _joined_rows(rows: Dataset, spans: list[list[tuple[int, int]]]) -> Iterator[dict]:
    for start, end in spans[0]:
        first, *others = [rows[i] for i in range(start, end)]
        for column in ("text_responses", "chat_responses", "scores", "finished", "desirable"):
            if first[column] is not None:
                first[column] = [item for row in (first, *others) for item in row[column] or [True]]
        yield first
