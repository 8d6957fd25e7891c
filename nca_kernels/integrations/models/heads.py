"""Log-probs without logits for any Hugging Face causal LM.

The model's own forward runs and calls its head as always. So what happens around the head happens (FSDP's unshard, ZeRO-3's
gather, accelerate's device moves), and what the model does to its hidden states before it, too. Only the forward of the
head's linear layer is replaced (``head_layer``), by :func:`nca_kernels.linear_token_logps` of what it was given. What the
model does after the head is found out, and compared with its own logits, at first use (``post_head``).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ... import linear_token_logps
from .head_layer import HeadLayer
from .post_head import PostHead, inspect, logits_of

_INSPECTED: WeakKeyDictionary[nn.Module, PostHead] = WeakKeyDictionary()


def model_logps(
    model: nn.Module,
    input_ids: Tensor,  # [N, T]
    attention_mask: Tensor | None,  # [N, T]
    labels: Tensor,  # [N, T]
    *,
    shift: int = 1,
    ignore_index: int = -100,
    save_budget: int = 0,
    backend: str | None = None,
    **inputs: object,
) -> Tensor:
    r"""The log-probability of each label under the model, without its ``[N, T, V]`` logits.

    Args:
        model: the module that you would call: a transformers causal LM, plain, split over devices by ``device_map``, or
            inside PEFT, ``DistributedDataParallel`` or FSDP2 (``fully_shard``).
        input_ids, attention_mask: as the model takes them.
        labels: the input ids, with ``ignore_index`` at the positions that are not to be scored.
        shift: 1, the Hugging Face convention: position ``t`` holds the log-prob of ``labels[:, t + 1]``, the last one 0.
        ignore_index, save_budget, backend: as in :func:`nca_kernels.linear_token_logps`.
        inputs: what else the model's forward takes (``position_ids``, ``pixel_values``, ...).

    Returns:
        float32 ``[N, T]``, 0 at ignored positions; its sum over ``T`` is each response's log-prob.

    Raises:
        ValueError: a head that is not one plain linear layer (quantised, several heads, LoRA on it), logits that are not
            its output scaled and softcapped, or log-probs that differ from those of the model's own logits at first use.
    """
    with logps_for_logits(model, labels, shift=shift, ignore_index=ignore_index, save_budget=save_budget, backend=backend):
        return model(input_ids=input_ids, attention_mask=attention_mask, **{"use_cache": False, **inputs}).logits


@contextmanager
def logps_for_logits(
    model: nn.Module,
    labels: Tensor,  # [N, T]
    *,
    shift: int = 1,
    ignore_index: int = -100,
    save_budget: int = 0,
    backend: str | None = None,
) -> Iterator[None]:
    r"""Inside it, ``model(...).logits`` are the token log-probs ``[N, T]`` of ``labels``: :func:`model_logps` for a trainer.

    Arguments and errors are those of :func:`model_logps`. ``model`` is the very module that is then called.

    Example::

        with logps_for_logits(model, batch["labels"]):
            logps = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    """
    core = causal_lm(model)
    head = HeadLayer(core)
    logps = None
    inspecting = False

    def score(linear: nn.Linear, hidden: Tensor) -> Tensor:
        nonlocal logps
        if hidden.shape[:-1] != labels.shape:
            raise ValueError(
                f"labels: got shape {list(labels.shape)}, wanted {list(hidden.shape[:-1])}, one for each hidden state that "
                f"reaches {head.kind} (no logits_to_keep, no virtual tokens before the prompt)"
            )
        logps = linear_token_logps(
            hidden,
            linear.weight,
            labels.to(hidden.device),
            bias=linear.bias,
            shift=shift,
            ignore_index=ignore_index,
            save_budget=save_budget,
            backend=backend,
            **_INSPECTED[core]._asdict(),
        )
        return logps[..., None].clone()  # the model may scale its logits in place

    def before(module: nn.Module, args: tuple, inputs: dict) -> None:
        nonlocal inspecting
        if inspecting:
            return
        if inputs.get("past_key_values") is not None:  # the forwards of `inspect` would append to it
            raise ValueError("past_key_values: got a cache, wanted None: log-probs are of whole sequences")
        if core not in _INSPECTED:
            inspecting = True
            try:
                with _random_state_kept(core):
                    _INSPECTED[core] = inspect(head, lambda: module(*args, **inputs), backend)
            finally:
                inspecting = False
        head.begin(score)

    def after(module: nn.Module, args: tuple, output: object) -> None:
        if inspecting:
            return
        head.end()
        logits = logits_of(output)
        if logits.shape != (*labels.shape, 1):
            raise ValueError(
                f"model: between the linear layer of {head.kind} and .logits its output {[*labels.shape, 1]} became "
                f"{list(logits.shape)}. Use token_logps on the logits"
            )
        output.logits = _Anchored.apply(logps.to(logits.device), logits)

    if model._compiled_call_impl is not None:  # model.compile() traces a module's hooks, too
        before, after = torch.compiler.disable(before), torch.compiler.disable(after)
    with head.replaced(), ExitStack() as hooks:
        # First of all hooks: the forwards of `inspect` may not run inside one that FSDP has begun.
        hooks.callback(model.register_forward_pre_hook(before, prepend=True, with_kwargs=True).remove)
        hooks.callback(model.register_forward_hook(after).remove)
        yield


class _Anchored(torch.autograd.Function):
    """The log-probs as the head gave them, with the model's output in their graph, where it gets a zero gradient.

    The output is what the model made of the log-probs on their way (scaled, squashed, rounded), so its values are of no
    use; but FSDP and ZeRO-3 make the weights whole again for the backward when a gradient reaches a module's output.
    """

    @staticmethod
    def forward(ctx, logps: Tensor, output: Tensor) -> Tensor:
        ctx.output = output.new_zeros(()).expand(output.shape)
        return logps.view_as(logps)

    @staticmethod
    def backward(ctx, dlogps: Tensor) -> tuple[Tensor, Tensor]:
        return dlogps, ctx.output


def causal_lm(model: nn.Module) -> nn.Module:
    """The transformers model inside DDP, DeepSpeed, FSDP1 (``module``), ``torch.compile`` (``_orig_mod``) and PEFT."""
    if isinstance(model, nn.DataParallel):
        raise TypeError("model: got nn.DataParallel, which does not split the labels; wanted DistributedDataParallel")
    for name in ("module", "_orig_mod"):
        if isinstance(inner := getattr(model, name, None), nn.Module):
            return causal_lm(inner)
    if hasattr(model, "get_base_model"):
        return model.get_base_model()
    if not hasattr(model, "get_output_embeddings"):
        raise TypeError(f"model: got {type(model).__name__}, wanted a transformers causal LM")
    return model


@contextmanager
def _random_state_kept(core: nn.Module) -> Iterator[None]:
    """A run that inspects draws the same dropout masks after it as one that does not."""
    devices = {p.device.index for p in core.parameters() if p.is_cuda}
    with torch.random.fork_rng(devices):
        yield
    # Autocast kept the weights that it cast without gradients, for the forward that needs them (pytorch#158232).
    torch.clear_autocast_cache()
