"""Reads one row of data, in any layout, as a prompt, its responses and their scores."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .layouts import PROMPTS, WANTED, Layout, begun, fitting, raw_scores
from .messages import BadRow, Empty, Message, as_messages, as_text, as_tools, from_transcript, is_chat, merged, same_messages
from .paths import Row, as_paths, find, listed

_FLOAT32_MAX = 3.4028234e38  # scores become float32, in which a larger number is infinite
_MEDIA = {"image": "an image", "images": "an image", "videos": "a video", "audios": "a sound"}


def group_of(row: Row, forced: Layout | None, *, chat: bool, skip: bool, scores_required: bool) -> dict[str, Any]:
    """The row as ``load_groups`` stores it.

    Args:
        row: with its columns under our names, if the user mapped them.
        forced: the layout to use; ``None`` for the one that keeps the most scores.
        chat: texts are turns of a chat.
        skip: leave a bad response out; it does not make the row a bad one.
        scores_required: false where responses may have no scores.

    Raises:
        BadRow: what is wrong, and in which column.
    """
    for column, medium in _MEDIA.items():
        if row.get(column):
            raise BadRow(column, f"{medium}, wanted text alone")
    layout, count, others = _layout(row, forced)
    responses, scores = _responses_and_scores(layout, row, scores_required)
    finished, responses = _finished(row, responses)
    if layout.transcript and layout.reads == "order":
        responses = {name: from_transcript(value) or value for name, value in responses.items()}
    responses, scores, dropped = _usable(layout, responses, scores, skip)
    prompt = _prompt(layout, row, responses)
    system, tools = _system(row), as_tools(row.get("tools"))
    in_messages = chat or layout.chat or is_chat(prompt) or any(map(is_chat, responses.values()))
    made: dict[str, Any] = {"layout": layout.name, "score_count": count, "others": others, "dropped": dropped or None}
    if in_messages or system or tools:
        made["kind"] = "chat"
        made["promoted"] = not in_messages  # plain text, apart from the system message or the tools
        prompt_messages, made["chat_responses"] = _as_chat(prompt, responses)
        made["chat_prompt"] = _with_system(system, prompt_messages)
    else:
        made["kind"] = "text"
        made["text_prompt"] = as_text("prompt", prompt)
        made["text_responses"] = list(responses.values())
    if scores is not None:
        made["scores"] = [float(score) for score in scores.values()]
        if layout.reads == "label":
            made["desirable"] = [score == 1 for score in made["scores"]]
    if tools:
        made["tools"] = tools
    if finished is not None:
        made["finished"] = [finished[name] for name in responses]
    if (kwargs := row.get("chat_template_kwargs")) and isinstance(kwargs, Mapping):
        made["template_kwargs"] = dict(kwargs)
    return made


def _layout(row: Row, forced: Layout | None) -> tuple[Layout, int, str | None]:
    """The layout of the row, the number of its scores, and another layout that it fits with fewer scores."""
    fits = fitting(row)
    if forced is not None:
        counts = {layout.name: count for layout, count in fits}
        if forced.name not in counts:
            raise BadRow(forced.columns(), f"missing, wanted layout {forced.name} as in other rows of the file")
        return forced, counts[forced.name], None
    if not fits:
        layout = begun(row)
        if layout is None:
            raise BadRow(", ".join(column for column in row if row[column] is not None), f"unknown layout; wanted {WANTED}")
        return layout, 0, None
    (layout, count), *rest = fits
    fewer = [other for other, fewer in rest if fewer < count and other.responses != layout.responses]
    return layout, count, f"{fewer[0].name} ({fewer[0].columns()})" if fewer else None


def _responses_and_scores(layout: Layout, row: Row, scores_required: bool) -> tuple[dict[str, Any], dict[str, Any] | None]:
    responses = dict(listed(row, layout.responses))
    if layout.name == "numbered":  # null in a row with fewer responses
        given = [name for name, value in responses.items() if not value is row.get(f"score_{name}") is None]
        responses = {name: responses[name] for name in given}
        scores = {f"score_{name}": row.get(f"score_{name}") for name in given}
    elif not scores_required and not any(find(row, path) for path in as_paths(layout.scores)) and layout.reads == "scores":
        scores = {}
    else:
        scores = raw_scores(layout, row, responses) or {}
    if not responses:
        named = "responses" if "responses" in row else ", ".join(find(row, str(layout.responses))) or str(layout.responses)
        raise BadRow(named, "no responses")
    if not scores_required and all(score is None for score in scores.values()):
        return responses, None
    if len(scores) != len(responses):
        raise BadRow(", ".join(as_paths(layout.scores)), f"got {len(scores)} scores for {len(responses)} responses")
    return responses, scores


def _finished(row: Row, responses: dict[str, Any]) -> tuple[dict[str, bool] | None, dict[str, Any]]:
    """Which responses are finished, if the row says so, and the responses without that key."""
    given = row.get("finished")
    flags: dict[str, object] = dict.fromkeys(responses)
    if isinstance(given, list):
        if len(given) != len(responses):
            raise BadRow("finished", f"got {len(given)} values for {len(responses)} responses")
        flags = dict(zip(responses, given, strict=True))
    elif given is not None:
        flags = dict.fromkeys(responses, given)
    bare = {}
    for name, value in responses.items():
        last = value[-1] if isinstance(value, list) and value else value
        if isinstance(last, Mapping) and last.get("finished") is not None:
            flags[name] = last["finished"]
        bare[name] = _bare(value)
    for name, flag in flags.items():
        if flag is not None and not isinstance(flag, bool):
            raise BadRow("finished", f"got {flag!r} for {name}, wanted true or false")
    if set(flags.values()) == {None}:
        return None, bare
    return {name: flag is not False for name, flag in flags.items()}, bare


def _bare(value: Any) -> Any:
    """A response without ``finished``; an object that holds only a text becomes that text."""
    if isinstance(value, list):
        return [*value[:-1], _bare(value[-1])] if value and isinstance(value[-1], Mapping) else value
    if not isinstance(value, Mapping):
        return value
    value = {key: item for key, item in value.items() if key != "finished"}
    if set(value) in ({"text"}, {"content"}, {"value"}):
        return next(iter(value.values()))
    return value


def _usable(
    layout: Layout, responses: dict[str, Any], scores: dict[str, Any] | None, skip: bool
) -> tuple[dict[str, Any], dict[str, Any] | None, list[str]]:
    """The responses that can be trained on, their scores, and what is wrong with those left out."""
    kept, numbers, problems = {}, {}, []
    for (name, value), (column, score) in zip(responses.items(), (scores or dict.fromkeys(responses)).items(), strict=True):
        try:
            if scores is not None:
                _check_score(column, score)
            as_messages(name, "assistant", value)
        except BadRow as problem:
            # A preference needs both responses. In other layouts, a missing response or score drops that response only.
            if layout.unit == "preference" or not (skip or isinstance(problem, Empty)):
                raise
            problems.append(problem)
        else:
            kept[name], numbers[column] = value, score
    if not kept:
        raise problems[0]
    return kept, None if scores is None else numbers, [str(problem) for problem in problems]


def _check_score(column: str, score: object) -> None:
    if score is None:
        raise Empty(column, "got None, wanted a finite number")
    if isinstance(score, bool) or not isinstance(score, (int, float)) or not abs(score) <= _FLOAT32_MAX:
        raise BadRow(column, f"got {score!r}, wanted a finite number")


def _prompt(layout: Layout, row: Row, responses: dict[str, Any]) -> Any:
    """The prompt at the layout's place for it: a text, messages, or None."""
    conversations = any(isinstance(value, list) and len(value) > 1 for value in responses.values())
    # If responses are whole conversations, columns other than prompt do not hold the prompt.
    places = layout.prompt or (("prompt",) if conversations else PROMPTS)
    for place in places:
        paths = as_paths(place)
        found: list[Any] = [value for path in paths for value in find(row, path).values() if value is not None]
        if not found or not any(value is not None for value in find(row, paths[0]).values()):
            continue
        prompt = found[0]
        if all(isinstance(value, str) for value in found):
            prompt = "\n".join(value for value in found if value.strip()) if len(found) > 1 else prompt
        if layout.transcript and (turns := from_transcript(prompt)):
            prompt = turns[:-1] if turns[-1]["role"] == "assistant" and not turns[-1]["content"] else turns
        return _after_history(row, prompt) if paths[0] == "instruction" else prompt
    return None


def _after_history(row: Row, prompt: Any) -> Any:
    """Alpaca's ``history``: earlier turns, as pairs of a question and its answer."""
    history = row.get("history")
    if not isinstance(history, list) or not history or not isinstance(prompt, str):
        return prompt
    if not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise BadRow("history", "wanted pairs of a question and its answer")
    turns = [{"role": role, "content": text} for pair in history for role, text in zip(("user", "assistant"), pair, strict=True)]
    return [*turns, {"role": "user", "content": prompt}]


def _system(row: Row) -> str | None:
    for column in ("system", "system_prompt"):
        value = row.get(column)
        if isinstance(value, str) and value.strip():
            return as_text(column, value)
        if value is not None and not isinstance(value, str):
            return str(as_messages(column, "system", value)[-1]["content"])
    return None


def _with_system(system: str | None, prompt: list[Message]) -> list[Message]:
    if system is None:
        return prompt
    first = str(prompt[0].get("content") or "").strip() if prompt[0]["role"] == "system" else None
    if first and first != system.strip():
        raise BadRow("system", "differs from the system message of the prompt, wanted one")
    return prompt if first else [{"role": "system", "content": system}, *prompt[first is not None :]]


def _as_chat(prompt: Any, responses: dict[str, Any]) -> tuple[list[Message], list[Message]]:
    """The messages of the prompt, each once, and the last message of each response."""
    conversations = {column: as_messages(column, "assistant", response) for column, response in responses.items()}
    turns: list[Message] = []
    first = ""
    for column, (*before, last) in conversations.items():
        if last["role"] != "assistant":
            raise BadRow(column, f"the last message is of role {last['role']!r}, wanted 'assistant'")
        if before and not turns:
            first, turns = column, before
        elif before and not same_messages(before, turns):
            raise BadRow(column, f"the messages before the response differ from those of {first}, wanted one prompt")
    blank = prompt is None or (isinstance(prompt, str) and not prompt.strip())
    messages = turns if blank and turns else merged(as_messages("prompt", "user", prompt), turns)
    return messages, [conversation[-1] for conversation in conversations.values()]
