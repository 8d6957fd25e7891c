"""Prompts and responses whose lengths have a long tail, and the batches on which a step is measured.

Lengths are log-normal, with standard deviation ``SIGMA`` of the logarithm and the mean of the case. They are truncated at ``CUT``
means, as ``max_length`` truncates. Half of the variance of response lengths is common to the responses of a prompt: a question that
asks for much gets long answers, but not equally long ones.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

SIGMA = 0.8
CUT = 4
STEPS = 6  # the measured steps of an epoch

Row = dict[str, list]


def long_tailed_rows(count: int, vocab: int, responses: int, prompt_tokens: int, response_tokens: int) -> list[Row]:
    """Rows in the layout of ``tokenize_groups``, with random tokens, scores and reference log-probs."""
    draw = torch.Generator().manual_seed(0)
    own, common = torch.randn(count, responses, generator=draw), torch.randn(count, 1, generator=draw)
    prompts = _lengths(prompt_tokens, torch.randn(count, generator=draw)).tolist()
    lengths = _lengths(response_tokens, math.sqrt(0.5) * (own + common))
    # About the log-prob of an untrained model, so that no loss is saturated.
    ref_logps = -math.log(vocab) * lengths + torch.randn(lengths.shape, generator=draw)
    scores = torch.rand(lengths.shape, generator=draw)

    def tokens(length: int) -> list[int]:
        return torch.randint(2, vocab, (length,), generator=draw).tolist()

    return [
        {
            "prompt_ids": tokens(prompt),
            "response_ids": [tokens(length) for length in row],
            "scores": scores[i].tolist(),
            "ref_logps": ref_logps[i].tolist(),
        }
        for i, (prompt, row) in enumerate(zip(prompts, lengths.tolist(), strict=True))
    ]


def _lengths(mean: int, normal: Tensor) -> Tensor:
    return (mean * torch.exp(SIGMA * normal - SIGMA**2 / 2)).clamp(2, CUT * mean).round().long()


def sequences(row: Row) -> list[int]:
    """The number of tokens of each response with its prompt."""
    return [len(row["prompt_ids"]) + len(response) for response in row["response_ids"]]


def scored(row: Row) -> int:
    return sum(map(len, row["response_ids"]))


def lines(row: Row, share_prompt: bool) -> list[int]:
    """The number of tokens of each line that a row takes in a batch: a line per response, or one for all responses."""
    if share_prompt:  # the prompt's last token is repeated for each response
        return [len(row["prompt_ids"]) - 1 + scored(row) + len(row["response_ids"])]
    return sequences(row)


def size(batch: list[Row], share_prompt: bool) -> int:
    """The number of positions of a batch, including padding."""
    all_lines = [line for row in batch for line in lines(row, share_prompt)]
    return len(all_lines) * max(all_lines)


def padding(batches: list[list[Row]], share_prompt: bool) -> float:
    """The share of all positions that is padding."""
    used = sum(line for batch in batches for row in batch for line in lines(row, share_prompt))
    return 1 - used / sum(size(batch, share_prompt) for batch in batches)


def sample(batches: list[list[Row]], share_prompt: bool) -> list[list[Row]]:
    """``STEPS`` batches that represent an epoch. The epoch is split into parts by batch size; each gives the batch nearest to its
    mean.

    Distance counts positions and scored tokens, so that the mean step of the sample is that of the epoch.
    """
    facts = torch.tensor([[size(batch, share_prompt), sum(map(scored, batch))] for batch in batches], dtype=torch.float64)
    chosen = []
    for part in facts[:, 0].argsort(stable=True).tensor_split(STEPS):
        distance = (facts[part] / facts[part].mean(0) - 1).abs().sum(1)
        chosen.append(batches[part[distance.argmin()]])
    return chosen
