"""What Triton's launchers tell the compiler about a call's memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import nca_kernels

triton = pytest.importorskip("triton", reason="Triton is not installed")


@pytest.fixture
def stores_whole_words(monkeypatch):
    """Whether backward of the logits that a function makes is compiled to store 16-byte words."""
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
    """One sequence without its last token, one token of every sequence, one token of one: only their own rows count."""
    assert stores_whole_words(lambda x: x)
    assert stores_whole_words(lambda x: x[:1, :-1])
    assert stores_whole_words(lambda x: x[:1, :1])
    assert stores_whole_words(lambda x: x[:1, :1, :1000])
    assert not stores_whole_words(lambda x: x[:2, :-1])  # rows of the second sequence start elsewhere in their words
    assert not stores_whole_words(lambda x: x[:1, :, 1:])
