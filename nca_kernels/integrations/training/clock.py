"""How a run's time is spent: how much of it in the head and the loss."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..models.heads import causal_lm


class LossClock:
    r"""Times the head and the loss, forward and backward, from the last hidden states to their gradient.

    Forward: from the call of the head (after FSDP has gathered its weights) to the end of the loss. Backward: from its begin to
    the gradient of the head's input. On a GPU by CUDA events, which are read when the seconds are asked for; elsewhere by
    the clock on the wall. A model whose hidden states need no gradient is timed in its forward alone.
    """

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self._spans: list[tuple[Any, Any]] = []  # of CUDA events, or of seconds
        self._begun: Any = None

    def seconds(self) -> float:
        """Since last asked. On a GPU everything must have been synchronized: as it is where a loss has been read."""
        spans, self._spans = self._spans, []
        return sum(begun.elapsed_time(ended) / 1e3 if self._cuda else ended - begun for begun, ended in spans)

    @contextmanager
    def from_head(self, model: nn.Module) -> Iterator[None]:
        """Around the forward of ``model`` and the loss, whose value goes to :meth:`watch` after it."""

        def begin(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            self._begun = self._now()
            if args[0].requires_grad:
                args[0].register_hook(lambda _: self._end())

        handle = causal_lm(model).get_output_embeddings().register_forward_pre_hook(begin)
        try:
            yield
        finally:
            handle.remove()
        self._end()

    def watch(self, loss: Tensor) -> None:
        """Begin anew when the backward of ``loss`` does."""
        loss.register_hook(lambda _: self._begin())

    def _begin(self) -> None:
        self._begun = self._now()

    def _end(self) -> None:
        self._spans.append((self._begun, self._now()))

    def _now(self) -> object:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
