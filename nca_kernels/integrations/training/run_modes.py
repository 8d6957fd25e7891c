"""Run modes that would change the results of one process: they are refused by name, or corrected with a warning."""

from __future__ import annotations

import logging
import os
from typing import Any

from torch import nn
from transformers import TrainingArguments

logger = logging.getLogger(__name__)

# Prefixes of the sizes in accelerate's ParallelismConfig and in the environment variables that `accelerate launch` sets.
_SPLIT = {"cp": "context parallelism", "sp": "sequence parallelism", "tp": "tensor parallelism"}
_WANTED = "wanted 1: a prompt's responses are summed on one rank. Use FSDP, DeepSpeed ZeRO or DistributedDataParallel"


def refuse_split_sequences(args: TrainingArguments) -> None:
    """Raise ValueError if the run splits sequences or layers among ranks: their log-probs would be summed wrongly."""
    config: Any = getattr(args, "parallelism_config", None)
    launched = os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG", "").lower() in ("true", "1", "yes")
    for name, mode in _SPLIT.items():
        size = getattr(config, f"{name}_size", None) or 1
        if launched:
            size = max(size, int(os.environ.get(f"PARALLELISM_CONFIG_{name.upper()}_SIZE", 1)))
        if size > 1:
            raise ValueError(f"parallelism_config: got {name}_size {size} ({mode}), {_WANTED}")
    deepspeed = args.deepspeed if isinstance(args.deepspeed, dict) else {}
    for key, mode, size in (
        ("sequence_parallel_size", "sequence parallelism", deepspeed.get("sequence_parallel_size")),
        ("tensor_parallel.autotp_size", "tensor parallelism", deepspeed.get("tensor_parallel", {}).get("autotp_size")),
    ):
        if isinstance(size, int) and size > 1:
            raise ValueError(f"deepspeed: got {key} {size} ({mode}), {_WANTED}")


def refuse_tensor_parallel(name: str, model: nn.Module) -> None:
    """Raise ValueError if the model's layers are split among ranks (``tp_plan``)."""
    size = getattr(model, "tp_size", None)
    if isinstance(size, int) and size > 1:
        raise ValueError(f"{name}: got a model with tp_plan, split among {size} ranks (tensor parallelism), {_WANTED}")


def keep_4bit_gradients(model: nn.Module) -> None:
    """Turn off bitsandbytes' packing of 4-bit weights on a CPU with AVX512-BF16, which loses gradients, and log a warning.

    A layer packs its weights at its first forward without gradients, for instance in the reference pass or an evaluation. With
    bitsandbytes 0.50 the gradient norm after that was 1.35 where 2.27 is right.
    """
    packing: list[Any] = [
        m for m in model.modules() if getattr(m, "support_avx512bf16_for_cpu", False) and m.weight.device.type == "cpu"
    ]
    for module in packing:
        module.support_avx512bf16_for_cpu = False
    if packing:
        logger.warning(
            "model: 4-bit on a CPU with AVX512-BF16, where bitsandbytes loses gradients after an evaluation; its fast path is off, "
            "and evaluations are slower"
        )
