"""The command line: ``nca-kernels COMMAND``. Exit codes: 0, 1 for a failed run, 2 for usage."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="nca-kernels", description=__doc__.split("\n")[0].split(":")[0])
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for add_command in (_add_demo,):
        add_command(commands)
    arguments = parser.parse_args(argv)
    try:
        arguments.run(arguments)
    # What the user can mend. Anything else is a defect: its traceback is wanted, and exits with 1 as well.
    except ModuleNotFoundError as error:
        return _failed(arguments.command, f"{error}; pip install 'nca_kernels[hf]' brings what it needs")
    except OSError as error:
        return _failed(arguments.command, str(error))
    return 0


def _failed(command: str, reason: str) -> int:
    print(f"nca-kernels {command}: {reason}", file=sys.stderr)
    return 1


def _add_demo(commands: argparse._SubParsersAction) -> None:
    demo = commands.add_parser(
        "demo",
        help="align a small Llama by NCA, InfoNCA and DPO, in about two minutes",
        description="Teach a small Llama sums, sample four answers a prompt, reward them, and align it by NCA, InfoNCA "
        "and DPO. Prints a table; writes figure2.png and demo.json.",
    )
    demo.add_argument("--path", choices=("linear", "logits"), default="linear", help="log-probs without or with logits")
    demo.add_argument("--out", type=Path, default=Path("out/demo"), help="the output folder (%(default)s)")
    demo.add_argument("--seed", type=int, default=0)
    demo.add_argument("--quick", action="store_true", help="a run of seconds that teaches nothing, as a check")
    demo.set_defaults(run=_demo)


def _demo(arguments: argparse.Namespace) -> None:
    # Imported when it runs: it loads transformers, and the other commands and --help do without.
    from .integrations.demo import QUICK, Size, run_demo

    run_demo(arguments.out, path=arguments.path, seed=arguments.seed, size=QUICK if arguments.quick else Size())
