"""Where a model lies for a forward outside the training loop: on this rank's device, or sharded where the run is."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel


def to_device_or_shard(model: nn.Module, accelerator: Accelerator) -> nn.Module:
    """The model on this rank's device, sharded where the run is sharded."""
    if accelerator.distributed_type != DistributedType.FSDP:
        return model.to(accelerator.device)
    if is_sharded(model):
        return model
    # accelerate shards a model only together with an optimizer of it; the run's own is made when training starts.
    model, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters()))
    return model


def is_sharded(model: nn.Module) -> bool:
    return isinstance(model, (FSDPModule, FullyShardedDataParallel))
