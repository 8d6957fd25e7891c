"""Log-probs of any Hugging Face causal LM, without its logits.

    logps = model_logps(model, input_ids, attention_mask, labels)            # float32 [N, T]

    with logps_for_logits(model, labels):                                    # the same inside a trainer
        logps = model(input_ids=input_ids, attention_mask=attention_mask).logits

The model's own forward runs, and inside it the head module is called as always: so every hook around it happens (FSDP's
unshard, ZeRO-3's gather, accelerate's device moves), and so does all that the model does to its hidden states before. Only
the forward of the head's one `nn.Linear` is replaced, by `linear_token_logps` on what it was given. What the model does
after the head is found out on first use (see post_head), and a few tokens are compared with the model's own logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from nca_kernels.functional import linear_token_logps
from nca_kernels.integrations.post_head import PostHead, fit_post_head, known_values

_POST_HEADS: WeakKeyDictionary[nn.Module, PostHead] = WeakKeyDictionary()


def model_logps(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    labels: Tensor,
    *,
    shift: int = 1,
    ignore_index: int = -100,
    save_budget: int = 0,
    backend: str | None = None,
    **inputs: object,
) -> Tensor:
    """Token log-probs [N, T], float32, without the [N, T, V] logits.

    `model` is the module you would call: plain, PEFT, DDP, FSDP2 or split over devices. `labels` [N, T] are the input ids
    with `ignore_index` where nothing is to be scored. With shift=1 (the Hugging Face convention) position t holds the
    log-prob of `labels[:, t + 1]`, and the last position 0; sum over dim 1 for the responses' log-probs. Further `inputs`
    (position_ids, pixel_values, ...) go to the model.
    """
    with logps_for_logits(
        model, labels, shift=shift, ignore_index=ignore_index, save_budget=save_budget, backend=backend
    ):
        return model(input_ids=input_ids, attention_mask=attention_mask, **{"use_cache": False, **inputs}).logits


@contextmanager
def logps_for_logits(
    model: nn.Module,
    labels: Tensor,
    *,
    shift: int = 1,
    ignore_index: int = -100,
    save_budget: int = 0,
    backend: str | None = None,
) -> Iterator[None]:
    """While it is open, the `.logits` of `model(...)` are the log-probs [N, T] of `labels`, as `model_logps` gives them.

    ValueError where the head cannot be used: not one plain linear layer (quantised, several heads, LoRA on the head), or a
    model whose logits are not the head's output scaled and softcapped.
    """
    core = _causal_lm(model)
    head = _Head(core)
    inspecting = False

    def score(linear: nn.Linear, hidden: Tensor) -> Tensor:
        if hidden.shape[:-1] != labels.shape:
            raise ValueError(
                f"labels: wanted one per position of the hidden states that reach the head of {head.owner}, "
                f"{list(hidden.shape[:-1])}; got {list(labels.shape)}"
            )
        post_head = _POST_HEADS[core]
        head.logps = linear_token_logps(
            hidden,
            linear.weight,
            labels.to(hidden.device),
            bias=linear.bias,
            shift=shift,
            ignore_index=ignore_index,
            scale=post_head.scale,
            softcap=post_head.softcap,
            save_budget=save_budget,
            backend=backend,
        )
        return head.logps[..., None]

    def before(module: nn.Module, args: tuple, inputs: dict) -> None:
        nonlocal inspecting
        if inspecting:
            return
        if inputs.get("past_key_values") is not None:
            raise ValueError("past_key_values: log-probs are of whole sequences; got a cache, wanted None")
        if core not in _POST_HEADS:
            inspecting = True
            _POST_HEADS[core] = _inspect(head, lambda: module(*args, **inputs), core, backend)
            inspecting = False
        head.start(score)

    def after(module: nn.Module, args: tuple, output: object) -> None:
        if inspecting:
            return
        head.finish()
        logits = output.logits
        if logits.shape != (*labels.shape, 1):
            raise ValueError(
                f"{head.owner}: something between the head's linear layer and .logits widens its output to {list(logits.shape)}"
            )
        output.logits = _Through.apply(head.logps.to(logits.device), logits)

    with ExitStack() as stack:
        stack.enter_context(head.replaced())
        # Before FSDP's own hook: the forwards of _inspect must not run inside one that has begun.
        stack.callback(model.register_forward_pre_hook(before, prepend=True, with_kwargs=True).remove)
        stack.callback(model.register_forward_hook(after).remove)
        yield


class _Through(torch.autograd.Function):
    """`logps`, with the model's own output kept in their graph and given a zero gradient.

    Wrappers unshard and gather for backward when a gradient reaches a module's output; these outputs are what the model
    made of the log-probs (rounded, scaled, squashed), so their values cannot be used, but their hooks must run.
    """

    @staticmethod
    def forward(ctx, logps: Tensor, output: Tensor) -> Tensor:
        ctx.save_for_backward(output)
        return logps.view_as(logps)

    @staticmethod
    def backward(ctx, dlogps: Tensor) -> tuple[Tensor, Tensor]:
        (output,) = ctx.saved_tensors
        return dlogps, torch.zeros_like(output)


class _Head:
    """The linear layer of a model's head, its forward replaced by `compute(linear, hidden)`, exactly once per forward."""

    def __init__(self, core: nn.Module):
        self.owner = type(core).__name__
        head = core.get_output_embeddings()
        if head is None:
            raise ValueError(f"{self.owner} names no head (get_output_embeddings() is None)")
        # The head may be wrapped (a PEFT copy, FSDP); which of the layers inside it runs is seen when it runs.
        self.linears = {name: layer for name, layer in head.named_modules() if _is_plain_linear(layer)}
        self.kind = f"the head of {self.owner}, a {type(head).__module__}.{type(head).__name__},"
        if not self.linears:
            raise ValueError(
                f"{self.kind} holds no plain nn.Linear that computes its output (it is quantised, or of another form): "
                f"use logits with token_logps"
            )

    @contextmanager
    def replaced(self) -> Iterator[None]:
        with ExitStack() as stack:
            for name, layer in self.linears.items():
                # accelerate keeps the true forward as _old_forward and calls it between its device moves.
                place = "_old_forward" if "_old_forward" in vars(layer) else "forward"
                stack.callback(_put_back, layer, place, vars(layer).get(place))
                setattr(layer, place, self._forward_of(name, layer))
            yield

    def _forward_of(self, name: str, layer: nn.Linear) -> Callable[[Tensor], Tensor]:
        def forward(input: Tensor) -> Tensor:
            self.ran.append(name)
            if len(self.ran) > 1:
                raise ValueError(
                    f"{self.kind} is not one linear map: {self.ran} ran in one forward. With LoRA on the head, leave it out "
                    f"of target_modules, or merge the adapter"
                )
            if type(layer.weight) not in _PLAIN:
                raise ValueError(f"{self.kind} has a weight of type {type(layer.weight).__name__}, not a plain tensor")
            return self.compute(layer, input)

        return forward

    def start(self, compute: Callable[[nn.Linear, Tensor], Tensor]) -> None:
        self.compute, self.ran, self.logps = compute, [], None

    def finish(self) -> None:
        if not self.ran:
            raise ValueError(f"{self.kind} did not run: none of its linear layers {list(self.linears)} was called")


_PLAIN = (Tensor, nn.Parameter)


def _is_plain_linear(layer: nn.Module) -> bool:
    forward = vars(layer).get("_old_forward") or layer.forward
    return isinstance(layer, nn.Linear) and getattr(forward, "__func__", None) is nn.Linear.forward


def _put_back(layer: nn.Module, place: str, own: object) -> None:
    if own is None:
        delattr(layer, place)
    else:
        setattr(layer, place, own)


def _causal_lm(model: nn.Module) -> nn.Module:
    """The transformers model inside DDP, FSDP1 and DeepSpeed (`module`), torch.compile (`_orig_mod`) and PEFT."""
    if isinstance(model, nn.DataParallel):
        raise TypeError("model: nn.DataParallel splits the inputs but not the labels; use DistributedDataParallel")
    for name in ("module", "_orig_mod"):
        inner = getattr(model, name, None)
        if isinstance(inner, nn.Module):
            return _causal_lm(inner)
    if hasattr(model, "get_base_model"):
        return model.get_base_model()
    if not hasattr(model, "get_output_embeddings"):
        raise TypeError(f"model: wanted a transformers causal LM, got {type(model).__name__}")
    return model


@torch.no_grad()
def _inspect(head: _Head, forward: Callable[[], object], core: nn.Module, backend: str | None) -> PostHead:
    """Two forwards of the whole model with a head of a few rows: one fits what follows the head, one compares."""

    def run(compute: Callable[[nn.Linear, Tensor], Tensor]) -> Tensor:
        head.start(compute)
        output = forward()
        head.finish()
        if not isinstance(getattr(output, "logits", None), Tensor):
            raise ValueError(f"{head.owner}: wanted an output with .logits, got {type(output).__name__}")
        return output.logits

    def known(linear: nn.Linear, hidden: Tensor) -> Tensor:
        nonlocal values
        values = known_values(linear.weight.shape[0], hidden.device)
        return values

    def both(linear: nn.Linear, hidden: Tensor) -> Tensor:
        nonlocal labels, fused
        rows = hidden.reshape(1, -1, hidden.shape[-1])
        rows = rows[:, :: max(1, rows.shape[1] // 4)]
        vocab = linear.weight.shape[0]
        labels = torch.arange(1, rows.shape[1] + 1, device=rows.device)[None] * vocab // (rows.shape[1] + 1)
        fused = linear_token_logps(
            rows, linear.weight, labels, bias=linear.bias, scale=post_head.scale, softcap=post_head.softcap, backend=backend
        )
        return nn.Linear.forward(linear, rows)

    values = labels = fused = None
    devices = {p.device.index for p in core.parameters() if p.is_cuda}
    with torch.random.fork_rng(devices):  # the run's random numbers are not ours to use up
        try:
            post_head = fit_post_head(values, run(known)) if False else None
        finally:
            pass
    return post_head
