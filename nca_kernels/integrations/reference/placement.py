"""Places a model for a forward outside the training loop: on this rank's device, or sharded if the run is."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, align_module_device
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor

from ... import _compat

Model = TypeVar("Model", bound=nn.Module)


def to_device_or_shard(model: nn.Module, accelerator: Accelerator) -> nn.Module:
    """Move the model to this rank's device, sharded by FSDP or ZeRO-3 if the run is, in the dtype in which the run computes."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        place_for_deepspeed(model, accelerator)
        return _zero3_engine(model, accelerator).module if _is_zero3(accelerator) else model
    if accelerator.distributed_type != DistributedType.FSDP:
        return to_device(model, accelerator.device)
    if is_sharded(model):
        return model
    # accelerate shards a model only together with an optimizer; the run's own does not exist before training starts.
    model, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters()))
    return model


@contextmanager
def checkpointed_once(model: nn.Module, accelerator: Accelerator) -> Iterator[None]:
    """Within this context, accelerate does not wrap the layers of a sharded model for activation checkpointing a second time.

    accelerate wraps the layers at every ``prepare``, and does not find layers that are already wrapped.
    """
    plugin = accelerator.state.fsdp_plugin if accelerator.distributed_type == DistributedType.FSDP else None
    wrapped = any("_checkpoint_wrapped_module" in name for name, _ in model.named_modules())
    if plugin is None or not (wrapped and plugin.activation_checkpointing):
        yield
        return
    plugin.activation_checkpointing = False
    try:
        yield
    finally:
        plugin.activation_checkpointing = True


def place_for_deepspeed(model: nn.Module, accelerator: Accelerator) -> None:
    """Place a model as DeepSpeed does when training starts: it uses no autocast and casts weights to ``bf16`` or ``fp16``."""
    dtype = _deepspeed_dtype(accelerator)
    if dtype != torch.float32:
        model.to(dtype)
    if not _is_split(model):
        to_device(model, accelerator.device)


@contextmanager
def zero3_for_forward(model: nn.Module, accelerator: Accelerator) -> Iterator[None]:
    """Within this context, a policy that ``zero.Init`` has split among the ranks can run before its training engine exists."""
    if not _is_split(model) or accelerator.distributed_type != DistributedType.DEEPSPEED:
        yield
        return
    engine = _zero3_engine(model, accelerator)
    try:
        yield
    finally:
        engine.destroy()  # removes its hooks; the training engine adds its own


def _is_zero3(accelerator: Accelerator) -> bool:
    return accelerator.state.deepspeed_plugin.zero_stage == 3


def _is_split(model: nn.Module) -> bool:
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def _deepspeed_dtype(accelerator: Accelerator) -> torch.dtype:
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision, torch.float32)


def _zero3_engine(model: nn.Module, accelerator: Accelerator) -> Any:
    import deepspeed

    given = accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]
    sharding = {name: value for name, value in given.items() if value != "auto" and name != "offload_optimizer"}
    settings = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": sharding}
    dtype = _deepspeed_dtype(accelerator)
    if dtype != torch.float32:
        settings["bf16" if dtype == torch.bfloat16 else "fp16"] = {"enabled": True}
    engine, *_ = deepspeed.initialize(model=model, config=settings)
    return engine


def to_device(model: Model, device: torch.device | str) -> Model:
    """Move the model to the device, unless loading has placed it already (by a ``device_map``, offloaded or quantised)."""
    return model if is_offloaded(model) or getattr(model, "quantization_method", None) else model.to(device)


def is_offloaded(model: nn.Module) -> bool:
    """Whether accelerate moves the weights to a device when they are used."""
    return any(_compat.execution_device(module) is not None for module in model.modules())


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def is_sharded(model: nn.Module) -> bool:
    return isinstance(model, (FSDPModule, FullyShardedDataParallel))


def frozen_copy(model: nn.Module) -> nn.Module:
    """A copy of the model that is whole on every rank, even if ZeRO-3 has split the model."""
    with _gathered([p for p in model.parameters() if hasattr(p, "ds_id")]):
        return copy.deepcopy(model)


def whole_tensors(core: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Names and whole values of a model's state, which may be sharded by FSDP or ZeRO-3, or offloaded. Collective if sharded."""
    for name, tensor in core.state_dict(keep_vars=True).items():
        if isinstance(tensor, DTensor):
            yield name, tensor.full_tensor().detach()
        elif hasattr(tensor, "ds_id"):
            with _gathered([tensor]):
                yield name, tensor.detach().clone()
        elif tensor.is_meta:  # offloaded: accelerate brings it back when its module runs
            path, _, own = name.rpartition(".")
            module = core.get_submodule(path)
            with align_module_device(module, execution_device=torch.device("cpu")):
                yield name, getattr(module, own).detach().clone()
        else:
            yield name, tensor.detach()


@contextmanager
def _gathered(parameters: list[Tensor]) -> Iterator[None]:
    if not parameters:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(parameters):
        yield
