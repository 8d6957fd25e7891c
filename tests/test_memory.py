"""Measured memory: forward allocates O(M), and backward one gradient, or none in place."""

import resource
import sys
from pathlib import Path

import pytest
import torch

import nca_kernels
from bench.memory import MIB, peak_extra
from nca_kernels import _compat, memory

SLACK = 6  # MiB: allocator granularity, thread stacks


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
    assert peak_extra(lambda: logps(leaf), kernels.device.type)[1] < SLACK
    with torch.no_grad():
        assert peak_extra(lambda: logps(leaf[:, :-1]), kernels.device.type)[1] < SLACK


def test_backward_allocates_one_gradient(problem):
    kernels, leaf, logps = problem
    size = leaf.nbytes / MIB
    loss = logps(leaf)
    _, peak = peak_extra(lambda: torch.autograd.grad(loss, leaf), kernels.device.type)
    assert 0.9 * size < peak < size + SLACK


def test_all_statistics_allocate_one_gradient(problem):
    """Log-prob, log-sum-exp and entropy share one read, one write and one gradient."""
    kernels, leaf, _ = problem
    labels = torch.zeros(leaf.shape[:2], dtype=torch.int64, device=kernels.device)

    def forward():
        return nca_kernels.token_stats(leaf, labels, entropy_gradient=True, backend=kernels.name)

    stats, peak = peak_extra(forward, kernels.device.type)
    assert peak < SLACK
    loss = stats.logps.sum() + stats.lse.sum() + stats.entropy.sum()
    _, peak = peak_extra(lambda: torch.autograd.grad(loss, leaf), kernels.device.type)
    assert peak < leaf.nbytes / MIB + SLACK


@pytest.mark.skipif(not _compat.counts_storage_users, reason="PyTorch before 2.8 does not tell who else reads the logits")
def test_inplace_backward_allocates_none(problem):
    kernels, leaf, logps = problem
    logits = leaf * 1
    loss = logps(logits, inplace_backward=True)
    _, peak = peak_extra(lambda: torch.autograd.grad(loss, logits), kernels.device.type)
    assert peak < SLACK


def test_large_fresh_memory_comes_in_huge_pages():
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not setting.exists() or "[never]" in setting.read_text():
        pytest.skip("this system has no transparent huge pages")

    def faults(size):
        fresh = memory.empty((size,), torch.uint8, torch.device("cpu"))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        fresh.fill_(1)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    assert faults(256 * MIB) < 256 * MIB // 4096 // 10
    assert memory.empty((0, 3), torch.bfloat16, torch.device("cpu")).shape == (0, 3)
