"""Random shapes, strides, dtypes, shifts, ignore patterns and masks: each backend against the reference."""

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import DTYPES, assert_no_worse, value_and_grad
from test_group_loss import TOL as GROUP_TOL
from test_group_loss import taken

import nca_kernels
from nca_kernels.loss_table import LOSSES

QUICK = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,  # the same examples every time: a failure in CI is one at the desk
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@st.composite
def token_cases(draw):
    N, T = draw(st.integers(1, 3)), draw(st.integers(1, 6))
    V = draw(st.sampled_from([1, 2, 3, 15, 16, 17, 63, 64, 65, 127, 1025]))
    seed = draw(st.integers(0, 2**16))
    generator = torch.Generator().manual_seed(seed)
    step, pad, offset = draw(st.integers(1, 2)), draw(st.integers(0, 3)), draw(st.integers(0, 2))
    dtype = draw(st.sampled_from(list(DTYPES.values())))
    store = draw(st.sampled_from([1.0, 10.0, 1e3])) * torch.randn(N, T * step, V + pad + offset, generator=generator)
    logits = store.to(dtype)[:, ::step, offset : offset + V]
    labels = torch.randint(V, (N, T), generator=generator)
    labels[torch.rand(N, T, generator=generator) < draw(st.sampled_from([0.0, 0.5, 1.0]))] = -100
    options = {
        "shift": draw(st.integers(0, 2)),
        "scale": draw(st.sampled_from([1.0, 0.3, 2.5])),
        "softcap": draw(st.sampled_from([None, 20.0])),
    }
    return logits, labels, options, torch.randn(N, T, generator=generator)


@QUICK
@given(case=token_cases())
def test_token_logps(kernels, case):
    logits, labels, options, upstream = case

    def run(values, backend, device="cpu"):
        where = labels.to(device)
        return value_and_grad(
            lambda x: nca_kernels.token_logps(x, where, backend=backend, **options),
            values.to(device),
            upstream.to(device),
        )

    truth = run(logits.double(), "torch")
    peer = run(logits, "torch")
    ours = run(logits, kernels.name, kernels.device)
    assert_no_worse(ours[0], truth[0], peer[0], 1e-6, "logps")
    assert_no_worse(ours[1], truth[1], peer[1], max(1e-6, torch.finfo(logits.dtype).eps / 2), "dlogits")


@st.composite
def group_cases(draw):
    B, K = draw(st.integers(1, 5)), draw(st.integers(1, 6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    ref_logps = -100 * torch.rand(B, K, generator=generator)
    logps = ref_logps + draw(st.sampled_from([0.0, 1.0, 50.0])) * torch.randn(B, K, generator=generator)
    scores = torch.randint(-2, 3, (B, K), generator=generator).float()
    options = {
        "beta": draw(st.sampled_from([0.01, 0.1, 2.0])),
        "alpha": draw(st.sampled_from([0.0, 0.05, 1.0])),
        "pairs": draw(st.sampled_from(["best_vs_rest", "all"])),
        "reduction": draw(st.sampled_from(["mean", "sum", "none"])),
        "label_smoothing": draw(st.sampled_from([0.0, 0.1])),
        "nll_weight": draw(st.sampled_from([0.0, 0.5])),
        "mask": torch.rand(B, K, generator=generator) < draw(st.sampled_from([0.0, 0.6, 1.0])),
        "lengths": torch.randint(1, 40, (B, K), generator=generator),
        "desirable": torch.rand(B, K, generator=generator) < 0.5,
        "baseline": draw(st.sampled_from([None, -1.0, 3.0])),
    }
    name = draw(st.sampled_from(list(LOSSES)))
    return name, logps, ref_logps, scores, taken(name, options)


@QUICK
@given(case=group_cases())
def test_group_loss(kernels, case):
    name, logps, ref_logps, scores, options = case

    def run(dtype, backend, device="cpu"):
        tensors = (x.to(device, dtype) for x in (logps, ref_logps, scores))
        moved = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
        leaf, *rest = tensors
        leaf.requires_grad_()
        out = nca_kernels.group_loss(name, leaf, *rest, backend=backend, **moved)
        return out.loss.detach(), out.rewards, torch.autograd.grad(out.loss.sum(), leaf)[0]

    results = run(torch.float32, kernels.name, kernels.device), run(torch.float64, "torch"), run(torch.float32, "torch")
    for what, ours, truth, peer in zip(("loss", "rewards", "dlogps"), *results, strict=True):
        assert_no_worse(ours, truth, peer, GROUP_TOL, what)
