"""Prompts in batches of similar length, so that little of a batch is padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler


class LengthSampler(Sampler[int]):
    """Every row once an epoch, batches of similar length, in an order that seed and epoch decide.

    transformers' own ``LengthGroupedSampler`` takes its order from the global random state, which differs between a run and the
    same run resumed, and sorts within fifty batches, which leaves twice the padding where lengths have a long tail.

    Args:
        lengths: of each row what it costs in a batch, in tokens.
        batch_size: rows of a step.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int):
        self._lengths, self._batch_size, self._seed = list(lengths), batch_size, seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the data loader at the beginning of each epoch."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self._seed + self._epoch)
        lengths = torch.tensor(self._lengths, dtype=torch.float32)
        # A tenth of noise: a batch has other prompts in each epoch, of nearly the same length.
        batches = (lengths * (1 + 0.1 * torch.rand(len(lengths), generator=generator))).argsort().split(self._batch_size)
        # Only the last batch may be smaller, so the short one stays there.
        whole = [batch for batch in batches if len(batch) == self._batch_size]
        order = torch.randperm(len(whole), generator=generator).tolist()
        rest = batches[len(whole) :]
        return iter(torch.cat([*(whole[i] for i in order), *rest]).tolist() if len(lengths) else [])
