"""Operator of ``group_loss``: ``logps``, ``ref_logps``, ``scores`` and ``mask`` are ``[B, K]``."""

from __future__ import annotations

import torch

from ..backends import BACKENDS
from .library import LIBRARY, define, differentiable, no_second_derivative


@define(
    "group_loss(Tensor logps, Tensor ref_logps, Tensor scores, Tensor? mask, Tensor? lengths, Tensor? desirable, "
    "Tensor? baseline, str name, float beta, float alpha, str pairs, str reduction, str backend) "
    "-> (Tensor loss, Tensor rewards, Tensor dlogps)"
)
def _group_loss(logps, ref_logps, scores, mask, lengths, desirable, baseline, name, beta, alpha, pairs, reduction, backend):
    loss, rewards, dlogps = _group_loss_results(logps, reduction)
    if logps.numel() == 0:  # nothing to launch; the mean over no prompt is 0, not 0 / 0
        return loss.zero_(), rewards, dlogps
    BACKENDS[backend].group_loss_fwd(
        name, logps, ref_logps, scores, mask, lengths, desirable, baseline, loss, rewards, dlogps,
        beta=beta, alpha=alpha, pairs=pairs, reduction=reduction,
    )  # fmt: skip
    return loss, rewards, dlogps


def _group_loss_results(logps, reduction):
    loss = logps.new_empty(logps.shape[:1] if reduction == "none" else ())
    return loss, torch.empty_like(logps), torch.empty_like(logps)


@torch.library.register_fake("nca_kernels::group_loss", lib=LIBRARY)
def _group_loss_fake(logps, ref_logps, scores, mask, lengths, desirable, baseline, name, beta, alpha, pairs, reduction, backend):
    return _group_loss_results(logps, reduction)


def _group_loss_setup(ctx, variables, constants, output):
    _, rewards, dlogps = output
    ctx.save_for_backward(dlogps)
    ctx.mark_non_differentiable(rewards, dlogps)
    ctx.set_materialize_grads(False)


def _group_loss_backward(ctx, dloss, _drewards, _ddlogps):
    if dloss is None:
        return (None,)
    if torch.is_grad_enabled():
        no_second_derivative()
    (dlogps,) = ctx.saved_tensors
    return ((dloss.unsqueeze(-1) if dloss.ndim else dloss) * dlogps,)


group_loss = differentiable(_group_loss, 1, _group_loss_setup, _group_loss_backward)
