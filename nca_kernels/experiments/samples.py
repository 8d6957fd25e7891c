"""Samples of the small Llama, their rewards and their log-probs.

The reward is a known function of a response (:mod:`~nca_kernels.experiments.tasks`), so models can be compared exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM

from nca_kernels import linear_sequence_logps, sequence_logps

from .tasks import Task
from .teach import IGNORED, sequences

# Rows of a forward pass without gradients: enough to fill the cores, few enough to stay in their caches.
ROWS = 512


class Responses(NamedTuple):
    """K responses to each of n prompts."""

    tokens: Tensor  # [n, K, length]
    logps: Tensor  # [n, K], under the model that computed them


@torch.no_grad()
def sample(model: LlamaForCausalLM, prompts: Tensor, K: int, length: int, generator: torch.Generator | None) -> Responses:
    """K responses of ``length`` tokens to each prompt.

    They are drawn at temperature 1, or are the likeliest tokens if ``generator`` is None.
    """

    def draw(logits: Tensor, place: int) -> Tensor:
        if generator is None:
            return logits.argmax(-1, keepdim=True)
        return torch.multinomial(logits.softmax(-1), 1, generator=generator)

    parts = [_respond(model, batch, K, length, draw) for batch in prompts.split(max(ROWS // K, 1))]
    return Responses(*(torch.cat(part) for part in zip(*parts, strict=True)))


@torch.no_grad()
def sampled_logps(model: LlamaForCausalLM, prompts: Tensor, tokens: Tensor) -> Tensor:
    """The log-probs [n, K] of responses [n, K, length], which may be another model's."""
    _, K, length = tokens.shape
    logps = []
    for batch, drawn in zip(prompts.split(max(ROWS // K, 1)), tokens.split(max(ROWS // K, 1)), strict=True):
        rows = drawn.flatten(0, 1)

        def given(logits: Tensor, place: int, rows: Tensor = rows) -> Tensor:
            return rows[:, place : place + 1]

        logps.append(_respond(model, batch, K, length, given).logps)
    return torch.cat(logps)


def _respond(model: LlamaForCausalLM, prompts: Tensor, K: int, length: int, choose: Callable[[Tensor, int], Tensor]) -> Responses:
    """Responses whose tokens ``choose`` picks from logits [n K, V] for a place in the response.

    Prompts are computed once, and so are responses to a prompt as far as they agree.
    """
    cache = DynamicCache(config=model.config)
    logits = model(prompts, past_key_values=cache).logits[:, -1]
    row = torch.arange(len(prompts)).repeat_interleave(K)  # of the cache, for each response
    tokens = [choose(logits[row], 0)]
    logps = logits.log_softmax(-1)[row].gather(1, tokens[0])
    while len(tokens) < length:
        different, row = torch.unique(torch.stack([row, tokens[-1][:, 0]], dim=1), dim=0, return_inverse=True)
        cache.batch_select_indices(different[:, 0])
        logits = model(different[:, 1:], past_key_values=cache).logits[:, -1]
        tokens.append(choose(logits[row], len(tokens)))
        logps = logps + logits.log_softmax(-1)[row].gather(1, tokens[-1])
    return Responses(torch.cat(tokens, dim=1).view(len(prompts), K, length), logps.view(len(prompts), K))


@dataclass(frozen=True)
class Preferences:
    """K responses to each of n prompts, with their rewards and the reference model's log-probs."""

    tokens: Tensor  # [n, K, T]
    labels: Tensor  # [n, K, T]
    scores: Tensor  # [n, K]
    ref_logps: Tensor  # [n, K]

    def __len__(self) -> int:
        return len(self.scores)

    def at(self, index: Tensor | tuple[Tensor, ...]) -> Preferences:
        """Some of the prompts, or of their responses."""
        return Preferences(self.tokens[index], self.labels[index], self.scores[index], self.ref_logps[index])

    def ends(self) -> Preferences:
        """Only a best and a worst response of each prompt."""
        ends = torch.stack([self.scores.argmax(1), self.scores.argmin(1)], 1)
        return self.at((torch.arange(len(self))[:, None], ends))

    def rows(self) -> list[dict[str, Any]]:
        """Rows as :class:`~nca_kernels.integrations.training.trainer.NCATrainer` takes them."""
        start = int((self.labels[0, 0] == IGNORED).sum())
        best = self.scores == self.scores.amax(1, keepdim=True)  # what KTO takes for desirable
        columns = self.tokens[:, 0, :start], self.tokens[..., start:], self.scores, self.ref_logps, best
        names = "prompt_ids", "response_ids", "scores", "ref_logps", "desirable"
        return [dict(zip(names, row, strict=True)) for row in zip(*(column.tolist() for column in columns), strict=True)]


@torch.no_grad()
def response_logps(model: LlamaForCausalLM, tokens: Tensor, labels: Tensor, path: str) -> Tensor:
    """The log-probs [n, K] of the responses in rows [n, K, T], without materialised logits (path ``linear``) or from them."""
    logps = []
    for batch, targets in zip(tokens.flatten(0, 1).split(ROWS), labels.flatten(0, 1).split(ROWS), strict=True):
        hidden = model.model(batch, use_cache=False).last_hidden_state
        if path == "linear":
            logps.append(linear_sequence_logps(hidden, model.lm_head.weight, targets, shift=1))
        else:
            logps.append(sequence_logps(model.lm_head(hidden), targets, shift=1))
    return torch.cat(logps).view(labels.shape[:2])


def prefer(model: LlamaForCausalLM, task: Task, problems: Tensor, responses: Tensor, scores: Tensor, path: str) -> Preferences:
    """Scored responses [n, K, R] with their log-probs under ``model``. Problems whose responses all score alike are left out."""
    differ = scores.amax(1) > scores.amin(1)
    if not differ.any():
        raise ValueError(
            f"model: all {scores.shape[1]} responses to each of {len(problems)} problems score alike, so there is nothing to learn"
        )
    tokens, labels = sequences(task.prompts(problems[differ]), responses[differ])
    return Preferences(tokens, labels, scores[differ], response_logps(model, tokens, labels, path))


def scored_samples(
    model: LlamaForCausalLM, task: Task, problems: Tensor, K: int, generator: torch.Generator | None
) -> tuple[Responses, Tensor]:
    """K samples of each problem, or without a generator the likeliest tokens, and their rewards, [n, K]."""
    responses = sample(model, task.prompts(problems), K, task.answers(problems).shape[1], generator)
    return responses, task.rewards(problems, responses.tokens)
