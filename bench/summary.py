"""A line for each stored problem compares this package with its ceiling, other packages and the goals for an H100."""

from __future__ import annotations

from .measure import CEILING
from .schema import PLAIN, SIDE_ROWS, by_problem, is_ours, label

COMPILED = "torch.compile"
HALF = ", half ignored"
# The goals on an H100, by suite and by what identifies a problem in it; their names are those of the facts below.
GOALS = {
    ("logps", "fwd bfloat16"): {"share": "93%", COMPILED: "2x", "peer": "1x"},
    ("logps", "fwd+bwd bfloat16"): {"share": "90%"},
    ("linear", "no gradient"): {"units": "1.1", "extra": "300"},
    ("linear", "frozen head"): {"units": "2.2", "extra": "300"},
    ("linear", "trained head"): {"units": "4.3", "extra": "300"},
    ("group", ""): {PLAIN: "3x"},
}


def summary(document: dict) -> str:
    """One line for each stored problem; a backward in place has its own line."""
    lines = []
    for group in by_problem(document["rows"]).values():
        mine = [row for row in group if is_ours(row) and not SIDE_ROWS.search(row["implementation"])]
        for pass_name in dict.fromkeys(row["pass"] for row in mine):
            alike = [row for row in mine if row["pass"] == pass_name]
            lines.append(_line(alike, group, document))
    return "\n".join(lines)


def _line(mine: list[dict], group: list[dict], document: dict) -> str:
    """The fastest of ``mine`` with its facts and goals, then the others."""
    mine = sorted(mine, key=lambda row: row["ms"] or float("inf"))
    best, others = mine[0], mine[1:]
    if best["ms"] is None:
        return f"{_title(best)}: " + "; ".join(dict.fromkeys(row["status"] for row in mine))
    facts = _facts(best, group, document["rows"])
    goals: dict[str, str] = _goals(best) if document["header"]["device"] == "cuda" else {}
    texts = [text + (f" (goal {goals[name]})" if name in goals else "") for name, text in facts.items()]
    return f"{_title(best)}: " + ", ".join([_timed(best), *texts, *map(_timed, others)])


def _title(row: dict) -> str:
    return ", ".join(text for text in (row["case"], row["dtype"], row["pass"]) if text)


def _timed(row: dict) -> str:
    return f"{row['implementation']} " + (f"{row['ms']:.3f} ms" if row["ms"] else row["status"])


def _facts(best: dict, group: list[dict], rows: list[dict]) -> dict[str, str]:
    facts = {}
    linear = " D=" in best["case"]
    if best["share"] is not None:
        facts["share"] = f"{best['share']:.0%} of the ceiling"
    if best["units"] is not None:
        facts["units"] = f"{best['units']:.2f} {'U' if linear else 'reads'}"
    if linear and best["peak_mib"] is not None:
        facts["extra"] = f"{best['peak_mib'] - best['result_mib']:.0f} MiB beyond results"
    if best["tokens_per_second"] is not None:
        facts["tokens"] = f"{best['tokens_per_second']:.0f} tokens/s"
    peers = [row for row in group if row["ms"] and not is_ours(row) and not row["implementation"].startswith(CEILING)]
    named = {row["implementation"]: row for row in peers if row["pass"] == best["pass"].removesuffix(" in place")}
    facts |= {name: _against(named[name], best) for name in (PLAIN, COMPILED) if name in named}
    peers = [row for row in peers if row["implementation"] not in (PLAIN, COMPILED)]
    if peers:
        facts["peer"] = _against(min(peers, key=lambda row: row["ms"]), best)
    same = ("case", "dtype", "pass", "implementation")
    whole = [best["case"].removesuffix(HALF), *(best[key] for key in same[1:])]
    for row in rows if HALF in best["case"] else []:
        if [row[key] for key in same] == whole and row["ms"]:
            facts["half"] = f"{best['ms'] / row['ms']:.2f} of the time of all rows"
    return facts


def _against(peer: dict, best: dict) -> str:
    return f"{peer['ms'] / best['ms']:.2f}x {label(peer)}"


def _goals(row: dict) -> dict[str, str]:
    if HALF in row["case"]:
        return {"half": "0.50"}
    problem = {"logps": f"{row['pass']} {row['dtype']}", "linear": row["case"].partition(",")[0]}
    return GOALS.get((row["suite"], problem.get(row["suite"], "")), {})


def lacking(document: dict) -> list[str]:
    """Why a run counts as failed: rows of this package that are wrong or failed, and problems where it did not run."""
    reasons = []
    for group in by_problem(document["rows"]).values():
        mine = [row for row in group if is_ours(row)]
        bad = [row for row in mine if row["status"].startswith(("wrong", "failed"))]
        if all(row["ms"] is None for row in mine):
            bad = mine
        reasons += [f"{_title(row)}: {row['implementation']}: {row['status']}" for row in bad]
    return reasons
