"""Log-probs without logits for any Hugging Face causal LM.

The model's own forward runs and calls its head as always. So what happens around the head happens (FSDP's unshard, ZeRO-3's
gather, accelerate's device moves), and what the model does to its hidden states before it, too. Only the forward of the
head's linear layer is replaced (``head_layer``), by :func:`nca_kernels.linear_token_logps` of what it was given. What the
model does after the head is found, and compared with its own logits, at first use (``post_head``); every call checks that it
is still the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ... import TokenStats, linear_token_logps, linear_token_stats
from ..._compat import is_compiled
from .head_layer import HeadLayer
from .post_head import (
    PostHead,
    Probe,
    find_post_head,
    learned_map,
    logits_of,
    names_of,
    parameters_after_head,
    probe_values,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def model_logps(
    model: nn.Module,
    input_ids: Tensor,  # [N, T]
    attention_mask: Tensor | None,  # [N, T]
    labels: Tensor,  # [N, T]
    *,
    shift: int = 1,
    ignore_index: int = -100,
    logits_dtype: torch.dtype | None = None,
    save_budget: int = 0,
    backend: str | None = None,
    **inputs: Any,
) -> Tensor:
    r"""The log-probability of each label under the model, without its ``[N, T, V]`` logits.

    Args:
        model: the module that you would call: a transformers causal LM, plain, split over devices by ``device_map``, or
            inside PEFT, ``DistributedDataParallel`` or FSDP2 (``fully_shard``).
        input_ids, attention_mask: as the model takes them.
        labels: the input ids, with ``ignore_index`` at the positions that have no label.
        shift: 1, the Hugging Face convention: position ``t`` holds the log-prob of ``labels[:, t + 1]``, the last one 0.
        ignore_index, logits_dtype, save_budget, backend: as in :func:`nca_kernels.linear_token_logps`.
        inputs: what else the model's forward takes (``position_ids``, ``pixel_values``, ...).

    Returns:
        float32 ``[N, T]``, 0 at ignored positions; its sum over ``T`` is each response's log-prob. Gradients reach what the
        model's own logits would reach.

    Raises:
        ValueError: a head that is not one plain linear layer (quantised, several heads, LoRA on it), logits that are not
            its output scaled and softcapped, a scale or softcap that is a trained parameter (the kernels give it no gradient),
            or log-probs that differ from those of the model's own logits at first use. A scale or softcap that changes
            between calls is followed, at the price of three forwards more.
    """
    options: dict[str, Any] = {
        "shift": shift, "ignore_index": ignore_index, "logits_dtype": logits_dtype, "save_budget": save_budget, "backend": backend,
    }  # fmt: skip
    with logps_for_logits(model, labels, **options):
        return _output_logits(model, input_ids, attention_mask, inputs)


def model_token_stats(
    model: nn.Module,
    input_ids: Tensor,  # [N, T]
    attention_mask: Tensor | None,  # [N, T]
    labels: Tensor,  # [N, T]
    *,
    shift: int = 1,
    ignore_index: int = -100,
    logits_dtype: torch.dtype | None = None,
    save_budget: int = 0,
    backend: str | None = None,
    **inputs: Any,
) -> TokenStats:
    r"""The log-prob, entropy, log-sum-exp and top-1 hit of each label under the model, without its ``[N, T, V]`` logits.

    Arguments and errors are those of :func:`model_logps`, and so is the number of GEMMs.

    Returns:
        ``TokenStats(logps, entropy, lse, top1)`` as :func:`nca_kernels.linear_token_stats` has it, each ``[N, T]``. ``logps``
        are those of :func:`model_logps`, with their gradients; the others are detached.

    Source: ``docs/math.md``, section 2.
    """
    options: dict[str, Any] = {
        "shift": shift, "ignore_index": ignore_index, "logits_dtype": logits_dtype, "save_budget": save_budget, "backend": backend,
    }  # fmt: skip
    with _replaced_head(model, labels, options, with_stats=True) as swap:
        logps = _output_logits(model, input_ids, attention_mask, inputs)
    # The model's output may be on another device than its head.
    entropy, lse, top1 = (values.detach().to(logps.device) for values in swap.stats[1:])
    return TokenStats(logps, entropy, lse, top1)


def _output_logits(model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None, inputs: dict[str, Any]) -> Tensor:
    return model(input_ids=input_ids, attention_mask=attention_mask, **{"use_cache": False, **inputs}).logits


class _Found(NamedTuple):
    """What is known of a model's map from the head's output to ``.logits``."""

    post_head: PostHead
    with_gradients: bool  # found while gradients were wanted, so that trained parameters would have shown


# Read and written outside of compiled regions alone: each entry more would otherwise compile every model anew.
_FOUND: WeakKeyDictionary[nn.Module, _Found] = WeakKeyDictionary()


@contextmanager
def logps_for_logits(
    model: nn.Module,
    labels: Tensor,  # [N, T]
    *,
    shift: int = 1,
    ignore_index: int = -100,
    logits_dtype: torch.dtype | None = None,
    save_budget: int = 0,
    backend: str | None = None,
) -> Iterator[None]:
    r"""Inside it, ``model(...).logits`` are the token log-probs ``[N, T]`` of ``labels``: :func:`model_logps` for a trainer.

    Arguments and errors are those of :func:`model_logps`. ``model`` is the very module that is then called.

    Example::

        with logps_for_logits(model, batch["labels"]):
            logps = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    """
    options: dict[str, Any] = {
        "shift": shift, "ignore_index": ignore_index, "logits_dtype": logits_dtype, "save_budget": save_budget, "backend": backend,
    }  # fmt: skip
    with _replaced_head(model, labels, options, with_stats=False):
        yield


@contextmanager
def _replaced_head(model: nn.Module, labels: Tensor, options: dict[str, Any], with_stats: bool) -> Iterator[_Swap]:
    swap = _Swap(model, labels, options, with_stats)
    before, after = swap.before, swap.after
    if is_compiled(model):  # model.compile() traces a module's hooks, too
        before, after = torch.compiler.disable(before), torch.compiler.disable(after)
    with swap.head.replaced(), ExitStack() as hooks:
        # First of all hooks: the forwards that find the map may not run inside one that FSDP has begun.
        hooks.callback(model.register_forward_pre_hook(before, prepend=True, with_kwargs=True).remove)
        hooks.callback(model.register_forward_hook(after, with_kwargs=True).remove)
        yield swap


class _Swap:
    """Log-probs of ``labels`` in place of the logits, for the forwards of a model while its head is replaced.

    ``with_stats``: after a forward ``stats`` holds all statistics, with the log-probs as the head gave them.
    """

    stats: TokenStats

    def __init__(self, model: nn.Module, labels: Tensor, options: dict[str, Any], with_stats: bool) -> None:
        self.core = causal_lm(model)
        self.head = HeadLayer(self.core)
        self.labels, self.options, self.with_stats = labels, options, with_stats
        self.finding = self.repeating = False

    def compute(self, linear: nn.Linear, hidden: Tensor) -> Tensor:
        """In place of the head's output."""
        labels = self.labels
        if hidden.shape[:-1] != labels.shape:
            raise ValueError(
                f"labels: got shape {list(labels.shape)}, wanted {list(hidden.shape[:-1])}, one for each hidden state that "
                f"reaches {self.head.kind} (no logits_to_keep, no virtual tokens before the prompt)"
            )
        rows = hidden, linear.weight, labels.to(hidden.device)
        options = {"bias": linear.bias, "scale": self.post_head.scale, "softcap": self.post_head.softcap, **self.options}
        if self.with_stats:
            self.stats = linear_token_stats(*rows, **options)
            self.logps = self.stats.logps
        else:
            self.logps = linear_token_logps(*rows, **options)
        return Probe.apply(self.logps)

    def before(self, module: nn.Module, args: tuple[Any, ...], inputs: dict[str, Any]) -> None:
        """Before the model's forward: the map is known, and the head is replaced."""
        if self.finding:
            return
        if inputs.get("past_key_values") is not None:  # the forwards of `find_post_head` would append to it
            raise ValueError("past_key_values: got a cache, wanted None: log-probs are of whole sequences")
        found = _FOUND.get(self.core)
        if found is None or (torch.is_grad_enabled() and not found.with_gradients):
            found = _FOUND[self.core] = self._find(lambda: module(*args, **inputs))
        self.post_head = found.post_head
        self.head.begin(self.compute)

    def _find(self, call: Callable[[], object]) -> _Found:
        with_gradients = torch.is_grad_enabled()
        self.finding = True
        try:
            with _random_state_kept(self.core):
                return _Found(find_post_head(self.head, call, self.options["backend"], with_gradients), with_gradients)
        finally:
            self.finding = False

    def after(self, module: nn.Module, args: tuple[Any, ...], inputs: dict[str, Any], output: Any) -> Any:
        """After the model's forward: its output is replaced, or the forward repeated where the map has changed."""
        if self.finding:
            return output
        self.head.end()
        logits = logits_of(output)
        if logits.shape != (*self.labels.shape, 1):
            raise ValueError(
                f"model: between the linear layer of {self.head.kind} and .logits its output {[*self.labels.shape, 1]} became "
                f"{list(logits.shape)}. Use token_logps on the logits"
            )
        if learned := parameters_after_head(self.logps, logits):
            raise learned_map(self.head, names_of(self.core, learned))
        if self._map_has_changed(logits):
            return self._repeated(lambda: module(*args, **inputs))
        output.logits = _Anchored.apply(self.logps.to(logits.device), logits)
        return output

    def _map_has_changed(self, logits: Tensor) -> bool:
        """One sync on a GPU; a CUDA graph replays the map that it has recorded."""
        if logits.is_cuda and torch.cuda.is_current_stream_capturing():
            return False
        few = logits.detach().flatten()[:64]
        return bool(self.post_head.differs(probe_values(few).flatten(), few).any())

    def _repeated(self, call: Callable[[], object]) -> object:
        """The forward once more, with the map that holds now: a scale of the configuration may have changed."""
        _FOUND.pop(self.core, None)
        if self.repeating:
            raise ValueError(
                f"model: what becomes of the output of {self.head.kind} changes from call to call. Use token_logps on the logits"
            )
        self.repeating = True
        try:
            return call()
        finally:
            self.repeating = False


class _Anchored(torch.autograd.Function):
    """The log-probs as the head gave them, with the model's output in their graph, where it gets a zero gradient.

    FSDP and ZeRO-3 make the weights whole again for the backward when a gradient reaches a module's output.
    """

    @staticmethod
    def forward(ctx: Any, logps: Tensor, output: Tensor) -> Tensor:
        ctx.output = output.new_zeros(()).expand(output.shape)
        return logps.clone()  # a view could not be changed in place

    @staticmethod
    def backward(ctx: Any, dlogps: Tensor) -> tuple[Tensor, Tensor]:
        return dlogps, ctx.output


def causal_lm(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside DDP, DeepSpeed, FSDP1 (``module``), ``torch.compile`` (``_orig_mod``) and PEFT."""
    if isinstance(model, nn.DataParallel):
        raise TypeError("model: got nn.DataParallel, which does not split the labels; wanted DistributedDataParallel")
    for name in ("module", "_orig_mod"):
        if isinstance(inner := getattr(model, name, None), nn.Module):
            return causal_lm(inner)
    if hasattr(model, "get_base_model"):
        return cast(Any, model).get_base_model()
    if not hasattr(model, "get_output_embeddings"):
        raise TypeError(f"model: got {type(model).__name__}, wanted a transformers causal LM")
    return cast("PreTrainedModel", model)


@contextmanager
def _random_state_kept(core: nn.Module) -> Iterator[None]:
    """A run that finds the map draws the same dropout masks after it as one that does not."""
    devices = {p.device.index for p in core.parameters() if p.is_cuda}
    with torch.random.fork_rng(devices):
        yield
    # Autocast kept the weights that it cast without gradients, for the forward that needs them (pytorch#158232).
    torch.clear_autocast_cache()
