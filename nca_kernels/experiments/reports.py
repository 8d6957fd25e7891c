"""The tables and figures of the paper, from the records of the runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from .align import Method
from .figure import draw_curves, draw_points
from .search import Contender
from .tasks import TASKS


@dataclass(frozen=True)
class Outcome:
    """A contender's tuned method, the records of its search, and one record of that method for each seed."""

    contender: Contender
    method: Method | None
    trials: list[dict[str, Any]]
    records: list[dict[str, Any]]

    def rewards(self) -> list[float]:
        return [record["reward"] for record in self.records]

    def exact(self) -> list[float]:
        """The share of samples with the highest reward."""
        highest = str(TASKS[self.contender.task].levels)
        return [record["rewards"].count(highest) / len(record["rewards"]) for record in self.records]

    def greedy(self) -> list[float]:
        return [record["greedy_reward"] for record in self.records]

    def moved(self, which: str) -> list[float]:
        return [moved(record, which) for record in self.records]

    def parameters(self) -> list[str]:
        """K, beta, alpha and learning rate, each empty if the method does not read it."""
        if self.method is None:
            return ["", "", "", ""]
        alpha = f"{self.method.alpha:g}" if self.method.loss in ("nca", "info_nca") else ""
        return [str(self.method.K), f"{self.method.beta:g}", alpha, f"{self.method.lr:g}"]


Outcomes = dict[str, Outcome]


@dataclass(frozen=True)
class Report:
    """What is compared, how its Markdown table is made, and how its figure is drawn."""

    contenders: tuple[Contender, ...]
    table: Callable[[Outcomes], str]
    draw: Callable[[Outcomes, Path], None]


def moved(record: dict[str, Any], which: str) -> float:
    """The change of the held-out log-probs of the ``chosen`` or ``rejected`` responses during training."""
    return record["curves"][which][-1] - record["curves"][which][0]


def win_rates(outcome: Outcome, against: Outcome) -> list[float]:
    """For each seed, how often its sample has the higher reward for the same prompt; ties count half."""
    rates = []
    for ours, theirs in zip(outcome.records, against.records, strict=True):
        prompts = list(zip(ours["rewards"], theirs["rewards"], strict=True))
        rates.append(sum((a > b) + (a == b) / 2 for a, b in prompts) / len(prompts))
    return rates


def spread(values: list[float], digits: int = 3, sign: str = "") -> str:
    """Mean and standard deviation over the seeds."""
    deviation = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):{sign}.{digits}f}{deviation}"


def paired(values: list[float], others: list[float]) -> str:
    """Mean and standard deviation of the differences seed by seed, and on how many seeds they are positive."""
    differences = [value - other for value, other in zip(values, others, strict=True)]
    return f"{spread(differences, sign='+')} ({sum(d > 0 for d in differences)} of {len(differences)})"


def markdown(header: str, rows: list[list[str]]) -> str:
    """``header`` names the columns, with bars between them."""
    columns = header.count("|") + 1
    lines = [header, "|".join(["---"] * columns), *(" | ".join(row) for row in rows)]
    return "".join(f"| {line} |\n" for line in lines)


def _figure2(outcomes: Outcomes) -> str:
    rows = []
    for name, outcome in outcomes.items():
        moves = [spread(outcome.moved(which), 2, "+") for which in ("chosen", "rejected")]
        rows.append([name, *outcome.parameters(), *moves, spread(outcome.rewards())])
    table = markdown(" | K | beta | alpha | lr | chosen log-prob, change | rejected log-prob, change | reward", rows)
    searched = []
    for trials in zip(outcomes[DPO.name].trials, outcomes[PAIRWISE_NCA.name].trials, strict=True):
        method = trials[0]["settings"]["method"]
        moves = [f"{moved(record, 'chosen'):+.2f}" for record in trials]
        rewards = [f"{record['reward']:.3f}" for record in trials]
        searched.append([f"{method['beta']:g}", f"{method['lr']:g}", *moves, *rewards])
    header = "beta | lr | chosen log-prob, change: DPO | pairwise NCA | reward: DPO | pairwise NCA"
    title = "The runs of the search, one seed, both methods at the same beta and learning rate:"
    return f"{table}\n{title}\n\n{markdown(header, searched)}"


def _table1(outcomes: Outcomes) -> str:
    dpo = outcomes[DPO.name]
    rows = []
    for name, outcome in outcomes.items():
        comparison = ["", ""]
        if outcome is not dpo:
            comparison = [spread(win_rates(outcome, dpo)), paired(outcome.rewards(), dpo.rewards())]
        searched = [record["reward"] for record in outcome.trials]
        search = f"{min(searched):.3f} to {max(searched):.3f}" if searched else ""
        rows.append([name, *outcome.parameters(), spread(outcome.rewards()), spread(outcome.exact()), *comparison, search])
    header = " | K | beta | alpha | lr | reward | exact | win rate against DPO | reward less DPO's | rewards in the search"
    return markdown(header, rows)


def _table2(outcomes: Outcomes) -> str:
    rows = []
    for outcome in outcomes.values():
        two = next(o for o in outcomes.values() if o.contender.loss == outcome.contender.loss and o.contender.K == 2)
        gain = "" if outcome is two else paired(outcome.rewards(), two.rewards())
        name = outcome.contender.name.split(",")[0]
        rows.append([name, *outcome.parameters(), spread(outcome.rewards()), spread(outcome.exact()), gain])
    return markdown(" | K | beta | alpha | lr | reward | exact | reward less that at K = 2", rows)


def _table3(outcomes: Outcomes) -> str:
    supervised = next(iter(outcomes.values()))
    rows = []
    for name, outcome in outcomes.items():
        changes = ["", "", ""]
        if outcome is not supervised:
            gains = (paired(getattr(outcome, how)(), getattr(supervised, how)()) for how in ("rewards", "greedy"))
            changes = [*gains, spread(outcome.moved("chosen"), 2, "+")]
        rows.append([name, *outcome.parameters(), spread(outcome.rewards()), spread(outcome.greedy()), *changes])
    header = " | K | beta | alpha | lr | accuracy, sampled | likeliest | sampled less SFT's | likeliest less SFT's"
    return markdown(f"{header} | chosen log-prob, change", rows)


def _draw_figure2(outcomes: Outcomes, path: Path) -> None:
    draw_curves({name: [record["curves"] for record in outcome.records] for name, outcome in outcomes.items()}, path)


def _draw_rewards(outcomes: Outcomes, path: Path) -> None:
    draw_points({name: outcome.rewards() for name, outcome in outcomes.items()}, "reward of held-out samples", path)


def _draw_accuracy(outcomes: Outcomes, path: Path) -> None:
    ways = {"sampled": Outcome.rewards, "likeliest": Outcome.greedy}
    points = {f"{name}, {way}": of(outcome) for way, of in ways.items() for name, outcome in outcomes.items()}
    draw_points(points, "accuracy on held-out problems", path)


SFT = Contender("SFT", None)
DPO = Contender("DPO", "dpo", K=2)
INFO_NCA = {K: Contender(f"InfoNCA, K = {K}", "info_nca", K=K) for K in (2, 3, 4)}
NCA = {K: Contender(f"NCA, K = {K}", "nca", K=K) for K in (2, 3, 4)}
PAIRWISE_NCA = Contender("pairwise NCA", "nca", K=2, pairwise=True)
BASELINES = (
    Contender("KTO", "kto", K=2),
    Contender("IPO", "ipo", K=2),
    DPO,
    Contender("DPO x 3", "dpo", K=4),
    Contender("DPO x C(4,2)", "dpo", K=4, pairs="all"),
)
REASONING = (
    Contender("SFT, chains", None, task="chains"),
    Contender("+ DPO", "dpo", K=2, task="chains"),
    Contender("+ NCA", "nca", K=2, pairwise=True, task="chains"),
)
# The usual beta of DPO, and the learning rate of the demo. alpha is not read here.
UNTUNED = (0.1, 0.0, 1e-4)
AT_USUAL_BETA = (
    Contender("DPO at beta 0.1", "dpo", K=2, given=UNTUNED),
    Contender("pairwise NCA at beta 0.1", "nca", K=2, pairwise=True, given=UNTUNED),
)

REPORTS = {
    "figure2": Report((DPO, PAIRWISE_NCA, *AT_USUAL_BETA), _figure2, _draw_figure2),
    "table1": Report((SFT, *BASELINES, INFO_NCA[4], NCA[4]), _table1, _draw_rewards),
    "table2": Report((*INFO_NCA.values(), *NCA.values()), _table2, _draw_rewards),
    "table3": Report(REASONING, _table3, _draw_accuracy),
}
