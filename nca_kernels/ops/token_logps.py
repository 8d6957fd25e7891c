"""Operators of ``token_logps``: ``logits [N, T, V]``, ``labels [N, T]`` (already shifted), ``logps [N, T]``, ``stats [3, N, T]``.

``stats`` holds the row's maximum, its sum of ``exp(z - max)`` and the label's ``z``, in float32. Maximum and sum are kept apart,
not as one log-sum-exp: where logits reach 1e4 that number has an ulp of 1e-3 in float32, and so would every probability
formed from it.
"""

from __future__ import annotations

import torch

from .. import checks, memory
from ..backends import BACKENDS
from .library import LIBRARY, define, differentiable, no_second_derivative


@define(
    "token_logps(Tensor logits, Tensor labels, int ignore_index, float scale, float? softcap, bool inplace_backward, "
    "str backend) -> (Tensor logps, Tensor stats)"
)
def _token_logps(logits, labels, ignore_index, scale, softcap, inplace_backward, backend):
    if backend != "cpu" and checks.are_read(labels):  # the cpu kernel looks for itself
        checks.vocabulary(labels, ignore_index, logits.shape[-1])
    logps, stats = _token_logps_fake(logits, labels, ignore_index, scale, softcap, inplace_backward, backend)
    BACKENDS[backend].token_logps_fwd(
        logits, labels, logps, stats,
        ignore_index=ignore_index, scale=scale, softcap=softcap, vocab_start=0, vocab_total=logits.shape[-1],
    )  # fmt: skip
    return logps, stats


@torch.library.register_fake("nca_kernels::token_logps", lib=LIBRARY)
def _token_logps_fake(logits, labels, ignore_index, scale, softcap, inplace_backward, backend):
    logps = torch.empty(labels.shape, dtype=torch.float32, device=logits.device)
    return logps, torch.empty((3, *labels.shape), dtype=torch.float32, device=logits.device)


@define(
    "token_logps_bwd(Tensor dlogps, Tensor logits, Tensor labels, Tensor stats, int ignore_index, float scale, "
    "float? softcap, str backend) -> Tensor dlogits"
)
def _token_logps_bwd(dlogps, logits, labels, stats, ignore_index, scale, softcap, backend):
    dlogits = memory.empty(logits.shape, logits.dtype, logits.device)
    _write_dlogits(dlogps, logits, labels, stats, dlogits, ignore_index, scale, softcap, backend)
    return dlogits


@torch.library.register_fake("nca_kernels::token_logps_bwd", lib=LIBRARY)
def _token_logps_bwd_fake(dlogps, logits, labels, stats, ignore_index, scale, softcap, backend):
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


@define(
    "token_logps_bwd_(Tensor dlogps, Tensor(a!) logits, Tensor labels, Tensor stats, int ignore_index, float scale, "
    "float? softcap, str backend) -> ()"
)
def token_logps_bwd_(dlogps, logits, labels, stats, ignore_index, scale, softcap, backend):
    _write_dlogits(dlogps, logits, labels, stats, logits, ignore_index, scale, softcap, backend)


@torch.library.register_fake("nca_kernels::token_logps_bwd_", lib=LIBRARY)
def _token_logps_bwd_inplace_fake(dlogps, logits, labels, stats, ignore_index, scale, softcap, backend):
    return None


def _write_dlogits(dlogps, logits, labels, stats, dlogits, ignore_index, scale, softcap, backend):
    BACKENDS[backend].token_logps_bwd(
        dlogps.contiguous(), logits, labels, stats, dlogits,
        ignore_index=ignore_index, scale=scale, softcap=softcap, vocab_start=0, vocab_total=logits.shape[-1],
    )  # fmt: skip


def _token_logps_setup(ctx, variables, constants, output):
    labels, *ctx.settings = constants
    ctx.save_for_backward(*variables, labels, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _token_logps_backward(ctx, dlogps, _dstats):
    if dlogps is None:
        return (None,)
    logits, labels, stats = ctx.saved_tensors
    ignore_index, scale, softcap, inplace_backward, backend = ctx.settings
    settings = (ignore_index, scale, softcap, backend)
    if not inplace_backward:
        return (token_logps_bwd(dlogps, logits, labels, stats, *settings),)
    if torch.is_grad_enabled():
        no_second_derivative()
    # Whoever has saved these logits for a backward of their own (a second call, an activation that keeps its output) must
    # meet PyTorch's error, not the gradient in their place.
    torch.autograd.graph.increment_version(logits)
    logits = logits.detach()
    token_logps_bwd_(dlogps, logits, labels, stats, *settings)
    return (logits,)


token_logps = differentiable(_token_logps, 1, _token_logps_setup, _token_logps_backward)
token_logps_bwd = differentiable(_token_logps_bwd, 2, lambda *_: None, no_second_derivative)
