"""One optimisation step of a Llama by NCA: forward, backward, clipping and AdamW, through this trainer and others.

Lengths have a long tail (:mod:`bench.step_data`), and each contestant takes the batches that its sampler makes of one data set.
Each runs in a separate process, so that its peak memory is its own. On a CPU they take turns step by step, so that a drift of
the machine's clock affects all alike; on a GPU one runs after the other, since not all fit in its memory.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future, ProcessPoolExecutor, wait
from contextlib import ExitStack
from functools import partial
from multiprocessing import get_context
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from nca_kernels.dispatch import resolve

from .cases import Problem, value_error
from .measure import TOLERANCE, Budget, Outcome, reported
from .memory import peak_extra, poisoned, release
from .step_data import STEPS, Row, long_tailed_rows, padding, sample, sequences
from .step_ways import ALL_LOGITS, Way, by_length, ours, plain, trl, truth

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)
MODELS = {
    "small": (32000, 512, 1408, 4, 8, 8),  # the head does 56% of a token's products; Gemma 3 270M's 63%
    "deep": (32000, 512, 1408, 12, 8, 8),  # 30%; Qwen 2.5 0.5B's 28%
    "1B": (128256, 2048, 8192, 16, 32, 8),  # Llama 3.2's, 21%
    "tiny": (50, 16, 32, 1, 2, 2),
}


class Case(NamedTuple):
    model: str
    dtype: str
    prompts: int  # per batch
    responses: int
    prompt_tokens: int  # the mean before truncation
    response_tokens: int
    rows: int = 4096  # of the data set

    def __str__(self) -> str:
        ratio = self.response_tokens / self.prompt_tokens
        share = f"1:{ratio:.0f}" if ratio >= 1 else f"{1 / ratio:.0f}:1"
        lengths = f"prompts of about {self.prompt_tokens} and responses of about {self.response_tokens} tokens"
        return f"{self.model} Llama, K={self.responses} {share}, {lengths}, B={self.prompts}"


def _cases(model: str, dtype: str, tokens: int, prompts: dict[int, int]) -> list[Case]:
    """``tokens``: of a prompt and one response together; ``prompts``: per batch, by the number of responses."""
    long, short = round(0.8 * tokens), round(0.2 * tokens)
    lengths = [(long, short), (tokens // 2, tokens // 2), (short, long)]
    return [Case(model, dtype, B, K, *means) for K, B in prompts.items() for means in lengths]


CASES = {
    "cpu": [*_cases("small", "float32", 128, {2: 4, 4: 2, 8: 2}), Case("deep", "float32", 2, 4, 64, 64)],
    "cuda": _cases("1B", "bfloat16", 512, {2: 8, 4: 4, 8: 2}),
}
TINY = [Case("tiny", "float32", 2, K, 5, 4, rows=64) for K in (2, 3)]


def ways(case: Case, device: str) -> dict[str, Callable[..., Way]]:
    mine = f"nca_kernels {resolve('linear_token_logps', None, torch.device(device), getattr(torch, case.dtype))}"
    return {
        "plain": plain,
        "plain, by length": partial(plain, grouped=True),
        f"{mine}, by length": ours,
        f"{mine}, by length, share_prompt": partial(ours, share_prompt=True),
        f"{mine}, by length, share_prompt, all logits kept": partial(ours, share_prompt=True, save_budget=ALL_LOGITS),
        "TRL DPOTrainer, by length": trl,
    }


def process() -> Executor:
    """The process in which a contestant runs."""
    return ProcessPoolExecutor(1, mp_context=get_context("spawn"))


def measured(case: Case, device: str, budget: Budget) -> tuple[Problem, list[Outcome]]:
    """Measure a case for one round of all steps and more until the budget's seconds are over.

    Returns the arguments of ``schema.rows``.
    """
    rows = _rows(case)
    checked = _sample(rows, by_length(rows, case.prompts), case, share_prompt=False)[0]
    problem = Problem(
        case=str(case),
        pass_name="step",
        dtype=case.dtype,
        tensors={},
        truth=partial(_errors, truth(_model(case, device), checked)),
        kind="tokens",
        # The tokens of separate rows without padding: a prompt counts once per response, even if it is computed only once.
        amount=round(sum(sum(sequences(row)) for row in rows) / (case.rows / case.prompts)),
    )
    release(device)
    outcomes = [Outcome(name, "step") for name in ways(case, device)]
    for together in [outcomes] if device == "cpu" else [[outcome] for outcome in outcomes]:
        with ExitStack() as stack:
            contestants = [_Contestant(outcome, stack.enter_context(process())) for outcome in together]
            _check(contestants, problem, checked, case, device)
            _take_turns([each for each in contestants if each.outcome.status == "ok"], budget.seconds)
    return problem, outcomes


def _errors(right: Tensor, values: Tensor, grads: list[Tensor]) -> tuple[float, None]:
    return value_error(values, right), None


class _Contestant(NamedTuple):
    outcome: Outcome
    executor: Executor

    def submit(self, method: str, *arguments: Any) -> Future:
        """Call the method of the executor's :class:`Runner`; the future holds what it returns."""
        return self.executor.submit(_call, self.outcome.name, method, *arguments)


def _check(contestants: list[_Contestant], problem: Problem, batch: list[Row], case: Case, device: str) -> None:
    begun = [contestant.submit("begin", case, device) for contestant in contestants]
    wait(begun)
    for contestant, share in zip(contestants, begun, strict=True):
        outcome = contestant.outcome
        with reported(outcome):
            outcome.padding = share.result()
            outcome.error, _ = problem.truth(contestant.submit("check", batch).result(), [])
            outcome.peak_mib = contestant.submit("peak").result()
            if not outcome.error <= TOLERANCE[case.dtype]:  # `not <=`, because NaN is wrong too
                outcome.status = "wrong"


def _take_turns(contestants: list[_Contestant], seconds: float) -> None:
    started, order = time.monotonic(), random.Random(0)
    while True:
        totals = {contestant.outcome.name: 0.0 for contestant in contestants}
        for i in range(STEPS):
            for contestant in order.sample(contestants, len(contestants)):
                totals[contestant.outcome.name] += contestant.submit("time", i).result()
        for contestant in contestants:
            contestant.outcome.times.append(totals[contestant.outcome.name] / STEPS)
        if time.monotonic() - started >= seconds:
            return


class Runner:
    """A contestant in its own process."""

    def __init__(self, name: str) -> None:
        self.name = name

    def begin(self, case: Case, device: str) -> float:
        """Make model, optimizer and batches. Returns the share of padding in an epoch."""
        self.device, rows = device, _rows(case)
        self.model = _model(case, device).train()
        way = ways(case, device)[self.name](self.model, rows, case.prompts)
        self.backward = way.backward
        # With a learning rate of 0 the optimizer does all of its work and does not change the weights.
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.0, fused=True)
        self.batches = _sample(rows, way.order, case, way.share_prompt)
        return padding(_batches(rows, way.order, case), way.share_prompt)

    def check(self, batch: list[Row]) -> Tensor:
        with poisoned(self.device):
            return self.step(batch).cpu()

    def peak(self) -> float | None:
        """The peak MiB of the step on the largest batch, beyond weights and optimizer."""
        return peak_extra(partial(self.step, self.batches[-1]), self.device)[1]

    def time(self, i: int) -> float:
        """Milliseconds of the step on a batch of the sample."""
        started = time.perf_counter()
        self.step(self.batches[i]).tolist()  # this waits for the GPU
        return 1e3 * (time.perf_counter() - started)

    def step(self, batch: list[Row]) -> Tensor:
        """The loss, and the norm of all gradients before clipping."""
        try:
            loss = self.backward(batch)
            norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
        finally:
            self.optimizer.zero_grad()  # a step that fails must not leave gradients for the next one
        return torch.stack([loss.detach(), norm])


_runners: dict[str, Runner] = {}


def _call(name: str, method: str, *arguments: Any) -> Any:
    return getattr(_runners.setdefault(name, Runner(name)), method)(*arguments)


def _rows(case: Case) -> list[Row]:
    return long_tailed_rows(case.rows, MODELS[case.model][0], case.responses, case.prompt_tokens, case.response_tokens)


def _batches(rows: list[Row], order: list[int], case: Case) -> list[list[Row]]:
    return [[rows[i] for i in order[start : start + case.prompts]] for start in range(0, len(order), case.prompts)]


def _sample(rows: list[Row], order: list[int], case: Case, share_prompt: bool) -> list[list[Row]]:
    return sample(_batches(rows, order, case), share_prompt)


def _model(case: Case, device: str) -> LlamaForCausalLM:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: dict[str, Any] = dict(zip(SIZES, MODELS[case.model], strict=True))
    config = LlamaConfig(**sizes, tie_word_embeddings=True, use_cache=False, pad_token_id=0, eos_token_id=1)
    torch.manual_seed(0)
    with torch.device(device):  # on a GPU, random numbers for a billion weights take almost no time
        return LlamaForCausalLM(config).to(getattr(torch, case.dtype))
