"""Every private name of Python, PyTorch, accelerate and transformers that the package uses, in one function each.

A new release may drop such a name. Then only one function of this file changes, and ``tests/test_compat.py``, which calls every
function, fails for it. Each docstring says what the name is for and, after "Without it", what breaks.
"""

from __future__ import annotations

import atexit
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import lru_cache
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses import FakeTensor

Function = TypeVar("Function", bound=Callable)


def run_exit_functions() -> None:
    """Run the functions registered with ``atexit``, before an exit by ``os._exit``, which skips them.

    Without it, processes over gloo leave temporary files and unflushed logs behind.
    """
    atexit._run_exitfuncs()


def below_autograd() -> AbstractContextManager[None]:
    """A context in which operators call their kernels without autograd.

    Without it, an operator called from the forward of its own ``autograd.Function`` calls itself endlessly.
    """
    return torch._C._AutoDispatchBelowAutograd()


def function_transforms_active() -> bool:
    """Whether ``torch.func.grad``, ``vmap`` or another function transform is running.

    Without it, function transforms compute wrong derivatives and raise no error.
    """
    return torch._C._are_functorch_transforms_active()


def constant_in_graphs(function: Function) -> Function:
    """Do what ``torch.compiler.assume_constant_result`` does, without importing the compiler and Triton.

    Without it, ``torch.compile`` traces into ``function`` and breaks the graph there.
    """
    vars(function)["_dynamo_marked_constant"] = True
    return function


def is_fake(tensor: Tensor) -> bool:
    """Whether the tensor has a shape but no values, as in a graph that is being traced.

    Without it, checks read values that do not exist.
    """
    return isinstance(tensor, FakeTensor)


def assert_in_graph(condition: Tensor, message: str) -> None:
    """Raise ``RuntimeError`` if ``condition`` is false when a compiled graph runs; no sync on a GPU.

    Without it, a compiled function does not check the values of its inputs.
    """
    torch._assert_async(condition, message)


def is_batched(tensor: Tensor) -> bool:
    """Whether ``torch.vmap`` maps over this tensor, on any level of nested function transforms.

    Without it, checks read a value that differs from one mapped call to the next, and ``vmap`` raises.
    """
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(tensor):
        if functorch.is_batchedtensor(tensor):
            return True
        tensor = functorch.get_unwrapped(tensor)
    return False


# PyTorch 2.6 and 2.7 have no such function.
counts_storage_users = hasattr(torch._C, "_storage_Use_Count")


def shares_storage(tensor: Tensor) -> bool:
    """Whether any tensor other than this one and the one that it is a view of uses its memory, or PyTorch cannot tell.

    Without it, a gradient written over the logits is read as logits by an operator that saved them under saved-tensor hooks,
    where PyTorch compares no versions.
    """
    if not counts_storage_users:
        return True
    storage = tensor.untyped_storage()  # is a user, too
    return torch._C._storage_Use_Count(storage._cdata) - 1 > (1 if view_base(tensor) is None else 2)


def view_base(tensor: Tensor) -> Tensor | None:
    """The tensor that this one is a view of, ``None`` if it is not a view.

    Without it, logits that are a slice of the model's always count as shared, and their gradient takes memory of its own.
    """
    return tensor._base


def saved_under_hooks(node: object) -> bool:
    """Whether an autograd node has saved one of its outputs under saved-tensor hooks, or a Python function any tensor.

    The caller has declared the logits changed (``increment_version``): a tensor that has no hooks may not be read again after
    this call.

    Without it, a backward under such hooks reads a gradient that was written over the logits: PyTorch compares no versions there.
    """
    for name in _saved_outputs(type(node)):  # type: ignore[arg-type]  # classes are hashable
        saved = getattr(node, name)
        if any(_has_hooks(s) for s in (saved if isinstance(saved, tuple) else (saved,))):
            return True
    return False


def _has_hooks(saved: Any) -> bool:
    """Whether a saved tensor has hooks. PyTorch before 2.10 does not tell, but refuses a second pair of hooks."""
    if hasattr(saved, "unpack_hook"):
        return saved.unpack_hook is not None
    try:
        saved.register_hooks(lambda tensor: None, _refuse)
    except RuntimeError:
        return True
    return False


def _refuse(packed: None) -> Tensor:
    """What PyTorch does without hooks, where it finds a changed version."""
    raise RuntimeError(
        "one of the variables needed for gradient computation has been modified by an inplace operation: inplace_backward"
    )


@lru_cache(maxsize=256)
def _saved_outputs(node: type) -> list[str]:
    """The attributes under which autograd keeps the saved outputs of a node, or all saved tensors of a Python function."""
    return [name for name in dir(node) if name.startswith(("_raw_saved_result", "_raw_saved_output", "_raw_saved_tensors"))]


def process_group(name: str) -> dist.ProcessGroup:
    """The process group of this name. Operators take a name, since their schemas have no type for a group.

    Without it, the linear functions do not run with a vocabulary-parallel head.
    """
    return dist.distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type]  # a str in PyTorch 2.6


def is_compiled(module: nn.Module) -> bool:
    """Whether ``module.compile()`` was called.

    Without it, the compiler traces into the hooks of a compiled model's head and breaks its graph there.
    """
    return module._compiled_call_impl is not None


def forward_attribute(module: nn.Module) -> str:
    """The attribute that holds a layer's own forward.

    accelerate puts the moves between devices into ``forward`` and keeps the layer's own as ``_old_forward``. Without it, the
    head of an offloaded model computes with weights that are not on its device.
    """
    return "_old_forward" if "_old_forward" in vars(module) else "forward"


def attention_implementation(config: Any) -> str:
    """The attention that a transformers model runs: "eager", "sdpa", "flex_attention" or another.

    Without it, the kind of mask that the model takes is unknown.
    """
    return config._attn_implementation


def is_stateful(model: nn.Module) -> bool:
    """Whether a transformers model carries a state from token to token.

    Without it, a state-space model is not refused with a clear error where responses share a prompt.
    """
    return getattr(model, "_is_stateful", False)


def run_folder(trainer: Any, trial: object) -> str:
    """The folder of a transformers trainer's checkpoints.

    Without it, checkpoints are not written beside their place, and a killed run leaves half-written ones.
    """
    from transformers import Trainer

    return Trainer._get_output_dir(trainer, trial)


def save_checkpoint(trainer: Any, model: nn.Module, trial: object) -> None:
    """Write a checkpoint into the trainer's ``_get_output_dir``.

    Without it, checkpoints are not written beside their place, and a killed run leaves half-written ones.
    """
    from transformers import Trainer

    Trainer._save_checkpoint(trainer, model, trial)


def push_checkpoint(trainer: Any, folder: str) -> None:
    """Push a checkpoint that is whole to the hub, as ``hub_strategy`` says.

    Without it, ``push_to_hub`` sends nothing before training ends.
    """
    from transformers import Trainer

    Trainer._push_from_checkpoint(trainer, folder)


def has_injected_adapter(model: nn.Module) -> bool:
    """Whether transformers put an adapter into a model's layers, as ``from_pretrained`` does with an adapter's folder.

    Without it, a new adapter replaces that one, and its training is lost without a message.
    """
    return getattr(model, "_hf_peft_config_loaded", False)


def execution_device(module: nn.Module) -> torch.device | None:
    """The device to which accelerate's hook brings a module's inputs and weights; None without such a hook.

    Without it, models that a ``device_map`` has placed or offloaded are moved, and the move fails.
    """
    hook = getattr(module, "_hf_hook", None)
    device = getattr(hook, "execution_device", None)
    return None if device is None else torch.device(device)
