"""``nca-kernels sample``: K responses to each prompt of a file, by a model loaded here or by a server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.files import digest
from ..models.pretrained import load_model, load_tokenizer
from ..models.sampling import Sampled, Sampling, end_tokens, sample_responses
from ..reference.placement import default_device, to_device
from .prompts import PromptRow, read_prompts
from .unfinished import UnfinishedFile

Done = tuple[PromptRow, list[Sampled]]


def sample_file(
    model: str,
    data: Path,
    out: Path,
    *,
    num_responses: int = 4,
    batch_size: int = 8,
    server: str | None = None,
    sampling: Sampling,
) -> None:
    r"""Write ``data`` to ``out`` with ``responses``, K texts per row, and ``finished``, whether the model ended each of them.

    A response whose ``finished`` is false was cut off at ``max_new_tokens``; training gives it no end token. Other columns stay.
    A command that is killed and started again continues from ``out.part``.

    Args:
        model: a folder or a name on the hub; with ``server``, the name by which the server knows it.
        data: rows with a ``prompt``, which is a text or messages. Messages, and rows with ``system`` or ``tools``, go through the
            chat template.
        out: a new file, in JSON lines.
        num_responses: K, the responses to each prompt, >= 1.
        batch_size: responses per batch, to prompts of similar length; with ``server``, requests in flight at a time.
        server: the base URL of an OpenAI-compatible endpoint, such as ``http://localhost:8000/v1``.
        sampling: how responses are sampled. On a CPU the model is in float32, where the same seed gives the same text at any batch
            size. A server samples in its own way from the seeds that it is sent.

    Raises:
        ValueError: a row cannot be used (the message names file, row and column); a prompt is too long for the model; ``out``
            exists; ``out.part`` was made with other settings; a server refuses a request.
        OSError: a file or model cannot be read or written, or a server cannot be reached.
    """
    rows = read_prompts(data)
    settings = {
        "model": model,
        "data": digest(data),
        "num_responses": num_responses,
        "server": server,
        **sampling._asdict(),
    }
    file = UnfinishedFile(out, settings)
    left = [row for row in rows if row.number not in file.lines]
    if file.lines:
        print(f"{file.part}: continues, {len(file.lines)} of {len(rows)} rows are done")
    if left:
        done = _by_server(server, model, left, num_responses, batch_size, sampling) if server else None
        done = done or _by_model(model, left, num_responses, batch_size, sampling)
        with tqdm(total=len(rows), initial=len(file.lines), desc="rows", unit="row") as bar:
            for row, responses in done:
                texts, finished = [each.text for each in responses], [each.finished for each in responses]
                file.add(row.number, {**row.line, "responses": texts, "finished": finished})
                bar.update()
    file.finish()
    lines = file.lines.values()
    cut = sum(not each for line in lines for each in line["finished"])
    print(f"{out}: {len(rows)} prompts, {num_responses} responses each; {cut} cut off at {sampling.max_new_tokens} tokens")


def _by_model(name: str, rows: list[PromptRow], K: int, batch_size: int, sampling: Sampling) -> Iterator[Done]:
    """Yield the rows with their responses, in the order in which they are completed."""
    tokenizer = load_tokenizer(name)
    device = default_device()
    model = to_device(load_model(name, **({"dtype": torch.float32} if device == "cpu" else {})), device).eval()
    ends = end_tokens(model, tokenizer)
    if not ends:
        raise ValueError(f"model: {name!r} has no end-of-sequence token, so no response would end")
    prompts = {row.number: prompt_ids(row, tokenizer) for row in rows}
    _refuse_long(rows, prompts, model, sampling.max_new_tokens)
    by_number = {row.number: row for row in rows}
    # Sorted by length, so that batches have little padding; the longest come first, so that a lack of memory shows at once.
    keys = [(row.number, k) for row in sorted(rows, key=lambda row: -len(prompts[row.number])) for k in range(K)]
    made: dict[int, list[Sampled | None]] = {}
    for start in range(0, len(keys), batch_size):
        batch = keys[start : start + batch_size]
        responses = sample_responses(model, tokenizer, [prompts[number] for number, _ in batch], batch, sampling, ends)
        for (number, k), response in zip(batch, responses, strict=True):
            made.setdefault(number, [None] * K)[k] = response
            if all(made[number]):
                yield by_number[number], [each for each in made.pop(number) if each is not None]


def prompt_ids(row: PromptRow, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids of a row's prompt: messages go through the chat template with its generation prompt, a text is used as it is."""
    if isinstance(row.prompt, str):
        return list(tokenizer(row.prompt)["input_ids"])
    if tokenizer.chat_template is None:
        raise ValueError(f"tokenizer: has no chat template, and row {row.number} has messages; wanted a template, or text prompts")
    options: dict[str, Any] = {"tools": row.tools} if row.tools else {}
    text = tokenizer.apply_chat_template(row.prompt, tokenize=False, add_generation_prompt=True, **options)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _refuse_long(rows: list[PromptRow], prompts: dict[int, list[int]], model: PreTrainedModel, new: int) -> None:
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for row in rows:
        length = len(prompts[row.number])
        if limit is not None and length + new > limit:
            raise ValueError(
                f"row {row.number}: its prompt has {length} tokens, and with {new} new ones that is more than the model's {limit}; "
                "wanted a smaller max_new_tokens, or the row left out"
            )
        if length == 0:
            raise ValueError(f"row {row.number}: its prompt has no tokens")


def _by_server(url: str, model: str, rows: list[PromptRow], K: int, workers: int, sampling: Sampling) -> Iterator[Done]:
    """Yield the same from a server, with ``workers`` requests at a time."""
    from .server import Server  # it needs a package that nothing else needs

    yield from Server(url, model, sampling).responses(rows, K, workers)
