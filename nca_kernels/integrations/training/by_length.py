"""A sampler that puts prompts of similar length into a batch, which leaves little padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler


class LengthSampler(Sampler[int]):
    """Yields every row once per epoch, in batches of similar length. The order depends only on the seed and the epoch.

    transformers' own ``LengthGroupedSampler`` takes its order from the global random state, which differs between a run and the
    same run resumed. It also sorts within groups of fifty batches, which leaves twice the padding if lengths have a long tail.

    Args:
        lengths: the cost of each row in a batch, in tokens.
        batch_size: rows per step.
        seed: determines the order, together with the epoch.
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
        # Up to 10% of noise, so that each epoch groups other prompts of nearly the same length.
        batches = (lengths * (1 + 0.1 * torch.rand(len(lengths), generator=generator))).argsort().split(self._batch_size)
        # The data loader cuts this order into batches, so an incomplete batch must stay last.
        whole = [batch for batch in batches if len(batch) == self._batch_size]
        order = torch.randperm(len(whole), generator=generator).tolist()
        rest = batches[len(whole) :]
        return iter(torch.cat([*(whole[i] for i in order), *rest]).tolist() if len(lengths) else [])
