"""Models and tokenizers by a folder's or a hub's name, with errors that name it."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase


def load_model(name: str, **keywords: object) -> PreTrainedModel:
    """``AutoModelForCausalLM.from_pretrained``; ``OSError`` or ``ValueError``, with the name, where it does not load."""
    return _load(AutoModelForCausalLM, "model", name, keywords)


def load_policy(name: str, *, adapter: bool, **keywords: object) -> PreTrainedModel:
    """:func:`load_model` of a model to train; without an ``adapter`` in float32, unless ``dtype`` says otherwise.

    An AdamW step is about the learning rate long, whatever the gradient: bfloat16 weights of 0.01 have a spacing of 6e-5, and
    steps of 5e-6 are rounded away.
    """
    return load_model(name, **(keywords if adapter else {"dtype": torch.float32, **keywords}))


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """``AutoTokenizer.from_pretrained``, with the same errors."""
    return _load(AutoTokenizer, "tokenizer", name, {})


def _load(kind: type, what: str, name: str, keywords: dict[str, object]):
    try:
        return kind.from_pretrained(name, **keywords)
    except (OSError, ValueError) as error:
        raise type(error)(f"{what}: {name!r} is no folder or hub name that loads: {error}") from error
