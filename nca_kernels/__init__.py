"""Fused kernels for aligning language models with explicit rewards (Chen et al. 2024, arXiv 2402.05369)."""

from ._version import __version__
from .dispatch import explain
from .drop_in import selective_log_softmax
from .functional import TokenStats, sequence_logps, token_logps, token_stats
from .linear_functional import linear_sequence_logps, linear_token_logps, linear_token_stats
from .losses import (
    GroupLoss,
    biased_nca_loss,
    dpo_loss,
    group_loss,
    info_nca_loss,
    ipo_loss,
    kto_loss,
    nca_loss,
    plackett_luce_loss,
)

__all__ = [
    "GroupLoss",
    "TokenStats",
    "__version__",
    "biased_nca_loss",
    "dpo_loss",
    "explain",
    "group_loss",
    "info_nca_loss",
    "ipo_loss",
    "kto_loss",
    "linear_sequence_logps",
    "linear_token_logps",
    "linear_token_stats",
    "nca_loss",
    "plackett_luce_loss",
    "selective_log_softmax",
    "sequence_logps",
    "token_logps",
    "token_stats",
]
