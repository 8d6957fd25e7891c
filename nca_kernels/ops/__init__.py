"""The operators: schemas, fakes and autograd, one file for each stem.

Each implementation allocates the results and hands them to the backend that the caller named; ``torch.compile`` sees
one opaque operator.
"""

from .group_loss import group_loss
from .linear_token_logps import linear_token_logps
from .linear_token_stats import linear_token_stats
from .token_logps import token_logps, token_stats

__all__ = ["group_loss", "linear_token_logps", "linear_token_stats", "token_logps", "token_stats"]
