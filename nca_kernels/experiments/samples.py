"""Samples of the small Llama, their rewards and their log-probs.

The reward is a known function of a response (:mod:`~nca_kernels.experiments.tasks`), so models can be compared exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM

from nca_kernels import linear_sequence_logps, sequence_logps

from .tasks import Task
from .teach import IGNORED, sequences

# Rows of a forward pass without gradients: enough to fill the cores, few enough to stay in their caches.
ROWS = 512


@torch.no_grad()
def sample(model: LlamaForCausalLM, prompts: Tensor, K: int, length: int, generator: torch.Generator | None) -> Tensor:
    """K responses of ``length`` tokens to each prompt, [n, K, length]; the prompt is computed once.

    They are drawn at temperature 1, or are the likeliest tokens if ``generator`` is None.
    """

    def draw(logits: Tensor) -> Tensor:
        if generator is None:
            return logits.argmax(-1, keepdim=True)
        return torch.multinomial(logits.softmax(-1), 1, generator=generator)

    responses = []
    for batch in prompts.split(max(ROWS // K, 1)):
        cache = DynamicCache(config=model.config)
        logits = model(batch, past_key_values=cache).logits[:, -1].repeat_interleave(K, dim=0)
        cache.batch_repeat_interleave(K)
        drawn = [draw(logits)]
        while len(drawn) < length:
            drawn.append(draw(model(drawn[-1], past_key_values=cache).logits[:, -1]))
        responses.append(torch.cat(drawn, dim=1).view(len(batch), K, length))
    return torch.cat(responses)


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
) -> tuple[Tensor, Tensor]:
    """K samples of each problem, or without a generator the likeliest tokens, [n, K, R], and their rewards, [n, K]."""
    responses = sample(model, task.prompts(problems), K, task.answers(problems).shape[1], generator)
    return responses, task.rewards(problems, responses)


@torch.no_grad()
def log_ratios(model: LlamaForCausalLM, reference: LlamaForCausalLM, task: Task, problems: Tensor, responses: Tensor) -> Tensor:
    """``logp - ref_logp`` [n, K] of responses [n, K, R]; each prompt is computed once.

    For samples of ``model`` the mean is an unbiased estimate of KL(model || reference).
    """
    K = responses.shape[1]
    ratios = []
    for prompts, drawn in zip(task.prompts(problems).split(ROWS // K), responses.split(ROWS // K), strict=True):
        rows = drawn.flatten(0, 1)
        logps, ref_logps = (sequence_logps(_next_token_logits(policy, prompts, rows, K), rows) for policy in (model, reference))
        ratios.append((logps - ref_logps).view(-1, K))
    return torch.cat(ratios)


def _next_token_logits(model: LlamaForCausalLM, prompts: Tensor, rows: Tensor, K: int) -> Tensor:
    """The logits that predict each token of the K responses ``rows`` [n K, R] to each of ``prompts``, [n K, R, V]."""
    cache = DynamicCache(config=model.config)
    first = model(prompts, past_key_values=cache).logits[:, -1:].repeat_interleave(K, dim=0)
    cache.batch_repeat_interleave(K)
    return torch.cat([first, model(rows[:, :-1], past_key_values=cache).logits], dim=1)
