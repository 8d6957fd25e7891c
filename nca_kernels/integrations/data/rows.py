"""Prepares the rows that a run trains on: tokenizes and checks them, chooses K responses, and for KTO adds a mismatched one."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, concatenate_datasets
from transformers import PreTrainedTokenizerBase

from ...loss_table import LOSSES
from .layouts import WANTED, begun
from .load import Groups, load_groups
from .tokenize import TokenizedGroups, tokenize_groups

logger = logging.getLogger(__name__)

Rows: TypeAlias = "Dataset | list[dict]"

# The last four columns are optional.
COLUMNS = ("prompt_ids", "response_ids", "scores", "ref_logps", "desirable", "mismatched_ids", "mismatched_ref_logps")


class RowOptions(NamedTuple):
    """How rows are prepared; each is a key of :class:`~nca_kernels.integrations.training.config.NCAConfig`."""

    loss: str = "nca"
    alpha: float = 1.0
    num_responses: int | None = None
    max_length: int | None = 1024
    max_prompt_length: int | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    skip_bad_rows: bool = False
    kto_threshold: float | None = None
    nll_weight: float = 0.0
    seed: int = 42


def prepare_rows(
    name: str,
    rows: Rows,
    tokenizer: PreTrainedTokenizerBase | None,
    options: RowOptions,
    vocabulary: int | None = None,
    *,
    training: bool = True,
) -> Dataset:
    r"""Rows as :class:`~nca_kernels.integrations.training.trainer.NCATrainer` takes them, to rows of ``COLUMNS``.

    Args:
        name: the name of the rows in errors.
        rows: in any layout of :func:`~nca_kernels.integrations.data.load.load_groups`, or tokenized already (``prompt_ids``,
            ``response_ids`` and ``scores``, as of ``tokenize_groups``); then also with ``ref_logps``, one for each response.
        tokenizer: for rows that are not tokenized.
        options: see :class:`RowOptions`.
        vocabulary: the number of the model's embeddings; every id must be below it. None: not checked.
        training: refuse rows if none of them gives a gradient. False: the rows are for evaluation.

    Raises:
        TypeError, ValueError: rows of another form, with ``name``, row (counted from 1) and column.
    """
    if not isinstance(rows, (Dataset, list)):
        raise TypeError(f"{name}: got {type(rows).__name__}, wanted a datasets.Dataset or a list of rows")
    if len(rows) == 0:
        raise ValueError(f"{name}: got no rows")
    if "prompt_ids" not in (rows[0] if isinstance(rows, list) else rows.column_names):
        rows = _loaded(name, rows, tokenizer, options)
    # In torch format rows are tensors, and `+` would add, not concatenate.
    rows = _table(name, rows) if isinstance(rows, list) else rows.with_format(None)
    columns = COLUMNS if options.loss == "kto" else COLUMNS[:4]
    rows = rows.select_columns([column for column in columns if column in rows.column_names])
    _check(name, rows)
    if vocabulary is not None:
        _refuse_unknown_ids(name, rows, vocabulary)
    if options.num_responses is not None:
        choice = {"K": options.num_responses, "seed": options.seed}
        rows = rows.map(_chosen, with_indices=True, fn_kwargs=choice, desc="Choosing responses")
    if options.loss == "kto":
        if "desirable" not in rows.column_names:
            rows = _with_desirable(name, rows, options.kto_threshold)
        if "mismatched_ids" not in rows.column_names:
            rows = _with_mismatched(name, rows)
    elif training and options.nll_weight == 0:
        _refuse_without_preference(name, rows)
    return rows


def map_datasets(
    name: str, rows: Rows | dict[str, Rows] | None, function: Callable[[str, Rows], Rows]
) -> Rows | dict[str, Rows] | None:
    """Apply ``function(name, rows)`` to the rows, or to each data set of a mapping."""
    if rows is None:
        return None
    if isinstance(rows, dict):
        return {key: function(f"{name}[{key!r}]", value) for key, value in rows.items()}
    return function(name, rows)


def _table(name: str, rows: list[dict]) -> Dataset:
    """A table of the columns that are used and that some row has; other columns may hold values of several kinds."""
    tables = []
    for column in dict.fromkeys(column for row in rows for column in row if column in COLUMNS):
        try:
            tables.append(Dataset.from_dict({column: [row.get(column) for row in rows]}))
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise ValueError(f"{name}: column {column}: {error}; wanted one kind of values in all rows") from error
    return concatenate_datasets(tables, axis=1)


def _loaded(name: str, rows: Rows, tokenizer: PreTrainedTokenizerBase | None, options: RowOptions) -> Dataset:
    columns = list(rows[0] if isinstance(rows, list) else rows.column_names)
    if begun(dict.fromkeys(columns)) is None:
        raise ValueError(f"{name}: got the columns {', '.join(columns)}; wanted {WANTED}")
    if tokenizer is None:
        raise ValueError(
            f"processing_class: got None, wanted a tokenizer, since {name} has no prompt_ids (but {', '.join(columns)})"
        )
    try:
        groups = load_groups(rows, skip_bad_rows=options.skip_bad_rows)
        made = tokenized(groups, tokenizer, options)
    except ValueError as error:
        raise ValueError(f"{name}: {str(error).removeprefix('rows: ').removeprefix('dataset: ')}") from error
    if groups.preference and options.alpha > 0 and "alpha" in LOSSES[options.loss].takes:
        logger.warning("%s: chosen and rejected say which is better, not by how much; wanted alpha=0, got %g", name, options.alpha)
    return made


def tokenized(groups: Groups, tokenizer: PreTrainedTokenizerBase, options: RowOptions) -> Dataset:
    """The rows of ``groups`` as ids, cut as ``options`` says; with KTO's labels where a preference gives them."""
    return tokenized_with_counts(groups, tokenizer, options).rows


def tokenized_with_counts(groups: Groups, tokenizer: PreTrainedTokenizerBase, options: RowOptions) -> TokenizedGroups:
    """The rows of :func:`tokenized`, with the counts of what was cut."""
    made = tokenize_groups(
        groups,
        tokenizer,
        max_length=options.max_length,
        max_prompt_length=options.max_prompt_length,
        chat_template_kwargs=options.chat_template_kwargs,
        skip_bad_rows=options.skip_bad_rows,
    )
    if options.loss != "kto" or not groups.preference or "desirable" in made.rows.column_names:
        return made
    return made._replace(
        rows=made.rows.add_column("desirable", [[score > 0 for score in scores] for scores in made.rows["scores"]])
    )


def _check(name: str, rows: Dataset) -> None:
    """Check what the collator and the losses rely on. In Arrow, because Python would take minutes for a large data set."""
    missing = [column for column in COLUMNS[:3] if column not in rows.column_names]
    if missing:
        raise ValueError(f"{name}: got the columns {', '.join(rows.column_names)}, wanted {', '.join(missing)} as well")
    before = 0

    def refuse(column: str, bad: pa.Array, problem: str, parents: pa.Array | None = None) -> None:
        if (at := pc.index(bad, True).as_py()) >= 0:
            row = at if parents is None else parents[at].as_py()
            raise ValueError(f"{name}: row {before + row + 1}, column {column}: {problem}")

    for columns in arrow_batches(rows):
        responses = columns["response_ids"]
        counts = _lengths(responses)
        refuse("prompt_ids", pc.less(_lengths(columns["prompt_ids"]), 1), "no tokens")
        refuse("response_ids", pc.less(counts, 1), "no responses")
        empty = pc.less(_lengths(responses.flatten()), 1)
        refuse("response_ids", empty, "a response without tokens", pc.list_parent_indices(responses))
        if "desirable" in columns:
            labels = columns["desirable"]
            refuse("desirable", pc.not_equal(_lengths(labels), counts), "wanted true or false for each response")
            refuse("desirable", pc.is_null(labels.flatten()), "wanted true or false", pc.list_parent_indices(labels))
        for column in ("scores", "ref_logps"):
            if column in columns:
                numbers = columns[column]
                refuse(column, pc.not_equal(_lengths(numbers), counts), "wanted one number for each response")
                finite = pc.fill_null(pc.is_finite(numbers.flatten().cast(pa.float32(), safe=False)), False)
                refuse(column, pc.invert(finite), "wanted finite numbers", pc.list_parent_indices(numbers))
        before += len(responses)


def arrow_batches(rows: Dataset) -> Iterator[dict[str, pa.Array]]:
    """The columns of 10,000 rows at a time: an Arrow list array holds no more than 2^31 tokens."""
    for table in rows.with_format("arrow").iter(batch_size=10_000):
        yield {name: table[name].combine_chunks() for name in table.column_names}


def _lengths(lists: pa.Array) -> pa.Array:
    return pc.fill_null(pc.list_value_length(lists), 0)


def _chosen(row: dict, index: int, K: int, seed: int) -> dict:
    """A best-scored response, one scored below it, then others at random, up to K."""
    scores = row["scores"]
    generator = random.Random(f"{seed} {index}")
    order = generator.sample(range(len(scores)), len(scores))
    best = next(i for i in order if scores[i] == max(scores))
    worse = [i for i in order if scores[i] < scores[best]][:1]
    kept = [best, *worse, *(i for i in order if i not in (best, *worse))][:K]
    columns = ("response_ids", "scores", "ref_logps", "desirable")
    return {column: [row[column][i] for i in kept] for column in columns if column in row}


def _refuse_without_preference(name: str, rows: Dataset) -> None:
    """Rows without two different scores give no gradient: warn with their number, or raise ValueError if no other rows exist."""
    without = sum(len(set(scores)) < 2 for scores in rows["scores"])
    if without == len(rows):
        raise ValueError(
            f"{name}: no row has two responses with different scores, so nothing can be learned from them; wanted two or more "
            "responses to a prompt, or loss kto for single responses with labels"
        )
    if without:
        logger.warning("%s: %d of %d rows have no two different scores, and teach nothing", name, without, len(rows))


def _with_desirable(name: str, rows: Dataset, threshold: float | None) -> Dataset:
    """Add ``desirable`` by the scores: at least ``threshold``, or without one, positive rather than negative scores."""
    flat = np.concatenate([columns["scores"].flatten().to_numpy() for columns in arrow_batches(rows.select_columns("scores"))])
    if threshold is None:
        if not (flat > 0).any() or not (flat < 0).any():
            raise ValueError(
                f"{name}: column scores: from {flat.min():g} to {flat.max():g}, so their sign does not tell good from bad; "
                "wanted kto_threshold, the least score of a good one, or labels (prompt, completion, label)"
            )
        if not flat.all():
            row = next(i for i, scores in enumerate(rows["scores"], start=1) if 0 in scores)
            raise ValueError(f"{name}: row {row}, column scores: 0 is neither good nor bad by its sign; wanted kto_threshold")
    least = np.nextafter(0, 1) if threshold is None else threshold
    return rows.add_column("desirable", [[score >= least for score in scores] for scores in rows["scores"]])


def _with_mismatched(name: str, rows: Dataset) -> Dataset:
    """Add ``mismatched_ids``: a response of the row before, a different one of its responses from row to row.

    It is fixed for the run and does not depend on the batch, so that its reference log-prob can be computed once.
    """
    n = len(rows)
    if n < 2:
        raise ValueError(f"{name}: got 1 row, wanted at least 2: kto's baseline takes responses to other prompts")
    before = rows.select_columns("response_ids").select([n - 1, *range(n - 1)])
    pairs = concatenate_datasets([before, rows.select_columns("prompt_ids")], axis=1)
    # A prompt with a response to another may be longer than both rows. It is cut to the longest sequence of all rows.
    limit = {"limit": int(longest_sequences(rows).max())}
    mismatched = pairs.map(_mismatched, with_indices=True, fn_kwargs=limit, remove_columns=pairs.column_names, desc="Mismatching")
    return concatenate_datasets([rows, mismatched], axis=1)


def _mismatched(row: dict, index: int, limit: int) -> dict:
    response = row["response_ids"][index % len(row["response_ids"])]
    return {"mismatched_ids": response[: limit - len(row["prompt_ids"])]}


def missing_ref_logps(rows: Dataset) -> Dataset | None:
    """For each row, the prompt with the responses without a reference log-prob, the mismatched one last; None if all have one."""
    mismatched = "mismatched_ids" in rows.column_names and "mismatched_ref_logps" not in rows.column_names
    if not mismatched:
        return None if "ref_logps" in rows.column_names else rows.select_columns(["prompt_ids", "response_ids"])
    return rows.map(_without_ref_logps, remove_columns=rows.column_names, desc="Responses without reference log-probs")


def _without_ref_logps(row: dict) -> dict:
    responses = [] if "ref_logps" in row else row["response_ids"]
    return {"prompt_ids": row["prompt_ids"], "response_ids": [*responses, row["mismatched_ids"]]}


def with_ref_logps(rows: Dataset, ref_logps: list[list[float]]) -> Dataset:
    """The rows with the log-probs that :func:`missing_ref_logps` found missing."""
    if "mismatched_ids" in rows.column_names and "mismatched_ref_logps" not in rows.column_names:
        rows = rows.add_column("mismatched_ref_logps", [values[-1] for values in ref_logps])
        ref_logps = [values[:-1] for values in ref_logps]
    return rows if "ref_logps" in rows.column_names else rows.add_column("ref_logps", ref_logps)


def response_counts(rows: Dataset) -> list[int]:
    batches = arrow_batches(rows.select_columns("response_ids"))
    return [count for columns in batches for count in _lengths(columns["response_ids"]).to_pylist()]


def _refuse_unknown_ids(name: str, rows: Dataset, vocabulary: int) -> None:
    """ValueError for the first row with a token id that a model of ``vocabulary`` embeddings does not have."""
    before = 0
    for columns in arrow_batches(rows.select_columns(["prompt_ids", "response_ids"])):
        for column, lists in columns.items():
            of_rows = lists.flatten() if column == "response_ids" else lists
            highest = pc.max(of_rows.flatten()).as_py()
            if highest is not None and highest >= vocabulary:
                bad = next(i for i, row in enumerate(lists.to_pylist()) if highest in _flat(row))
                raise ValueError(
                    f"{name}: row {before + bad + 1}, column {column}: the token id {highest}, and the model has {vocabulary} "
                    "embeddings; wanted the model's own tokenizer, or a model resized to this one"
                )
        before += len(columns["prompt_ids"])


def _flat(row: list[Any]) -> list[int]:
    return [token for each in row for token in (each if isinstance(each, list) else [each])]


def longest_sequences(rows: Dataset) -> np.ndarray:
    """For each row the tokens of its prompt with its longest response."""
    return _row_tokens(rows, lambda tokens, starts: np.maximum.reduceat(tokens, starts))


def shared_lengths(rows: Dataset) -> np.ndarray:
    """For each row its tokens in a batch of ``share_prompt``, which repeats the last token of the prompt for each response."""
    return _row_tokens(rows, lambda tokens, starts: np.add.reduceat(tokens + 1, starts)) - 1


def _row_tokens(rows: Dataset, responses: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> np.ndarray:
    """For each row the tokens of its prompt plus a reduction of those of its responses.

    ``responses(tokens, starts)`` takes the tokens of all responses and where those of each row start; it returns a number per row.
    """
    totals = []
    for columns in arrow_batches(rows.select_columns(["prompt_ids", "response_ids"])):
        counts = _lengths(columns["response_ids"]).to_numpy()
        tokens = _lengths(columns["response_ids"].flatten()).to_numpy()
        totals.append(_lengths(columns["prompt_ids"]).to_numpy() + responses(tokens, counts.cumsum() - counts))
    return np.concatenate(totals)
