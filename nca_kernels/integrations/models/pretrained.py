"""Loads models and tokenizers by the name of a folder or on the hub, with errors that contain the name."""

from __future__ import annotations

from typing import Any

import torch
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import find_adapter_config_file

from .main_process import print_main


def load_model(name: str, **keywords: object) -> PreTrainedModel:
    """``AutoModelForCausalLM.from_pretrained``; ``OSError`` or ``ValueError``, with the name, if it does not load."""
    return _load(AutoModelForCausalLM, "model", name, keywords)


def load_policy(name: str, *, adapter: bool, **keywords: object) -> PreTrainedModel | PeftModel:
    """:func:`load_model` for a model to train. Without an ``adapter`` it is loaded in float32, unless ``dtype`` is given.

    If ``name`` is itself a saved adapter, it is merged into its base if the policy gets a new ``adapter``. Otherwise the saved
    adapter is trained further, on its base in the dtype in which the base was saved. A printed line says which.

    Why float32: an AdamW step is about as large as the learning rate, for any gradient. bfloat16 weights of 0.01 have a spacing of
    6e-5, and steps of 5e-6 are rounded away.
    """
    if not is_adapter(name):
        return load_model(name, **(keywords if adapter else {"dtype": torch.float32, **keywords}))
    loaded = _load(AutoPeftModelForCausalLM, "model", name, {**keywords, "is_trainable": not adapter})
    base = loaded.peft_config["default"].base_model_name_or_path
    if adapter:
        print_main(f"adapter  {name} is merged into its base {base}, and a new one is trained on it")
        return loaded.merge_and_unload()
    print_main(f"adapter  {name} of the base {base} is trained further")
    return loaded


def is_adapter(name: str) -> bool:
    """Whether a folder or hub name holds a saved PEFT adapter, not a whole model."""
    try:
        return find_adapter_config_file(name) is not None
    except (OSError, ValueError):  # not a folder, and not a valid name on the hub
        return False


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """``AutoTokenizer.from_pretrained``, with the same errors. For an adapter without a tokenizer, the tokenizer of its base."""
    try:
        return _load(AutoTokenizer, "tokenizer", name, {})
    except (OSError, ValueError):
        if not is_adapter(name):
            raise
    return _load(AutoTokenizer, "tokenizer", PeftConfig.from_pretrained(name).base_model_name_or_path, {})


def _load(kind: Any, what: str, name: str, keywords: dict[str, object]) -> Any:
    try:
        return kind.from_pretrained(name, **keywords)
    except (OSError, ValueError) as error:
        raise type(error)(f"{what}: {name!r} cannot be loaded as a folder or hub name: {error}") from error
    except SafetensorError as error:
        raise ValueError(f"{what}: a file of weights of {name!r} is damaged or cut off: {error}") from error
