"""A trained head with ``skip_mass``, in units of U, on the hidden states of a language model over text.

The inputs are those of a real model, since what can be left out is a property of its probabilities. Without ``--model`` a small
Llama is trained first on the sources of Python's standard library (:mod:`bench.skip_model`), for some minutes. Its own samples and
held-out text are measured, each with all rows and with those whose entropy is below :data:`SURE`.
"""

from __future__ import annotations

from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from nca_kernels import skipping
from nca_kernels.linear import labelled_rows
from nca_kernels.linear_head import Head, Settings

from . import ceilings, skip_model
from .cases import BACKENDS, IGNORE_INDEX, Implementation, Problem, ours
from .linear import gradient_truth, peers
from .measure import Budget, Outcome, measure

ROWS = 2048  # the most rows that are measured
LENGTH = 256  # tokens per sequence
PROMPT = 16  # tokens of a held-out sequence that a sample continues
SURE = 1.0  # nats
EXPONENTS = (6, 8, 10, 12)  # skip_mass is 2 to minus these powers
SOURCES = ("held-out text", "own samples")


class Case(NamedTuple):
    """Which rows of which model; ``model`` and ``text`` are paths, empty for the model that is trained here."""

    source: str
    sure: bool
    model: str = ""
    text: str = ""

    def __str__(self) -> str:
        rows = f"rows below {SURE:g} nat" if self.sure else "all rows"
        return f"{Path(self.model).name or 'small Llama'}, {self.source}, {rows}"


CASES = {device: [Case(source, sure) for source in SOURCES for sure in (False, True)] for device in ("cpu", "cuda")}


def measured(case: Case, device: str, budget: Budget) -> tuple[Problem, list[Outcome]]:
    """Measure a case; return the arguments of ``schema.rows``."""
    hidden, weight, labels = (values.to(device) for values in _rows(case))
    upstream = torch.randn(len(hidden), device=device)
    gemm = ceilings.gemm(hidden, weight)
    problem = Problem(
        case=str(case),
        pass_name="fwd+bwd",
        dtype="float32",
        tensors={"hidden": hidden, "weight": weight, "labels": labels},
        truth=gradient_truth(hidden, weight, labels, upstream, ("hidden", "weight")),
        leaves=("hidden", "weight"),
        upstream=upstream,
        kind="flop",
        amount=gemm.amount,
        bound_by="GEMM",
        unit="GEMM",
        ceilings={"GEMM": gemm},
    )
    name = BACKENDS[device][0]
    function = partial(ours, "linear_token_logps", name, device, torch.float32)
    implementations = [
        Implementation(f"nca_kernels {name}", function()),
        # The tests hold the bound; this tolerance is above what a right implementation gives, and below a mistake.
        *(
            Implementation(f"nca_kernels {name}, skip_mass 2^-{k}", function(skip_mass=2.0**-k), tolerance=32 * 2.0**-k)
            for k in EXPONENTS
        ),
        *(peer for peer in peers(device) if peer.name in ("plain", "Cut Cross-Entropy")),
    ]
    outcomes = measure(problem, implementations, budget)
    for k, outcome in zip(EXPONENTS, outcomes[1:], strict=False):
        outcome.computed = computed(hidden, weight, labels, 2.0**-k, name)
    return problem, outcomes


def computed(hidden: Tensor, weight: Tensor, labels: Tensor, mass: float, backend: str) -> float:
    """The share of the logits that backward computes."""
    V = len(weight)
    settings = Settings(IGNORE_INDEX, 1.0, None, backend, hidden.dtype, 0, V, "", "trained", 0, mass)
    kept = hidden.new_empty(0)
    stays = skipping.forward(Head(weight, None, settings), hidden, labels, labelled_rows(labels, IGNORE_INDEX), kept, 3).stays
    widths = torch.full((len(stays), 1), skipping.slice_width(V))
    widths[-1] -= widths.sum() - V
    return ((stays.cpu() * widths).sum() / (len(hidden) * V)).item()


# --- the rows --------------------------------------------------------------------------------------------------------


def _rows(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, weight and labels: at most :data:`ROWS` rows in random order."""
    hidden, weight, labels, entropy = _states(case.model, case.text, case.source)
    some = torch.randperm(len(hidden), generator=torch.Generator().manual_seed(0))
    some = some[entropy[some] < SURE] if case.sure else some
    some = some[:ROWS]
    print(f"{case}: {len(some)} rows, entropy {entropy[some].mean():.2f} nats on average")
    return hidden[some], weight, labels[some]


@lru_cache(maxsize=2)
@torch.no_grad()
def _states(folder: str, text: str, source: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The hidden states that enter the head, the head's weight, the labels and the entropy, for all rows of a source."""
    model, ids = _model(folder, text)
    if not len(ids):
        raise ValueError(f"{text}: got fewer than {LENGTH} tokens")
    if source == "own samples":
        torch.manual_seed(0)
        prompts = ids[:64, :PROMPT]
        ids = model.generate(prompts, attention_mask=torch.ones_like(prompts), do_sample=True, max_length=LENGTH, min_length=LENGTH)
    hidden = torch.cat([model.model(input_ids=part).last_hidden_state[:, :-1] for part in ids.split(4)]).flatten(0, 1)
    weight = model.get_output_embeddings().weight.detach()
    entropy = torch.cat([torch.distributions.Categorical(logits=rows @ weight.t()).entropy() for rows in hidden.split(256)])
    return hidden, weight, ids[:, 1:].flatten(), entropy


@lru_cache(maxsize=1)
def _model(folder: str, text: str) -> tuple[Any, Tensor]:
    """The model, and the token ids of the held-out text, ``[n, LENGTH]``."""
    model: Any
    if not folder:
        model, ids = skip_model.trained()
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        ids = torch.tensor(AutoTokenizer.from_pretrained(folder)(Path(text).read_text("utf-8")).input_ids)
    return model, ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)[:64]
