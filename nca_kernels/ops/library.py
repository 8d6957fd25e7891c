"""Registers operators with ``torch.library``, and their derivatives. No other file does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn, get_type_hints

import torch
from torch import Tensor

from .. import _compat

LIBRARY = torch.library.Library("nca_kernels", "DEF")

SCHEMA_TYPES = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    str: "str",
    int: "int",
    bool: "bool",
    torch.dtype: "ScalarType",
    float: "float",
    float | None: "float?",
}


def schema(name: str, arguments: type[tuple], results: str) -> str:
    """The schema of an operator whose arguments are the fields of a named tuple."""
    return f"{name}({fields(arguments)}) -> {results}"


def fields(arguments: type[tuple]) -> str:
    """The fields of a named tuple, in the syntax of a schema."""
    return ", ".join(f"{SCHEMA_TYPES[hint]} {field}" for field, hint in get_type_hints(arguments).items())


def define(schema: str) -> Callable[[Callable], Callable]:
    """Register the decorated function as the implementation of ``schema`` on every device."""
    name = LIBRARY.define(schema)

    def register(function: Callable) -> Callable:
        LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        return getattr(torch.ops.nca_kernels, name).default

    return register


def differentiable(op: Callable, inputs: int, setup_context: Callable, backward: Callable) -> Callable:
    """Register autograd for the first ``inputs`` arguments of an operator; return the function that the package calls.

    ``torch.library.register_autograd`` does the same, and takes three times as long: it goes through the schema's arguments one by
    one at every call (160 us for the thirteen of group_loss, whose arithmetic takes 5). The arguments without a derivative are
    passed as one tuple, because PyTorch inspects each argument in forward and backward.
    """

    class Derivative(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, constants: tuple, *variables: Any) -> Any:
            with _compat.below_autograd():
                output = op(*variables, *constants)
            setup_context(ctx, variables, constants, output)
            return output

        @staticmethod
        def backward(ctx: Any, *doutputs: Any) -> Any:
            return None, *backward(ctx, *doutputs)

    def derivative(*arguments: Any) -> Any:
        return Derivative.apply(arguments[inputs:], *arguments[:inputs])

    def dispatched(*arguments: Any) -> Any:
        if _compat.function_transforms_active():
            raise NotImplementedError(
                "torch.func.grad, vjp, jvp and what is made of them: the kernels of nca_kernels have torch.autograd's "
                "gradients alone; call the function with backend='torch'"
            )
        return derivative(*arguments)

    def call(*arguments: Any) -> Any:
        # Compilers and function transforms must see the operator before autograd unwraps it. All other calls skip the
        # dispatcher between the operator and its derivative, which takes 3 us; without a gradient they skip the derivative, too.
        if torch.compiler.is_compiling() or _compat.function_transforms_active():
            return op(*arguments)
        if torch.is_grad_enabled():
            return derivative(*arguments)
        with _compat.below_autograd():
            return op(*arguments)

    LIBRARY.impl(op, dispatched, "Autograd")
    return call


def no_second_derivative(*_: Any) -> NoReturn:
    raise NotImplementedError("second derivatives: the kernels of nca_kernels have none; call the function with backend='torch'")
