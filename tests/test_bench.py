"""The benchmark's suites run at tiny shapes, check what they time, and store what the schema and the plots can read."""

import copy
import importlib
import os
import platform
import shutil
import subprocess
import warnings
from concurrent.futures import Executor, Future
from functools import partial
from pathlib import Path

import pytest
import torch
from tiny import save_tiny_model

import nca_kernels
from bench import __main__ as command
from bench import group, memory, plot, schema, skip, skip_model, step, step_data, step_ways, syncs, tune
from bench.cases import Implementation, Unsupported
from bench.measure import Budget, measure
from bench.summary import lacking, summary
from nca_kernels.backends import BACKENDS
from nca_kernels.dispatch import resolve

ONCE = Budget(rounds=1, seconds=0.0)
process = step.process
TRAINERS = f"nca_kernels {resolve('linear_token_logps', None, torch.device('cpu'), torch.float32)}, by length"  # names no backend


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Skip the implementation with torch.compile, which takes half a minute to compile, and run contestants in this process."""

    def refuse(*_, **__):
        raise Unsupported("not in the tests")

    monkeypatch.setattr(torch, "compile", refuse)
    monkeypatch.setattr(step, "process", _Here)


class _Here(Executor):
    """Runs a contestant in this process: another one takes seconds to start."""

    def submit(self, function, *arguments):
        future = Future()
        try:
            future.set_result(function(*arguments))
        except Exception as failure:
            future.set_exception(failure)
        return future


@pytest.fixture
def figures(monkeypatch):
    """The figures that are drawn, kept open."""
    figures = []
    monkeypatch.setattr(plot.plt, "close", figures.append)
    return figures


def _run(suite, tmp_path, cases=None):
    cases = cases or importlib.import_module(f"bench.{suite}").TINY
    document = schema.load(command.run(suite, "cpu", cases, ONCE, tmp_path))
    return document, {(row["implementation"], row["status"]) for row in document["rows"]}


@pytest.mark.parametrize("suite", [suite for suite in command.SUITES if suite not in ("tune", "skip")])
def test_suite_stores_rows_that_can_be_drawn(suite, tmp_path, figures):
    document, status = _run(suite, tmp_path)
    mine = TRAINERS if suite == "step" else "nca_kernels cpu"
    assert {(mine, "ok"), ("plain", "ok")} <= status
    assert not lacking(document)
    assert not [row for row in status if row[1] == "wrong" or row[1].startswith("failed")]
    assert f": {mine}" in summary(document)
    plot.plot(tmp_path, tmp_path / "img")
    assert len(figures) == len(list((tmp_path / "img").glob("*.png"))) > 0
    assert not any(map(_overlaps, figures))


def test_skip_measures_a_model_over_text(tmp_path, figures):
    folder = tmp_path / "models" / "tiny"
    save_tiny_model(folder)
    text = tmp_path / "text"
    text.write_text("what can be left out is a property of the text. " * 40)
    cases = [skip.Case("held-out text", False, str(folder), str(text))]
    document, status = _run("skip", tmp_path, cases)
    assert {("nca_kernels cpu", "ok"), ("nca_kernels cpu, skip_mass 2^-6", "ok"), ("plain", "ok")} <= status
    shares = [row["computed"] for row in document["rows"] if "skip_mass" in row["implementation"]]
    assert 0 < shares[0] <= shares[-1] <= 1
    plot.plot(tmp_path, tmp_path / "img")
    assert len(figures) == len(list((tmp_path / "img").glob("*.png"))) > 0 and not any(map(_overlaps, figures))


def test_skip_trains_its_own_model(tmp_path, monkeypatch, default_dispatch):
    files = [Path(__file__), Path(skip.__file__)]
    monkeypatch.setattr(skip, "LENGTH", 32)
    for name, value in {"VOCAB": 300, "WIDTH": 16, "LAYERS": 1, "STEPS": 2, "sources": lambda: (files[:1], files)}.items():
        monkeypatch.setattr(skip_model, name, value)
    _, status = _run("skip", tmp_path, [skip.Case(source, False) for source in skip.SOURCES])
    assert {("nca_kernels cpu", "ok"), ("nca_kernels cpu, skip_mass 2^-6", "ok"), ("plain", "ok")} <= status
    assert not [row for row in status if row[1].startswith("failed")]


def _overlaps(figure):
    """Whether the figure's title overlaps that of a panel."""
    panels = [axis._left_title.get_window_extent().y1 for axis in figure.axes if axis.get_visible()]
    return figure._suptitle.get_window_extent().y0 < max(panels)


def test_settings_are_tuned_on_checked_kernels_and_left_as_they_were(tmp_path):
    if BACKENDS["triton"].unsupported("token_logps", torch.device("cpu"), torch.bfloat16):
        pytest.skip("Triton's interpreter is off, or Triton is not installed")
    from nca_kernels.backends.triton import token_logps as kernels

    before = kernels._fwd_launch, kernels._bwd_launch, dict(os.environ)
    document, status = _run("tune", tmp_path)
    assert {row[1] for row in status} == {"ok"} and not lacking(document)
    assert {("nca_kernels triton", "ok"), ("8 words, 4 warps, 64 registers", "ok"), ("tiles of 4 MiB", "ok")} <= status
    for problem, implementations in tune.problems("cpu", tune.TINY):
        implementations[-1].build()(problem.tensors)
    assert (kernels._fwd_launch, kernels._bwd_launch, dict(os.environ)) == before


def _problem():
    problems = importlib.import_module("bench.logps").problems("cpu", [(8, 50, "float32", True)])
    return [(problem, {each.name: each for each in implementations}) for problem, implementations in problems][1]


def test_a_case_that_cannot_be_set_up_costs_itself_alone(tmp_path, monkeypatch):
    truth = group._truth

    def short_of_memory(name, tensors):
        if name == "nca":
            raise torch.OutOfMemoryError("out of memory")
        return truth(name, tensors)

    monkeypatch.setattr(group, "_truth", short_of_memory)
    document, status = _run("group", tmp_path, [("nca", 3, 2), ("dpo", 3, 4)])
    assert {("nca_kernels", "failed: OutOfMemoryError: out of memory"), ("nca_kernels cpu", "ok")} <= status
    lost, kept = summary(document).splitlines()
    assert lost == "nca 3 2: failed: OutOfMemoryError: out of memory" and kept.startswith("dpo B=3 K=4, ")
    assert lacking(document) == ["nca 3 2: nca_kernels: failed: OutOfMemoryError: out of memory"]


CASE = step.TINY[1]


def runner(name):
    runner = step.Runner(name)
    runner.begin(CASE, "cpu")
    return runner


def test_a_step_has_its_truth_row_by_row_and_leaves_its_model_as_it_was(monkeypatch):
    model, batch = step._model(CASE, "cpu"), step._rows(CASE)[:3]
    loss = step_ways.loss_of(step_ways.plain_sequence_logps(model, batch), batch)
    norm = torch.nn.utils.get_total_norm(torch.autograd.grad(loss, list(model.parameters())))
    truth = step_ways.truth(model, batch)
    torch.testing.assert_close(truth.float(), torch.stack([loss, norm]).detach(), rtol=1e-5, atol=0)

    plain = runner("plain")
    before = copy.deepcopy(plain.model.state_dict())
    for _ in range(2):
        torch.testing.assert_close(plain.step(batch), truth.float(), rtol=1e-5, atol=0)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        plain.step(batch)
    assert all(parameter.grad is None for parameter in plain.model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in plain.model.state_dict().items())


def test_a_contestant_that_is_wrong_is_not_timed(monkeypatch):
    right = step_ways.truth
    monkeypatch.setattr(step, "truth", lambda model, batch: right(model, batch) + 1e-3)
    _, outcomes = step.measured(CASE, "cpu", ONCE)
    assert {(outcome.status.partition(":")[0], len(outcome.times)) for outcome in outcomes} == {("wrong", 0), ("unsupported", 0)}


def test_the_steps_that_are_measured_stand_for_an_epoch():
    rows = step_data.long_tailed_rows(4096, 50, 4, 32, 32)
    lengths = [len(response) for row in rows for response in row["response_ids"]]
    assert 0.95 * 32 < sum(lengths) / len(lengths) < 32  # the longest are cut
    assert max(lengths) == 4 * 32 and sorted(lengths)[len(lengths) // 2] < 0.8 * 32
    batches = [rows[i : i + 2] for i in range(0, len(rows), 2)]
    for share_prompt in (False, True):
        chosen = step_data.sample(batches, share_prompt)
        for facts in (partial(step_data.size, share_prompt=share_prompt), lambda batch: sum(map(step_data.scored, batch))):
            of_epoch, of_sample = (sum(map(facts, each)) / len(each) for each in (batches, chosen))
            assert of_sample == pytest.approx(of_epoch, rel=0.03)


@pytest.mark.long
def test_a_contestant_runs_in_a_process_of_its_own():
    with process() as executor:
        assert executor.submit(os.getpid).result() != os.getpid()
        share = executor.submit(step._call, "plain, by length", "begin", CASE, "cpu").result()
        assert share == pytest.approx(runner("plain, by length").begin(CASE, "cpu"))
        assert executor.submit(step._call, "plain, by length", "time", 0).result() > 0


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


def test_a_peer_that_fails_while_it_is_timed_loses_its_times_alone():
    problem, implementations = _problem()
    plain, calls = implementations["plain"].build(), []

    def call(tensors):
        calls.append(1)
        if len(calls) > 4:  # two for the check, one to warm up, one that is timed
            raise torch.OutOfMemoryError("out of memory")
        return plain(tensors)

    peer = Implementation("peer", lambda: call)
    lost, kept, *_ = measure(problem, [peer, implementations["plain"]], Budget(rounds=4, seconds=0.0))
    assert (lost.status, lost.times, len(calls)) == ("failed: OutOfMemoryError: out of memory", [], 5)
    assert kept.status == "ok" and len(kept.times) == 4


def test_a_backward_in_place_does_not_spoil_the_next_contestant():
    problem, implementations = _problem()
    inplace = Implementation(
        "in place", lambda: lambda tensors: _Overwrite.apply(tensors["logits"], tensors["labels"]), inplace=True
    )
    outcomes = measure(problem, [inplace, implementations["plain"]], Budget(rounds=2, seconds=0.0))
    assert [outcome.pass_name for outcome in outcomes[:2]] == ["fwd+bwd in place", "fwd+bwd"]
    assert outcomes[1].status == "ok"


class _Overwrite(torch.autograd.Function):
    """The results of plain PyTorch, but the gradient overwrites the logits."""

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


def test_the_header_names_the_code_that_ran(monkeypatch):
    monkeypatch.setattr(schema, "_output", lambda *_: None)  # no git
    monkeypatch.setenv("NCA_KERNELS_REVISION", "abc")
    header = schema.header("logps", "cpu")
    assert (header["version"], header["revision"]) == (nca_kernels.__version__, "abc")


def _row(suite, case, pass_name, name, ms, **fields):
    texts = {"suite": suite, "case": case, "pass": pass_name, "dtype": "bfloat16", "implementation": name}
    return dict.fromkeys(schema.ROW) | texts | {"status": "ok", "samples": 9, "ms": ms} | fields


def _document(suite, rows, device="cuda"):
    return {"header": dict.fromkeys(schema.HEADER, "") | {"suite": suite, "device": device, "threads": 1}, "rows": rows}


def test_the_summary_holds_each_goal_against_the_row_that_it_is_for():
    logps = [
        _row("logps", case, pass_name, name, scale * ms, **fields)
        for case, scale in (("M=8192 V=32000", 1.0), ("M=8192 V=32000, half ignored", 0.51))
        for pass_name, name, ms, fields in (
            ("fwd", "nca_kernels triton", 1.0, {"share": 0.94, "units": 1.06}),
            ("fwd", "nca_kernels triton again", 0.9, {}),
            ("fwd", "nca_kernels cuda", 1.1, {}),
            ("fwd", "plain", 8.0, {}),
            ("fwd", "torch.compile", 2.5, {}),
            ("fwd", "quack", 1.02, {}),
            ("fwd", "ceiling: read", 0.5, {}),
            ("fwd+bwd", "nca_kernels triton", 3.0, {"share": 0.91}),
            ("fwd+bwd in place", "nca_kernels triton", 2.0, {"share": 1.4}),
            ("fwd+bwd in place", "quack", 2.2, {}),
        )
    ]
    assert summary(_document("logps", logps)).splitlines() == [
        "M=8192 V=32000, bfloat16, fwd: nca_kernels triton 1.000 ms, 94% of the ceiling (goal 93%), 1.06 reads, 8.00x plain, "
        "2.50x torch.compile (goal 2x), 1.02x quack (goal 1x), nca_kernels cuda 1.100 ms",
        "M=8192 V=32000, bfloat16, fwd+bwd: nca_kernels triton 3.000 ms, 91% of the ceiling (goal 90%), 0.73x quack, in place",
        "M=8192 V=32000, bfloat16, fwd+bwd in place: nca_kernels triton 2.000 ms, 140% of the ceiling, 1.10x quack, in place",
        "M=8192 V=32000, half ignored, bfloat16, fwd: nca_kernels triton 0.510 ms, 94% of the ceiling, 1.06 reads, 8.00x plain, "
        "2.50x torch.compile, 1.02x quack, 0.51 of the time of all rows (goal 0.50), nca_kernels cuda 0.561 ms",
        "M=8192 V=32000, half ignored, bfloat16, fwd+bwd: nca_kernels triton 1.530 ms, 91% of the ceiling, "
        "0.73x quack, in place, 0.51 of the time of all rows (goal 0.50)",
        "M=8192 V=32000, half ignored, bfloat16, fwd+bwd in place: nca_kernels triton 1.020 ms, 140% of the ceiling, "
        "1.10x quack, in place, 0.51 of the time of all rows (goal 0.50)",
    ]
    assert "goal" not in summary(_document("logps", logps, "cpu"))

    case, memory = "trained head, M=8192 D=4096 V=128256", {"peak_mib": 1300.0, "result_mib": 1066.0}
    linear = [
        _row("linear", case, "fwd+bwd", "nca_kernels triton", 50.0, units=4.2, **memory),
        _row("linear", case, "fwd+bwd", "nca_kernels triton, save_budget 100%", 40.0, units=3.3, **memory),
        _row("linear", case, "fwd+bwd", "nca_kernels cuda", None, status="wrong"),
    ]
    assert summary(_document("linear", linear)) == (
        f"{case}, bfloat16, fwd+bwd: nca_kernels triton 50.000 ms, 4.20 U (goal 4.3), 234 MiB beyond results (goal 300), "
        "nca_kernels cuda wrong"
    )
    assert lacking(_document("linear", linear)) == [f"{case}, bfloat16, fwd+bwd: nca_kernels cuda: wrong"]


def test_plots_skip_what_has_no_times_and_tell_eight_peers_apart(tmp_path, figures):
    names = [f"peer {i}" for i in range(8)]
    header = dict.fromkeys(schema.HEADER, "x") | {"threads": 1}
    cases = [f"M=8 V={vocab}" for vocab in range(12)]  # in six lines
    rows = [_row("logps", case, "fwd", name, 1.0, speedup=2.0, peak_mib=1.0) for case in cases for name in names]
    schema.write(tmp_path, {"header": header | {"suite": "logps"}, "rows": rows})
    schema.write(tmp_path, {"header": header | {"suite": "step"}, "rows": [schema.missing("step", (1, 2), "failed: x")]})
    assert [file.name for file in plot.plot(tmp_path, tmp_path / "img")] == ["x-logps-speed.png", "x-logps-memory.png"]
    assert not any(map(_overlaps, figures))
    assert len(set(plot._colours(names).values())) == 8


@pytest.mark.skipif(not all(map(shutil.which, ("bash", "timeout", "tar"))), reason="bash, timeout and tar are needed")
@pytest.mark.parametrize("fault", [None, "report", "failed", "interrupted", "none passed"])
def test_sanitizers_are_judged_by_reports_on_our_kernels_and_by_pytests_own_line(tmp_path, fault):
    report = "=========     at void token_logps_fwd_kernel<float, (bool)0>(TokenLogps)+0x1a0 in token_logps.cu:123"
    ends = {"failed": "1 failed, 7 passed in 4.20s", "interrupted": "!!! KeyboardInterrupt !!!\n8 passed in 4.20s"}
    tool = [
        "========= COMPUTE-SANITIZER",
        ends.get(fault, "8 skipped in 4.20s" if fault == "none passed" else "8 passed in 4.20s"),
    ]
    tool += [report] if fault == "report" else []
    tool += [
        "========= ERROR SUMMARY: 0 errors",
        "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)",
    ]
    # The interpreter builds nothing, and finds nothing missing.
    for name, lines in (
        ("python", ["[[ $1 != setup.py ]]"]),
        ("compute-sanitizer", [f"printf '%b\\n' '{line}'" for line in tool]),
    ):
        (tmp_path / name).write_text("\n".join(["#!/usr/bin/env bash", *lines]))
        (tmp_path / name).chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": str(tmp_path / "python")}
    script = Path(__file__).parent.parent / "bench" / "gpu.sh"
    done = subprocess.run(
        ["bash", script, "--only", "sanitize", "--out", tmp_path / "out"],
        env=environment,
        capture_output=True,
        text=True,
    )
    verdict = next(line for line in done.stdout.splitlines() if line.startswith("sanitize "))
    assert verdict.startswith("sanitize  ok" if fault is None else "sanitize  failed: exit code 4"), done.stdout
    assert (tmp_path / "out" / "gpu.tgz").exists()


def test_waits_for_the_gpu_are_counted_by_the_line_that_waits(monkeypatch):
    modes = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def call():
        for _ in range(2):
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("something else", stacklevel=1)

    places = syncs.waits(call)
    assert list(places.values()) == [2] and __file__ in next(iter(places))
    assert modes == ["warn", "default"]
