"""Samples responses from a causal LM, each with its own random numbers."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)


class Sampled(NamedTuple):
    """A response, and whether the model ended it (by an end token or a stop string) and not the limit of tokens."""

    text: str
    finished: bool


class Sampling(NamedTuple):
    """How responses are drawn.

    Attributes:
        temperature: >= 0; 0 takes the likeliest token.
        top_p: in (0, 1]; only the likeliest tokens that together have this probability are drawn.
        max_new_tokens: >= 1, the most tokens of a response.
        seed: with the row and the number of the response, it seeds the random numbers of the response.
        stop: a response ends before the first of these strings.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 512
    seed: int = 0
    stop: tuple[str, ...] = ()


def sample_responses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    keys: Sequence[tuple[int, int]],
    sampling: Sampling,
    ends: Sequence[int],
) -> list[Sampled]:
    r"""One response to each prompt, in one batch.

    A token is ``argmax_v (log p_v + G_v)`` with Gumbel noise ``G``, which draws from p (the Gumbel-max trick). Each response has a
    generator of its own for the noise, seeded by ``sampling.seed`` and the response's key. So a response does not depend on the
    rest of the batch, up to rounding: in float32 the same seed gives the same text at any batch size.

    Args:
        prompts: token ids, at least one each.
        keys: for each prompt, its row and the number of the response.
        ends: ids that end a response (:func:`end_tokens`).

    Source: Gumbel 1954; Maddison, Tarlow and Minka 2014, "A* Sampling".
    """
    longest = max(map(len, prompts))
    pad = ends[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    # On the left, so that every response begins at the same position.
    ids = torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
    config = GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        do_sample=False,
        repetition_penalty=1.0,  # whatever the model's own defaults are
        eos_token_id=list(ends),
        pad_token_id=pad,
        stop_strings=list(sampling.stop) or None,
    )
    made = model.generate(  # type: ignore[operator]  # transformers declares it in a mixin of the causal LMs alone
        input_ids=ids,
        attention_mask=mask,
        generation_config=config,
        logits_processor=_processors(sampling, keys),
        tokenizer=tokenizer,
    )
    return [_sampled(row.tolist(), tokenizer, sampling.stop, set(ends)) for row in made[:, longest:]]


def _sampled(ids: list[int], tokenizer: PreTrainedTokenizerBase, stop: tuple[str, ...], ends: set[int]) -> Sampled:
    end = next((i for i, token in enumerate(ids) if token in ends), None)
    text = str(tokenizer.decode(ids[:end], skip_special_tokens=True))
    cuts = [at for string in stop if (at := text.find(string)) >= 0]
    return Sampled(text[: min(cuts)] if cuts else text, end is not None or bool(cuts))


def _processors(sampling: Sampling, keys: Sequence[tuple[int, int]]) -> LogitsProcessorList:
    processors: list[LogitsProcessor] = []
    if sampling.temperature > 0:
        processors.append(TemperatureLogitsWarper(sampling.temperature))
        if sampling.top_p < 1:
            processors.append(TopPLogitsWarper(sampling.top_p))
        processors.append(_GumbelNoise(sampling.seed, keys))
    return LogitsProcessorList(processors)


class _GumbelNoise(LogitsProcessor):
    """Adds Gumbel noise, each row's from a generator of its own."""

    def __init__(self, seed: int, keys: Sequence[tuple[int, int]]):
        self._generators = [torch.Generator().manual_seed(response_seed(seed, *key)) for key in keys]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        # On the CPU, whose generator gives the same numbers on every machine.
        exponential = torch.stack([torch.empty(scores.shape[1]).exponential_(generator=each) for each in self._generators])
        return scores.float() - exponential.log().to(scores.device)


def response_seed(seed: int, row: int, response: int) -> int:
    """A seed of 63 bits for one response."""
    digest = hashlib.blake2b(f"{seed} {row} {response}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that end a response: the model's, the tokenizer's, and the one that the chat template writes after an answer."""
    found: list[Any] = [tokenizer.eos_token_id]
    given = getattr(model.generation_config, "eos_token_id", None)
    found += given if isinstance(given, list) else [given]
    if tokenizer.chat_template is not None:
        found.append(_end_of_turn(tokenizer))
    return list(dict.fromkeys(token for token in found if token is not None))


def _end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    answer = "The answer."
    conversation = [{"role": "user", "content": "A question?"}, {"role": "assistant", "content": answer}]
    text = str(tokenizer.apply_chat_template(conversation, tokenize=False))
    if answer not in text:
        return None
    after = tokenizer(text[text.rindex(answer) + len(answer) :], add_special_tokens=False)["input_ids"]
    return after[0] if after and after[0] in tokenizer.all_special_ids else None
