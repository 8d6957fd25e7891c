"""What only the CUDA kernels promise, on the emulated ones; ``tests/test_cuda_emulated.py`` runs this file."""

import ctypes
import itertools
import math

import _cuda
import pytest
import torch
from oracle import DTYPES, assert_no_worse, plain_token_logps, value_and_grad

import nca_kernels
from nca_kernels.backends import native
from nca_kernels.backends.native import NativeBackend
from nca_kernels.loss_table import GroupLossArguments

TOL = 1e-6
SETTINGS = {"ignore_index": -100, "scale": 1.0, "softcap": None}

cuda = NativeBackend("cuda")
cuda._module = _cuda
blocks = ctypes.c_uint64.in_dll(ctypes.CDLL(_cuda.__file__), "emulated_blocks")


def _forward(logits, labels, vocab_start=0, vocab_total=None):
    logps, stats = torch.empty(labels.shape), torch.empty(3, *labels.shape)
    total = vocab_total or logits.shape[-1]
    cuda.token_logps_fwd(logits, labels, logps, stats, vocab_start=vocab_start, vocab_total=total, **SETTINGS)
    return logps, stats


def _backward(dlogps, logits, labels, stats, dlogits, vocab_start=0, vocab_total=None):
    total = vocab_total or logits.shape[-1]
    cuda.token_logps_bwd(dlogps, logits, labels, stats, dlogits, vocab_start=vocab_start, vocab_total=total, **SETTINGS)


def _check(logits, labels, dlogps, logps, dlogits):
    truth = value_and_grad(lambda x: plain_token_logps(x, labels, compute=torch.float64), logits, dlogps)
    peer = value_and_grad(lambda x: plain_token_logps(x, labels), logits, dlogps)
    assert_no_worse(logps, truth[0], peer[0], TOL, "logps")
    assert_no_worse(dlogits, truth[1], peer[1], max(TOL, torch.finfo(logits.dtype).eps / 2), "dlogits")


def test_an_old_driver_is_a_reason(monkeypatch):
    monkeypatch.delenv("EMULATED_OLD_DRIVER", raising=False)
    assert cuda.unsupported("token_logps", torch.device("cuda")) == []
    monkeypatch.setenv("EMULATED_OLD_DRIVER", "1")
    (reason,) = cuda.unsupported("token_logps", torch.device("cuda"))
    assert reason.startswith("the extension nca_kernels._cuda cannot run here (CUDA driver version is insufficient")
    assert len(cuda.unsupported("token_logps", torch.device("cpu"))) == 1  # the wrong device, which needs no driver


# What runs token_logps on each GPU, and what the other says: compute capability, CUDA version of the driver, cuda, triton.
RUNS, TOO_OLD = "runs", "Triton needs compute capability 8.0"
GPUS = {
    "V100": (70, 13000, "the GPU has compute capability 7.0, and this build serves sm_75, sm_80,", TOO_OLD),
    "T4": (75, 13000, RUNS, TOO_OLD),
    "A100": (80, 13000, RUNS, "would run too"),
    "RTX 4090": (89, 13000, RUNS, "would run too"),
    "H100": (90, 13000, RUNS, "would run too"),
    "B200": (100, 13000, RUNS, "would run too"),
    "B300": (103, 13000, RUNS, "would run too"),
    "Thor": (110, 13000, RUNS, "would run too"),
    "Thor beside an older driver": (110, 12090, "by PTX alone; that takes a driver for CUDA 13.0, and this one is for 12.9", RUNS),
    "RTX 5090 beside an older driver": (120, 12090, RUNS, "would run too"),  # there is machine code for it
    "DGX Spark": (121, 13000, RUNS, "would run too"),
    "one to come": (140, 13010, RUNS, "would run too"),
}


def _explained(monkeypatch, capability, driver):
    """What explain() says of token_logps by each backend on such a GPU."""
    monkeypatch.setenv("EMULATED_CAPABILITY", str(capability))
    monkeypatch.setenv("EMULATED_DRIVER", str(driver))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: divmod(capability, 10))
    monkeypatch.setitem(native.cuda.__dict__, "_module", _cuda)
    monkeypatch.setitem(native.cuda.__dict__, "_import_error", "")
    lines = nca_kernels.explain("cuda:0", "token_logps").splitlines()[1:]
    return dict(line.split(maxsplit=1) for line in lines)


@pytest.mark.parametrize("gpu", GPUS)
def test_explain_tells_the_truth_of_every_gpu(monkeypatch, gpu):
    capability, driver, *wanted = GPUS[gpu]
    explained = _explained(monkeypatch, capability, driver)
    assert list(explained)[:2] == ["cuda", "triton"]
    for name, reason in zip(("cuda", "triton"), wanted, strict=True):
        assert reason in explained[name], explained
    assert "runs on cpu tensors, not on cuda" in explained["cpu"]
    assert explained["torch"] == ("runs" if RUNS not in wanted else "would run too")


def test_gpus_of_rocm_are_refused_with_a_reason(monkeypatch):
    """PyTorch calls them "cuda"."""
    monkeypatch.setattr(torch.version, "hip", "6.4")
    explained = _explained(monkeypatch, 94, 13000)
    assert "built for ROCm" in explained["cuda"] and "built for ROCm" in explained["triton"] and explained["torch"] == "runs"


@pytest.mark.parametrize("V", [5, 5000])  # a row of a warp, and of a block
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_an_illegal_label_gives_nan_in_its_row_alone(dtype, V):
    torch.manual_seed(V)
    logits, dlogps = torch.randn(3, 5, V).to(dtype), torch.randn(3, 5)
    legal = torch.randint(V, (3, 5))
    labels = legal.clone()
    labels[0, 1], labels[1, 4], labels[2, 0], labels[2, 2] = V, -1, 2**40, -(2**40)
    illegal = labels != legal
    results = []
    for each in (labels, legal):
        logps, stats = _forward(logits, each)
        dlogits = torch.empty_like(logits)
        _backward(dlogps, logits, each, stats, dlogits)
        results.append((logps, stats.movedim(0, -1), dlogits))
    for got, wanted in zip(*results, strict=True):
        assert torch.isnan(got[illegal]).all() and torch.equal(got[~illegal], wanted[~illegal])


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_slices_of_the_vocabulary_merge(dtype):
    """Slices of odd lengths, so that each row starts at an alignment of its own."""
    torch.manual_seed(0)
    N, T, bounds = 2, 5, [0, 1, 334, 4097, 6001]
    V = bounds[-1]
    logits, dlogps = (4 * torch.randn(N, T, V)).to(dtype), torch.randn(N, T)
    labels = torch.tensor([[0, 1, 333, 334, -100], [4096, 4097, 6000, 2000, 333]])
    slices = list(itertools.pairwise(bounds))
    stats = torch.stack([_forward(logits[..., a:b], labels, a, V)[1] for a, b in slices])
    top = stats[:, 0].amax(0)
    total = (stats[:, 1] * (stats[:, 0] - top).exp()).sum(0)
    target = stats[:, 2].sum(0)
    ignored = labels == -100
    assert (stats[:, :, ignored] == torch.tensor([0.0, 1.0, 0.0])[:, None]).all()
    dlogits = torch.empty_like(logits)
    for a, b in slices:
        _backward(dlogps, logits[..., a:b], labels, torch.stack([top, total, target]), dlogits[..., a:b], a, V)
    _check(logits, labels, dlogps, ((target - top) - total.log()).masked_fill(ignored, 0.0), dlogits)


def _in_a_frame(N, T, V, dtype, offset, pad):
    """``[N, T, V]`` inside a store of NaN: at ``offset``, with ``pad`` elements between the rows."""
    store = torch.full((offset + N * T * (V + pad) + 16,), math.nan, dtype=dtype)
    return store, store.as_strided((N, T, V), (T * (V + pad), V + pad, 1), offset)


@pytest.mark.parametrize("V", [1, 7, 1027, 17001])  # a warp each, 3 rows in a block for 8; 8 or 16 warps each
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_logits_and_dlogits_of_any_alignment(dtype, V):
    """Read and written inside the frame alone, whether or not both rows meet the 16-byte boundary at one column."""
    torch.manual_seed(V)
    values, labels, dlogps = torch.randn(1, 3, V), torch.randint(V, (1, 3)), torch.randn(1, 3)
    for (offset, pad), (out_offset, out_pad) in itertools.product([(0, 0), (1, 0), (3, 1), (8, 2)], repeat=2):
        _, logits = _in_a_frame(1, 3, V, dtype, offset, pad)
        out_store, dlogits = _in_a_frame(1, 3, V, dtype, out_offset, out_pad)
        logits.copy_(values)
        logps, stats = _forward(logits, labels)
        _backward(dlogps, logits, labels, stats, dlogits)
        _check(logits, labels, dlogps, logps, dlogits)
        dlogits.fill_(math.nan)
        assert torch.isnan(out_store).all()


@pytest.mark.parametrize("B", [127, 128, 129, 1500, 2500])  # a block of 512 threads takes 128 prompts; 2500 take several
def test_more_prompts_than_a_block_has_threads(B):
    torch.manual_seed(B)
    logps, ref_logps, scores = torch.randn(3, B, 4)
    losses, grads = {}, {}
    for reduction in ("none", "sum", "mean"):
        losses[reduction] = torch.empty(B if reduction == "none" else 1)
        grads[reduction] = torch.empty(B, 4)
        arguments = GroupLossArguments(
            logps, ref_logps, scores, None, None, None, None, name="nca", beta=0.3, alpha=0.7, pairs="all",
            label_smoothing=0.0, nll_weight=0.0, reduction=reduction, backend="cuda",
        )  # fmt: skip
        assert arguments.wants_several_blocks() == (B * 4 * 4 > 2**15)
        before = blocks.value
        cuda.group_loss_fwd(arguments, losses[reduction], torch.empty(B, 4), grads[reduction])
        one_each = reduction == "none" or arguments.wants_several_blocks()
        summing = one_each and reduction != "none"
        assert blocks.value - before == (-(-B // 128) if one_each else 1) + summing
    assert (losses["none"] > 0).all()
    total = losses["none"].double().sum()
    assert losses["sum"].item() == pytest.approx(total.item(), rel=1e-7)
    assert losses["mean"].item() == pytest.approx(total.item() / B, rel=1e-7)
    assert torch.equal(grads["sum"], grads["none"]) and torch.equal(grads["mean"], grads["sum"] / B)
