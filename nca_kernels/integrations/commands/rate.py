"""``nca-kernels rate``: scores for each row's responses, by a reward model or by a Python function."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from ..data.files import digest
from ..data.messages import BadRow, as_messages, as_text
from ..models.pretrained import load_tokenizer
from .prompts import Messages, PromptRow, read_prompts
from .unfinished import UnfinishedFile

Rated = tuple[PromptRow, list[float]]
Function = Callable[[Any, list[Any]], Any]


def rate_file(data: Path, out: Path, *, reward_model: str | None = None, function: str | None = None, batch_size: int = 8) -> None:
    r"""Write ``data`` to ``out`` with a column ``scores``, one number per response. Existing scores move to ``old_scores``.

    Args:
        data: rows with ``prompt`` and ``responses``, as ``nca-kernels sample`` writes them.
        out: a new file, in JSON lines.
        reward_model: a sequence-classification model with one output; a folder or a name on the hub. Prompt and response go
            through its chat template (a text prompt as a user's message). If it has none, they are concatenated.
        function: ``file.py:name``, called with a row's prompt and responses as the file has them; returns their scores.
        batch_size: responses per batch; those of a batch have similar lengths.

    A command that is killed and started again continues from ``out.part``.

    Raises:
        ValueError: a row cannot be used, or its scores are not finite numbers (the message names file, row and column);
            ``reward_model`` does not have one output; ``out`` exists; ``out.part`` was made with other settings.
        OSError: a file or model cannot be read or written.
    """
    rows = read_prompts(data)
    for row in rows:
        _responses(data, row)
    rater: dict[str, Any] = {"reward_model": reward_model}
    if function is not None:
        rater = {"function": function, "function's file": digest(_function_file(function))}
    file = UnfinishedFile(out, {"data": digest(data), **rater})
    left = [row for row in rows if row.number not in file.lines]
    if file.lines:
        print(f"{file.part}: continues, {len(file.lines)} of {len(rows)} rows are done")
    if left:
        done = _by_function(function, left) if function is not None else _by_model(str(reward_model), left, batch_size)
        with tqdm(total=len(rows), initial=len(file.lines), desc="rows", unit="row") as bar:
            for row, scores in done:
                _check(data, row, scores)
                file.add(row.number, {**_with_old_scores(row.line), "scores": [float(score) for score in scores]})
                bar.update()
    file.finish()
    scores = [score for line in file.lines.values() for score in line["scores"]]
    differ = sum(len(set(line["scores"])) > 1 for line in file.lines.values())
    print(
        f"{out}: {len(rows)} prompts, {len(scores)} responses; scores {min(scores):.4g} to {max(scores):.4g}, mean "
        f"{sum(scores) / len(scores):.4f}; {differ} prompts have responses of different scores"
    )


def _responses(data: Path, row: PromptRow) -> list[Any]:
    responses = row.line.get("responses")
    if not isinstance(responses, list) or not responses:
        raise ValueError(f"{data}: row {row.number}, column responses: wanted a list of at least one response")
    return responses


def _check(data: Path, row: PromptRow, scores: Any) -> None:
    K = len(row.line["responses"])
    if not isinstance(scores, list) or len(scores) != K:
        got = f"{len(scores)} scores" if isinstance(scores, list) else type(scores).__name__
        raise ValueError(f"{data}: row {row.number}: got {got} for {K} responses, wanted a list of one number each")
    for k, score in enumerate(scores):
        if isinstance(score, bool) or not isinstance(score, (int, float)) or not math.isfinite(score):
            raise ValueError(f"{data}: row {row.number}, scores[{k}]: got {score!r}, wanted a finite number")


def _with_old_scores(line: dict[str, Any]) -> dict[str, Any]:
    """The row with its existing scores, if any, under a column name that is not yet used."""
    if line.get("scores") is None:
        return line
    name, n = "old_scores", 2
    while name in line:
        name, n = f"old_scores_{n}", n + 1
    return {(name if column == "scores" else column): value for column, value in line.items()}


# --- a function ------------------------------------------------------------------------------------------------------


def _function_file(function: str) -> Path:
    file, colon, name = function.rpartition(":")
    if not colon or not file or not name:
        raise ValueError(f"function: got {function!r}, wanted file.py:name")
    if not Path(file).is_file():
        raise FileNotFoundError(f"function: {file}: no such file")
    return Path(file)


def _load_function(function: str) -> Function:
    file, name = _function_file(function), function.rpartition(":")[2]
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if spec is None or spec.loader is None:
        raise ValueError(f"function: {file} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"function: {file} fails when it is loaded: {type(error).__name__}: {error}") from error
    found = getattr(module, name, None)
    if not callable(found):
        raise ValueError(f"function: {file} has no function {name!r}")
    return found


def _by_function(function: str, rows: list[PromptRow]) -> Iterator[Rated]:
    score = _load_function(function)
    for row in rows:
        try:
            scores = score(row.line["prompt"], row.line["responses"])
        except Exception as error:
            raise ValueError(f"function: {function} fails at row {row.number}: {type(error).__name__}: {error}") from error
        yield row, scores.tolist() if hasattr(scores, "tolist") else list(scores) if isinstance(scores, tuple) else scores


# --- a reward model --------------------------------------------------------------------------------------------------


def _by_model(name: str, rows: list[PromptRow], batch_size: int) -> Iterator[Rated]:
    """Yield the rows with their scores, in the order in which they are completed."""
    tokenizer = load_tokenizer(name)
    model = _load_reward_model(name)
    by_number = {row.number: row for row in rows}
    texts = {(row.number, k): _ids(row, k, tokenizer) for row in rows for k in range(len(row.line["responses"]))}
    keys = sorted(texts, key=lambda key: -len(texts[key]))
    made: dict[int, dict[int, float]] = {}
    for start in range(0, len(keys), batch_size):
        batch = keys[start : start + batch_size]
        for (number, k), score in zip(batch, rewards(model, [texts[key] for key in batch]).tolist(), strict=True):
            made.setdefault(number, {})[k] = score
            if len(made[number]) == len(by_number[number].line["responses"]):
                of_row = made.pop(number)
                yield by_number[number], [of_row[i] for i in range(len(of_row))]


def _load_reward_model(name: str) -> PreTrainedModel:
    on_gpu = torch.cuda.is_available()
    try:
        model = AutoModelForSequenceClassification.from_pretrained(name, **({} if on_gpu else {"dtype": torch.float32}))
    except (OSError, ValueError) as error:
        raise type(error)(f"reward_model: {name!r} cannot be loaded as a folder or hub name: {error}") from error
    if model.config.num_labels != 1:
        raise ValueError(f"reward_model: {name!r} has {model.config.num_labels} outputs, wanted 1")
    return model.to("cuda" if on_gpu else "cpu").eval()


@torch.no_grad()
def rewards(model: PreTrainedModel, sequences: list[list[int]]) -> Tensor:
    """The output of a sequence-classification model for each sequence, [n]: one batch gives what each sequence alone gives.

    Padding is on the right, so that positions do not change. Its id is one that the model recognises as padding, because the
    model reads its output at the last token that is not padding.
    """
    pad = model.config.get_text_config().pad_token_id
    if pad is None:
        # Without a padding id the model would read the last position of a row, so an id that no sequence has becomes that id.
        used = {token for sequence in sequences for token in sequence}
        pad = next(token for token in range(model.config.get_text_config().vocab_size) if token not in used)
        model.config.get_text_config().pad_token_id = pad
        try:
            return _rewards(model, sequences, pad)
        finally:
            model.config.get_text_config().pad_token_id = None
    return _rewards(model, sequences, pad)


def _rewards(model: PreTrainedModel, sequences: list[list[int]], pad: int) -> Tensor:
    longest = max(map(len, sequences))
    ids = torch.tensor([sequence + [pad] * (longest - len(sequence)) for sequence in sequences], device=model.device)
    mask = torch.tensor([[1] * len(sequence) + [0] * (longest - len(sequence)) for sequence in sequences], device=model.device)
    return model(input_ids=ids, attention_mask=mask).logits[:, 0].float()


def _ids(row: PromptRow, k: int, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    response = row.line["responses"][k]
    column = f"responses[{k}]"
    try:
        if tokenizer.chat_template is None:
            if not isinstance(row.prompt, str):
                raise BadRow("prompt", "has messages, and the reward model's tokenizer has no chat template")
            return list(tokenizer(row.prompt + as_text(column, response))["input_ids"])
        prompt: Messages = [{"role": "user", "content": row.prompt}] if isinstance(row.prompt, str) else row.prompt
        conversation = [*prompt, as_messages(column, "assistant", response)[-1]]
    except BadRow as error:
        raise ValueError(f"row {row.number}, {error}") from None
    options: dict[str, Any] = {"tools": row.tools} if row.tools else {}
    text = tokenizer.apply_chat_template(conversation, tokenize=False, **options)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
