"""Triton's kernels with the rounding errors of a GPU's instructions, which Triton's interpreter does not have.

A float32 division is ``div.full.f32`` (2 ulp) and ``exp2`` is ``ex2.approx.f32`` (2 ulp) on the GPU (PTX ISA, floating-point
instructions). The interpreter rounds both correctly, so an expression that cancels after one of them passes there.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import numpy as np
import pytest
import test_group_loss
import test_row_stats
import test_token_logps
import torch
from conftest import Target
from oracle import plain_token_logps, value_and_grad

import nca_kernels
from nca_kernels.loss_table import LOSSES

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="a GPU has the error itself")


def _moved(exact: Callable, ulps: int) -> Callable:
    """The function with its result moved up by ``ulps`` float32 numbers (down if negative)."""

    def inexact(*arguments: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore"):
            result = exact(*arguments)
        if result.dtype != np.float32:
            return result
        for _ in range(abs(ulps)):
            result = np.where(result == 0, result, np.nextafter(result, np.float32(np.copysign(np.inf, ulps))))
        return result

    return inexact


@pytest.fixture(params=[("division", -2), ("division", -1), ("division", 1), ("division", 2), ("exp2", -2), ("exp2", 2)], ids=str)
def triton(request, monkeypatch) -> Target:
    """Backend ``triton`` with one instruction off by a number of ulp."""
    runtime = pytest.importorskip("triton.runtime.interpreter", reason="Triton is not installed")
    builder, (instruction, ulps) = runtime.InterpreterBuilder, request.param
    if instruction == "division":
        inexact = _moved(np.divide, ulps)
        monkeypatch.setattr(builder, "create_fdiv", lambda self, x, y: self.binary_op(x, y, inexact))
    else:
        inexact = _moved(np.exp2, ulps)
        monkeypatch.setattr(builder, "create_exp2", lambda self, x: self.unary_op(x, inexact))
    return Target("triton")


@pytest.mark.parametrize("scale, softcap", [(2.0, 5.0), (1.0, 0.25)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_scale_and_softcap(triton, dtype, scale, softcap):
    test_token_logps.test_scale_and_softcap(triton, dtype, scale, softcap)


def test_statistics_and_their_gradients(triton):
    for softcap in (None, 5.0):
        test_row_stats._check(triton, *test_row_stats._case(517, torch.float32), softcap=softcap)


def test_a_softcap_has_the_same_slope_on_both_sides(triton):
    """``1 - tanh^2`` at u = -4 is as exact as at u = 4, where it is 1.3e-3 and tanh's last bit is 9e-5 of it."""
    u = torch.linspace(0.6, 5, 45)
    logits = torch.stack([torch.stack([u, -u], -1), torch.stack([-u, u], -1)]).requires_grad_()
    labels = torch.zeros(logits.shape[:2], dtype=torch.int64)

    def grad(function: Callable) -> torch.Tensor:
        return value_and_grad(function, logits, torch.ones(labels.shape))[1].double()

    ours = grad(lambda x: nca_kernels.token_logps(x, labels, softcap=1.0, backend="triton"))
    truth = grad(lambda x: plain_token_logps(x, labels, softcap=1.0, compute=torch.float64))
    slope = 1 - torch.tanh(u.double())[None, :, None] ** 2
    assert ((ours - truth).abs() <= truth.abs() * (4e-6 + 2**-23 / slope)).all()


@pytest.mark.parametrize("name", LOSSES)
def test_losses(triton, name):
    logps, ref_logps, scores, mask, *_ = test_group_loss._batch(9, 4, ragged=True, ties=False)
    test_group_loss._check(triton, name, logps, ref_logps, scores, mask=mask, beta=0.7, alpha=0.3, pairs="all")
