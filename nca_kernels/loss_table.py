"""The losses, pairs and reductions of ``group_loss`` by name, and the arguments of its operator. Every layer may import it."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Loss(NamedTuple):
    """A loss, as callers and backends see it; its formula is in ``reference.py``."""

    takes: tuple[str, ...]  # its arguments, in addition to those that every loss takes
    has_kernels: bool = True  # False: it runs on backend "torch" alone


LOSSES = {
    "info_nca": Loss(takes=("alpha",)),
    "nca": Loss(takes=("alpha",)),
    "dpo": Loss(takes=("pairs", "label_smoothing")),
    "ipo": Loss(takes=("pairs", "lengths")),
    "kto": Loss(takes=("desirable", "baseline")),
    "plackett_luce": Loss(takes=()),
    "biased_nca": Loss(takes=("alpha",)),
}
PAIRS = ("best_vs_rest", "all")
REDUCTIONS = ("mean", "sum", "none")


class GroupLossArguments(NamedTuple):
    """The arguments of the operator ``group_loss``, in the order of its schema, as the backends read them."""

    logps: Tensor  # [B, K], as every tensor here but baseline; contiguous, float32
    ref_logps: Tensor
    scores: Tensor
    mask: Tensor | None  # bool; None: every response is valid
    lengths: Tensor | None  # None: 1
    desirable: Tensor | None  # bool; None: the best-scored responses
    baseline: Tensor | None  # [1]; None: 0
    name: str
    beta: float
    alpha: float  # 0 for a loss without alpha: uniform weights over the best-scored responses
    pairs: str
    label_smoothing: float
    nll_weight: float
    reduction: str
    backend: str

    def wants_several_blocks(self) -> bool:
        """Whether a GPU computes the prompts' losses in several blocks and adds them up in a second launch.

        For a batch of a usual size, one block takes less time than the second launch costs.
        """
        B, K = self.logps.shape
        return B * K * K > 2**15
