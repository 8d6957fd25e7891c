"""Log-probs without logits for any Hugging Face causal LM.

The model's own forward runs and calls its head. So everything around the head takes place as usual: FSDP's unshard, ZeRO-3's
gather, accelerate's moves between devices, and what the model does to its hidden states before the head. Only the forward of the
head's linear layer is replaced (``head_layer``), by :func:`nca_kernels.linear_token_logps` of its input. The map that the model
applies after the head is found, and checked against the model's own logits, at first use (``post_head``). Every later call checks
that it has not changed.
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
    skip_mass: float = 0.0,
    backend: str | None = None,
    **inputs: Any,
) -> Tensor:
    r"""The log-probability of each label under the model, without its ``[N, T, V]`` logits.

    ``logp[n, t] = log softmax(model(...).logits[n, t])[labels[n, t + shift]]``.

    Args:
        model: the module that you would call: a transformers causal LM, plain, split over devices by ``device_map``, or
            inside PEFT, ``DistributedDataParallel`` or FSDP2 (``fully_shard``).
        input_ids, attention_mask: ``[N, T]``, as the model takes them.
        labels: int64 ``[N, T]``, the input ids, with ``ignore_index`` at the positions that have no label.
        shift: 1, the Hugging Face convention: position ``t`` holds the log-prob of ``labels[:, t + 1]``, the last one 0.
        ignore_index, logits_dtype, save_budget, skip_mass, backend: as in :func:`nca_kernels.linear_token_logps`.
        inputs: further arguments of the model's forward (``position_ids``, ``pixel_values``, ...).

    Returns:
        Log-probs in nats, float32 ``[N, T]``, 0 at ignored positions; the sum over ``T`` is the log-prob of a response. The
        parameters that would get a gradient from the model's own logits get the same one.

    Raises:
        ValueError: a head that is not one plain linear layer (quantised, several heads, LoRA on it), logits that are not
            its output scaled and softcapped, a scale or softcap that is a trained parameter (the kernels give it no gradient),
            or log-probs that differ from those of the model's own logits at first use. If a scale or softcap changes between
            calls, the new one is found with three more forwards.

    Source: ``docs/linear.md``, "Heads of Hugging Face models".

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> model, ids = LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes)), torch.tensor([[3, 7, 1]])
        >>> logits = model(ids).logits
        >>> logps = model_logps(model, ids, None, ids)
        >>> torch.allclose(logps[0, :2], logits[0, :2].log_softmax(-1)[[0, 1], ids[0, 1:]], atol=1e-5)
        True
    """
    options: dict[str, Any] = {
        "shift": shift, "ignore_index": ignore_index, "logits_dtype": logits_dtype, "save_budget": save_budget,
        "skip_mass": skip_mass, "backend": backend,
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
    skip_mass: float = 0.0,
    backend: str | None = None,
    **inputs: Any,
) -> TokenStats:
    r"""The log-prob, entropy, log-sum-exp and top-1 hit of each label under the model, without its ``[N, T, V]`` logits.

    The arguments, the errors and the number of GEMMs are those of :func:`model_logps`.

    Returns:
        ``TokenStats(logps, entropy, lse, top1)`` as :func:`nca_kernels.linear_token_stats` returns it, each ``[N, T]``. ``logps``
        are those of :func:`model_logps`, with their gradients; the others are detached.

    Source: ``docs/math.md``, section 2.
    """
    options: dict[str, Any] = {
        "shift": shift, "ignore_index": ignore_index, "logits_dtype": logits_dtype, "save_budget": save_budget,
        "skip_mass": skip_mass, "backend": backend,
    }  # fmt: skip
    with _replaced_head(model, labels, options, with_stats=True) as swap:
        logps = _output_logits(model, input_ids, attention_mask, inputs)
    # The model's output may be on another device than its head.
    entropy, lse, top1 = (values.detach().to(logps.device) for values in swap.stats[1:])
    return TokenStats(logps, entropy, lse, top1)


def _output_logits(model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None, inputs: dict[str, Any]) -> Tensor:
    return model(input_ids=input_ids, attention_mask=attention_mask, **{"use_cache": False, **inputs}).logits


class _Found(NamedTuple):
    """A model's map from the head's output to ``.logits``."""

    post_head: PostHead
    with_gradients: bool  # found with gradients enabled, where trained parameters would have been seen


# Read and written only outside of compiled regions: otherwise each new entry would recompile every model.
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
    skip_mass: float = 0.0,
    backend: str | None = None,
) -> Iterator[None]:
    r"""Within it, ``model(...).logits`` are the token log-probs ``[N, T]`` of ``labels``: :func:`model_logps` for a trainer.

    Arguments and errors are those of :func:`model_logps`. ``model`` must be the module that is then called.

    Example::

        with logps_for_logits(model, batch["labels"]):
            logps = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    """
    options: dict[str, Any] = {
        "shift": shift, "ignore_index": ignore_index, "logits_dtype": logits_dtype, "save_budget": save_budget,
        "skip_mass": skip_mass, "backend": backend,
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
        # Before all other hooks: the forwards that find the map must not run inside a forward that FSDP has begun.
        hooks.callback(model.register_forward_pre_hook(before, prepend=True, with_kwargs=True).remove)
        hooks.callback(model.register_forward_hook(after, with_kwargs=True).remove)
        yield swap


class _Swap:
    """Puts log-probs of ``labels`` in place of the logits, in the forwards of a model while its head is replaced.

    With ``with_stats``, ``stats`` holds all statistics after a forward, with the log-probs that the head returned.
    """

    stats: TokenStats

    def __init__(self, model: nn.Module, labels: Tensor, options: dict[str, Any], with_stats: bool) -> None:
        self.core = causal_lm(model)
        self.head = HeadLayer(self.core)
        self.labels, self.options, self.with_stats = labels, options, with_stats
        self.finding = self.repeating = False

    def compute(self, linear: nn.Linear, hidden: Tensor) -> Tensor:
        """The function that runs in place of the head."""
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
        """Runs before the model's forward: find the map, if it is not known, and set the head's replacement."""
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
        """Runs after the model's forward: replace its output, or repeat the forward if the map has changed."""
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
        """Whether the map has changed. One sync on a GPU; a CUDA graph replays the map that it recorded."""
        if logits.is_cuda and torch.cuda.is_current_stream_capturing():
            return False
        few = logits.detach().flatten()[:64]
        return bool(self.post_head.differs(probe_values(few).flatten(), few).any())

    def _repeated(self, call: Callable[[], object]) -> object:
        """Run the forward once more and find the map again: a scale of the configuration may have changed."""
        _FOUND.pop(self.core, None)
        if self.repeating:
            raise ValueError(
                f"model: the map from the output of {self.head.kind} to .logits changes. Use token_logps on the logits"
            )
        self.repeating = True
        try:
            return call()
        finally:
            self.repeating = False


class _Anchored(torch.autograd.Function):
    """The log-probs that the head returned, with the model's output in their graph, where it gets a zero gradient.

    FSDP and ZeRO-3 gather the weights for the backward when a gradient reaches a module's output.
    """

    @staticmethod
    def forward(ctx: Any, logps: Tensor, output: Tensor) -> Tensor:
        ctx.output = output.new_zeros(()).expand(output.shape)
        return logps.clone()  # not a view, which could not be changed in place

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
    """Keep the random state, so that finding the map does not change the dropout masks that follow."""
    devices = {p.device.index for p in core.parameters() if p.is_cuda}
    with torch.random.fork_rng(devices):
        yield
    # Autocast has cached the weights that it cast without gradients, and would use them in the next forward (pytorch#158232).
    torch.clear_autocast_cache()
