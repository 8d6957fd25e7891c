"""Converts texts, chat messages and transcripts of several formats to messages of ``role`` and ``content``."""

from __future__ import annotations

import json
import re

Message = dict[str, object]

# Names of the roles in other formats (ShareGPT, Vicuna, LLaMA-Factory, HH-RLHF).
_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    "prompter": "user",
}
# HH-RLHF and Nectar ("Human: ... Assistant: ..."), and HelpSteer ("<extra_id_1>User ... <extra_id_1>Assistant").
_SPEAKER = re.compile(r"(?:^|\n\n)(Human|Assistant|System): ?|\n?<extra_id_[01]>(User|Assistant|System)\n")


class BadRow(Exception):
    """A row that cannot be used: the column and what is wrong with it."""

    def __init__(self, column: str | None, problem: str):
        super().__init__(problem if column is None else f"column {column}: {problem}")
        self.problem = problem


class Empty(BadRow):
    """A response or its score is missing."""


def as_text(column: str, value: object) -> str:
    """``value``, checked to be a text that is not blank and that a tokenizer can read."""
    if value is None or (isinstance(value, str) and not value.strip()):
        raise Empty(column, "missing text" if value is None else "empty text")
    if not isinstance(value, str):
        raise BadRow(column, f"got {type(value).__name__}, wanted text")
    _valid_unicode(column, value)
    return value


def is_chat(value: object) -> bool:
    """Whether ``value`` is a message or a list of messages, not a text."""
    return isinstance(value, (dict, list))


def as_messages(column: str, role: str, value: object) -> list[Message]:
    """The list of messages in a text (of ``role``), a message or a list of messages; the last message must not be empty."""
    if isinstance(value, str):
        value = {"role": role, "content": value}
    if value is None or value == []:
        raise Empty(column, "missing, wanted text or messages with role and content")
    items: list = value if isinstance(value, list) else [value]
    if not all(isinstance(item, dict) for item in items):
        raise BadRow(column, f"got {type(value).__name__}, wanted text or messages with role and content")
    messages = [_message(column, role if not isinstance(value, list) else None, item) for item in items]
    if not messages[-1].get("tool_calls"):
        as_text(column, messages[-1].get("content"))
    return messages


def _message(column: str, role: str | None, item: dict) -> Message:
    """A message of any format with ``role`` and ``content``; its other keys are kept."""
    # Tables give every message the keys of all messages, with null for a key that it did not have.
    made = {key: value for key, value in item.items() if value is not None and key != "loss_weight"}
    for ours, theirs in (("role", ("from",)), ("content", ("value", "text"))):
        for name in theirs:
            if ours not in made and name in made:
                made = {ours if key == name else key: value for key, value in made.items()}
    made.setdefault("role", role)
    if not isinstance(made["role"], str):
        raise BadRow(column, "a message without a role, wanted text or messages with role and content")
    if made["role"] == "function_call" and "tool_calls" not in made:
        made = _as_tool_calls(made)
    made["role"] = _ROLES.get(made["role"].lower(), made["role"].lower())
    if isinstance(made.get("content"), list):
        made["content"] = _joined(column, made["content"])
    _valid_unicode(column, made)
    return made


def _as_tool_calls(message: Message) -> Message:
    """Tool calls from LLaMA-Factory's form: a JSON text of one or several objects of name and arguments."""
    try:
        calls = json.loads(str(message["content"]))
    except (KeyError, ValueError):
        return message
    calls = calls if isinstance(calls, list) else [calls]
    if not all(isinstance(call, dict) and "name" in call for call in calls):
        return message
    return {**message, "content": "", "tool_calls": [{"type": "function", "function": call} for call in calls]}


def _joined(column: str, parts: list) -> str:
    """The text of a content in parts: ``{"type": "text", "text": ...}``, or "value" in place of "text"."""
    texts = []
    for part in parts:
        part = {"text": part} if isinstance(part, str) else part
        value = part.get("text", part.get("value")) if isinstance(part, dict) else None
        if not isinstance(value, str) or part.get("type", "text") not in ("text", "input_text", "output_text"):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise BadRow(column, f"a content part of type {kind!r}, wanted text alone")
        texts.append(value)
    return "".join(texts)


def _valid_unicode(column: str, value: object) -> None:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadRow(column, f"a lone surrogate ({text[error.start]!a}), which is not Unicode text") from None


def from_transcript(text: object) -> list[Message] | None:
    """The messages of a transcript that begins with a speaker and has a user's turn; ``None`` for any other value."""
    if not isinstance(text, str):
        return None
    marks = list(_SPEAKER.finditer(text))
    lead = text[: marks[0].start()].strip() if marks else ""
    if not marks or (lead and marks[0][2] is None):
        return None
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    speakers = [(mark[1] or mark[2]).lower() for mark in marks]
    turns = [
        {"role": _ROLES.get(speaker, speaker), "content": text[mark.end() : end].strip()}
        for speaker, mark, end in zip(speakers, marks, ends, strict=True)
    ]
    if lead:  # HelpSteer names the speakers from the second turn on
        turns.insert(0, {"role": "user", "content": lead})
    return turns if any(turn["role"] == "user" for turn in turns) else None


def _key(message: Message) -> tuple[object, str]:
    """The key by which two messages count as the same: role, words and tool calls. White space and other keys do not count."""
    return message["role"], " ".join(str(message.get("content", "")).split()) + json.dumps(
        message.get("tool_calls", []), default=str
    )


def same_messages(some: list[Message], others: list[Message]) -> bool:
    return list(map(_key, some)) == list(map(_key, others))


def merged(prompt: list[Message], turns: list[Message]) -> list[Message]:
    """One prompt from a prompt column and from the messages before the response in a response's conversation.

    Most data sets give the prompt twice: in a column of its own, and at the start of each conversation. Either may be whole or
    partial. Each message is kept once.

    Raises:
        BadRow: two different prompts.
    """
    p, t = list(map(_key, prompt)), list(map(_key, turns))
    if not p or not t:
        return prompt or turns
    if any(t[i : i + len(p)] == p for i in range(len(t))):
        return turns
    if p[-len(t) :] == t:
        return prompt
    heads = [message for message in prompt if message["role"] == "system"]
    rest = [key for key in p if key[0] != "system"]
    system_turns = sum(message["role"] == "system" for message in turns)
    if system_turns == len(turns) and not heads:
        return turns + prompt
    if heads and not system_turns and any(t[i : i + len(rest)] == rest for i in range(len(t))):
        return heads + turns
    for n in range(min(len(p), len(t)) - 1, 0, -1):
        if p[-n:] == t[:n]:
            return prompt + turns[n:]
    if turns[0]["role"] == "assistant" and prompt[-1]["role"] != "assistant":
        return prompt + turns
    # A text prompt may be the whole conversation written out, with other marks between the turns.
    words = "".join(str(prompt[0].get("content", "")).split())
    if len(prompt) == 1 and all("".join(str(turn.get("content", "")).split()) in words for turn in turns):
        return turns
    raise BadRow("prompt", "differs from the messages before the response, wanted one prompt")


def as_tools(value: object) -> list[dict]:
    """Tool definitions: a list of objects or of their JSON texts, or a JSON text of such a list."""
    try:
        tools = json.loads(value) if isinstance(value, str) and value.strip() else value or []
        tools = tools if isinstance(tools, list) else [tools]
        tools = [json.loads(tool) if isinstance(tool, str) else tool for tool in tools]
    except ValueError as error:
        raise BadRow("tools", f"not JSON: {error}") from None
    if not all(isinstance(tool, dict) for tool in tools):
        raise BadRow("tools", f"got {type(value).__name__}, wanted a list of tool definitions")
    _valid_unicode("tools", tools)
    return tools
