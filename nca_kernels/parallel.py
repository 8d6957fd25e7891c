"""A head whose rows are spread over ranks: which slice is this rank's, and the collectives of the linear family."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def _group(name: str):
    return dist.distributed_c10d._resolve_process_group(name)


def all_gather(values: Tensor, group: str) -> tuple[int, Tensor]:
    """This rank's number and everyone's ``values``, stacked. Merged locally, they are the same bits on every rank."""
    group = _group(group)
    parts = values.new_empty((group.size(), *values.shape))
    dist.all_gather(list(parts), values.contiguous(), group=group)
    return group.rank(), parts


def all_reduce(values: Tensor, group: str) -> Tensor:
    """The sum over ranks, in place."""
    dist.all_reduce(values, group=_group(group))
    return values
