"""Registration of operators with ``torch.library``, and of their derivatives. The one file that knows it."""

from __future__ import annotations

from typing import get_type_hints

import torch
from torch import Tensor

LIBRARY = torch.library.Library("nca_kernels", "DEF")

SCHEMA_TYPES = {Tensor: "Tensor", Tensor | None: "Tensor?", str: "str", float: "float"}


def schema(name: str, arguments: type[tuple], results: str) -> str:
    """The schema of an operator whose arguments are the fields of a named tuple."""
    fields = (f"{SCHEMA_TYPES[hint]} {field}" for field, hint in get_type_hints(arguments).items())
    return f"{name}({', '.join(fields)}) -> {results}"


def define(schema: str):
    """Register the decorated function as the implementation of ``schema`` on every device."""
    name = LIBRARY.define(schema)

    def register(function):
        LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        return getattr(torch.ops.nca_kernels, name).default

    return register


def differentiable(op, inputs: int, setup_context, backward):
    """Give an operator its derivative by the first few of its ``inputs``; the operator as the package calls it.

    What ``torch.library.register_autograd`` does for a third of its time: that one goes through the schema's arguments one
    by one, at every call: 160 us for the thirteen of group_loss, whose whole arithmetic takes 5. The inputs without a
    derivative travel as one, because PyTorch looks at each by itself, forward and backward.
    """

    class Derivative(torch.autograd.Function):
        @staticmethod
        def forward(ctx, constants, *variables):
            with torch._C._AutoDispatchBelowAutograd():
                output = op(*variables, *constants)
            setup_context(ctx, variables, constants, output)
            return output

        @staticmethod
        def backward(ctx, *doutputs):
            return None, *backward(ctx, *doutputs)

    def derivative(*arguments):
        return Derivative.apply(arguments[inputs:], *arguments[:inputs])

    def dispatched(*arguments):
        if torch._C._are_functorch_transforms_active():
            raise NotImplementedError(
                "torch.func.grad, vjp, jvp and what is made of them: the kernels of nca_kernels have torch.autograd's "
                "gradients alone; call the function with backend='torch'"
            )
        return derivative(*arguments)

    def call(*arguments):
        # Compilers and function transforms must meet the operator above its derivative. Everything else meets it below, and
        # the dispatcher's way from the operator to the derivative is 3 us for nothing.
        above = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
        return op(*arguments) if above else derivative(*arguments)

    LIBRARY.impl(op, dispatched, "Autograd")
    return call


def no_second_derivative(*_):
    raise NotImplementedError("second derivatives: the kernels of nca_kernels have none; call the function with backend='torch'")
