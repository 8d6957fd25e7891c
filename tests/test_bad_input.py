"""Every error names the argument, the value that it got and the one that was wanted."""

import re

import pytest
import torch

import nca_kernels
from nca_kernels.loss_table import LOSSES

LOGITS, LABELS = torch.randn(2, 3, 5), torch.zeros(2, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    "arguments, options, error, message",
    [
        (([1.0], LABELS), {}, TypeError, "logits: got list, wanted a tensor of float32"),
        ((LOGITS.long(), LABELS), {}, TypeError, "logits: got a tensor of torch.int64, wanted"),
        ((LOGITS[0, 0], LABELS), {}, ValueError, "logits: got shape [5], wanted [N, T, V] or [M, V]"),
        ((LOGITS[..., :0], LABELS), {}, ValueError, "logits: got shape [2, 3, 0]"),
        ((LOGITS, LABELS.float()), {}, TypeError, "labels: got a tensor of torch.float32, wanted a tensor of int64"),
        ((LOGITS, LABELS[:, :2]), {}, ValueError, "labels: got shape [2, 2], wanted [2, 3]"),
        ((LOGITS, LABELS.to("meta")), {}, ValueError, "labels: on meta, wanted cpu"),
        ((LOGITS, LABELS), {"shift": -1}, ValueError, "shift: got -1, wanted an int >= 0"),
        ((LOGITS, LABELS), {"shift": 1.0}, TypeError, "shift: got float"),
        ((LOGITS, LABELS), {"inplace_backward": "no"}, TypeError, "inplace_backward: got str, wanted a bool"),
        (
            (LOGITS[:1].expand(2, 3, 5), LABELS),
            {"inplace_backward": True},
            ValueError,
            "inplace_backward: logits of shape [2, 3, 5] has strides [0, 5, 1], one row for several positions; wanted a row",
        ),
        (
            (LOGITS, LABELS),
            {"ignore_index": 2**63},
            ValueError,
            "ignore_index: got 9223372036854775808, wanted an int of 64",
        ),
        (
            (LOGITS, LABELS),
            {"softcap": 1e-46},
            ValueError,
            "softcap: got 1e-46, wanted a finite number > 0, in float32",
        ),
        ((LOGITS, LABELS), {"scale": 1e39}, ValueError, "scale: got 1e+39, wanted a finite number > 0, in float32"),
        ((LOGITS, LABELS), {"backend": ["cpu"]}, TypeError, "backend: got list, wanted None or a name"),
        ((LOGITS[0], LABELS[0]), {"shift": 1}, ValueError, "shift: got 1 with logits of one row of tokens; wanted 0"),
        ((LOGITS, LABELS), {"ignore_index": None}, TypeError, "ignore_index: got NoneType, wanted an int"),
        ((LOGITS, LABELS), {"scale": 0.0}, ValueError, "scale: got 0.0, wanted a finite number > 0"),
        ((LOGITS, LABELS), {"scale": float("nan")}, ValueError, "scale: got nan"),
        ((LOGITS, LABELS), {"scale": "2"}, TypeError, "scale: got str"),
        ((LOGITS, LABELS), {"softcap": -5.0}, ValueError, "softcap: got -5.0, wanted a finite number > 0"),
        ((LOGITS, LABELS), {"backend": "numpy"}, ValueError, "backend: got 'numpy'"),
    ],
)
def test_token_logps(arguments, options, error, message):
    with pytest.raises(error, match=re.escape(message)):
        nca_kernels.token_logps(*arguments, **options)


@pytest.mark.parametrize("label", [5, -1, 2**40, -101])
def test_a_label_outside_the_vocabulary(target, label):
    """A bad label anywhere gives an IndexError on the CPU. On a GPU, which does not sync, it gives NaN in its row."""
    labels = LABELS.clone()
    labels[1, 2] = label
    logits = LOGITS.to(target.device).requires_grad_()
    labels = labels.to(target.device)
    message = re.escape(f"labels: the label {label} of the logits at flat position 5 is neither in [0, 5) nor ignore_index (-100)")
    if target.device.type == "cpu":
        with pytest.raises(IndexError, match=message):
            nca_kernels.token_logps(logits, labels, backend=target.name)
        return
    logps = nca_kernels.token_logps(logits, labels, backend=target.name)
    logps.sum().backward()
    bad = torch.zeros(2, 3, dtype=torch.bool, device=target.device)
    bad[1, 2] = True
    assert torch.equal(torch.isnan(logps), bad) and torch.equal(torch.isnan(logits.grad).all(-1), bad)
    assert torch.equal(torch.isnan(logits.grad).any(-1), bad)


def test_labels_are_checked_on_a_gpu_on_demand(target, monkeypatch):
    monkeypatch.setenv("NCA_KERNELS_CHECK", "1")
    with pytest.raises(IndexError, match="labels: the label 5"):
        nca_kernels.token_logps(LOGITS.to(target.device), (LABELS + 5).to(target.device), backend=target.name)


@pytest.mark.parametrize(
    "bounds, error, message",
    [
        (torch.tensor([0, 4, 3, 6]), ValueError, "cu_seqlens: got [0, 4, 3, 6], wanted bounds that rise from 0 to 6"),
        (torch.tensor([1, 6]), ValueError, "cu_seqlens: got [1, 6], wanted bounds that rise from 0 to 6"),
        (torch.tensor([0, 5]), ValueError, "cu_seqlens: got [0, 5], wanted bounds that rise from 0 to 6"),
        (torch.tensor([[0, 6]]), ValueError, "cu_seqlens: got shape [1, 2], wanted [S + 1]"),
        (torch.tensor([0.0, 6.0]), TypeError, "cu_seqlens: got a tensor of torch.float32"),
        ([0, 6], TypeError, "cu_seqlens: got list"),
    ],
)
def test_segment_bounds(bounds, error, message):
    with pytest.raises(error, match=re.escape(message)):
        nca_kernels.sequence_logps(LOGITS.view(6, 5), LABELS.view(6), cu_seqlens=bounds)


def test_segment_bounds_want_one_row():
    with pytest.raises(ValueError, match=re.escape("cu_seqlens: logits has leading shape [2, 3], wanted one packed row")):
        nca_kernels.sequence_logps(LOGITS, LABELS, cu_seqlens=torch.tensor([0, 6]))


def test_leading_dimensions_that_do_not_collapse(default_dispatch):
    logits = torch.randn(3, 2, 4, 5).transpose(0, 1)
    with pytest.raises(ValueError, match=re.escape("logits: shape [2, 3, 4, 5] with strides")):
        nca_kernels.token_logps(logits, torch.zeros(2, 3, 4, dtype=torch.int64))


LOGPS = torch.randn(2, 3)


@pytest.mark.parametrize(
    "name, arguments, options, error, message",
    [
        ("ppo", (LOGPS, LOGPS), {}, ValueError, "name: got 'ppo', wanted one of"),
        ("nca", (LOGPS.long(), LOGPS), {}, TypeError, "logps: got a tensor of torch.int64"),
        ("nca", (LOGPS[0], LOGPS), {}, ValueError, "logps: got shape [3], wanted [B, K] with K >= 1"),
        ("nca", (LOGPS[:, :0], LOGPS[:, :0]), {}, ValueError, "logps: got shape [2, 0], wanted [B, K] with K >= 1"),
        ("nca", (LOGPS, LOGPS[:1]), {}, ValueError, "ref_logps: got shape [1, 3], wanted [2, 3]"),
        ("nca", (LOGPS, LOGPS.clone().requires_grad_()), {}, ValueError, "ref_logps: requires a gradient"),
        ("nca", (LOGPS, LOGPS.to("meta")), {}, ValueError, "ref_logps: on meta, wanted cpu"),
        ("nca", (LOGPS, LOGPS, LOGPS > 0), {}, TypeError, "scores: got a tensor of torch.bool, wanted a tensor of integers or"),
        ("nca", (LOGPS, LOGPS, LOGPS[:, :2]), {}, ValueError, "scores: got shape [2, 2], wanted [2, 3]"),
        (
            "nca",
            (LOGPS, LOGPS),
            {"mask": LOGPS},
            TypeError,
            "mask: got a tensor of torch.float32, wanted a tensor of bool",
        ),
        ("ipo", (LOGPS, LOGPS), {"lengths": LOGPS > 0}, TypeError, "lengths: got a tensor of torch.bool"),
        ("kto", (LOGPS, LOGPS), {"desirable": LOGPS}, TypeError, "desirable: got a tensor of torch.float32"),
        ("kto", (LOGPS, LOGPS), {"baseline": LOGPS}, ValueError, "baseline: got shape [2, 3], wanted one element"),
        ("kto", (LOGPS, LOGPS), {"baseline": "0"}, TypeError, "baseline: got str, wanted a number"),
        ("nca", (LOGPS, LOGPS), {"beta": 0}, ValueError, "beta: got 0, wanted a finite number > 0"),
        ("nca", (LOGPS, LOGPS), {"alpha": -0.1}, ValueError, "alpha: got -0.1, wanted a finite number >= 0"),
        (
            "dpo",
            (LOGPS, LOGPS),
            {"pairs": "some"},
            ValueError,
            "pairs: got 'some', wanted one of 'best_vs_rest', 'all'",
        ),
        ("nca", (LOGPS, LOGPS), {"reduction": "max"}, ValueError, "reduction: got 'max', wanted one of 'mean'"),
        ("nca", (LOGPS, LOGPS), {"backend": "tpu"}, ValueError, "backend: got 'tpu'"),
        (LOGPS, (LOGPS, LOGPS), {}, TypeError, "name: got Tensor, wanted one of 'info_nca', 'nca'"),
        ("dpo", (LOGPS, LOGPS), {"pairs": LOGPS}, TypeError, "pairs: got Tensor, wanted one of 'best_vs_rest', 'all'"),
        ("nca", (LOGPS, LOGPS), {"reduction": LOGPS}, TypeError, "reduction: got Tensor, wanted one of 'mean', 'sum', 'none'"),
        ("nca", (LOGPS, LOGPS), {"beta": LOGPS}, TypeError, "beta: got Tensor, wanted a finite number > 0"),
        ("dpo", (LOGPS, LOGPS), {"label_smoothing": 0.5}, ValueError, "label_smoothing: got 0.5, wanted a number in [0, 0.5)"),
        ("dpo", (LOGPS, LOGPS), {"label_smoothing": -0.1}, ValueError, "label_smoothing: got -0.1, wanted a finite number >= 0"),
        ("nca", (LOGPS, LOGPS), {"nll_weight": -1}, ValueError, "nll_weight: got -1, wanted a finite number >= 0"),
        ("nca", (LOGPS, LOGPS), {"nll_weight": 0.1}, ValueError, "lengths: got None, wanted the number of tokens of each response"),
    ],
)
def test_group_loss(name, arguments, options, error, message):
    with pytest.raises(error, match=re.escape(message)):
        nca_kernels.group_loss(name, *arguments, **options)


UNUSED = {"alpha": 5.0, "pairs": "all", "lengths": LOGPS.abs(), "desirable": LOGPS > 0, "baseline": 0.5, "label_smoothing": 0.1}


@pytest.mark.parametrize("argument", UNUSED)
@pytest.mark.parametrize("name", LOSSES)
def test_arguments_that_a_loss_does_not_take(name, argument):
    """The argument is refused by its name, in every function that reaches the loss."""
    options = {argument: UNUSED[argument]}
    functions = (lambda *x, **o: nca_kernels.group_loss(name, *x, **o)), getattr(nca_kernels, f"{name}_loss")
    for function in functions:
        if argument in LOSSES[name].takes:
            assert function(LOGPS, LOGPS, LOGPS, **options).loss.isfinite()
            continue
        with pytest.raises(ValueError, match=f"^{argument}: got a value, wanted none: the loss '{name}' does not take it$"):
            function(LOGPS, LOGPS, LOGPS, **options)


def test_average_is_a_bool():
    with pytest.raises(TypeError, match="average: got str, wanted a bool"):
        nca_kernels.sequence_logps(LOGITS, LABELS, average="no")


def test_linear_token_logps(monkeypatch):
    hidden, weight = torch.randn(2, 3, 4), torch.randn(5, 4)
    with pytest.raises(ValueError, match="save_budget: got 1180591620717411303424, wanted an int >= 0, in bytes"):
        nca_kernels.linear_token_logps(hidden, weight, LABELS, save_budget=2**70)
    with pytest.raises(TypeError, match="tp_group: got str, wanted a process group"):
        nca_kernels.linear_token_logps(hidden, weight, LABELS, tp_group="tp")
    monkeypatch.setenv("NCA_KERNELS_TILE_BYTES", "32M")
    with pytest.raises(ValueError, match="NCA_KERNELS_TILE_BYTES: got '32M', wanted a number of bytes"):
        nca_kernels.linear_token_logps(hidden, weight, LABELS)


def test_row_mask():
    with pytest.raises(TypeError, match="row_mask: got list, wanted a tensor"):
        nca_kernels.selective_log_softmax(LOGITS, LABELS, row_mask=[[True] * 3] * 2)


def test_explain():
    with pytest.raises(TypeError, match="tensor_or_device: got NoneType, wanted a tensor, a device or its name"):
        nca_kernels.explain(None)
    with pytest.raises(TypeError, match="tensor_or_device: got a tensor of torch.int64"):
        nca_kernels.explain(LABELS)
