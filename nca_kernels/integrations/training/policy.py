"""Loads and checks the models of a trainer: the policy with its adapter, and a separate reference model."""

from __future__ import annotations

import logging
import os
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from peft import PeftConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import set_seed

from ... import _compat
from ..models.heads import causal_lm
from ..models.pretrained import load_policy

logger = logging.getLogger(__name__)


def policy_of(
    model: nn.Module | str | os.PathLike,
    peft_config: PeftConfig | None,
    seed: int,
    model_init_kwargs: dict[str, Any] | None = None,
) -> nn.Module:
    """Return the policy: ``model``, loaded if it is a name, with a new adapter if ``peft_config`` is given."""
    if isinstance(model, (str, os.PathLike)):
        model = _loaded(os.fspath(model), peft_config is not None, model_init_kwargs or {})
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, wanted a causal LM, or a name or folder to load one from")
    if peft_config is None:
        _refuse_frozen(model)
        return model
    if isinstance(model, PeftModel) or _compat.has_injected_adapter(model):
        raise ValueError("peft_config: model has an adapter already; wanted one or the other, or the adapter merged into the model")
    set_seed(seed)  # the adapter's first weights are random
    model = get_peft_model(model, peft_config)
    _materialise(model)
    _refuse_frozen(model)
    return model


def _materialise(model: PeftModel) -> None:
    """Allocate an adapter on an offloaded base: PEFT creates it on the base's device, which is meta until the base runs."""
    for name, layer in model.named_modules():
        if not any(p.is_meta and p.requires_grad for p in layer.parameters()) or not isinstance(layer, LoraLayer):
            continue
        device = _compat.execution_device(layer.get_base_layer())
        adapter = model.active_adapter
        config: Any = model.peft_config[adapter]
        if device is None or config.use_dora:
            raise ValueError(f"lora: {name} is offloaded, and this kind of adapter cannot be made on it; wanted plain LoRA")
        for part in (layer.lora_A, layer.lora_B):
            part[adapter].to_empty(device=device)
        layer.reset_lora_parameters(adapter, config.init_lora_weights)
        layer.set_adapter(layer.active_adapters)


def _loaded(name: str, adapter: bool, keywords: dict[str, Any]) -> nn.Module:
    try:
        return load_policy(name, adapter=adapter, **keywords)
    except (AttributeError, ImportError, TypeError, StrictDataclassError) as error:
        if not keywords:
            raise
        raise ValueError(f"model_init_kwargs: got {keywords}, with which the model does not load: {error}") from error


def _refuse_frozen(model: nn.Module) -> None:
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            "model: none of its weights is trained (requires_grad is False for all); wanted some, or a peft_config (lora: in YAML)"
        )


def warn_of_losses(policy: nn.Module, learning_rate: float) -> None:
    """Warn of what a run would silently drop: small steps of low-precision weights, and a term of the model's own loss."""
    low = {str(p.dtype) for p in policy.parameters() if p.requires_grad and p.dtype in (torch.bfloat16, torch.float16)}
    if low:
        logger.warning(
            "model: trains weights in %s, which round steps of %g to 0; wanted float32 (bf16=True still computes in bfloat16)",
            *(" and ".join(sorted(low)), learning_rate),
        )
    if getattr(causal_lm(policy).config.get_text_config(), "output_router_logits", False):
        logger.warning("model: output_router_logits is set; the loss that balances its experts is not added to this one")


def vocabulary_of(model: nn.Module) -> int:
    """The number of the model's embeddings; every token id must be smaller."""
    embeddings: Any = causal_lm(model).get_input_embeddings()
    return embeddings.num_embeddings


def check_reference(ref_model: object, policy: nn.Module) -> None:
    """Raise TypeError or ValueError if ``ref_model`` cannot be frozen while ``policy`` is trained."""
    if not isinstance(ref_model, nn.Module):
        raise TypeError(f"ref_model: got {type(ref_model).__name__}, wanted a causal LM, loaded")
    trained = {id(p) for p in policy.parameters() if p.requires_grad}
    if any(id(p) in trained for p in ref_model.parameters()):
        raise ValueError(
            "ref_model: shares trained weights with model; wanted a separate model, or None for model as it is at the "
            "start of training"
        )
