"""The layouts of reward and preference data: a table with a row for each, and how a row of data is read by it."""

from __future__ import annotations

import ast
import json
import re
from typing import Any, NamedTuple

from .messages import BadRow
from .paths import Found, Path, Row, as_paths, find, listed

PAIR = ("chosen", "rejected")
# The places of a prompt, if the layout names none; several paths in one entry are joined, line by line.
PROMPTS: tuple[Path | tuple[Path, ...], ...] = (
    "prompt",
    ("instruction", "input"),
    "question",
    "input",
    "query",
    "conversations",
    "messages",
)
# The values of a column that names the winner: the position of the better response; None for a tie.
_WINNERS = {"a": 0, "model_a": 0, "b": 1, "model_b": 1, "tie": None, "both_bad": None, "tie (bothbad)": None}


class Layout(NamedTuple):
    """One row of the table.

    Attributes:
        name: as printed.
        sets: public data sets or programs that use it, for the documentation.
        responses: one path to a list, or a path for each response.
        scores: likewise; for "winner", "strength" and "label" one path to a single value.
        reads: the kind of values in ``scores``. "scores": explicit rewards. "rank": 1 for the best, which becomes -1, -2, ...
            "winner": which response is better, counted from ``first``. "strength": by how much the second is better than the first.
            "label": whether the one response is desirable (KTO). "order": no scores, the first response is the best.
        prompt: the places of the prompt; if empty, any of ``PROMPTS``, or the messages before the response.
        chat: the texts are turns of a conversation, which go through the chat template.
        transcript: texts hold whole conversations ("Human: ... Assistant: ...").
        single: a row has one response; rows that follow one another with the same prompt become one.
        first: the number of the first response, for "winner".
    """

    name: str
    sets: str
    responses: Path | tuple[Path, ...] = PAIR
    scores: Path | tuple[Path, ...] | None = None
    reads: str = "scores"
    prompt: tuple[Path | tuple[Path, ...], ...] = ()
    chat: bool = False
    transcript: bool = False
    single: bool = False
    first: int = 0

    @property
    def unit(self) -> str:
        """The kind of its scores, one for all rows of a source. "preference": which response is better, not by how much."""
        return {"winner": "preference", "order": "preference"}.get(self.reads, self.reads)

    def columns(self, mark: str = "") -> str:
        """The columns that identify the layout, each between two ``mark``."""
        marked = [f"{mark}{' + '.join(as_paths(each))}{mark}" for each in self.prompt[:1]]
        marked += [f"{mark}{path}{mark}" for path in as_paths(self.responses)]
        scores = ", ".join(f"{mark}{path}{mark}" for path in as_paths(self.scores))
        return ", ".join(marked) + (f" with {scores}" if scores else "")

    def described(self) -> str:
        """The layout in one line."""
        notes = {"rank": "; ranks 1, 2, ... become scores -1, -2, ...", "strength": "; half of it for one, against the other"}
        return f"{self.name}: {self.columns()}{notes.get(self.reads, '')}"


LAYOUTS: tuple[Layout, ...] = (
    # This package's own, and TRL's.
    Layout("groups", "this package; any number of responses", "responses", "scores"),
    Layout("numbered", "thu-ml: ChenDRAG/ultrafeedback_reward", "A#", "score_A#"),
    Layout("pairs", "TRL, tulu-3 preference mixtures, Skywork-Reward-Preference, orpo-dpo-mix-40k, truthy-dpo", reads="order"),
    Layout("kto", "TRL: trl-lib/kto-mix-14k", ("completion",), "label", "label"),
    Layout("rated", "one response a row with its score", ("response",), ("score",), chat=True, transcript=True, single=True),
    # Pairs with a score each.
    Layout(
        "ultrafeedback_binarized", "HuggingFaceH4/ and trl-lib/ultrafeedback_binarized", PAIR, ("score_chosen", "score_rejected")
    ),
    Layout(
        "scored_pairs",
        "OpenRLHF/preference_dataset_mixture2_and_safe_pku, RLHFlow/*-standard",
        PAIR,
        ("chosen_score", "rejected_score"),
    ),
    Layout("rated_pairs", "argilla/dpo-mix-7k, allenai/olmo-2 and tulu-3 mixtures", PAIR, ("chosen_rating", "rejected_rating")),
    Layout(
        "ultrafeedback_cleaned", "argilla/ultrafeedback-binarized-preferences-cleaned", PAIR, ("chosen-rating", "rejected-rating")
    ),
    Layout(
        "capybara",
        "argilla/distilabel-capybara-dpo-7k-binarized, argilla/Capybara-Preferences",
        PAIR,
        ("rating_chosen", "rating_rejected"),
    ),
    Layout("rewarded_pairs", "pairs with a reward model's rewards", PAIR, ("chosen_reward", "rejected_reward")),
    Layout("reward_pairs", "pairs with a reward model's rewards", PAIR, ("reward_chosen", "reward_rejected")),
    Layout(
        "argilla_ultrafeedback",
        "argilla/ultrafeedback-binarized-preferences",
        ("chosen_response", "rejected_response"),
        ("chosen_avg_rating", "rejected_avg_rating"),
        prompt=("instruction",),
        chat=True,
    ),
    Layout(
        "distilabel_math",
        "argilla/distilabel-math-preference-dpo",
        ("chosen_response", "rejected_response"),
        ("chosen_rating", "rejected_rating"),
        prompt=("instruction",),
        chat=True,
    ),
    # Several responses with a score each.
    Layout(
        "on_policy",
        "princeton-nlp/llama3-ultrafeedback and the like (SimPO), snorkelai/Snorkel-Mistral-PairRM-DPO-Dataset",
        "all_generated_responses",
        "all_rm_scores",
        chat=True,
    ),
    Layout("nectar", "berkeley-nest/Nectar", "answers.answer", "answers.rank", "rank", chat=True, transcript=True),
    Layout(
        "ultrafeedback",
        "openbmb/UltraFeedback",
        "completions.response",
        "completions.overall_score",
        prompt=("instruction",),
        chat=True,
    ),
    Layout(
        "ultrafeedback_fine",
        "openbmb/UltraFeedback without overall_score",
        "completions.response",
        "completions.fine-grained_score",
        prompt=("instruction",),
        chat=True,
    ),
    Layout(
        "stack_exchange",
        "HuggingFaceH4/stack-exchange-preferences",
        "answers.text",
        "answers.pm_score",
        prompt=("question",),
        chat=True,
    ),
    Layout("distilabel", "argilla/distilabel-intel-orca-dpo-pairs", "generations", "rating", chat=True),
    Layout("distilabel_ratings", "distilabel's UltraFeedback task", "generations", "ratings", chat=True),
    Layout("openhermes", "argilla/OpenHermesPreferences", "candidates_completions", "ranks", "rank", chat=True),
    Layout(
        "webgpt",
        "openai/webgpt_comparisons",
        ("answer_0", "answer_1"),
        ("score_0", "score_1"),
        prompt=("question.full_text", "question"),
        chat=True,
    ),
    Layout(
        "shp", "stanfordnlp/SHP and SHP-2", ("human_ref_A", "human_ref_B"), ("score_A", "score_B"), prompt=("history",), chat=True
    ),
    # One scored response a row, those to one prompt one after another.
    Layout(
        "helpsteer",
        "nvidia/HelpSteer and HelpSteer2 (another attribute: columns {score: correctness})",
        ("response",),
        ("helpfulness",),
        chat=True,
        transcript=True,
        single=True,
    ),
    Layout(
        "summarize_axis",
        "openai/summarize_from_feedback, axis",
        ("summary.text",),
        ("summary.axes.overall",),
        prompt=(("info.title", "info.post"), "info.article"),
        chat=True,
        single=True,
    ),
    # Which of two is better, or by how much.
    Layout(
        "helpsteer2_preference",
        "nvidia/HelpSteer2, preference",
        ("response_1", "response_2"),
        "preference_strength",
        "strength",
        chat=True,
        transcript=True,
    ),
    Layout(
        "helpsteer3",
        "nvidia/HelpSteer3",
        ("response1", "response2"),
        "overall_preference",
        "strength",
        prompt=("context",),
        chat=True,
    ),
    Layout("pku_saferlhf", "PKU-Alignment/PKU-SafeRLHF", ("response_0", "response_1"), "better_response_id", "winner", chat=True),
    Layout(
        "summarize_comparisons",
        "openai/summarize_from_feedback, comparisons",
        "summaries.text",
        "choice",
        "winner",
        prompt=(("info.title", "info.post"), "info.article"),
        chat=True,
    ),
    Layout(
        "alpaca_farm",
        "tatsu-lab/alpaca_farm",
        ("output_1", "output_2"),
        "preference",
        "winner",
        prompt=(("instruction", "input"),),
        chat=True,
        first=1,
    ),
    Layout(
        "arena",
        "lmsys/chatbot_arena_conversations, lmarena-ai/arena-human-preference",
        ("conversation_a", "conversation_b"),
        "winner",
        "winner",
    ),
    Layout(
        "preference_collection",
        "prometheus-eval/Preference-Collection",
        ("orig_response_A", "orig_response_B"),
        "orig_preference",
        "winner",
        prompt=("orig_instruction",),
        chat=True,
    ),
    # A better and a worse response under other names, or beside another form of prompt.
    Layout("ultrainteract", "openbmb/UltraInteract_pair", PAIR, None, "order", prompt=("trajectory",)),
    Layout("hh_rlhf", "Anthropic/hh-rlhf", PAIR, None, "order", chat=True, transcript=True),
    Layout("llamafactory_sharegpt", "LLaMA-Factory, sharegpt", PAIR, None, "order", prompt=("conversations",)),
    Layout(
        "llamafactory_alpaca", "LLaMA-Factory, alpaca; axolotl", PAIR, None, "order", prompt=(("instruction", "input"),), chat=True
    ),
    Layout("llamafactory_v1", "LLaMA-Factory, v1", ("chosen_messages", "rejected_messages"), None, "order"),
    Layout("axolotl", "axolotl, chat_template.default", PAIR, None, "order", prompt=("messages",)),
    Layout("intel_orca", "Intel/orca_dpo_pairs, axolotl chatml.intel", PAIR, None, "order", prompt=("question",), chat=True),
    Layout(
        "distilabel_orca",
        "argilla/distilabel-intel-orca-dpo-pairs without ratings, axolotl chatml.icr",
        PAIR,
        None,
        "order",
        prompt=("input",),
        chat=True,
    ),
    Layout(
        "chosen_response",
        "nvidia/When2Call, axolotl chatml.argilla",
        ("chosen_response", "rejected_response"),
        None,
        "order",
        chat=True,
    ),
    Layout("swift", "ms-swift", ("messages", "rejected_response"), None, "order"),
    Layout("swift_messages", "ms-swift, rejected_messages", ("messages", "rejected_messages"), None, "order"),
    Layout(
        "stack_exchange_paired",
        "lvwerra/stack-exchange-paired",
        ("response_j", "response_k"),
        None,
        "order",
        prompt=("question",),
        chat=True,
    ),
    # One labelled response a row.
    Layout("kto_messages", "ms-swift, KTO", ("messages",), "label", "label"),
    Layout("llamafactory_kto", "LLaMA-Factory, KTO in sharegpt", ("messages",), "kto_tag", "label"),
    Layout("llamafactory_kto_conversations", "LLaMA-Factory, KTO in sharegpt", ("conversations",), "kto_tag", "label"),
    Layout(
        "llamafactory_kto_alpaca",
        "LLaMA-Factory, KTO in alpaca",
        ("output",),
        "kto_tag",
        "label",
        prompt=(("instruction", "input"),),
        chat=True,
    ),
)

WANTED = (
    "prompt + responses + scores, prompt + chosen + rejected, A0, A1, ... + score_A0, score_A1, ..., or another of docs/data.md"
)


def fitting(row: Row) -> list[tuple[Layout, int]]:
    """The layouts that the row fits, each with the number of scores found; the one with the most scores is first."""
    fits = [(layout, count) for layout in LAYOUTS if (count := _count(layout, row)) is not None]
    # With equally many scores, the layout identified by more columns is first, as it is more specific; then the table's order
    # counts.
    return sorted(fits, key=lambda fit: (-fit[1], fit[0].name == "groups" and "scores" not in row, -_specific(fit[0])))


def _specific(layout: Layout) -> int:
    return len(layout.prompt) + len(as_paths(layout.responses)) + len(as_paths(layout.scores)) + layout.transcript


def _count(layout: Layout, row: Row) -> int | None:
    """How many scores the layout finds in the row; None if the row lacks columns that identify the layout."""
    if layout.prompt and not any(_there(row, as_paths(each)[0]) for each in layout.prompt):
        return None
    if layout.name == "groups":  # its scores may be missing; then its responses alone identify it
        return None if row.get("responses") is None else _numbers(row, "scores")
    responses = as_paths(layout.responses)
    if not all(_there(row, path) for path in responses):
        return None
    if layout.transcript and layout.reads == "order" and not _transcripts(row, responses):
        return None
    if layout.scores is None:
        return 0
    if not all(_there(row, path) for path in as_paths(layout.scores)):
        return None
    if layout.reads in ("scores", "rank"):
        return sum(_numbers(row, path) for path in as_paths(layout.scores))
    return 1


def _transcripts(row: Row, paths: tuple[Path, ...]) -> bool:
    return all(isinstance(row[path], str) and "\n\nHuman:" in row[path] and "\n\nAssistant:" in row[path] for path in paths)


def _there(row: Row, path: Path) -> bool:
    return any(value is not None for value in find(row, path).values())


def _numbers(row: Row, path: Path) -> int:
    found = find(row, path)
    items = [item for value in found.values() for item in (value if isinstance(value, list) else [value])]
    return sum(item is not None for item in items)


def begun(row: Row) -> Layout | None:
    """The first layout of which the row has a response column, even a null one; for a message about what is missing."""
    return next((layout for layout in LAYOUTS if any(find(row, path) for path in as_paths(layout.responses))), None)


def raw_scores(layout: Layout, row: Row, responses: Found) -> Found | None:
    """A number, or null, for each response, under the name of its column; None if there is no column."""
    if layout.reads == "order":
        return dict(zip(responses, [1.0, *[0.0] * (len(responses) - 1)], strict=True))
    if layout.scores is None:
        return None
    if layout.reads in ("scores", "rank"):
        scores = listed(row, layout.scores)
        if layout.reads == "rank":
            scores = {name: -rank if _is_number(rank) else rank for name, rank in scores.items()}
        return scores
    value: Any
    ((name, value),) = find(row, str(layout.scores)).items() or {str(layout.scores): None}.items()
    if layout.reads == "label":
        return {name: _label(name, value)}
    if layout.reads == "strength":
        if not _is_number(value) or not abs(value) < 1e30:
            raise BadRow(name, f"got {value!r}, wanted a finite number")
        return {f"{name} of {response}": sign * value / 2 for response, sign in zip(responses, (-1, 1), strict=True)}
    winner = _winner(name, value, layout.first, len(responses))
    return {f"{name} of {response}": float(i == winner) for i, response in enumerate(responses)}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _label(name: str, value: object) -> float:
    known = {"true": 1.0, "1": 1.0, "1.0": 1.0, "false": 0.0, "0": 0.0, "0.0": 0.0}
    label = known.get(str(value).lower())
    if label is None:
        raise BadRow(name, f"got {value!r}, wanted true or false")
    return label


def _winner(name: str, value: Any, first: int, count: int) -> int | None:
    if isinstance(value, str) and value.lower() in _WINNERS:
        return _WINNERS[value.lower()]
    number = int(value) if isinstance(value, str) and value.isdecimal() else value
    if not _is_number(number) or not 0 <= number - first < count or number != int(number):
        raise BadRow(name, f"got {value!r}, wanted the number of a response, from {first} to {first + count - 1}")
    return int(number) - first


def typed(row: Row) -> dict[str, object]:
    """A row of a table of texts (CSV), with scores as numbers, and with lists and messages parsed."""
    return {name: _typed(name, cell) if isinstance(cell, str) else cell for name, cell in row.items()}


def _typed(name: str, cell: str) -> object:
    if re.fullmatch(r"score_A\d+", name) or name in _SCORES:
        try:
            return float(cell)
        except ValueError:
            pass
    if cell[:1] not in ("[", "{"):
        return cell
    for read in (json.loads, ast.literal_eval):  # pandas writes lists in Python's syntax
        try:
            value = read(cell)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        messages = value if isinstance(value, list) else [value]
        if name in _LISTS or all(isinstance(item, dict) and {"role", "from"} & set(item) for item in messages):
            return value
    return cell


_SCORES = {path for layout in LAYOUTS if layout.reads in ("scores", "rank", "strength") for path in as_paths(layout.scores)}
_LISTS = {path.split(".")[0] for each in LAYOUTS for path in (each.responses, each.scores) if isinstance(path, str)} | {"finished"}


def table() -> str:
    """The table of layouts for the documentation, in Markdown."""
    reads = {
        "scores": "as given",
        "rank": "ranks 1, 2, ... become -1, -2, ...",
        "winner": "1 and 0: which is better",
        "order": "1 and 0: which is better",
        "strength": "half the strength for the second, against the first",
        "label": "1 and 0, and KTO's labels",
    }
    lines = ["| layout | columns | scores | known from |", "|---|---|---|---|"]
    for layout in LAYOUTS:
        lines.append(f"| {layout.name} | {layout.columns('`')} | {reads[layout.reads]} | {layout.sets} |")
    return "\n".join(lines)
