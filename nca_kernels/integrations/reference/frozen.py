"""A model as a reference: without dropout, without gradients and, where it is the policy under PEFT, without its adapter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from peft import PeftModel
from torch import nn

from ..models.evaluating import evaluating

# Initializations of LoRA that take out of the base what they put into the adapter.
_REWRITE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@contextmanager
def as_reference(model: nn.Module, *, base: bool) -> Iterator[None]:
    """Inside it the model computes what it did before training; with ``base``, what its base does, under PEFT."""
    with evaluating(model), model.disable_adapter() if base and isinstance(model, PeftModel) else nullcontext():
        yield


def refuse_rewritten_base(model: PeftModel) -> None:
    """ValueError for an adapter without which the base is no longer the model that it was made of."""
    for config in model.peft_config.values():
        how = str(getattr(config, "init_lora_weights", "")).lower()
        if how.startswith(_REWRITE_THE_BASE):
            raise ValueError(
                f"init_lora_weights: got {how!r}, which changes the weights of the base, so that it is not the reference; wanted "
                "another, or a ref_model, or rows with ref_logps"
            )
