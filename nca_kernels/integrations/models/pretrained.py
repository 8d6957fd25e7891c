"""Models and tokenizers by a folder's or a hub's name, with errors that name it."""

from __future__ import annotations

from typing import Any

import torch
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import find_adapter_config_file

from .main_process import print_main


def load_model(name: str, **keywords: object) -> PreTrainedModel:
    """``AutoModelForCausalLM.from_pretrained``; ``OSError`` or ``ValueError``, with the name, where it does not load."""
    return _load(AutoModelForCausalLM, "model", name, keywords)


def load_policy(name: str, *, adapter: bool, **keywords: object) -> PreTrainedModel | PeftModel:
    """:func:`load_model` of a model to train; without an ``adapter`` in float32, unless ``dtype`` says otherwise.

    Where ``name`` is itself a saved adapter, it is merged into its base if the policy gets a new ``adapter``; else it goes on being
    trained, on its base in the dtype that this was saved in. A line says which.

    An AdamW step is about the learning rate long, whatever the gradient: bfloat16 weights of 0.01 have a spacing of 6e-5, and
    steps of 5e-6 are rounded away.
    """
    if not is_adapter(name):
        return load_model(name, **(keywords if adapter else {"dtype": torch.float32, **keywords}))
    loaded = _load(AutoPeftModelForCausalLM, "model", name, {**keywords, "is_trainable": not adapter})
    base = loaded.peft_config["default"].base_model_name_or_path
    if adapter:
        print_main(f"adapter  {name} is merged into its base {base}, and a new one is trained on it")
        return loaded.merge_and_unload()
    print_main(f"adapter  {name} of the base {base} goes on being trained")
    return loaded


def is_adapter(name: str) -> bool:
    """Whether a folder or hub name holds a saved PEFT adapter, not a whole model."""
    try:
        return find_adapter_config_file(name) is not None
    except (OSError, ValueError):  # no folder, and no name that the hub could have
        return False


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """``AutoTokenizer.from_pretrained``, with the same errors; an adapter that has none takes its base's."""
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
        raise type(error)(f"{what}: {name!r} is no folder or hub name that loads: {error}") from error
    except SafetensorError as error:
        raise ValueError(f"{what}: a file of weights of {name!r} is damaged or cut off: {error}") from error
