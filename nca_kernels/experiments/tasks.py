"""The tasks of the small models: arithmetic in text, where the reward is a known function of the response."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

CHARS = "0123456789+="


@dataclass(frozen=True)
class Task:
    """Problems of ``operands`` numbers with ``digits`` digits each, [n, operands].

    All prompts have one length, and all responses have one length, so neither needs padding nor an end token.
    """

    digits: int
    operands: int
    target_loss: float  # loss per token at which about half of a model's samples are right

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        """``n`` different problems."""
        low, span = 10 ** (self.digits - 1), 9 * 10 ** (self.digits - 1)
        drawn = torch.randperm(span**self.operands, generator=generator)[:n]
        return low + torch.stack([drawn // span**place % span for place in reversed(range(self.operands))], dim=1)

    def prompts(self, problems: Tensor) -> Tensor:
        """Tokens, [n, P]."""
        return _tokens(["+".join(map(str, problem)) + "=" for problem in problems.tolist()])

    def answers(self, problems: Tensor) -> Tensor:
        """The tokens of the right responses, [n, R]."""
        return _tokens([self._answer(problem) for problem in problems.tolist()])

    def rewards(self, problems: Tensor, responses: Tensor) -> Tensor:
        """The rewards [n, K], in [0, 1], of responses [n, K, R]."""
        raise NotImplementedError

    def _answer(self, numbers: list[int]) -> str:
        raise NotImplementedError


class Sums(Task):
    """``123+456=`` wants ``0579``; the reward is the share of right digits."""

    def __init__(self) -> None:
        super().__init__(digits=3, operands=2, target_loss=0.25)

    def _answer(self, numbers: list[int]) -> str:
        a, b = numbers
        return f"{a + b:04}"

    def rewards(self, problems: Tensor, responses: Tensor) -> Tensor:
        return (responses == self.answers(problems)[:, None]).float().mean(-1)


class Chains(Task):
    """``47+85+36=`` wants the step and then the result, ``132+36=168``; the reward is 1 if the result is right, else 0."""

    def __init__(self) -> None:
        super().__init__(digits=2, operands=3, target_loss=0.1)

    def _answer(self, numbers: list[int]) -> str:
        a, b, c = numbers
        return f"{a + b:03}+{c}={a + b + c:03}"

    def rewards(self, problems: Tensor, responses: Tensor) -> Tensor:
        result = self.answers(problems)[:, None, -3:]
        return (responses[..., -3:] == result).all(-1).float()


class Near(Sums):
    """Sums again; the reward is ``1 - log2(1 + |x - y|) / log2(10000)``, x the response and y the right sum: many levels."""

    def rewards(self, problems: Tensor, responses: Tensor) -> Tensor:
        places = torch.tensor([1000, 100, 10, 1])
        digits = torch.where(responses < 10, responses, torch.tensor(10))
        value = (digits * places).sum(-1)
        error = (value - problems.sum(-1, keepdim=True)).abs().clamp(max=9999)
        # A response with a sign in place of a digit is not a number.
        return torch.where((digits < 10).all(-1), 1 - (1 + error.float()).log2() / math.log2(10_000), 0.0)


TASKS = {"sums": Sums(), "chains": Chains(), "near": Near()}


def _tokens(texts: list[str]) -> Tensor:
    return torch.tensor([[CHARS.index(char) for char in text] for text in texts])
