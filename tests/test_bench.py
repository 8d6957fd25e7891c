"""The benchmark's suites run at tiny shapes, check what they time, and store what the schema and the plots can read."""

import copy
import importlib
import platform

import pytest
import torch

from bench import __main__ as command
from bench import memory, schema
from bench.cases import Implementation, Unsupported
from bench.measure import Budget, measure
from bench.plot import plot

ONCE = Budget(rounds=1, seconds=0.0)


@pytest.fixture(autouse=True)
def quick(monkeypatch, one_thread):
    """No half a minute of compiling for torch.compile's peer."""

    def refuse(*_, **__):
        raise Unsupported("not in the tests")

    monkeypatch.setattr(torch, "compile", refuse)


@pytest.mark.parametrize("suite", command.SUITES)
def test_suite_stores_rows_that_can_be_drawn(suite, tmp_path):
    module = importlib.import_module(f"bench.{suite}")
    document = schema.load(command.run(suite, "cpu", module.TINY, ONCE, tmp_path))
    status = [(row["implementation"], row["status"]) for row in document["rows"]]
    assert ("nca_kernels cpu", "ok") in status and ("plain", "ok") in status
    assert not [row for row in status if row[1] == "wrong" or row[1].startswith("failed")]
    assert "nca_kernels cpu" in schema.summary(document["rows"])
    plot(tmp_path, tmp_path / "img")
    assert list((tmp_path / "img").glob("*.png"))


def _problem():
    problems = importlib.import_module("bench.logps").problems("cpu", [(8, 50, "float32", True)])
    return [(problem, {each.name: each for each in implementations}) for problem, implementations in problems][1]


@pytest.mark.parametrize("fault", ["value", "gradient", "nan"])
def test_a_wrong_peer_is_called_wrong_and_not_timed(fault):
    problem, implementations = _problem()
    plain = implementations["plain"].build()

    def call(tensors):
        if fault == "value":
            return plain(tensors) + 0.1
        if fault == "gradient":
            return plain(tensors | {"logits": 0.5 * tensors["logits"] + 0.5 * tensors["logits"].detach()})
        return plain(tensors) + torch.nan

    wrong, right, *_ = measure(problem, [Implementation("peer", lambda: call), implementations["plain"]], ONCE)
    assert wrong.status == "wrong" and not wrong.times
    assert right.status == "ok" and right.times


def test_a_backward_in_place_does_not_spoil_the_next_contestant():
    problem, implementations = _problem()
    inplace = Implementation(
        "in place", lambda: lambda tensors: _Overwrite.apply(tensors["logits"], tensors["labels"]), inplace=True
    )
    outcomes = measure(problem, [inplace, implementations["plain"]], Budget(rounds=2, seconds=0.0))
    assert [outcome.pass_name for outcome in outcomes[:2]] == ["fwd+bwd in place", "fwd+bwd"]
    assert outcomes[1].status == "ok"


class _Overwrite(torch.autograd.Function):
    """Plain PyTorch's numbers, with the gradient over the logits."""

    @staticmethod
    def forward(ctx, logits, labels):
        from bench.cases import plain_logps

        ctx.logits, ctx.labels = logits, labels
        return plain_logps(logits, labels)

    @staticmethod
    def backward(ctx, upstream):
        from bench.cases import plain_logps

        leaf = ctx.logits.detach().clone().requires_grad_()
        with torch.enable_grad():
            (grad,) = torch.autograd.grad(plain_logps(leaf, ctx.labels), leaf, upstream)
        return ctx.logits.detach().copy_(grad), None


def test_peak_memory_sees_what_was_freed_again():
    def function():
        scratch = torch.ones(2**24)  # 64 MiB
        return (scratch + 1)[:2].clone()  # and 64 more

    memory.peak_extra(function, "cpu")
    _, mib = memory.peak_extra(function, "cpu")
    if mib is None:
        pytest.skip("no /proc/self/clear_refs or malloc_trim here")
    assert 126 < mib < 136


@pytest.mark.parametrize("size", [2**18, 2**24])  # from malloc's heap, and mapped
def test_memory_handed_out_is_poisoned(size):
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("only glibc can be told to fill what it hands out")
    with memory.poisoned("cpu"):
        assert (torch.empty(size) > 1e38).all()
    assert not (torch.zeros(size) > 1e38).any()


def test_schema_refuses_a_row_of_another_shape(tmp_path):
    document = schema.load(command.run("group", "cpu", [("nca", 3, 2)], ONCE, tmp_path))
    for spoil in ({"ms": None}, {"status": "good"}, {"samples": "many"}, {"unknown": 1}):
        spoilt = copy.deepcopy(document)
        spoilt["rows"][0].update(spoil)
        with pytest.raises(ValueError):
            schema.check(spoilt)
