"""The cost of a call of the linear functions: GEMMs, slices of the vocabulary, and waits of the host for the device."""

from collections import Counter
from contextlib import contextmanager

import pytest
import torch
from torch._subclasses import FakeTensorMode

import nca_kernels
from nca_kernels import linear, tiles
from nca_kernels.backends import BACKENDS
from nca_kernels.tiles import Tiling, aligned, multiplies_wide, split, tile_shape

SYNCS = ("aten::nonzero", "aten::item", "aten::_local_scalar_dense", "aten::is_nonzero", "aten::masked_select")
GPU = torch.device("cuda")


@contextmanager
def counted():
    """Count how often each PyTorch operator and each row kernel runs inside this context."""
    counts = Counter()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        yield counts
    counts.update({event.key: event.count for event in profile.key_averages()})


@contextmanager
def recorded_tiles(monkeypatch):
    """Record the shape, strides and columns of every tile that the row kernels read inside this context."""
    tiles = []
    with monkeypatch.context() as patch:
        for name in ("token_logps_fwd", "token_logps_bwd"):
            kernel = getattr(BACKENDS["cpu"], name)

            def record(*tensors, _kernel=kernel, _name=name, **settings):
                logits = tensors[_name == "token_logps_bwd"]
                tiles.append((_name, tuple(logits.shape[1:]), logits.stride(1), settings["vocab_start"]))
                return _kernel(*tensors, **settings)

            patch.setattr(BACKENDS["cpu"], name, record)
        yield tiles


def _gemms(counts):
    return counts["aten::mm"] + counts["aten::addmm"]


def _step(M, V, D=8, trained=False, ignored=0, **options):
    torch.manual_seed(0)
    hidden = torch.randn(M, D, requires_grad=True)
    weight = torch.randn(V, D, requires_grad=trained)
    labels = torch.randint(V, (M,))
    labels[:ignored] = -100
    logps = nca_kernels.linear_token_logps(hidden, weight, labels, backend="cpu", **options)
    return torch.autograd.grad(logps.sum(), (hidden, weight) if trained else (hidden,))


@pytest.mark.parametrize("V", [1, 63, 1000, 4097, 50257])
def test_a_vocabulary_that_fits_is_one_slice(monkeypatch, V):
    """A frozen head takes two GEMMs and a trained one four, even if V is not a multiple of 64."""
    M = 8
    monkeypatch.setenv("NCA_KERNELS_TILE_BYTES", str(2 * 4 * M * V))
    for trained, gemms in ((False, 2), (True, 4)):
        with recorded_tiles(monkeypatch) as tiles, counted() as counts:
            _step(M, V, trained=trained)
        assert _gemms(counts) == gemms
        assert [shape for _, shape, _, _ in tiles] == [(M, V)] * 2


def test_splitting_keeps_what_fits_whole():
    for total in (50257, 128257, 151936, 262144):
        assert split(total, total, 64) == [slice(0, total)]
        assert len(split(total, total - 1, 64)) == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("V", [50257, 128256, 128257, 131073, 151936, 201088, 256000, 262144])
@pytest.mark.parametrize("M", [1, 511, 512, 777, 8192])
def test_a_frozen_head_gives_up_rows_for_one_slice(M, V, dtype):
    """On a GPU a tile has fewer rows, so that it spans the vocabulary, if at least 512 rows fit; otherwise it keeps its rows."""
    rows, columns = tile_shape(M, V, dtype, GPU, frozen=True)
    fits = (256 << 20) // dtype.itemsize // V
    if fits >= 512:
        assert columns == V and rows == min(M, 1024, fits)
    else:
        assert rows == min(M, 1024) and columns >= min(V, (256 << 20) // dtype.itemsize // 1024)


def test_a_frozen_block_is_two_gemms_however_many_rows(monkeypatch):
    monkeypatch.setenv("NCA_KERNELS_TILE_BYTES", str(600 * 128 * 4))
    with recorded_tiles(monkeypatch) as tiles, counted() as counts:
        _step(M=1500, V=128)
    assert _gemms(counts) == 6 and len(tiles) == 6
    assert all(shape == (500, 128) for _, shape, _, _ in tiles)


@pytest.mark.parametrize("V", [131, 517])
@pytest.mark.parametrize("share", [0.5, 1.0])
def test_rows_of_tiles_and_of_kept_logits_are_aligned(monkeypatch, V, share):
    with recorded_tiles(monkeypatch) as tiles, counted() as counts:
        _step(M=16, V=V, trained=True, save_budget=int(share * 16 * V * 4))
    assert all(stride % 64 == 0 for _, _, stride, _ in tiles)
    if share == 1:  # a budget for the logits is one for all of them, padding beside
        assert _gemms(counts) == 3 and {shape for _, shape, _, _ in tiles} == {(16, V)}


@pytest.mark.parametrize("options", [{}, {"save_budget": 10**6}, {"save_budget": 10**4}, {"bias": True}])
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("ignored", [0, 3, 12])
def test_one_sync_in_forward_and_backward_together(monkeypatch, options, trained, ignored):
    monkeypatch.setattr("nca_kernels.checks.are_read", lambda _: False)  # of labels: on a CPU alone
    options = {**options, "bias": torch.randn(131)} if "bias" in options else options
    with counted() as counts:
        _step(M=12, V=131, trained=trained, ignored=ignored, **options)
    assert sum(counts[name] for name in SYNCS) == 1, {name: counts[name] for name in SYNCS}


def test_a_captured_forward_and_backward_agree_on_the_rows(monkeypatch):
    """A graph takes all rows, so a backward outside of it must use the same rows and the logits kept for them."""
    wanted = _step(M=12, V=131, trained=True, ignored=4)
    monkeypatch.setattr(linear, "is_captured", lambda _: True)
    with counted() as counts:
        ours = _step(M=12, V=131, trained=True, ignored=4, save_budget=12 * 131 * 4)
    assert sum(counts[name] for name in SYNCS[:1]) == 0 and _gemms(counts) == 3
    for a, b in zip(ours, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_padded_widths():
    assert [aligned(n) for n in (0, 1, 64, 65)] == [0, 64, 64, 128]


@pytest.mark.skipif(
    "dtype_out" not in torch.ops.aten.mm.overloads(), reason="this PyTorch has no product of 16-bit matrices in float32"
)
def test_float16_sums_are_no_float32_products(monkeypatch):
    """PyTorch refuses a float32 product of float16 inputs if it may sum in float16, and ROCm has no such product."""
    with FakeTensorMode():
        half, brain = (torch.empty(2, 2, dtype=dtype, device="cuda") for dtype in (torch.float16, torch.bfloat16))
    assert multiplies_wide(half) and multiplies_wide(brain)
    torch.backends.cuda.matmul.allow_fp16_accumulation = True
    try:
        assert not multiplies_wide(half) and multiplies_wide(brain)
    finally:
        torch.backends.cuda.matmul.allow_fp16_accumulation = False
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert not multiplies_wide(brain)


def test_a_frozen_heads_gradient_is_a_float32_product(monkeypatch):
    """With bfloat16 output PyTorch may add partial sums in bfloat16 where it splits a long sum."""
    outputs = []

    def mm(a, b, out_dtype=None, out=None):
        outputs.append((tuple(out.shape), out_dtype))
        return out.copy_(a.float() @ b.float())

    hidden = torch.randn(12, 16).bfloat16().requires_grad_()
    weight, labels = torch.randn(131, 16).bfloat16(), torch.randint(131, (12,))
    # As on a GPU, which has such products.
    monkeypatch.setattr(tiles, "multiplies_wide", lambda _: True)
    monkeypatch.setattr(torch, "mm", mm)
    nca_kernels.linear_token_logps(hidden, weight, labels, backend="cpu").sum().backward()
    assert ((12, 16), torch.float32) in outputs


def test_strides_of_dimensions_of_size_one_do_not_count(monkeypatch):
    """``logits[:, :-1]`` with N = 1 and odd V keeps its vector stores."""
    pytest.importorskip("triton", reason="Triton is not installed")
    from nca_kernels.backends.triton import token_logps

    launches = []

    class Recorder:
        def __getitem__(self, grid):
            return lambda *_arguments, **options: launches.append(options)

    monkeypatch.setattr(token_logps, "_token_logps_bwd_kernel", Recorder())
    for N, T, V in ((1, 9, 131), (3, 2, 131)):
        logits = torch.randn(N, T, V)[:, :-1]
        labels, row = torch.zeros(N, T - 1, dtype=torch.int64), torch.zeros(N, T - 1)
        token_logps.token_logps_bwd(
            row, logits, labels, torch.zeros(3, N, T - 1), torch.empty(N, T - 1, V),
            ignore_index=-100, scale=1.0, softcap=None, vocab_start=0, vocab_total=V,
        )  # fmt: skip
    assert [options["ALIKE"] for options in launches] == [True, False]


@pytest.fixture
def memory_of_nan():
    """PyTorch fills what is not initialised with NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def test_the_padding_of_a_tile_is_zero(memory_of_nan):
    tiling = Tiling(64, 97, torch.empty(0, dtype=torch.bfloat16), torch.bfloat16, frozen=True)
    block, columns = slice(0, 64), slice(0, 97)
    for tile in (tiling.tile(block, columns), tiling.spare_tile(block, columns), tiling.logits(block, columns)[0]):
        assert not tile.as_strided((64, 31), (128, 1), tile.storage_offset() + 97).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("trained", [False, True])
def test_what_memory_held_before_does_not_reach_a_gradient(memory_of_nan, trained, dtype):
    """On a CPU with AMX a GEMM multiplies the padding of its operands' rows by zeros, so NaN there would reach the result."""
    torch.manual_seed(0)
    hidden = torch.randn(64, 32).to(dtype).requires_grad_()
    weight = torch.randn(97, 32).to(dtype).requires_grad_(trained)
    nca_kernels.linear_token_logps(hidden, weight, torch.randint(97, (64,)), backend="cpu").sum().backward()
    assert hidden.grad.isfinite().all()
    assert not trained or weight.grad.isfinite().all()
