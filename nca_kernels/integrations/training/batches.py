"""Batches in which each prompt counts once, and batches that change when they are read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader

from ..data.collator import Batch


def each_prompt_once(batches: list[Batch], accelerator: Accelerator, drop_last: bool) -> tuple[list[Batch], list[int]]:
    """Mask the prompts that only fill up the last batch; return the batches and the number of prompts left in each.

    accelerate gives every rank a full batch: at the end of the data it adds prompts from the beginning.

    Args:
        batches: consecutive batches of this rank, of which the last was read last.
        accelerator: the run's, which knows whether the data has ended.
        drop_last: the data loader drops an incomplete batch, so that none is filled up.
    """
    prompts = [len(batch["mask"]) for batch in batches]
    ranks, data = accelerator.num_processes, accelerator.gradient_state
    if batches and ranks > 1 and accelerator.even_batches and not drop_last and data.end_of_dataloader:
        # If a run resumes within an epoch, accelerate does not set its own `remainder` for the rest of that epoch.
        last = len(data.active_dataloader.dataset) % (ranks * prompts[-1]) or ranks * prompts[-1]
        prompts[-1] = min(max(last - accelerator.process_index * prompts[-1], 0), prompts[-1])
        mask = batches[-1]["mask"]
        kept = torch.arange(len(mask), device=mask.device)[:, None] < prompts[-1]
        batches = [*batches[:-1], {**batches[-1], "mask": mask & kept}]
    return batches, prompts


def with_baseline(batch: Batch, baseline: Tensor) -> Batch:
    """The batch with KTO's baseline, a scalar."""
    return {**batch, "baseline": baseline}


class ChangedBatches:
    """The batches of a data loader, each passed through ``change`` when it is read."""

    def __init__(self, dataloader: DataLoader | ChangedBatches, change: Callable[[Batch], Batch]):
        self.dataset: Any = dataloader.dataset
        self._dataloader, self._change = dataloader, change

    def __len__(self) -> int:
        return len(self._dataloader)

    def __iter__(self) -> Iterator[Batch]:
        return map(self._change, self._dataloader)
