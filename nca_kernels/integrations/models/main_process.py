"""Work that only the main process does, with its result on every rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list

Result = TypeVar("Result")


def on_main(accelerator: Accelerator, function: Callable[..., Result], *args: object) -> Result:
    """Call the function on the main process; return its result, or raise its error, on every rank, so that no rank waits."""
    outcome: list[Any] = [None]
    if accelerator.is_main_process:
        try:
            outcome = [function(*args)]
        except Exception as error:
            outcome = [error]
    broadcast_object_list(outcome)
    if isinstance(outcome[0], Exception):
        raise outcome[0]
    return outcome[0]


def print_main(line: str) -> None:
    """Print on the main process only."""
    if PartialState().is_main_process:
        print(line, flush=True)
