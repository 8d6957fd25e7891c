"""The record of a run: its settings as YAML, and a fingerprint of everything that its weights depend on."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields
from typing import Any

import torch
import transformers
import yaml
from datasets import Dataset
from peft import PeftModel
from torch import nn
from transformers import TrainingArguments

from ... import __version__
from ..data.rows import COLUMNS
from ..reference.cache import columns_digest, weights_digest
from ..reference.frozen import adapter_changes_nothing
from .checkpoints import Fingerprint
from .config import NCAConfig

# The settings that determine a run's steps, apart from model and data. The number of epochs is not among them, so that a
# finished run can be resumed with more.
_DECISIVE = (
    *("loss", "beta", "alpha", "pairs", "average", "reference", "max_grad_norm", "seed", "data_seed"),
    *("learning_rate", "lr_scheduler_type", "optim", "weight_decay", "warmup_steps", "gradient_accumulation_steps"),
    *("per_device_train_batch_size", "train_sampling_strategy", "label_smoothing", "nll_weight", "logits_dtype"),
    "skip_mass",
)
# Settings of one start of a run, and secrets.
_NOT_SETTINGS = {"resume_from_checkpoint", "hub_token", "push_to_hub_token", "local_rank"}


def run_settings(config: NCAConfig, sources: Mapping[str, object], command: str | None = None) -> str:
    """The text of ``run.yaml``: the sources, all keys of this package, and those keys of transformers that were set.

    The text is itself a configuration of ``nca-kernels train``. Keys that the loss does not read are left out.

    Args:
        sources: keys and values that ``config`` does not have, such as ``model`` and ``data``.
        command: the command line of the run, which is written as a comment.
    """
    inherited = {field.name: _default(field) for field in fields(TrainingArguments)}
    own = {field.name for field in fields(NCAConfig)} - inherited.keys() - {*config.unread_keys()}
    settings = {key: value for key, value in sources.items() if value is not None}
    for key, value in config.to_dict().items():
        if key not in _NOT_SETTINGS and value is not None and (key in own or (key in inherited and value != inherited[key])):
            settings.setdefault(key, value)
    settings = {key: value for key, value in settings.items() if _is_plain(value)}
    versions = f"nca_kernels {__version__}, torch {torch.__version__}, transformers {transformers.__version__}"
    lines = [f"# {versions}, Python {platform.python_version()}", *([f"# {command}"] if command else [])]
    return "\n".join([*lines, yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)])


def run_fingerprint(config: NCAConfig, model: nn.Module, rows: Dataset | None, ref_model: nn.Module | None) -> Fingerprint:
    """What two runs with the same weights must share: the initial model, the rows, the reference, the loss and the steps.

    Args:
        rows: the tokenized rows as they were given; reference log-probs count only if they were given with the rows.
    """
    fingerprint: Fingerprint = {key: _plain(getattr(config, key)) for key in _DECISIVE if hasattr(config, key)}
    fingerprint["processes"] = config.world_size
    fingerprint["mixed_precision"] = config.mixed_precision
    fingerprint["model"] = weights_digest(model, base=isinstance(model, PeftModel) and adapter_changes_nothing(model))
    if isinstance(model, PeftModel):
        adapters = {name: json.loads(json.dumps(adapter.to_dict(), default=_plain)) for name, adapter in model.peft_config.items()}
        fingerprint["adapter"] = {name: _described(adapter) for name, adapter in adapters.items()}
    fingerprint["ref_model"] = None if ref_model is None else weights_digest(ref_model, base=False)
    if rows is not None:
        columns = [column for column in COLUMNS if column in rows.column_names]
        fingerprint["rows"] = len(rows)
        fingerprint["data"] = columns_digest(rows.select_columns(columns))
    return fingerprint


def _described(adapter: dict[str, object]) -> dict[str, object]:
    names = ("peft_type", "r", "lora_alpha", "lora_dropout", "target_modules", "modules_to_save", "use_dora", "use_rslora", "bias")
    return {name: adapter[name] for name in (*names, "init_lora_weights") if name in adapter}


def _plain(value: object) -> object:
    if isinstance(value, (set, tuple)):
        return sorted(value, key=str) if isinstance(value, set) else list(value)
    return getattr(value, "value", value) if _is_plain(getattr(value, "value", value)) else str(value)


def _is_plain(value: object) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and _is_plain(each) for key, each in value.items())
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))


def _default(field: Field[Any]) -> object:
    if field.default_factory is not MISSING:
        return field.default_factory()
    return getattr(field.default, "value", field.default)
