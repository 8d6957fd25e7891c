"""What a trained head gains by leaving out slices of the vocabulary of next to no probability, and what that costs in accuracy.

``python -m bench.skip MODEL TEXT`` takes the hidden states of a causal language model of transformers (a folder) over a text
file. For all rows and for those whose entropy is below a nat it prints, against the mass that each row may leave out: 1 + 3 f, the
GEMMs that are left where f is the share of the logits that stay; the errors; and the time beside today's head in units of U, the
one GEMM ``[M, D] x [D, V]``. In float32 on a CPU. docs/tuning.md has results; the package itself leaves nothing out.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import nca_kernels
from nca_kernels import memory
from nca_kernels.linear_head import Head, Settings, Upstream
from nca_kernels.slices import logps_of, merge
from nca_kernels.tiles import aligned

from .measure import median, quantile

ROWS = 2048  # the most rows that are measured: one block of a tile
LENGTH = 384  # tokens per sequence
SLICES = 32  # as many as the package's tiles have at V = 32000
MASSES = (2.0**-6, 2.0**-8, 2.0**-10, 2.0**-12)
TIMED = 2.0**-10
SURE = 1.0  # nats

Results = tuple[Tensor, Tensor, Tensor]  # logps, dhidden, dweight


class SkippingHead:
    """Forward and backward of a trained head, built from parts of the package, that leaves out each row's least probable slices.

    ``ordered`` sorts the columns by descending logit of the mean hidden state, so that few slices hold the probable ones. The rows
    of the head are then gathered for each slice.
    """

    def __init__(self, mass: float, ordered: bool) -> None:
        self.mass, self.ordered, self.share = mass, ordered, 1.0

    def __call__(self, hidden: Tensor, weight: Tensor, labels: Tensor, upstream: Tensor) -> Results:
        V, D = weight.shape
        width = aligned(-(-V // SLICES))
        order = torch.mv(weight, hidden.mean(0)).argsort(descending=True) if self.ordered else torch.arange(V)
        slices = [columns.sort().values for columns in order.split(width)]
        labels = torch.empty_like(order).index_copy_(0, torch.cat(slices), torch.arange(V))[labels]
        tile, piece = hidden.new_empty(len(hidden) * width), weight.new_empty(width, D)

        def head_of(i: int) -> Head:
            columns = slices[i]
            rows = weight[i * width : i * width + len(columns)]
            if self.ordered:
                rows = torch.index_select(weight, 0, columns, out=piece[: len(columns)])
            return Head(rows, None, Settings(-100, 1.0, None, "cpu", weight.dtype, i * width, V, "", "trained", 0))

        parts = hidden.new_empty(len(slices), 3, len(hidden))
        for i, (columns, part) in enumerate(zip(slices, parts, strict=True)):
            head, logits = head_of(i), _tile(tile, len(hidden), len(columns))
            head.logits(hidden, slice(0, len(columns)), out=logits)
            head.stats(logits, labels, slice(0, len(columns)), out=part)
        stats, shares = merge(parts)
        stays = _stay(shares, labels // width, self.mass)
        counts = stays.sum(1).tolist()
        self.share = sum(n * len(columns) for n, columns in zip(counts, slices, strict=True)) / (len(hidden) * V)
        of_rows = torch.cat((stats, upstream[None]))
        dhidden, dweight = torch.zeros_like(hidden), memory.empty(weight.shape, weight.dtype, weight.device)
        for i, (columns, rows) in enumerate(zip(slices, stays.nonzero()[:, 1].split(counts), strict=True)):
            head, every, logits = head_of(i), slice(0, len(columns)), _tile(tile, len(rows), len(columns))
            x, each = hidden.index_select(0, rows), of_rows.index_select(1, rows)
            head.logits(x, every, out=logits)
            head.dlogits(Upstream(each[3]), logits, labels.index_select(0, rows), each[:3], every, out=logits)
            dhidden.index_copy_(0, rows, dhidden.index_select(0, rows).addmm_(logits, head.weight))
            if self.ordered:
                dweight.index_copy_(0, columns, logits.t() @ x)
            else:
                torch.mm(logits.t(), x, out=dweight[i * width : i * width + len(columns)])
        return logps_of(stats), dhidden, dweight


def _tile(flat: Tensor, rows: int, columns: int) -> Tensor:
    return flat[: rows * aligned(columns)].view(rows, aligned(columns))[:, :columns]


def _stay(shares: Tensor, of_label: Tensor, mass: float) -> Tensor:
    """Which slices stay, ``[S, M]``: the label's, and all but a row's smallest ``shares [S, M]`` that sum to at most ``mass``."""
    ascending, order = shares.t().contiguous().sort(1)
    stays = torch.empty_like(order, dtype=torch.bool).scatter_(1, order, ascending.cumsum(1) > mass).t().contiguous()
    stays[of_label, torch.arange(len(of_label))] = True
    return stays


def exact(hidden: Tensor, weight: Tensor, labels: Tensor, upstream: Tensor) -> Results:
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    logps = nca_kernels.linear_token_logps(hidden, weight, labels, backend="cpu")
    dhidden, dweight = torch.autograd.grad(logps, (hidden, weight), upstream)
    return logps.detach(), dhidden, dweight


def print_errors(hidden: Tensor, weight: Tensor, labels: Tensor) -> None:
    upstream = torch.ones(len(hidden))
    _, dhidden, dweight = exact(hidden, weight, labels, upstream)
    for mass in MASSES:
        for ordered in (False, True):
            head = SkippingHead(mass, ordered)
            _, dx, dw = head(hidden, weight, labels, upstream)
            of_rows = ((dx - dhidden).norm(dim=1) / dhidden.norm(dim=1)).median()
            print(
                f"  mass {mass:.1e}, {'ordered' if ordered else 'natural'}: 1 + 3 f = {1 + 3 * head.share:.2f}; relative error of "
                f"dhidden {_error(dx, dhidden):.1e}, median of rows {of_rows:.1e}, of dweight {_error(dw, dweight):.1e}"
            )


def _error(values: Tensor, truth: Tensor) -> float:
    return ((values - truth).norm() / truth.norm()).item()


def print_times(hidden: Tensor, weight: Tensor, labels: Tensor, rounds: int) -> None:
    """Time all contestants in turn, in a new random order each round, on copies of the inputs that no cache holds."""
    logits, upstream = torch.zeros(len(hidden), len(weight)), torch.ones(len(hidden))
    copies = [(hidden.clone(), weight.clone()) for _ in range(4)]
    calls: dict[str, Callable[[Tensor, Tensor], object]] = {
        "U": lambda x, w: torch.mm(x, w.t(), out=logits),
        "exact": lambda x, w: exact(x, w, labels, upstream),
        "natural": lambda x, w: SkippingHead(TIMED, ordered=False)(x, w, labels, upstream),
        "ordered": lambda x, w: SkippingHead(TIMED, ordered=True)(x, w, labels, upstream),
    }
    taken: dict[str, list[float]] = {name: [] for name in calls}
    order, turn = random.Random(0), 0
    for round_number in range(-1, rounds):  # the first, -1, warms up
        for name in order.sample(list(calls), len(calls)):
            turn += 1
            started = time.perf_counter()
            calls[name](*copies[turn % len(copies)])
            if round_number >= 0:
                taken[name].append(1e3 * (time.perf_counter() - started))
    unit = median(taken["U"])
    print(f"  M = {len(hidden)}, D = {hidden.shape[1]}, V = {len(weight)}, mass {TIMED:.1e}, U = {unit:.0f} ms")
    for name, each in taken.items():
        p20, middle, p80 = (quantile(each, q) / unit for q in (0.2, 0.5, 0.8))
        print(f"  {name}: {middle:.2f} U (p20 {p20:.2f}, p80 {p80:.2f})")


@torch.no_grad()
def hidden_states(folder: str, text: str) -> Results:
    """The hidden states that enter the head, the weight of the head, and the labels."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.tensor(AutoTokenizer.from_pretrained(folder)(text).input_ids)
    ids = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
    states = [model.model(input_ids=part).last_hidden_state[:, :-1] for part in ids.split(4)]
    return torch.cat(states).flatten(0, 1), model.get_output_embeddings().weight, ids[:, 1:].flatten()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder of transformers")
    parser.add_argument("text", type=Path, help=f"a file; of 8000 tokens or more, {ROWS} rows of each kind are measured")
    parser.add_argument("--rounds", type=int, default=9, help="of timing (default: 9)")
    options = parser.parse_args()
    hidden, weight, labels = hidden_states(options.model, options.text.read_text("utf-8"))
    weight = weight.detach()
    entropy = torch.cat([torch.distributions.Categorical(logits=rows @ weight.t()).entropy() for rows in hidden.split(256)])
    mixed = torch.randperm(len(hidden), generator=torch.Generator().manual_seed(0))
    for name, rows in (("all rows", mixed), ("rows below a nat", mixed[entropy[mixed] < SURE])):
        rows = rows[:ROWS]
        print(f"{name}: {len(rows)}, entropy {entropy[rows].mean():.2f} nats on average")
        print_errors(hidden[rows], weight, labels[rows])
        print_times(hidden[rows], weight, labels[rows], options.rounds)


if __name__ == "__main__":
    main()
