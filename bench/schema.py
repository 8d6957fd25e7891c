"""The format of a result: a header and rows as JSON, which are checked before they are written, and their table."""

from __future__ import annotations

import json
import math
import os
import platform
import re
import subprocess
import sys
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

import torch

import nca_kernels

from .cases import Problem
from .measure import CEILING, Outcome, median, quantile

NUMBER = (int, float, type(None))
TEXT = (str, type(None))
Kind = type | tuple[type, ...]
HEADER: dict[str, Kind] = {
    "suite": str,
    "device": str,  # cpu or cuda
    "hardware": str,
    "driver": TEXT,
    "torch": str,
    "triton": TEXT,
    "version": TEXT,  # of nca_kernels
    "revision": TEXT,  # of the repository; $NCA_KERNELS_REVISION if git does not know it
    "date": str,
    "command": str,
    "threads": int,
}
ROW: dict[str, Kind] = {
    "suite": str,
    "case": str,
    "pass": str,  # fwd, fwd+bwd, fwd+bwd in place, or step; empty where the case as a whole failed
    "dtype": str,
    "implementation": str,
    "status": str,  # ok, wrong, "unsupported: reason" or "failed: reason"; only ok is timed
    "ms": NUMBER,  # median
    "ms_p20": NUMBER,
    "ms_p80": NUMBER,
    "samples": int,
    "bytes": NUMBER,  # the least traffic that solves the case (null where arithmetic bounds it)
    "flop": NUMBER,  # the least arithmetic (null where traffic bounds it)
    "tokens_per_second": NUMBER,  # of a training step, where a prompt counts once per response (null elsewhere)
    # The share of the measured ceiling: the time of the least work at the ceiling's rate, divided by ms. In place on a CPU it
    # exceeds 1, because a cache line that was just read is written without the second fetch that a copy needs.
    "share": NUMBER,
    "units": NUMBER,  # ms divided by the time of the case's unit (one read of the logits, one GEMM)
    "speedup": NUMBER,  # ms of plain PyTorch at this case and pass, divided by ms
    "peak_mib": NUMBER,  # beyond the inputs
    "result_mib": NUMBER,  # the part of it that is outputs and gradients
    "error": NUMBER,  # of the values against float64, in units of 1 + |truth|
    "grad_error": NUMBER,  # of the gradients against float64, in units of the largest gradient
    "padding": NUMBER,  # the share of an epoch's positions that is padding
    "computed": NUMBER,  # the share of the logits that backward computes with skip_mass
}
PLAIN, OURS = "plain", "nca_kernels"
SIDE_ROWS = re.compile(f"^{CEILING}| again$|save_budget")  # rows that are not compared with other packages


def header(suite: str, device: str) -> dict:
    return {
        "suite": suite,
        "device": device,
        "hardware": hardware(device),
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if device == "cuda" else None,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "version": nca_kernels.__version__,  # that of the imported code, even if it is not installed
        "revision": _output("git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty")
        or os.environ.get("NCA_KERNELS_REVISION"),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join(["python -m bench", *sys.argv[1:]]),
        "threads": torch.get_num_threads(),
    }


def hardware(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    try:
        names = re.findall(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        names = []
    return f"{names[0] if names else platform.machine()}, {torch.get_num_threads()} threads"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    try:
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")
    except (OSError, subprocess.CalledProcessError):
        return None
    return lines[0].strip()


def rows(suite: str, problem: Problem, outcomes: list[Outcome]) -> list[dict]:
    """The outcomes of a problem as rows."""
    medians = {outcome.name: median(outcome.times) for outcome in outcomes if outcome.times}
    plain, unit = medians.get(PLAIN), medians.get(f"{CEILING}{problem.unit}")
    floor = None
    if problem.bound_by and problem.amount and f"{CEILING}{problem.bound_by}" in medians:
        ceiling = problem.ceilings[problem.bound_by]
        floor = problem.amount / ceiling.amount * medians[f"{CEILING}{problem.bound_by}"]
    result = []
    for outcome in outcomes:
        ms = median(outcome.times) if outcome.times else None
        is_ceiling = outcome.name.startswith(CEILING)
        amount = problem.ceilings[outcome.name.removeprefix(CEILING)].amount if is_ceiling else problem.amount
        result.append(
            {
                "suite": suite,
                "case": problem.case,
                "pass": outcome.pass_name,
                "dtype": problem.dtype,
                "implementation": outcome.name,
                "status": outcome.status,
                "ms": ms,
                "ms_p20": quantile(outcome.times, 0.2) if outcome.times else None,
                "ms_p80": quantile(outcome.times, 0.8) if outcome.times else None,
                "samples": len(outcome.times),
                "bytes": amount if problem.kind == "bytes" else None,
                "flop": amount if problem.kind == "flop" else None,
                "tokens_per_second": 1e3 * amount / ms if problem.kind == "tokens" and amount and ms else None,
                "share": floor / ms if floor and ms and not is_ceiling else None,
                "units": ms / unit if unit and ms else None,
                "speedup": plain / ms if plain and ms and not is_ceiling else None,
                "peak_mib": outcome.peak_mib,
                "result_mib": outcome.result_mib,
                "error": _finite(outcome.error),
                "grad_error": _finite(outcome.grad_error),
                "padding": outcome.padding,
                "computed": outcome.computed,
            }
        )
    return result


def missing(suite: str, case: tuple, status: str) -> dict:
    """The row of a case that could not be set up."""
    texts = {
        "suite": suite,
        "case": str(case) if hasattr(case, "_fields") else " ".join(map(str, case)),
        "pass": "",
        "dtype": "",
        "implementation": OURS,
        "status": status,
    }
    return dict.fromkeys(ROW) | texts | {"samples": 0}


def _finite(error: float | None) -> float | None:
    """The error, or null if it is infinite or NaN, which JSON does not have; the status is then ``wrong``."""
    return error if error is not None and math.isfinite(error) else None


def check(document: dict) -> None:
    """Raise ``ValueError`` unless ``document`` has this format."""
    if set(document) != {"header", "rows"}:
        raise ValueError(f"wanted header and rows, got {sorted(document)}")
    for fields, record in [(HEADER, document["header"]), *((ROW, row) for row in document["rows"])]:
        if set(record) != set(fields):
            raise ValueError(f"fields {sorted(set(record) ^ set(fields))} are missing or unknown")
        for name, kind in fields.items():
            if not isinstance(record[name], kind):
                raise ValueError(f"{name}: got {record[name]!r}, wanted {kind}")
    for row in document["rows"]:
        if row["status"].partition(":")[0] not in ("ok", "wrong", "unsupported", "failed"):
            raise ValueError(f"status: got {row['status']!r}")
        if (row["ms"] is None) == (row["status"] == "ok"):
            raise ValueError(f"a row is timed if and only if it is ok, got {row}")


def path(folder: Path, document: dict) -> Path:
    device = re.sub(r"[^a-z0-9]+", "-", document["header"]["hardware"].lower()).strip("-")
    return folder / device / f"{document['header']['suite']}.json"


def stored_rows(folder: Path, document: dict, without: set[str]) -> list[dict]:
    """The stored rows of this suite and machine, except those of the cases ``without``."""
    file = path(folder, document)
    return [row for row in load(file)["rows"] if row["case"] not in without] if file.exists() else []


def write(folder: Path, document: dict) -> Path:
    check(document)
    target = path(folder, document)
    target.parent.mkdir(parents=True, exist_ok=True)
    # One line for each row, so that a new run shows as a short diff.
    lines = ",\n".join("  " + json.dumps(row) for row in document["rows"])
    target.write_text(f'{{"header": {json.dumps(document["header"], indent=1)},\n "rows": [\n{lines}\n]}}\n')
    return target


def load(file: Path) -> dict:
    document = json.loads(file.read_text())
    for row in document["rows"]:
        for later in ("padding", "computed"):  # results from before 2026-11-30 do not have them
            row.setdefault(later, None)
    check(document)
    return document


COLUMNS = {
    "ms": ("ms", "{:.3f}"),
    "p20": ("ms_p20", "{:.3f}"),
    "p80": ("ms_p80", "{:.3f}"),
    "units": ("units", "{:.2f}"),
    "share": ("share", "{:.0%}"),
    "vs plain": ("speedup", "{:.2f}x"),
    "tokens/s": ("tokens_per_second", "{:.0f}"),
    "padding": ("padding", "{:.0%}"),
    "computed": ("computed", "{:.0%}"),
    "peak MiB": ("peak_mib", "{:.0f}"),
    "results": ("result_mib", "{:.0f}"),
    "error": ("error", "{:.1e}"),
    "grad err": ("grad_error", "{:.1e}"),
}


def table(rows: list[dict]) -> str:
    """The rows of one problem under its title."""
    first = rows[0]
    width = max(len(row["implementation"]) for row in rows) + 9
    head = f"{'':<{width}}" + "".join(f"{name:>11}" for name in COLUMNS)
    lines = [f"{first['suite']}: {first['case']}, {first['dtype']}, {rows[0]['pass'].removesuffix(' in place')}", head]
    for row in rows:
        cells = ["-" if row[key] is None else form.format(row[key]) for key, form in COLUMNS.values()]
        text = "".join(f"{cell:>11}" for cell in cells) if row["status"] in ("ok", "wrong") else f"  {row['status']}"
        lines.append(f"{label(row):<{width}}{text}" + ("  wrong" if row["status"] == "wrong" else ""))
    return "\n".join(lines) + "\n"


def by_problem(rows: list[dict]) -> dict[tuple[str, str, str], list[dict]]:
    """The rows that were timed in turn, by case, dtype and pass."""
    groups: dict[tuple[str, str, str], list[dict]] = {}
    for row in rows:
        groups.setdefault((row["case"], row["dtype"], row["pass"].removesuffix(" in place")), []).append(row)
    return groups


def is_ours(row: dict) -> bool:
    return row["implementation"].startswith(OURS)


def label(row: dict) -> str:
    return row["implementation"] + (", in place" if row["pass"].endswith("in place") else "")
