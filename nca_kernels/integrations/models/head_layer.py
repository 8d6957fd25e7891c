"""Finds the one linear layer that computes a model's logits by running the model, and runs a function in its place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, cast

from torch import Tensor, nn

from ..._compat import forward_attribute

Compute = Callable[[nn.Linear, Tensor], Tensor]


class HeadLayer:
    """The head of ``core``. Within ``replaced()``, calling the head runs ``compute(linear, hidden)``, once a forward.

    A head may be wrapped (PEFT's copies and adapters, FSDP). So every linear layer inside it is replaced, and the one that runs is
    the head. If more than one runs in a forward (LoRA on the head, several heads), the head is not one linear map.
    """

    def __init__(self, core: nn.Module) -> None:
        self.core = core
        head: nn.Module | None = cast(Any, core).get_output_embeddings()
        self.kind = f"the head of {type(core).__name__}, a {type(head).__module__}.{type(head).__name__},"
        self.linears = {name: m for name, m in head.named_modules() if _is_plain(m)} if head is not None else {}
        if not self.linears:
            raise ValueError(
                f"model: {self.kind} has no plain nn.Linear to compute it (quantised, replaced, or of another form); wanted "
                "one linear layer. Use token_logps on the model's logits"
            )
        self.begin(_not_begun)

    @contextmanager
    def replaced(self) -> Iterator[None]:
        with ExitStack() as stack:
            for name, linear in self.linears.items():
                place = forward_attribute(linear)
                stack.callback(_restore, linear, place, vars(linear).get(place))
                setattr(linear, place, self._forward_of(name, linear))
            yield

    def begin(self, compute: Compute) -> None:
        """Set the function that the next forward of the model runs in place of the head."""
        self._compute = compute
        self._ran: list[str] = []

    def end(self) -> None:
        """Raise ``ValueError`` unless the forward since ``begin`` called the head."""
        if not self._ran:
            raise ValueError(
                f"model: {self.kind} was not called as wanted: none of its linear layers {list(self.linears)} ran in the "
                "model's forward. Use token_logps on the model's logits"
            )

    def _forward_of(self, name: str, linear: nn.Linear) -> Callable[[Tensor], Tensor]:
        def forward(input: Tensor) -> Tensor:
            self._ran.append(name)
            if len(self._ran) > 1:
                raise ValueError(
                    f"model: {self.kind} is not one linear map, {self._ran} of its layers ran in one forward. If that is "
                    "LoRA on the head, leave it out of target_modules, merge the adapter, or use token_logps on the logits"
                )
            # Checked here, inside the module's hooks: under FSDP2 the weight is a DTensor outside of them and plain within.
            if type(linear.weight) not in (Tensor, nn.Parameter):
                raise ValueError(
                    f"model: {self.kind} has a weight of type {type(linear.weight).__name__} in its forward, wanted a plain "
                    "tensor (neither quantised nor tensor-parallel). Use token_logps on the logits"
                )
            return self._compute(linear, input)

        return forward


def _not_begun(linear: nn.Linear, hidden: Tensor) -> Tensor:
    raise RuntimeError("model: the head did not run in a forward of the module given for log-probs; wanted a call of that module")


def _is_plain(module: nn.Module) -> bool:
    # Quantised and tensor-parallel layers are nn.Linear, too, but have another forward.
    return (
        isinstance(module, nn.Linear) and getattr(getattr(module, forward_attribute(module)), "__func__", None) is nn.Linear.forward
    )


def _restore(linear: nn.Linear, place: str, own: object) -> None:
    if own is None:
        delattr(linear, place)
    else:
        setattr(linear, place, own)
