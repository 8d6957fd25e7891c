"""What Triton's launchers tell the compiler about a call's memory."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

import nca_kernels
from nca_kernels.backends import BACKENDS

triton = pytest.importorskip("triton", reason="Triton is not installed")


@pytest.fixture
def stores_whole_words(monkeypatch):
    """Whether the backward for the logits that a function makes is compiled to store 16-byte words."""
    from nca_kernels.backends.triton import token_logps

    if torch.cuda.is_available():
        pytest.skip("the recorder stands between the launcher and the interpreter")
    kernel, seen = token_logps._token_logps_bwd_kernel, []

    class Recorder:
        def __getitem__(self, grid):
            def launch(*args, **options):
                seen.append(options["ALIKE"])
                return kernel[grid](*args, **options)

            return launch

    def backward(view) -> bool:
        leaf = torch.randn(3, 5, 1001, requires_grad=True)
        logits: Tensor = view(leaf)
        labels = torch.randint(logits.shape[-1], logits.shape[:-1])
        nca_kernels.token_logps(logits, labels, backend="triton").sum().backward()
        return seen[-1]

    monkeypatch.setattr(token_logps, "_token_logps_bwd_kernel", Recorder())
    return backward


def test_the_stride_of_a_dimension_of_size_1_is_no_obstacle(stores_whole_words):
    """One sequence without its last token, one token of every sequence, one token of one sequence: only strides of rows count."""
    assert stores_whole_words(lambda x: x)
    assert stores_whole_words(lambda x: x[:1, :-1])
    assert stores_whole_words(lambda x: x[:1, :1])
    assert stores_whole_words(lambda x: x[:1, :1, :1000])
    assert not stores_whole_words(lambda x: x[:2, :-1])  # rows of the second sequence start elsewhere in their words
    assert not stores_whole_words(lambda x: x[:1, :, 1:])


@pytest.fixture
def touched(monkeypatch):
    """The addresses of the row elements that kernels have loaded and stored since the last call."""
    runtime = pytest.importorskip("triton.runtime.interpreter", reason="Triton is not installed")
    if torch.cuda.is_available():
        pytest.skip("the interpreter shows the addresses; on a GPU the sanitizers see them")
    builder, addresses = runtime.InterpreterBuilder, {"load": [], "store": []}

    def record(kind: str) -> None:
        function = getattr(builder, f"create_masked_{kind}")

        def recorded(self, pointers, *arguments):
            mask = arguments[0 if kind == "load" else 1].data
            if pointers.data.ndim == 2:  # a block of a row; labels, statistics and log-probs are single elements
                addresses[kind].append(pointers.data[np.broadcast_to(mask, pointers.data.shape)])
            return function(self, pointers, *arguments)

        monkeypatch.setattr(builder, f"create_masked_{kind}", recorded)

    def taken(kind: str) -> np.ndarray:
        found = np.unique(np.concatenate(addresses[kind]))
        addresses[kind].clear()
        return found

    record("load")
    record("store")
    return taken


@pytest.mark.parametrize("V", [1, 5, 1027])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_every_16_byte_word_that_is_read_holds_an_element_of_the_row(touched, dtype, V):
    """So a read past a row stays within the allocation, whose size is a multiple of 16 bytes; no write leaves the row."""
    backend = BACKENDS["triton"]
    store, out = torch.zeros(2, V + 16, dtype=dtype)
    labels, dlogps = torch.randint(V, (1, 1)), torch.ones(1, 1)
    options = {"ignore_index": -100, "scale": 1.0, "softcap": None, "vocab_start": 0, "vocab_total": V}
    for offset in range(16 // dtype.itemsize):
        logits, dlogits = store[offset:][:V].view(1, 1, V), out[3:][:V].view(1, 1, V)
        stats = torch.empty(4, 1, 1)
        backend.token_logps_fwd(logits, labels, torch.empty(1, 1), stats, **options)
        backend.token_logps_bwd(dlogps, logits, labels, stats, dlogits, **options)
        first, last = logits.data_ptr(), logits.data_ptr() + (V - 1) * dtype.itemsize
        assert set(touched("load") // 16) == set(range(first // 16, last // 16 + 1))
        written = dlogits.data_ptr() + np.arange(V) * dtype.itemsize
        assert set(touched("store")) == set(written)
