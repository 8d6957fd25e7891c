"""The vocabulary-parallel head, whose rows are spread over ranks: this rank's slice, and the collectives."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ._compat import process_group


def all_gather(values: Tensor, group: str) -> tuple[int, Tensor]:
    """This rank's number, and the ``values`` of all ranks, stacked. Merging them gives the same bits on every rank."""
    ranks = process_group(group)
    parts = values.new_empty((ranks.size(), *values.shape))
    dist.all_gather(list(parts), values.contiguous(), group=ranks)
    return ranks.rank(), parts


def size(group: str) -> int:
    """The number of ranks."""
    return process_group(group).size()


def all_reduce(values: Tensor, group: str) -> Tensor:
    """The sum over ranks, in place."""
    dist.all_reduce(values, group=process_group(group))
    return values


def local_head(weight: Any, bias: Any, tp_group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor | None, str]:
    """This rank's rows of ``weight`` and ``bias``, and the name of the group whose ranks hold the other rows, "" for none.

    For a ``DTensor`` sharded on dim 0 over one mesh dimension, the group is that of its mesh.
    """
    if not hasattr(weight, "device_mesh"):  # not isinstance: importing DTensor takes most of a second
        if tp_group is None:
            return weight, bias, ""
        if not isinstance(tp_group, dist.ProcessGroup):
            raise TypeError(f"tp_group: got {type(tp_group).__name__}, wanted a process group of torch.distributed")
        return weight, bias, tp_group.group_name
    mesh, placements = weight.device_mesh, tuple(weight.placements)
    if mesh.ndim != 1 or not placements[0].is_shard(0):
        raise ValueError(
            f"weight: got a DTensor with placements {placements} on a {mesh.ndim}-D mesh, wanted (Shard(0),) on a 1-D mesh; "
            "pass weight.full_tensor() for the whole head, or this rank's rows and tp_group"
        )
    if hasattr(bias, "device_mesh"):
        bias = bias.to_local()
    return weight.to_local(), bias, mesh.get_group().group_name


def slice_of(rows: int, labels: Tensor, group: str) -> tuple[int, int]:
    """The first of this rank's ``rows`` of the head in the vocabulary, and the number of rows on all ranks.

    The ranks exchange this at every call. If one of them cached it and another did not, the other would wait for ever.
    """
    mine = torch.stack((labels.new_tensor(rows), labels.new_tensor(labels.numel()), _checksum(labels)))
    rank, answers = all_gather(mine, group)
    sizes, *seen = answers.T.tolist()
    if min(sizes) < 1:
        raise ValueError(f"weight: the ranks hold {sizes} rows of the head, wanted at least one each")
    # A head sharded by FSDP looks like a vocabulary-parallel one, but its ranks hold different tokens.
    if any(len(set(values)) > 1 for values in seen):
        raise ValueError(
            "labels: differ between the ranks of a vocabulary-parallel head, wanted the same hidden and labels on all; "
            "use a head sharded by FSDP inside its module's forward, where it is whole"
        )
    return sum(sizes[:rank]), sum(sizes)


def _checksum(labels: Tensor) -> Tensor:
    """An order-sensitive hash of the labels; integers overflow in the same way on all devices."""
    position = torch.arange(labels.numel(), device=labels.device)
    return (labels.flatten() + 1_000_003 * position).pow(3).sum()
