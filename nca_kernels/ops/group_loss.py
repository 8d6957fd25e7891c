"""Operator of ``group_loss``: its arguments are those of :class:`~nca_kernels.loss_table.GroupLossArguments`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backends import KERNELS
from ..loss_table import GroupLossArguments
from .library import LIBRARY, define, differentiable, no_second_derivative, schema

Results = tuple[Tensor, Tensor, Tensor]  # loss, rewards, dlogps


@define(schema("group_loss", GroupLossArguments, "(Tensor loss, Tensor rewards, Tensor dlogps)"))
def _group_loss(*values: Any) -> Results:
    arguments = GroupLossArguments(*values)
    loss, rewards, dlogps = _results(arguments)
    if dlogps.numel() == 0:  # nothing to launch; the mean over no prompt is 0, not 0 / 0
        return loss.zero_(), rewards, dlogps
    KERNELS[arguments.backend].group_loss_fwd(arguments, loss, rewards, dlogps)
    return loss, rewards, dlogps


@torch.library.register_fake("nca_kernels::group_loss", lib=LIBRARY)
def _group_loss_fake(*values: Any) -> Results:
    return _results(GroupLossArguments(*values))


def _results(arguments: GroupLossArguments) -> Results:
    logps = arguments.logps
    loss = logps.new_empty(logps.shape[:1] if arguments.reduction == "none" else ())
    return loss, torch.empty_like(logps), torch.empty_like(logps)


def _setup(ctx: Any, variables: tuple[Tensor], constants: tuple, output: Results) -> None:
    _, rewards, dlogps = output
    ctx.save_for_backward(dlogps)
    ctx.mark_non_differentiable(rewards, dlogps)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dloss: Tensor | None, _drewards: None, _ddlogps: None) -> tuple[Tensor | None]:
    if dloss is None:
        return (None,)
    if torch.is_grad_enabled():
        no_second_derivative()
    (dlogps,) = ctx.saved_tensors
    return ((dloss.unsqueeze(-1) if dloss.ndim else dloss) * dlogps,)


group_loss = differentiable(_group_loss, 1, _setup, _backward)
