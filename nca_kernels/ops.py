"""The operators: schemas, fakes and autograd. The one file that knows ``torch.library``.

Each implementation allocates the results and hands them to the backend that the caller named; ``torch.compile`` sees
one opaque operator. The tensors of the row operators are ``logits [N, T, V]``, ``labels [N, T]`` (already shifted),
``logps [N, T]`` and ``stats [3, N, T]``: the row's maximum, its sum of ``exp(z - max)`` and the label's ``z``, in float32.
Maximum and sum are kept apart, not as one log-sum-exp: where logits reach 1e4 that number has an ulp of 1e-3 in float32,
and so would every probability formed from it.
"""

from __future__ import annotations

import torch

from . import checks, linear, memory
from .backends import BACKENDS

LIBRARY = torch.library.Library("nca_kernels", "DEF")


def _define(schema: str):
    """Register the decorated function as the implementation of ``schema`` on every device."""
    name = LIBRARY.define(schema)

    def register(function):
        LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        return getattr(torch.ops.nca_kernels, name).default

    return register


def _differentiable(op, inputs: int, setup_context, backward):
    """Give an operator its derivative by the first few of its ``inputs``; the operator as the package calls it.

    What ``torch.library.register_autograd`` does for a third of its time: that one goes through the schema's arguments one
    by one, at every call: 160 us for the thirteen of group_loss, whose whole arithmetic takes 5. The inputs without a
    derivative travel as one, because PyTorch looks at each by itself, forward and backward.
    """

    class Derivative(torch.autograd.Function):
        @staticmethod
        def forward(ctx, constants, *variables):
            with torch._C._AutoDispatchBelowAutograd():
                output = op(*variables, *constants)
            setup_context(ctx, variables, constants, output)
            return output

        @staticmethod
        def backward(ctx, *doutputs):
            return None, *backward(ctx, *doutputs)

    def derivative(*arguments):
        return Derivative.apply(arguments[inputs:], *arguments[:inputs])

    def dispatched(*arguments):
        if torch._C._are_functorch_transforms_active():
            raise NotImplementedError(
                "torch.func.grad, vjp, jvp and what is made of them: the kernels of nca_kernels have torch.autograd's "
                "gradients alone; call the function with backend='torch'"
            )
        return derivative(*arguments)

    def call(*arguments):
        # Compilers and function transforms must meet the operator above its derivative. Everything else meets it below, and
        # the dispatcher's way from the operator to the derivative is 3 us for nothing.
        above = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
        return op(*arguments) if above else derivative(*arguments)

    LIBRARY.impl(op, dispatched, "Autograd")
    return call


# --- token_logps ---------------------------------------------------------------------------------------------------


@_define(
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


@_define(
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


@_define(
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
        _no_second_derivative()
    # Whoever has saved these logits for a backward of their own (a second call, an activation that keeps its output) must
    # meet PyTorch's error, not the gradient in their place.
    torch.autograd.graph.increment_version(logits)
    logits = logits.detach()
    token_logps_bwd_(dlogps, logits, labels, stats, *settings)
    return (logits,)


def _no_second_derivative(*_):
    raise NotImplementedError("second derivatives: the kernels of nca_kernels have none; call the function with backend='torch'")


token_logps = _differentiable(_token_logps, 1, _token_logps_setup, _token_logps_backward)
token_logps_bwd = _differentiable(_token_logps_bwd, 2, lambda *_: None, _no_second_derivative)


# --- linear_token_logps --------------------------------------------------------------------------------------------
# ``hidden [M, D]``, ``weight [V, D]``, ``bias [V]``, ``labels [M]``. ``mode`` is "none" (no gradient), "frozen" (hidden alone gets
# one, made in forward as ``u [M, D]``) or "trained" (made in backward, from the logits in ``kept`` or from new ones).
# ``group`` names the process group of a vocabulary-parallel head, "" for none.


def _head(weight, bias, vocab_start, vocab_total, ignore_index, scale, softcap, backend) -> linear.Head:
    return linear.Head(weight, bias, BACKENDS[backend], ignore_index, scale, softcap, vocab_start, vocab_total)


@_define(
    "linear_token_logps(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, int vocab_start, int vocab_total, "
    "int ignore_index, float scale, float? softcap, int save_budget, str mode, str group, str backend) "
    "-> (Tensor logps, Tensor stats, Tensor u, Tensor kept)"
)
def _linear_token_logps(
    hidden,
    weight,
    bias,
    labels,
    vocab_start,
    vocab_total,
    ignore_index,
    scale,
    softcap,
    save_budget,
    mode,
    group,
    backend,
):
    if checks.are_read(labels):
        checks.vocabulary(labels, ignore_index, vocab_total)
    head = _head(weight, bias, vocab_start, vocab_total, ignore_index, scale, softcap, backend)
    kept = hidden.new_empty(_kept_elements(hidden, weight, save_budget, mode))
    return *linear.forward(head, hidden, labels, kept, mode == "frozen", group), kept


def _kept_elements(hidden, weight, save_budget, mode) -> int:
    """Room for logits, and for one number that says whether they are there."""
    room = min(save_budget // hidden.dtype.itemsize, len(hidden) * len(weight)) if mode == "trained" else 0
    return room + 1 if room else 0


@torch.library.register_fake("nca_kernels::linear_token_logps", lib=LIBRARY)
def _linear_token_logps_fake(
    hidden,
    weight,
    bias,
    labels,
    vocab_start,
    vocab_total,
    ignore_index,
    scale,
    softcap,
    save_budget,
    mode,
    group,
    backend,
):
    M, D = hidden.shape
    u = hidden.new_empty((M if mode == "frozen" else 0, D), dtype=torch.float32 if group else hidden.dtype)
    logps, stats = (hidden.new_empty(shape, dtype=torch.float32) for shape in ((M,), (3, M)))
    return logps, stats, u, hidden.new_empty(_kept_elements(hidden, weight, save_budget, mode))


@_define(
    "linear_token_logps_bwd(Tensor dlogps, Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, Tensor stats, Tensor kept, "
    "bool[] needs, int vocab_start, int vocab_total, int ignore_index, float scale, float? softcap, str group, str backend) "
    "-> (Tensor dhidden, Tensor dweight, Tensor dbias)"
)
def linear_token_logps_bwd(
    dlogps,
    hidden,
    weight,
    bias,
    labels,
    stats,
    kept,
    needs,
    vocab_start,
    vocab_total,
    ignore_index,
    scale,
    softcap,
    group,
    backend,
):
    head = _head(weight, bias, vocab_start, vocab_total, ignore_index, scale, softcap, backend)
    return linear.backward(head, dlogps.contiguous(), hidden, labels, stats, kept, needs, group)


@torch.library.register_fake("nca_kernels::linear_token_logps_bwd", lib=LIBRARY)
def _linear_token_logps_bwd_fake(
    dlogps,
    hidden,
    weight,
    bias,
    labels,
    stats,
    kept,
    needs,
    vocab_start,
    vocab_total,
    ignore_index,
    scale,
    softcap,
    group,
    backend,
):
    shapes = (hidden.shape, weight.shape, (len(weight),))
    return tuple(hidden.new_empty(shape if need else (0,)) for shape, need in zip(shapes, needs, strict=True))


@_define(
    "linear_frozen_bwd(Tensor dlogps, Tensor labels, Tensor u, int ignore_index, ScalarType dtype, str group) -> Tensor dhidden"
)
def linear_frozen_bwd(dlogps, labels, u, ignore_index, dtype, group):
    return linear.frozen_backward(dlogps, labels, u, ignore_index, dtype, group)


@torch.library.register_fake("nca_kernels::linear_frozen_bwd", lib=LIBRARY)
def _linear_frozen_bwd_fake(dlogps, labels, u, ignore_index, dtype, group):
    return u.new_empty(u.shape, dtype=dtype)


def _linear_setup(ctx, variables, constants, output):
    hidden, weight, bias = variables
    labels, *ctx.settings = constants
    _, stats, u, kept = output
    ctx.dtype = hidden.dtype
    # With the head frozen, u takes the place of the hidden states.
    ctx.save_for_backward(*((labels, u) if ctx.settings[6] == "frozen" else (hidden, weight, bias, labels, stats, kept)))
    ctx.mark_non_differentiable(stats, u, kept)
    ctx.set_materialize_grads(False)


def _linear_backward(ctx, dlogps, *_):
    if dlogps is None:
        return None, None, None
    if torch.is_grad_enabled():
        _no_second_derivative()
    vocab_start, vocab_total, ignore_index, scale, softcap, _, mode, group, backend = ctx.settings
    if mode == "frozen":
        labels, u = ctx.saved_tensors
        return linear_frozen_bwd(dlogps, labels, u, ignore_index, ctx.dtype, group), None, None
    hidden, weight, bias, labels, stats, kept = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[1:])
    gradients = linear_token_logps_bwd(
        dlogps, hidden, weight, bias, labels, stats, kept, needs,
        vocab_start, vocab_total, ignore_index, scale, softcap, group, backend,
    )  # fmt: skip
    return tuple(gradient if need else None for gradient, need in zip(gradients, needs, strict=True))


linear_token_logps = _differentiable(_linear_token_logps, 3, _linear_setup, _linear_backward)


# --- group_loss ----------------------------------------------------------------------------------------------------


@_define(
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
        _no_second_derivative()
    (dlogps,) = ctx.saved_tensors
    return ((dloss.unsqueeze(-1) if dloss.ndim else dloss) * dlogps,)


group_loss = _differentiable(_group_loss, 1, _group_loss_setup, _group_loss_backward)
