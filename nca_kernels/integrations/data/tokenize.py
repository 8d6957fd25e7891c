"""Prompts and responses as token ids: chat template or plain text, end of sequence, truncation."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from datasets import Dataset, Features, List, Value
from transformers import PreTrainedTokenizerBase

from ..._version import __version__
from .load import OPTIONAL, Groups, report
from .messages import BadRow
from .render import Rendered, rendered_chat

logger = logging.getLogger(__name__)

_IDS = List(Value("int64"))
_MADE = {
    "prompt_ids": _IDS,
    "response_ids": List(_IDS),
    "problem": Value("string"),
    "prompts_cut": Value("int64"),
    "responses_cut": Value("int64"),
    "tokens_cut": Value("int64"),
    "prompts_merged": Value("int64"),
    "responses_equal": Value("int64"),
}
_COUNTS = ("prompts_cut", "responses_cut", "tokens_cut", "prompts_merged", "responses_equal")


class TokenizedGroups(NamedTuple):
    """What :func:`tokenize_groups` made, and what it cut.

    Attributes:
        rows: ``prompt_ids``, ``response_ids`` (K lists) and ``scores``.
        prompts_cut, responses_cut: how many were shortened to fit ``max_length``.
        tokens_cut: how many tokens that took.
        prompts_merged: prompts whose last tokens change when a response follows; these tokens count as part of the response.
        responses_equal: responses with the same tokens as another response to the same prompt, before or after truncation.
        skipped: the rows left out, by index (from 0), with what is wrong.
    """

    rows: Dataset
    prompts_cut: int
    responses_cut: int
    tokens_cut: int
    prompts_merged: int
    responses_equal: int
    skipped: dict[int, str]


def tokenize_groups(
    groups: Groups | Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None = None,
    max_prompt_length: int | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    skip_bad_rows: bool = False,
) -> TokenizedGroups:
    r"""Token ids of each prompt and of each of its responses; every finished response ends with an end token.

    Messages go through the tokenizer's chat template, plain text does not. The tokens of a response are those after the prompt,
    when both are tokenized together. White space after a template's end of turn is left out, since no model has to write it. The
    end-of-sequence token is added where the template does not end the turn itself. A response that is not ``finished`` gets
    neither the template's end of turn nor that token.

    Args:
        groups: the result of :func:`load_groups`, or its ``rows``; with the former, errors name the file.
        max_length: the most tokens of a prompt with a response; ``None`` for no limit.
        max_prompt_length: the number of tokens that the prompt keeps at least if both do not fit; ``None`` for half of
            ``max_length``. The prompt loses its first tokens, except the beginning-of-sequence token. If that does not suffice,
            each response loses its last tokens, except its end token.
        chat_template_kwargs: further variables of the chat template (``{"enable_thinking": False}``); a row's own come first.
        skip_bad_rows: leave out rows that cannot be tokenized, with a warning, and do not raise.

    Returns:
        The rows, with counts of what was cut, which are also logged.

    Raises:
        ValueError: limits that leave no room for a prompt or a response; a tokenizer without what the data needs; a row that
            cannot be tokenized as it is written, by file, row and column.
    """
    limits = _limits(max_length, max_prompt_length)
    rows, origins = (groups.rows, groups.origins) if isinstance(groups, Groups) else (groups, None)
    if tokenizer.eos_token_id is None:
        raise ValueError("tokenizer: no eos_token, wanted one to end the responses with")
    chat = not isinstance(rows[0]["prompt"], str)
    if chat and tokenizer.chat_template is None:
        raise ValueError("tokenizer: no chat_template for data of chat messages; set one, or give plain text")
    given = [column for column in ("prompt", "responses", *OPTIONAL[:3]) if column in rows.column_names]
    kept = {column: feature for column, feature in rows.features.items() if column not in given}
    made = rows.map(
        _tokenized_row,
        fn_kwargs={
            "tokenizer": tokenizer,
            "limits": limits,
            "kwargs": dict(chat_template_kwargs or {}),
            "clock": _clock(tokenizer) if chat else None,
            "version": __version__,
        },
        remove_columns=given,
        features=Features({**kept, **_MADE}),
        desc="Tokenizing",
    )
    problems = {i: problem for i, problem in enumerate(made["problem"]) if problem is not None}
    if problems:
        if origins is None:
            origins = Dataset.from_dict({"file": [None] * len(rows), "row": list(range(1, len(rows) + 1))})
        report("rows", origins, problems, skip_bad_rows)
        if len(problems) == len(rows):
            raise ValueError(f"rows: none of them can be tokenized; the first: {problems[0]}")
        made = made.select([i for i in range(len(made)) if i not in problems])
    counts = {name: sum(made[name]) for name in _COUNTS}
    tokenized = TokenizedGroups(rows=made.remove_columns(["problem", *_COUNTS]), skipped=problems, **counts)
    _warn(tokenized, max_length)
    return tokenized


def _limits(max_length: int | None, max_prompt_length: int | None) -> tuple[int, int] | None:
    if max_length is None:
        if max_prompt_length is not None:
            raise ValueError(f"max_prompt_length: got {max_prompt_length} without max_length")
        return None
    max_prompt_length = max_length // 2 if max_prompt_length is None else max_prompt_length
    if not 2 <= max_prompt_length <= max_length - 2:
        raise ValueError(
            f"max_prompt_length: got {max_prompt_length} with max_length {max_length}, wanted at least 2 tokens for the "
            "prompt and 2 for a response"
        )
    return max_length, max_prompt_length


def _clock(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The date that the chat template reads from the clock, as text: part of the cache's key, so that no old date is kept."""
    formats = re.findall(r"strftime_now\s*\(\s*(\"[^\"]*\"|'[^']*')\s*\)", str(tokenizer.chat_template))
    if not formats:
        return None
    template = " ".join(f"{{{{ strftime_now({each}) }}}}" for each in formats)
    return str(tokenizer.apply_chat_template([{"role": "user", "content": ""}], chat_template=template, tokenize=False))


def _warn(made: TokenizedGroups, max_length: int | None) -> None:
    n = len(made.rows)
    if made.tokens_cut:
        logger.warning(
            "max_length %d cut %d of %d prompts and %d responses, %d tokens in all",
            *(max_length, made.prompts_cut, n, made.responses_cut, made.tokens_cut),
        )
    if made.prompts_merged:
        logger.warning(
            "%d of %d prompts end in tokens that change once a response follows (a chat template that writes the prompt "
            "alone otherwise, or a prompt that ends inside a token); there the response begins where they differ",
            *(made.prompts_merged, n),
        )
    if made.responses_equal:
        logger.warning("%d responses have the same tokens as another response to their prompt", made.responses_equal)


def _tokenized_row(
    row: dict,
    *,
    tokenizer: PreTrainedTokenizerBase,
    limits: tuple[int, int] | None,
    kwargs: dict[str, Any],
    clock: str | None,
    version: str,
) -> dict:
    try:
        return {"problem": None, **_tokenized(row, tokenizer, limits, kwargs)}
    except BadRow as error:
        return {**dict.fromkeys(_MADE), "problem": str(error)}


def _tokenized(row: dict, tokenizer: PreTrainedTokenizerBase, limits: tuple[int, int] | None, kwargs: dict[str, Any]) -> dict:
    if isinstance(row["prompt"], str):
        rendered = Rendered(row["prompt"], [row["prompt"] + response for response in row["responses"]], ended=False)
    else:
        rendered = rendered_chat(row, tokenizer, kwargs)
    finished = row.get("finished") or [True] * len(row["responses"])
    prompt, *whole = _encoded(rendered, finished, tokenizer, plain=isinstance(row["prompt"], str))
    shared = min(_common_prefix(prompt, ids[:-1]) for ids in whole)
    if shared == 0:
        alone, together = (tokenizer.decode(ids)[:80] for ids in (prompt, whole[0]))
        raise BadRow("prompt", f"its tokens {alone!r} are not the first tokens of prompt and response together, {together!r}")
    merged = shared < len(prompt)
    prompt, responses = prompt[:shared], [ids[shared:] for ids in whole]
    for name, ids in enumerate(responses):
        if not ids:
            raise BadRow(f"responses[{name}]", "no tokens")
    _refuse_equal(row["responses"], responses)
    before = [len(ids) for ids in (prompt, *responses)]
    if limits is not None:
        prompt, responses = truncate(prompt, responses, *limits, bos_token_id=tokenizer.bos_token_id, finished=finished)
    cut = [n - len(ids) for n, ids in zip(before, (prompt, *responses), strict=True)]
    return {
        "prompt_ids": prompt,
        "response_ids": responses,
        "prompts_cut": int(cut[0] > 0),
        "responses_cut": sum(n > 0 for n in cut[1:]),
        "tokens_cut": sum(cut),
        "prompts_merged": int(merged),
        "responses_equal": len(responses) - len(set(map(tuple, responses))),
    }


def _refuse_equal(responses: list, ids: list[list[int]]) -> None:
    """BadRow for two responses with different words and the same tokens: some of their words are lost."""
    seen: dict[tuple[int, ...], tuple[int, str]] = {}
    for i, (response, tokens) in enumerate(zip(responses, ids, strict=True)):
        words = "".join(str(response).split())
        j, others = seen.setdefault(tuple(tokens), (i, words))
        if others != words:
            raise BadRow(f"responses[{i}]", f"differs from responses[{j}], and has the same tokens")


def _encoded(rendered: Rendered, finished: list[bool], tokenizer: PreTrainedTokenizerBase, *, plain: bool) -> list[list[int]]:
    """The ids of the prompt alone, then of the prompt with each response; an end token follows finished responses."""
    eos = tokenizer.eos_token_id
    try:
        # A template writes the special tokens itself.
        encoded = tokenizer([rendered.prompt, *rendered.whole], add_special_tokens=plain)["input_ids"]
    except Exception as error:  # a tokenizer may be custom code
        raise BadRow(None, f"the tokenizer fails on it: {error}") from error
    # Some tokenizers end every text with an end token.
    encoded = [ids[:-1] if plain and ids[-1:] == [eos] else ids for ids in encoded]
    ends = [end and not rendered.ended for end in finished]
    return [encoded[0], *([*ids, eos] if end else ids for ids, end in zip(encoded[1:], ends, strict=True))]


def _common_prefix(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def truncate(
    prompt: list[int],
    responses: list[list[int]],
    max_length: int,
    max_prompt_length: int,
    *,
    bos_token_id: int | None,
    finished: list[bool] | None = None,
) -> tuple[list[int], list[list[int]]]:
    """The prompt, shared by all responses, cut at its start; then responses that are still too long, cut before the end token.

    A response that is not ``finished`` has no end token, and loses its last tokens.
    """
    room = max(max_prompt_length, max_length - max(map(len, responses)))
    if len(prompt) > room:
        first = prompt[:1] if prompt[0] == bos_token_id else []
        prompt = first + prompt[len(prompt) - room + len(first) :]
    room = max_length - len(prompt)
    ends = finished or [True] * len(responses)
    return prompt, [
        ids if len(ids) <= room else [*ids[: room - 1], ids[-1]] if end else ids[:room]
        for ids, end in zip(responses, ends, strict=True)
    ]
