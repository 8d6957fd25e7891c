"""Hugging Face integration: models, reward data, the reference, the trainer and the commands.

Each subpackage imports only from those after it: ``commands -> training -> reference -> data -> models``. The names below are
loaded at their first use, so that importing this package loads neither transformers nor Triton.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .data.load import load_groups as load_groups
    from .models.heads import model_logps as model_logps
    from .training.config import NCAConfig as NCAConfig
    from .training.trainer import NCATrainer as NCATrainer

_HOMES = {
    "NCAConfig": ".training.config",
    "NCATrainer": ".training.trainer",
    "load_groups": ".data.load",
    "model_logps": ".models.heads",
}

__all__ = ["NCAConfig", "NCATrainer", "load_groups", "model_logps"]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name], __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
