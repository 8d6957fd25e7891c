"""Measures how much of a run's time the head and the loss take."""

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

    The forward span runs from the call of the head (after FSDP has gathered its weights) to the end of the loss. The backward
    span runs from the start of the backward pass to the gradient of the head's input. On a GPU, CUDA events mark the spans and
    are read by :meth:`seconds`; elsewhere the wall clock does. If the hidden states need no gradient, only the forward is timed.
    """

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self._spans: list[tuple[Any, Any]] = []  # (start, end) as CUDA events, or in seconds
        self._begun: Any = None

    def seconds(self) -> float:
        """The seconds since the last call. On a GPU the caller must have synchronized, for instance by reading a loss."""
        spans, self._spans = self._spans, []
        return sum(begun.elapsed_time(ended) / 1e3 if self._cuda else ended - begun for begun, ended in spans)

    @contextmanager
    def from_head(self, model: nn.Module) -> Iterator[None]:
        """Time the forward of ``model`` and the loss within this context. Pass the loss to :meth:`watch` afterwards."""

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
        """Start the backward span when the backward pass of ``loss`` starts."""
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
