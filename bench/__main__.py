"""``python -m bench SUITE`` measures a suite, prints its table and stores its JSON; ``summary`` and ``plot`` read the JSON."""

from __future__ import annotations

import argparse
import importlib
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from . import schema
from .measure import Budget, failed, measure
from .summary import lacking, summary

SUITES = ("logps", "group", "linear", "skip", "step", "tune")
RESULTS = Path(__file__).parent / "results"
SECONDS = {"cpu": 30.0, "cuda": 1.5}  # for each problem


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in SUITES:
        command = commands.add_parser(name, help=(_suite(name).__doc__ or "").split("\n")[0])
        command.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
        command.add_argument("--quick", action="store_true", help="three rounds each, for a look; stored under out/")
        command.add_argument("--out", type=Path, help="default: bench/results, or out/bench with --quick")
        if name == "step":
            command.add_argument(
                "--case", help='of the cases only those whose name has this text, "K=4 1:1" for one; others stay stored'
            )
        if name == "skip":
            command.add_argument("--model", help="a folder of transformers; default: a small model, trained now")
            command.add_argument("--text", help="a file for the model of --model; other models stay stored")
    command = commands.add_parser("numerics", help="errors against float64, not times")
    command.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    command.add_argument("--out", type=Path, default=RESULTS)
    command = commands.add_parser("summary", help="a line for each stored problem")
    command.add_argument("--device", choices=("cpu", "cuda"), help="only of this device")
    command.add_argument("--out", type=Path, default=RESULTS)
    command = commands.add_parser("plot", help="draw every stored result into docs/img")
    command.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    if options.command == "plot":
        from .plot import plot

        plot(options.out, Path("docs/img"))
    elif options.command == "numerics":
        from . import numerics

        print("stored", numerics.store(options.device, options.out))
    elif options.command == "summary":
        for file in sorted(options.out.glob("*/*.json")):
            document = schema.load(file)
            if options.device in (None, document["header"]["device"]):
                print(f"{file}\n{summary(document)}\n")
    else:
        out = options.out or (Path("out/bench") if options.quick else RESULTS)
        budget = Budget(rounds=3, seconds=0.0) if options.quick else Budget(rounds=7, seconds=SECONDS[options.device])
        cases = _suite(options.command).CASES[options.device]
        if text := getattr(options, "case", None):
            names, cases = list(map(str, cases)), [case for case in cases if text in str(case)]
            if not cases:
                parser.error(f"--case: got {text!r}, wanted text of one of these: {'; '.join(names)}")
        if options.command == "skip" and (options.model or options.text):
            if not (options.model and options.text):
                parser.error("--model and --text: got one of them, wanted both or neither")
            cases = [case._replace(model=options.model, text=options.text) for case in cases]
        file = run(options.command, options.device, cases, budget, out)
        print("stored", file)
        if reasons := lacking(schema.load(file)):
            sys.exit("\n".join(reasons))


def _suite(name: str) -> ModuleType:
    return importlib.import_module(f".{name}", __package__)


def run(name: str, device: str, cases: list, budget: Budget, out: Path) -> Path:
    """Measure the cases of a suite; return the path of its JSON."""
    warnings.filterwarnings("ignore", module="torch")  # other packages warn at every call
    torch.manual_seed(0)
    started = time.monotonic()
    document: dict[str, Any] = {"header": schema.header(name, device), "rows": []}
    if name in ("skip", "step"):
        document["rows"] = schema.stored_rows(out, document, without=set(map(str, cases)))
    print(", ".join(f"{key} {value}" for key, value in document["header"].items() if value is not None), "\n")
    for rows in (rows for case in cases for rows in _measured(name, device, case, budget)):
        document["rows"] += rows
        print(schema.table(rows), flush=True)
        file = schema.write(out, document)  # after each case, so that a run that is stopped keeps its results
    print(f"{name}: {time.monotonic() - started:.0f} s")
    return file


def _measured(name: str, device: str, case: tuple, budget: Budget) -> Iterator[list[dict]]:
    """The rows of each problem of a case, or one row with the reason if making its inputs or truth fails (out of memory, say)."""
    try:
        if measured := getattr(_suite(name), "measured", None):  # a suite that times its cases itself
            yield schema.rows(name, *measured(case, device, budget))
            return
        for problem, implementations in _suite(name).problems(device, [case]):
            yield schema.rows(name, problem, measure(problem, implementations, budget))
    except Exception as failure:
        traceback.print_exc()
        yield [schema.missing(name, case, failed(failure))]


if __name__ == "__main__":
    main()
