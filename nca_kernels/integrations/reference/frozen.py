"""Runs a model as a reference: without dropout, without gradients and, for the policy under PEFT, without its adapter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import ModulesToSaveWrapper
from torch import nn
from torch.distributed.fsdp import FSDPModule

from ..models.evaluating import evaluating
from .placement import whole_tensors


@contextmanager
def as_reference(model: nn.Module, *, base: bool) -> Iterator[None]:
    """Run ``model`` without dropout and gradients in this context; with ``base`` and PEFT, also without its adapter."""
    with evaluating(model), _adapter_disabled(model) if base and isinstance(model, PeftModel) else nullcontext():
        yield


@contextmanager
def _adapter_disabled(model: PeftModel) -> Iterator[None]:
    # disable_adapter freezes the trained copies of layers and unfreezes them at its end. FSDP2 keeps the weight of a layer as two
    # tensors, gathered and sharded. The shards must be in place both times, or PEFT freezes one tensor and unfreezes the other.
    reshard(model)
    with model.disable_adapter():
        try:
            yield
        finally:
            reshard(model)


def reshard(model: nn.Module) -> None:
    """Replace the weights that FSDP2 has left gathered after a forward by their shards."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def adapter_changes_nothing(model: PeftModel) -> bool:
    """Whether the base computes the same as the model: LoRA's second factors are zero, and copied layers equal their originals.

    False for other kinds of adapters, because for them this is not known.
    """
    tuner = model.base_model
    if not isinstance(tuner, BaseTuner):  # virtual tokens (prompt or prefix tuning); the base has no PEFT layers
        return False
    for name, tensor in whole_tensors(model):
        kind = next((part for part in name.split(".") if part.startswith(tuner.prefix)), None)
        if kind in ("lora_B", "lora_embedding_B") and bool(tensor.any()):
            return False
        if kind not in (None, "lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector"):
            return False
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            copied = dict(whole_tensors(module.original_module))
            for copies in module.modules_to_save.values():
                if any(not torch.equal(tensor, copied[name]) for name, tensor in whole_tensors(copies)):
                    return False
    return True
