"""``nca-kernels inspect``: what a run would train on, without loading a model's weights."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ...loss_table import LOSSES
from ..data.load import Groups
from ..data.rows import prepare_rows, tokenized_with_counts
from ..data.tokenize import TokenizedGroups
from ..models.pretrained import load_tokenizer
from ..training.config import NCAConfig
from .run_config import Run
from .train import describe_groups, describe_loss, load_data

_QUANTILES = (0.0, 0.5, 0.9, 0.99, 1.0)
_SHOWN = 2000  # the most characters of a text


def inspect_run(run: Run, *, rows: int = 1) -> None:
    r"""Print what a run would train on: layout, K, lengths, scores, truncation, steps, decoded rows, and warnings.

    Args:
        run: the configuration of the run.
        rows: how many rows to print decoded.

    Raises:
        ValueError, OSError: the data or the tokenizer cannot be used; training would fail in the same way.
    """
    sources, config, given, _ = run
    groups = load_data(sources.data, sources.split, run)
    if groups.preference and "alpha" not in given:
        config.alpha = 0.0
    tokenizer = load_tokenizer(sources.tokenizer or sources.model)
    made = tokenized_with_counts(groups, tokenizer, config.row_options())
    prepared = prepare_rows("data", made.rows, None, config.row_options(), training=False)
    print(f"data     {sources.data}: {describe_groups(groups)}")
    print(f"layout   {groups.layout}")
    print(f"loss     {describe_loss(config, groups.preference)}")
    print(f"K        {_counts(prepared)}")
    for name, lengths in _lengths(prepared).items():
        print(f"tokens   {name}: {_quantiles(lengths)}")
    for line in _scores(prepared, config):
        print(line)
    print(f"cut      {_cut(made, config)}")
    print(f"steps    {_steps(len(prepared), config)}")
    for i in range(min(rows, len(prepared))):
        print(_decoded(i, prepared[i], tokenizer))
    for warning in _warnings(prepared, made, groups, config):
        print(f"warning  {warning}")


def _counts(rows: Dataset) -> str:
    counts = Counter(map(len, rows["response_ids"]))
    return ", ".join(f"{k} responses: {n} prompts" for k, n in sorted(counts.items()))


def _lengths(rows: Dataset) -> dict[str, list[int]]:
    prompts = [len(ids) for ids in rows["prompt_ids"]]
    responses = [list(map(len, row)) for row in rows["response_ids"]]
    return {
        "a prompt": prompts,
        "a response": [n for row in responses for n in row],
        "a prompt with its longest response": [n + max(row) for n, row in zip(prompts, responses, strict=True)],
    }


def _quantiles(values: list[int] | list[float]) -> str:
    names = ("least", "median", "90%", "99%", "most")
    return ", ".join(f"{name} {value:g}" for name, value in zip(names, np.quantile(values, _QUANTILES).tolist(), strict=True))


def _scores(rows: Dataset, config: NCAConfig) -> list[str]:
    scores = rows["scores"]
    lines = [f"scores   {_quantiles([score for row in scores for score in row])}"]
    pairs, differ = 0, 0
    for row in scores:
        pairs += math.comb(len(row), 2)
        differ += math.comb(len(row), 2) - sum(math.comb(n, 2) for n in Counter(row).values())
    lines.append(f"pairs    {pairs} of one prompt's responses, {differ} of them with different scores")
    if config.loss == "kto":
        labels = [label for row in rows["desirable"] for label in row]
        lines.append(f"labels   {sum(labels)} desirable, {len(labels) - sum(labels)} not")
    elif "alpha" in LOSSES[config.loss].takes:
        lines.append(f"weights  the best response of a prompt has {_best_weight(scores, config.alpha):.0%} of it, on average")
    return lines


def _best_weight(scores: list[list[float]], alpha: float) -> float:
    """The largest of ``softmax(scores / alpha)``, averaged over the prompts whose scores differ."""
    weights = []
    for row in scores:
        if len(set(row)) > 1:
            gaps = np.array(row) - max(row)
            weight = (gaps == 0) if alpha == 0 else np.exp(np.maximum(gaps / alpha, -700))
            weights.append(1 / weight.sum())
    return float(np.mean(weights)) if weights else 0.0


def _cut(made: TokenizedGroups, config: NCAConfig) -> str:
    if config.max_length is None:
        return "nothing, max_length is not set"
    lost = f"{made.prompts_cut} prompts and {made.responses_cut} responses, {made.tokens_cut} tokens"
    return f"{lost}, by max_length {config.max_length}"


def _steps(prompts: int, config: NCAConfig) -> str:
    step = config.per_device_train_batch_size * config.gradient_accumulation_steps * config.world_size
    batches = math.ceil(prompts / (config.per_device_train_batch_size * config.world_size))
    epoch = max(1, math.ceil(batches / config.gradient_accumulation_steps))
    steps = config.max_steps if config.max_steps > 0 else math.ceil(config.num_train_epochs * epoch)
    return f"{steps} of {step} prompts, {steps / epoch:g} epochs of {prompts} prompts"


def _decoded(index: int, row: dict, tokenizer: PreTrainedTokenizerBase) -> str:
    """A row as the model sees it. The model is trained on the text between [ and ]."""
    lines = [f"row      {index + 1}, the prompt:", _short(str(tokenizer.decode(row["prompt_ids"])))]
    for i, (ids, score) in enumerate(zip(row["response_ids"], row["scores"], strict=True)):
        label = "" if "desirable" not in row else f", {'desirable' if row['desirable'][i] else 'undesirable'}"
        lines.append(f"         response {i}, score {score:g}{label}, {len(ids)} tokens trained on:")
        lines.append(f"[{_short(str(tokenizer.decode(ids)))}]")
    return "\n".join(lines)


def _short(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN // 2]} ... {text[-_SHOWN // 2 :]}"


def _warnings(rows: Dataset, made: TokenizedGroups, groups: Groups, config: NCAConfig) -> list[str]:
    """Warnings about data and settings that the user may not intend."""
    found = []
    scores = rows["scores"]
    if config.loss != "kto" and config.nll_weight == 0:
        same = sum(len(set(row)) < 2 for row in scores)
        if same:
            all_of_them = "; training would be refused" if same == len(scores) else ""
            found.append(f"{same} of {len(scores)} prompts have no two different scores and teach nothing{all_of_them}")
    if "alpha" in LOSSES[config.loss].takes and config.alpha > 0 and not groups.preference:
        found += _alpha_warning(scores, config.alpha)
    if groups.preference and config.alpha > 0 and "alpha" in LOSSES[config.loss].takes:
        found.append(f"chosen and rejected say which is better, not by how much; wanted alpha: 0, got {config.alpha:g}")
    if made.responses_cut:
        found.append(f"{made.responses_cut} responses lose the words before their end token; a larger max_length keeps them")
    if "finished" in groups.rows.column_names:
        unfinished = sum(flag is False for row in groups.rows["finished"] for flag in row or [])
        found += [f"{unfinished} responses are not finished and get no end token"] if unfinished else []
    if made.responses_equal:
        found.append(f"{made.responses_equal} responses have the same tokens as another response to their prompt")
    if made.prompts_merged:
        found.append(
            f"{made.prompts_merged} prompts end in tokens that change once a response follows, and count as the response's"
        )
    if made.skipped or groups.skipped:
        found.append(f"{len(made.skipped) + len(groups.skipped)} bad rows are left out")
    return found


def _alpha_warning(scores: list[list[float]], alpha: float) -> list[str]:
    gaps = [max(row) - min(row) for row in scores if len(set(row)) > 1]
    if not gaps:
        return []
    gap = float(np.median(gaps))
    if gap / alpha < 0.2:
        return [f"alpha {alpha:g} is far above the scores' differences (median {gap:g}): all responses weigh nearly the same"]
    if gap / alpha > 20:
        return [f"alpha {alpha:g} is far below the scores' differences (median {gap:g}): the best has all the weight"]
    return []
