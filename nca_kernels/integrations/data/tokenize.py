"""Prompts and responses as token ids: chat template or plain text, end of sequence, truncation."""

from __future__ import annotations

import logging
from typing import NamedTuple

from datasets import Dataset
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


class TokenizedGroups(NamedTuple):
    """What :func:`tokenize_groups` made, and what it cut.

    Attributes:
        rows: ``prompt_ids``, ``response_ids`` (K lists) and ``scores``.
        prompts_cut, responses_cut: how many were shortened to fit ``max_length``.
        tokens_cut: how many tokens that took.
        prompts_merged: prompts whose last tokens are others once a response follows, and count as the response's.
    """

    rows: Dataset
    prompts_cut: int
    responses_cut: int
    tokens_cut: int
    prompts_merged: int


def tokenize_groups(
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None = None,
    max_prompt_length: int | None = None,
) -> TokenizedGroups:
    r"""Token ids of each prompt and of each of its responses, every response ending its sequence.

    Messages go through the tokenizer's chat template, plain text does not. A response is what follows the prompt in the
    tokens of both together, without the white space after a template's end of turn, which no model is asked to write. The
    end-of-sequence token is added where the template does not end the turn itself.

    Args:
        rows: of :func:`load_groups`.
        max_length: the most tokens of a prompt with a response; ``None`` for no limit.
        max_prompt_length: what the prompt keeps at least when both do not fit; ``None`` for half of ``max_length``. It loses
            its first tokens, the beginning-of-sequence token not among them; if that does not suffice, each response loses
            its last ones, but its end token.

    Returns:
        The rows, with counts of what was cut; they are logged, too.

    Raises:
        ValueError: limits that leave no room for a prompt or a response; a tokenizer without what the data needs.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError("tokenizer: no eos_token, wanted one to end the responses with")
    if max_length is None and max_prompt_length is not None:
        raise ValueError(f"max_prompt_length: got {max_prompt_length} without max_length")
    if max_length is not None:
        max_prompt_length = max_length // 2 if max_prompt_length is None else max_prompt_length
        if not 2 <= max_prompt_length <= max_length - 2:
            raise ValueError(
                f"max_prompt_length: got {max_prompt_length} with max_length {max_length}, wanted at least 2 tokens for the "
                "prompt and 2 for a response"
            )
    rows = rows.map(
        _tokenized,
        fn_kwargs={"tokenizer": tokenizer, "limits": None if max_length is None else (max_length, max_prompt_length)},
        remove_columns=["prompt", "responses"],
        desc="Tokenizing",
    )
    counts = TokenizedGroups._fields[1:]
    made = TokenizedGroups(rows.remove_columns(counts), *(sum(rows[name]) for name in counts))
    if made.tokens_cut:
        logger.warning(
            "max_length %d cut %d of %d prompts and %d responses, %d tokens in all",
            *(max_length, made.prompts_cut, len(rows), made.responses_cut, made.tokens_cut),
        )
    if made.prompts_merged:
        logger.warning(
            "%d of %d prompts end in tokens that change once a response follows (a chat template that writes the prompt "
            "alone otherwise, or a prompt that ends inside a token); there the response begins where they differ",
            *(made.prompts_merged, len(rows)),
        )
    return made


def _tokenized(row: dict, tokenizer: PreTrainedTokenizerBase, limits: tuple[int, int] | None) -> dict:
    prompt, *whole = _prompt_and_whole(row["prompt"], row["responses"], tokenizer)
    shared = min(_common_prefix(prompt, ids[:-1]) for ids in whole)
    if shared == 0:
        raise ValueError(
            f"tokenizer: the prompt {tokenizer.decode(prompt)!r} begins otherwise once a response follows: "
            f"{tokenizer.decode(whole[0])!r}"
        )
    merged = shared < len(prompt)
    prompt, responses = prompt[:shared], [ids[shared:] for ids in whole]
    before = [len(ids) for ids in (prompt, *responses)]
    if limits is not None:
        prompt, responses = truncate(prompt, responses, *limits, bos_token_id=tokenizer.bos_token_id)
    cut = [n - len(ids) for n, ids in zip(before, (prompt, *responses), strict=True)]
    return {
        "prompt_ids": prompt,
        "response_ids": responses,
        "prompts_cut": int(cut[0] > 0),
        "responses_cut": sum(n > 0 for n in cut[1:]),
        "tokens_cut": sum(cut),
        "prompts_merged": int(merged),
    }


def _prompt_and_whole(prompt: str | list, responses: list, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """The ids of the prompt alone, then those of the prompt with each response."""
    chat = not isinstance(prompt, str)
    if chat:
        if tokenizer.chat_template is None:
            raise ValueError("tokenizer: no chat_template for data of chat messages; set one, or give plain text")
        # Two contents tell whether the template writes more after them: it may write them otherwise than they are (trimmed, say).
        contents = [{**responses[0], "content": content} for content in "01"]
        try:
            texts = [tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)]
            texts += [tokenizer.apply_chat_template([*prompt, r], tokenize=False).rstrip() for r in [*responses, *contents]]
        except TemplateError as error:
            raise ValueError(f"tokenizer: its chat template refuses the prompt {str(prompt)[:200]}: {error}") from error
        *texts, zero, one = texts
        ended = zero[-1:] == one[-1:]
    else:
        texts = [prompt, *(prompt + response for response in responses)]
        ended = False
    eos = tokenizer.eos_token_id
    # A template writes the special tokens itself.
    encoded = tokenizer(texts, add_special_tokens=not chat)["input_ids"]
    # Some tokenizers end every text with one.
    encoded = [ids[:-1] if not chat and ids[-1:] == [eos] else ids for ids in encoded]
    return [encoded[0], *(ids if ended else [*ids, eos] for ids in encoded[1:])]


def _common_prefix(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def truncate(
    prompt: list[int],
    responses: list[list[int]],
    max_length: int,
    max_prompt_length: int,
    *,
    bos_token_id: int | None,
) -> tuple[list[int], list[list[int]]]:
    """The prompt, one for all responses, cut at its start; then what is still too long, before its last token."""
    room = max(max_prompt_length, max_length - max(map(len, responses)))
    if len(prompt) > room:
        first = prompt[:1] if prompt[0] == bos_token_id else []
        prompt = first + prompt[len(prompt) - room + len(first) :]
    room = max_length - len(prompt)
    return prompt, [ids if len(ids) <= room else [*ids[: room - 1], ids[-1]] for ids in responses]
