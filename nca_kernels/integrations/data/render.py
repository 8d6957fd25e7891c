"""Applies a tokenizer's chat template to messages, and checks that the template writes all of their words."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from .messages import BadRow, Message


class Rendered(NamedTuple):
    """The texts of a row: its prompt, and the prompt with each response; ``ended``: they contain the end of the response."""

    prompt: str
    whole: list[str]
    ended: bool


def rendered_chat(row: dict, tokenizer: PreTrainedTokenizerBase, kwargs: dict[str, Any]) -> Rendered:
    """The texts that the template writes for a row of messages.

    Raises:
        BadRow: the template refuses the messages, or leaves out some of their words, of the system message, or the tools.
    """
    prompt: list[Any] = row["prompt"]
    responses, tools = row["responses"], row.get("tools") or None
    variables = {**kwargs, **(row.get("template_kwargs") or {})}

    def write(messages: list[Any], column: str, *, generate: bool = False, tools: list | None = tools) -> str:
        try:
            text: Any = tokenizer.apply_chat_template(
                messages, tools=tools, tokenize=False, add_generation_prompt=generate, **variables
            )
        except Exception as error:  # a template is a program, and may fail in any way
            reason = " ".join(str(error).split()) or type(error).__name__
            raise BadRow(column, f"the chat template refuses the prompt {str(messages)[:200]}: {reason}") from error
        return text if generate else text.rstrip()

    alone = write(prompt, "prompt", generate=True)
    before = write(prompt, "prompt")
    # Two contents show what the template writes after a response; it may change the contents themselves.
    zero, one = (write([*prompt, {"role": "assistant", "content": content}], "prompt") for content in "01")
    end = _common_suffix(zero, one)
    if tools and write(prompt, "tools", generate=True, tools=None) == alone:
        raise BadRow("tools", "the chat template writes no tools")
    for message in prompt:
        if message["role"] in ("system", "user", "developer"):
            _refuse_lost("prompt" if message["role"] == "user" else "system", message, alone)
    whole = []
    finished = row.get("finished") or [True] * len(responses)
    for i, (response, complete) in enumerate(zip(responses, finished, strict=True)):
        text = write([*prompt, response], f"responses[{i}]")
        _refuse_lost(f"responses[{i}]", response, text[_common_prefix(before, text) :])
        whole.append(text if complete or not end else text.removesuffix(end))
    return Rendered(alone, whole, ended=bool(end))


def _common_prefix(a: str, b: str) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _common_suffix(a: str, b: str) -> str:
    return a[len(a) - _common_prefix(a[::-1], b[::-1]) :]


def _refuse_lost(column: str, message: Message, text: str) -> None:
    """BadRow unless the text has all the words of the message; white space may differ."""
    written = "".join(text.split())
    for key in ("content", "reasoning_content", "reasoning", "thinking"):
        words = message.get(key)
        if isinstance(words, str) and "".join(words.split()) not in written:
            words = " ".join(words.split())
            raise BadRow(column, f"the chat template leaves out some of its {key}, {words[:100]!r}")
    calls = message.get("tool_calls")
    for call in calls if isinstance(calls, list) else []:
        function = call.get("function", call) if isinstance(call, dict) else {}
        for words in (function.get("name"), *_leaves(function.get("arguments"))):
            if isinstance(words, str) and not _written(words, written):
                raise BadRow(column, f"the chat template leaves out {words[:100]!r} of its tool calls")


def _written(words: str, text: str) -> bool:
    forms = (words, json.dumps(words)[1:-1], json.dumps(words, ensure_ascii=False)[1:-1])
    return any("".join(form.split()) in text for form in forms)


def _leaves(value: object) -> list[object]:
    if isinstance(value, dict):
        return [leaf for item in value.values() for leaf in _leaves(item)]
    if isinstance(value, list):
        return [leaf for item in value for leaf in _leaves(item)]
    return [value] if isinstance(value, str) else []
