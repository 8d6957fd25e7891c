"""A head whose rows are spread over ranks: which slice is this rank's, and the collectives of the linear family."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard


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


def local_head(weight: Tensor, bias: Tensor | None, tp_group) -> tuple[Tensor, Tensor | None, str]:
    """This rank's rows of the head, and the name of the group that holds the others', "" for none.

    A ``DTensor`` sharded on dim 0 over one mesh dimension names its own group.
    """
    if not isinstance(weight, DTensor):
        return weight, bias, "" if tp_group is None else tp_group.group_name
    if weight.device_mesh.ndim != 1 or tuple(weight.placements) != (Shard(0),):
        raise ValueError(
            f"weight: got a DTensor with placements {tuple(weight.placements)} on a {weight.device_mesh.ndim}-D mesh, wanted "
            "(Shard(0),) on a 1-D mesh; gather it first (weight.full_tensor()), or pass this rank's rows and tp_group"
        )
    if isinstance(bias, DTensor):
        bias = bias.to_local()
    return weight.to_local(), bias, weight.device_mesh.get_group().group_name


def slice_of(rows: int, device: torch.device, group: str) -> tuple[int, int]:
    """Where this rank's rows start, and how many rows all ranks have.

    Asked anew at every call: an answer kept by one rank and not by another would leave the second alone in the collective.
    """
    rank, sizes = all_gather(torch.tensor([rows], device=device), group)
    sizes = sizes.flatten().tolist()
    return sum(sizes[:rank]), sum(sizes)
