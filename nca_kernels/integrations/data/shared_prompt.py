"""Computes a prompt once for all its responses, which lie side by side in one row (``GroupCollator``, "share_prompt").

A row holds the prompt without its last token, then for each response that token and the response. In each response the position ids
continue from the prompt. The attention mask is a tree: a token sees the prompt and the earlier tokens of its own response.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import PreTrainedModel

from ..._compat import attention_implementation, is_stateful
from ..models.evaluating import evaluating
from ..models.heads import causal_lm, model_logps
from .collator import IGNORE_INDEX, Batch, GroupCollator

Mask = Tensor | BlockMask

_LAYERS = {"full_attention", "sliding_attention"}
_ATTENTION = ("eager", "sdpa", "flex_attention")


def model_inputs(model: nn.Module, batch: Batch) -> dict[str, Any]:
    """The arguments of the model's forward for a batch of any layout, with the tree mask if its prompts are shared."""
    inputs: dict[str, Any] = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids") if name in batch}
    if "branches" in batch:
        inputs["attention_mask"] = _tree_masks(causal_lm(model), batch["branches"], batch["position_ids"])
    return inputs


def _tree_masks(core: PreTrainedModel, branches: Tensor, positions: Tensor) -> Mask | dict[str, Mask]:
    """One mask, or one for each type of attention layer that the model has."""
    config = core.config.get_text_config()
    windows = _windows(config)
    masks = {
        kind: tree_mask(branches, positions, window, attention_implementation(config), core.dtype)
        for kind, window in windows.items()
    }
    return masks if len(masks) > 1 else next(iter(masks.values()))


def _windows(config: object) -> dict[str, int | None]:
    """The sliding window of each type of layer. transformers passes a given mask on unchanged, so the window must be in it."""
    sliding = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or (["sliding_attention"] if sliding else ["full_attention"]))
    return {kind: sliding if kind == "sliding_attention" else None for kind in kinds}


def tree_mask(
    branches: Tensor,  # [B, T]: 0 at the prompt, k at the k-th response, -1 at padding
    positions: Tensor,  # [B, T]
    window: int | None,
    implementation: str,
    dtype: torch.dtype,
) -> Mask:
    """The mask in the form of that attention: a ``BlockMask``, or ``[B, 1, T, T]``, additive for "eager", bool for "sdpa"."""

    def sees(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        seen = (k <= q) & ((branches[b, k] == 0) | (branches[b, k] == branches[b, q]))
        return seen if window is None else seen & (positions[b, q] - positions[b, k] < window)

    B, T = branches.shape
    if implementation == "flex_attention":
        return create_block_mask(sees, B, None, T, T, device=branches.device)
    token = torch.arange(T, device=branches.device)
    row = torch.arange(B, device=branches.device)[:, None, None, None]
    mask = sees(row, row, token[:, None], token)
    if implementation == "sdpa":
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)


def refuse_unless_tree(model: nn.Module) -> None:
    """ValueError for a model that is known not to follow a tree mask and position ids."""
    core = causal_lm(model)
    config = core.config.get_text_config()
    name = type(core).__name__
    kinds = set(getattr(config, "layer_types", None) or []) - _LAYERS
    if is_stateful(core) or kinds:
        raise ValueError(
            f"share_prompt: {name} carries a state from token to token, or has its own kind of attention"
            f"{''.join(f', {kind!r}' for kind in sorted(kinds))}: which would leak from one response into the next; wanted full or "
            "sliding-window attention"
        )
    if "position_ids" not in inspect.signature(core.forward).parameters:
        raise ValueError(f"share_prompt: {name} takes no position_ids, so responses that share a prompt would get wrong positions")
    attention = attention_implementation(config)
    if attention not in _ATTENTION:
        raise ValueError(
            f"share_prompt: {name} runs attention {attention!r}, which does not take a mask of a tree; wanted "
            f"attn_implementation one of {', '.join(_ATTENTION)}"
        )


def check_layout(model: nn.Module, rows: list[dict], collator: GroupCollator, backend: str | None = None) -> None:
    r"""Compare the layout's log-probs on this model with those of separate rows, at the start of a run.

    Args:
        model: on its device, in any wrapping that ``model_logps`` takes.
        rows: of ``tokenize_groups``; the longest of them is compared.
        collator: the layout to check.

    Raises:
        ValueError: a model that is known not to support the layout, or log-probs that differ, with both numbers.
    """
    if collator.layout == "share_prompt":
        refuse_unless_tree(model)
    name = type(causal_lm(model)).__name__
    row = max(rows, key=lambda row: len(row["prompt_ids"]) + max(map(len, row["response_ids"])))
    separate = GroupCollator(collator.pad_token_id)
    with evaluating(model):
        own = _labelled_logps(model, separate([row]), backend)
        first = _labelled_logps(model, separate([{**row, "response_ids": row["response_ids"][:1]}]), backend)
        try:
            laid_out = _labelled_logps(model, collator([row]), backend)
        except Exception as error:
            raise ValueError(f"{collator.layout}: {name} fails in this layout, not in separate rows: {error!r}") from error
    # The tolerance is the model's own rounding in a batch of another shape. A difference above 0.02 is not rounding.
    noise = (first - own[: len(first)]).abs().mean().clamp(max=0.02)
    # Rounding differences of tree and separate rows: 7e-7 (float32) and 0.003 (bfloat16) of a mean log-prob of -8, 24 layers.
    eps = max(2e-6, torch.finfo(causal_lm(model).dtype).eps / 4)
    difference = (laid_out - own).abs()
    tolerance = 4 * noise + eps * (1 + own.abs().mean())
    if not difference.mean() <= tolerance:
        i = int(difference.nan_to_num(torch.inf).argmax())
        raise ValueError(
            f"{collator.layout}: {name} gives a token the log-prob {laid_out[i]:.6f} in this layout "
            f"and {own[i]:.6f} in a row of its own (mean difference {difference.mean():.2g}, tolerance {tolerance:.2g}). "
            "Refused: use separate, padded rows"
        )


def _labelled_logps(model: nn.Module, batch: Batch, backend: str | None) -> Tensor:
    """The log-probs of all tokens with a label, in the same order in every layout."""
    batch = send_to_device(batch, causal_lm(model).device)
    inputs = {"attention_mask": None, **model_inputs(model, batch)}
    logps = model_logps(model, **inputs, labels=batch["labels"], backend=backend)
    return logps[:, :-1][batch["labels"][:, 1:] != IGNORE_INDEX]
