"""A model as a reference: without dropout, without gradients and, where it is the policy under PEFT, without its adapter."""

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
    """Inside it the model computes what it did before training; with ``base``, what its base does, under PEFT."""
    with evaluating(model), _adapter_disabled(model) if base and isinstance(model, PeftModel) else nullcontext():
        yield


@contextmanager
def _adapter_disabled(model: PeftModel) -> Iterator[None]:
    # PEFT freezes the trained copies of layers inside, and thaws them after it. FSDP2 has a layer's weight in two tensors, whole
    # and in shards, of which it would freeze one and thaw the other: so the shards must be in place both times.
    reshard(model)
    with model.disable_adapter():
        try:
            yield
        finally:
            reshard(model)


def reshard(model: nn.Module) -> None:
    """Put FSDP2's shards in the place of the weights that it has left whole after a forward."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def adapter_changes_nothing(model: PeftModel) -> bool:
    """Whether the base computes what the model does: LoRA whose second factor is zero, and copies equal to what they copy.

    False for adapters of other kinds, of which this is not known.
    """
    tuner = model.base_model
    if not isinstance(tuner, BaseTuner):  # virtual tokens, before a base that PEFT leaves as it is
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
