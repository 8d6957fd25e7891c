"""The questions of docs/protocol.md: for each its contenders, its table and its picture. A contender is a method in a world."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

from ..loss_table import LOSSES
from .align import Method
from .figure import draw_lines, draw_points
from .inference import Interval, answer, holm, interval, p_value, paired, share_above
from .search import Contender


@dataclass(frozen=True)
class Outcome:
    """A contender's tuned method, the records of its search, and the records of its tests, one per seed."""

    method: Method | None
    trials: list[dict[str, Any]]
    records: list[dict[str, Any]]

    def values(self, name: str) -> list[float]:
        return [record[name] for record in self.records]

    def moved(self, which: str) -> list[float]:
        """The change of the mean held-out log-prob of the ``chosen`` or ``rejected`` responses over the training, per seed."""
        return [record[which][-1] - record[which][0] for record in self.records]


Outcomes = dict[Contender, Outcome]


@dataclass(frozen=True)
class Question:
    """The contenders that a question compares, its answers as Markdown, and its picture, if it has one."""

    contenders: tuple[Contender, ...]
    table: Callable[[Outcomes], str]
    draw: Callable[[Outcomes, Path], None] | None = None


# --- contenders ------------------------------------------------------------------------------------------------------

SFT = Contender("SFT", None)
DPO = Contender("DPO", "dpo", K=2)
DPO_ALL = Contender("DPO x C(4,2)", "dpo", pairs="all")
PAIRWISE_NCA = Contender("pairwise NCA", "nca", K=2, pairwise=True)
INFO_NCA = {K: Contender(f"InfoNCA, K = {K}", "info_nca", K=K) for K in (2, 3, 4)}
NCA = {K: Contender(f"NCA, K = {K}", "nca", K=K) for K in (2, 3, 4)}
MAIN = (DPO, Contender("DPO x 3", "dpo"), DPO_ALL, PAIRWISE_NCA, INFO_NCA[4], NCA[4])
MORE = (Contender("KTO", "kto", K=2), Contender("IPO", "ipo", K=2))
# In the order in which they are run.
NOISY = ("noise_0.4", "exact", "writers", "noise_0.2", "noise_0.8", "noise_by_rank", "noise_heavy", "near")
BETAS = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4)


def _in(world: str, *contenders: Contender) -> tuple[Contender, ...]:
    return tuple(replace(contender, world=world) for contender in contenders)


def _at(contender: Contender, beta: float) -> Contender:
    return replace(contender, name=f"{contender.name} at beta {beta:g}", given=(beta, 0.3, 1.7e-4))


# --- tables ----------------------------------------------------------------------------------------------------------


def markdown(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """A Markdown table."""
    lines = [header, ("---",) * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _parameters(method: Method | None) -> str:
    if method is None:
        return ""
    alpha = f", alpha {method.alpha:g}" if "alpha" in LOSSES[method.loss].takes else ""
    return f"beta {method.beta:g}{alpha}, lr {method.lr:g}"


def _delta(outcomes: Outcomes, world: str) -> float:
    """The ``delta`` of a world: half of the lead that DPO on all pairs has over DPO on the best against the rest, >= 0.003."""
    dpo, every = (outcomes[replace(contender, world=world)].values("reward") for contender in (DPO, DPO_ALL))
    return _half_of_lead(every, dpo)


def _half_of_lead(every: list[float], dpo: list[float]) -> float:
    return max(0.003, (mean(every) - mean(dpo)) / 2)


def _as_a_whole(asked: dict[str, tuple[list[float], list[float]]]) -> str:
    """Which of a question's differences are not 0 with Holm's correction for all that are asked, as a line of text."""
    corrected = holm([p_value(*pair) for pair in asked.values()])
    found = {
        name: mean(ours) > mean(theirs) for (name, (ours, theirs)), p in zip(asked.items(), corrected, strict=True) if p < 0.05
    }
    above, below = (", ".join(name for name, is_above in found.items() if is_above == side) or "none" for side in (True, False))
    return f"\nWith Holm's correction for {len(asked)} differences, above 0: {above}; below 0: {below}.\n"


def _table1(outcomes: Outcomes) -> str:
    rows, whole = [], {}
    for world in NOISY:
        delta = _delta(outcomes, world)
        dpo, every, start = (outcomes[replace(c, world=world)].values("reward") for c in (DPO, DPO_ALL, SFT))
        for contender, outcome in outcomes.items():
            if contender.world != world:
                continue
            reward = outcome.values("reward")
            against = paired(reward, every)
            asked = contender.name in (INFO_NCA[4].name, NCA[4].name)
            if asked:
                whole[f"{contender.name} in {world}"] = (reward, every)
            differences = ("", "") if contender.loss is None else (paired(reward, dpo).text(), against.text())
            best = interval([outcome.method.beta * change for change in outcome.moved("chosen")]).text(2) if outcome.method else ""
            rows.append(
                (
                    world,
                    contender.name,
                    _parameters(outcome.method),
                    f"{mean(reward):.4f}",
                    paired(reward, start).text() if contender.loss else "",
                    *differences,
                    answer(against, delta) if asked else "",
                    best,
                )
            )
    header = ("world", "method", "setting", "reward", "less SFT's", "less DPO's", "less DPO x C(4,2)'s", "answer", "r of the best")
    return markdown(header, rows) + _as_a_whole(whole)


def _table2(outcomes: Outcomes) -> str:
    rows, whole = [], {}
    for contender, outcome in outcomes.items():
        if contender.loss == "dpo":
            continue
        family = INFO_NCA if contender.loss == "info_nca" else NCA
        reward = outcome.values("reward")
        fewer = outcomes[replace(family[2], world=contender.world)].values("reward")
        gain = paired(reward, fewer)
        if contender.K == 4:
            whole[f"{contender.name} in {contender.world}"] = (reward, fewer)
        row = (contender.world, contender.name, _parameters(outcome.method), f"{mean(reward):.4f}")
        told = ("", "") if contender.K == 2 else (gain.text(), answer(gain, _delta(outcomes, contender.world)))
        rows.append((*row, *told))
    return markdown(("world", "method", "setting", "reward", "less that at K = 2", "answer"), rows) + _as_a_whole(whole)


def _table3(outcomes: Outcomes) -> str:
    start = next(iter(outcomes.values()))
    rows = []
    for contender, outcome in outcomes.items():
        gains: tuple[str, ...] = ("", "")
        if contender.loss:
            gains = tuple(paired(outcome.values(how), start.values(how)).text() for how in ("reward", "greedy_reward"))
        accuracy = (f"{mean(outcome.values(how)):.4f}" for how in ("reward", "greedy_reward"))
        rows.append((contender.name, _parameters(outcome.method), *accuracy, *gains))
    header = ("method", "setting", "accuracy, sampled", "likeliest", "sampled less SFT's", "likeliest less SFT's")
    return markdown(header, rows)


def _optimum(outcomes: Outcomes) -> str:
    rows = []
    for contender, outcome in outcomes.items():
        slope, deviation = (interval([record["optimum"][what] for record in outcome.records]) for what in ("slope", "deviation"))
        told = "yes" if slope.low > 0.8 and slope.high < 1.2 else "cannot tell" if slope.half is None else "no"
        rows.append((contender.name, slope.text(3), deviation.text(3), told))
    return markdown(("method", "slope", "deviation over spread", "answer"), rows)


def _figure2(outcomes: Outcomes) -> str:
    rows = []
    for contender, outcome in outcomes.items():
        if contender.loss != "dpo":
            continue
        other = next(o for c, o in outcomes.items() if c.loss == "nca" and (c.world, c.given) == (contender.world, contender.given))
        ours, theirs = outcome.moved("chosen"), other.moved("chosen")
        dpo, nca, difference = interval(ours), interval(theirs), paired(theirs, ours)
        setting = f"beta {contender.given[0]:g}" if contender.given else "tuned"
        prevents = "" if dpo.high >= 0 else "yes" if difference.low > 0 else "no" if difference.high < 0 else "cannot tell"
        rows.append((contender.world, setting, dpo.text(2), nca.text(2), difference.text(2), _sign(dpo), prevents))
    header = ("world", "setting", "DPO's change", "pairwise NCA's", "difference", "DPO lowers", "NCA prevents")
    return markdown(header, rows)


def _sign(change: Interval) -> str:
    return "yes" if change.high < 0 else "no" if change.low > 0 else "cannot tell"


def _curves(outcomes: Outcomes) -> dict[tuple[str, str], list[Outcome]]:
    """The outcomes in the order of beta, for each world and method."""
    curves: dict[tuple[str, str], list[Outcome]] = {}
    for contender, outcome in outcomes.items():
        if contender.given:
            curves.setdefault((contender.world, contender.name.split(" at beta")[0]), []).append(outcome)
    return curves


def _at_kl(curve: list[Outcome], seed: int, kl: float) -> float:
    """The reward at this KL on the line through a seed's points, sorted by KL; beyond the ends, that of the nearest end."""
    points = sorted((outcome.records[seed]["kl"], outcome.records[seed]["reward"]) for outcome in curve)
    return float(np.interp(kl, [x for x, _ in points], [y for _, y in points]))


def _at_best_of(other: list[Outcome], curve: list[Outcome]) -> tuple[list[float], list[float], list[float]]:
    """For each seed, the best reward on the curve ``other``, the reward of ``curve`` at the same KL, and that KL."""
    points = [[outcome.records[seed] for outcome in other] for seed in range(len(other[0].records))]
    best = [max(point, key=lambda record: record["reward"]) for point in points]
    rewards = [_at_kl(curve, seed, record["kl"]) for seed, record in enumerate(best)]
    return [record["reward"] for record in best], rewards, [record["kl"] for record in best]


def _frontier(outcomes: Outcomes) -> str:
    curves, rows, whole = _curves(outcomes), [], {}
    for (world, name), curve in curves.items():
        dpo = curves[world, DPO.name]
        theirs, ours, kl = _at_best_of(dpo, curve)
        told = ("", "")
        if curve is not dpo:
            gain = paired(ours, theirs)
            told = (gain.text(), answer(gain, _half_of_lead(_at_best_of(dpo, curves[world, DPO_ALL.name])[1], theirs)))
            whole[f"{name} in {world}"] = (ours, theirs)
        top = interval(_at_best_of(curve, curve)[0])
        far = f"{mean(curve[0].values('kl')):.2f}, {mean(curve[0].values('reward')):.3f}"
        error = max(record["kl_error"] for outcome in curve for record in outcome.records)
        rows.append((world, name, top.text(), f"{mean(kl):.3f}", *told, far, f"{error:.3f}"))
    at_equal_kl = ("KL of DPO's best", "reward there less DPO's", "answer")
    far_away = f"KL and reward at beta {BETAS[0]:g}"
    header = ("world", "method", "best reward over beta", *at_equal_kl, far_away, "largest error of a KL")
    return markdown(header, rows) + _as_a_whole(whole)


def _settings(outcomes: Outcomes) -> str:
    rows = []
    for contender, outcome in outcomes.items():
        if contender.loss:
            share, low, high = _share(outcome, outcomes[replace(SFT, world=contender.world)])
            rows.append((contender.world, contender.name, f"{share:.2f} [{low:.2f}, {high:.2f}]"))
    return markdown(("world", "method", "share of the search above SFT"), rows)


def _share(outcome: Outcome, start: Outcome) -> tuple[float, float, float]:
    """The share of the search's runs that end above the supervised model of the same seed, on the validation problems."""
    level = {record["settings"]["seed"]: record["reward"] for record in start.trials}
    groups: dict[str, list[bool]] = {}
    for record in outcome.trials:
        above = record["reward"] > level[record["settings"]["seed"]]
        groups.setdefault(str(record["settings"]["method"]), []).append(above)
    return share_above(list(groups.values()))


# --- pictures --------------------------------------------------------------------------------------------------------


def _draw_differences(outcomes: Outcomes, path: Path) -> None:
    def rewards(contender: Contender, world: str) -> list[float]:
        return outcomes[replace(contender, world=world)].values("reward")

    points = {
        f"{world}: {contender.name}": list(np.subtract(rewards(contender, world), rewards(DPO_ALL, world)))
        for world in NOISY
        for contender in (PAIRWISE_NCA, INFO_NCA[4], NCA[4])
    }
    draw_points(points, "reward less that of DPO x C(4,2), a point a seed", path)


def _draw_frontier(outcomes: Outcomes, path: Path) -> None:
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for (world, name), curve in _curves(outcomes).items():
        panels.setdefault(world, {})[name] = [(mean(o.values("kl")), mean(o.values("reward"))) for o in curve]
    draw_lines(panels, "KL(policy || reference), nats", "reward", path, log_x=True)


def _draw_figure2(outcomes: Outcomes, path: Path) -> None:
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for (world, name), curve in _curves(outcomes).items():
        panels.setdefault(world, {})[name] = [(o.method.beta, mean(o.moved("chosen"))) for o in curve if o.method]
    draw_lines(panels, "beta", "change of the chosen log-prob, nats", path, log_x=True)


# --- the questions ---------------------------------------------------------------------------------------------------

_PAIRWISE = (DPO, PAIRWISE_NCA)
_CHAINS = _in("chains", SFT, DPO, PAIRWISE_NCA)
_USUAL = tuple(replace(c, name=f"{c.name} at beta 0.1", given=(0.1, 0.0, 1e-4)) for c in _CHAINS[1:])
_UNLIKELY = tuple(replace(c, world="unlikely", given=(1.0, 0.3, 3e-4)) for c in (INFO_NCA[4], NCA[4]))
_MAIN = tuple(
    contender for world in NOISY for contender in _in(world, SFT, *MAIN, *(MORE if world in ("exact", "noise_0.4") else ()))
)
_ALONG_BETA = {
    "exact": _in("exact", *(_at(contender, beta) for contender in MAIN for beta in BETAS)),
    "noise_0.4": _in("noise_0.4", *(_at(contender, beta) for contender in MAIN for beta in BETAS)),
    "writers": _in("writers", *(_at(contender, beta) for contender in _PAIRWISE for beta in BETAS)),
}
_PAIRS_ALONG_BETA = tuple(
    contender
    for world, along in _ALONG_BETA.items()
    for contender in (*_in(world, *_PAIRWISE), *(c for c in along if c.name.split(" at beta")[0] in (DPO.name, PAIRWISE_NCA.name)))
)

QUESTIONS = {
    "table1": Question(_MAIN, _table1, _draw_differences),
    "settings": Question(_MAIN, _settings),
    "optimum": Question(_UNLIKELY, _optimum),
    "figure2": Question(_PAIRS_ALONG_BETA, _figure2, _draw_figure2),
    "table2": Question(
        tuple(
            c for world in ("exact", "noise_0.4", "writers") for c in _in(world, DPO, DPO_ALL, *INFO_NCA.values(), *NCA.values())
        ),
        _table2,
    ),
    "table3": Question((*_CHAINS, *_USUAL), _table3),
    "frontier": Question((*_ALONG_BETA["exact"], *_ALONG_BETA["noise_0.4"]), _frontier, _draw_frontier),
}
