"""The demo: a small Llama learns sums; its sampled answers are rewarded, and it is aligned by NCA, InfoNCA and DPO."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from statistics import mean
from typing import Any

import datasets
import torch
import transformers
from transformers import LlamaForCausalLM

from nca_kernels import __version__, explain

from .align import Method, align
from .figure import draw_curves
from .samples import scored_samples
from .tasks import TASKS
from .world import WORLDS, Size, World, make_world

TASK = TASKS["sums"]

# Every method has the same beta, alpha and learning rate, which are tuned for none of them. The result depends on beta: at 0.1 DPO
# and InfoNCA end far below the start; at 0.5 all three end above it, three points of exact answers apart. 0.3 lies between.
METHODS = {
    "NCA": Method("nca"),
    "InfoNCA": Method("info_nca"),
    "DPO": Method("dpo"),
}


FULL = Size()
QUICK = Size(hidden_size=16, taught=640, rewarded=40, probed=10, tested=20, steps=4, batch_size=4)


def run_demo(out: Path, *, path: str = "linear", seed: int = 0, size: Size = FULL, progress: bool = True) -> dict[str, Any]:
    """Run the demo, print the table and write ``figure2.png`` and ``demo.json`` to ``out``. Returns the content of the JSON."""
    out.mkdir(parents=True, exist_ok=True)  # before the work, so that a folder that cannot be made fails at once
    # Steps of 0.1 s gain little from a second thread, and take 8 times as long if other programs share its core.
    torch.set_num_threads(1)
    datasets.disable_progress_bars()  # preparing a few thousand rows needs none
    seconds: dict[str, float] = {}
    with _timed("world", seconds):
        world = make_world(WORLDS["exact"], seed, size, path=path, progress=progress)
    start = _evaluate(world.reference, world, seed)

    results: dict[str, dict[str, Any]] = {}
    for name, method in METHODS.items():
        with _timed(name, seconds):
            model, curves = align(
                world.reference,
                world.train,
                world.probe,
                method,
                seed=seed,
                steps=size.steps,
                batch_size=size.batch_size,
                path=path,
                progress=progress,
            )
            results[name] = {"method": asdict(method), "after": _evaluate(model, world, seed), "curves": asdict(curves)}

    result = {
        "path": path,
        "seed": seed,
        "size": asdict(size),
        "parameters": sum(p.numel() for p in world.reference.parameters()),
        "prompts": {"train": len(world.train), "heldout": len(world.probe)},
        "supervised_steps": len(world.supervised_loss),
        "supervised_loss": world.supervised_loss,
        "start": start,
        "results": results,
        "seconds": seconds,
        "versions": {
            "nca_kernels": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "backends": explain("cpu"),
    }
    draw_curves({name: [run["curves"]] for name, run in results.items()}, out / "figure2.png")
    (out / "demo.json").write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))
    print(f"\nwrote {out / 'figure2.png'} and {out / 'demo.json'}")
    return result


def _evaluate(model: LlamaForCausalLM, world: World, seed: int) -> dict[str, float]:
    """The mean reward and the share of exact answers over one sample for each prompt."""
    _, scores = scored_samples(model, TASK, world.test, 1, torch.Generator().manual_seed(seed))
    return {"reward": scores.mean().item(), "exact": (scores == 1).float().mean().item()}


@contextmanager
def _timed(part: str, seconds: dict[str, float]) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[part] = round(time.perf_counter() - start, 1)


def table(result: dict[str, Any]) -> str:
    """The result as text."""
    size, start = result["size"], result["start"]
    rows = [("", "reward", "exact", "chosen log-prob", "rejected log-prob", "in the loss", "time")]
    rows.append(("supervised", f"{start['reward']:.3f}", f"{start['exact']:.1%}", "", "", "", ""))
    for name, run in result["results"].items():
        curves, after = run["curves"], run["after"]
        moves = [f"{curves[which][0]:.2f} -> {curves[which][-1]:6.2f}" for which in ("chosen", "rejected")]
        share = mean(curves["loss_time_share"])
        time_taken = f"{result['seconds'][name]:.0f} s"
        rows.append((name, f"{after['reward']:.3f}", f"{after['exact']:.1%}", *moves, f"{share:.1%}", time_taken))
    return "\n".join(
        [
            f"{result['parameters'] / 1e6:.2f} M parameters, {result['supervised_steps']} supervised steps; then "
            f"{size['steps']} steps of {size['batch_size']} prompts with K = {size['responses']} sampled",
            f"answers each ({result['prompts']['train']} prompts whose answers differ in reward). The same beta, alpha "
            f"and lr for all. Path {result['path']}.",
            "Reward and exact: answers sampled for held-out sums. Log-probs: best and worst of held-out samples.",
            "",
            *("{:10}  {:>6}  {:>6}  {:>16}  {:>17}  {:>11}  {:>6}".format(*row).rstrip() for row in rows),
        ]
    )
