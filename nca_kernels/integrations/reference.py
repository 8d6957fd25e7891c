"""A model as the reference that it is: without dropout, without gradients and, of PEFT, without its adapter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from peft import PeftModel
from torch import nn
from torch.distributed.fsdp import FSDPModule


@contextmanager
def as_reference(model: nn.Module) -> Iterator[None]:
    """Inside it the model computes what it did before training, as far as that lies in its base."""
    with evaluating(model), model.disable_adapter() if isinstance(model, PeftModel) else nullcontext():
        yield


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout and gradients; every module is in its own mode again after it."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
            # FSDP2 leaves its outermost weights gathered until a backward; an optimizer made now would take them for shards.
            if isinstance(module, FSDPModule):
                module.reshard()
