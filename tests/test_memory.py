"""Memory as measured: forward allocates O(M), backward one gradient, none in place."""

import sys

import pytest
import torch
from memory import peak_extra_bytes

import nca_kernels

MIB = 2**20
SLACK = 6 * MIB  # allocator granularity, thread stacks


@pytest.fixture
def problem(kernels):
    if kernels.interpreted:
        pytest.skip("the interpreter copies every tensor: its memory says nothing about the kernels")
    if kernels.device.type == "cpu" and sys.platform != "linux":
        pytest.skip("the resident set is read from /proc")
    torch.manual_seed(0)
    leaf = torch.randn(2, 256, 32000, device=kernels.device).requires_grad_()  # 62.5 MiB
    labels = torch.randint(32000, (2, 256), device=kernels.device)

    def logps(logits, **options):
        return nca_kernels.token_logps(logits, labels[:, : logits.shape[1]], backend=kernels.name, **options).sum()

    logps(leaf).backward()  # what the first call loads is not the call's
    leaf.grad = None
    return kernels, leaf, logps


def test_forward_allocates_no_copy_of_the_logits(problem):
    kernels, leaf, logps = problem
    assert peak_extra_bytes(lambda: logps(leaf), kernels.device) < SLACK
    with torch.no_grad():
        assert peak_extra_bytes(lambda: logps(leaf[:, :-1]), kernels.device) < SLACK


def test_backward_allocates_one_gradient(problem):
    kernels, leaf, logps = problem
    size = leaf.numel() * 4
    loss = logps(leaf)
    peak = peak_extra_bytes(lambda: torch.autograd.grad(loss, leaf), kernels.device)
    assert 0.9 * size < peak < size + SLACK


def test_inplace_backward_allocates_none(problem):
    kernels, leaf, logps = problem
    logits = leaf * 1
    loss = logps(logits, inplace_backward=True)
    peak = peak_extra_bytes(lambda: torch.autograd.grad(loss, logits), kernels.device)
    assert peak < SLACK
