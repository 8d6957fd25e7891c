"""Trains the supervised model to the same weights on every machine, so that runs can be continued on another one.

Training amplifies rounding: after 250 steps in float32, and also in float64, a CPU with other vector instructions gets another
model. Here every step is computed in float64, and then each weight is rounded to a grid. The grid is far coarser than the rounding
of float64, so a weight that two CPUs round differently ends at the same grid point, and far finer than a step.
"""

from __future__ import annotations

import copy
from collections import deque

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from .tasks import CHARS, Task

IGNORED = -100
# The grid of the weights. A weight of less than 256 on it is a float32 number.
GRID = 2.0**-16
HEADS = 4
THETA = 100.0  # the base of the rotary position embeddings, for a dozen positions


def build_model(seed: int, hidden_size: int = 192) -> LlamaForCausalLM:
    """A Llama with random weights; 1.2 M parameters by default.

    It is wide and shallow, and the base of its rotary embeddings suits a dozen positions: it learns sums in 200 to 400 steps of 64.
    Four layers of width 128 with the usual base of 10,000 learned almost nothing in that time.
    """
    config = LlamaConfig(
        vocab_size=len(CHARS),
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        max_position_embeddings=32,
        rope_parameters={"rope_type": "default", "rope_theta": THETA},
        bos_token_id=None,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            # In float64, because float32 random numbers depend on the CPU's vector instructions.
            drawn = 0.06 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data = _on_grid(drawn).float()
    return model


def teach(model: LlamaForCausalLM, task: Task, problems: Tensor, *, batch_size: int, target: float, progress: bool) -> list[float]:
    """Supervised fine-tuning on the right answers, each seen once, until the loss per token is at most ``target``.

    Returns the losses. The loss falls steeply once the model carries digits; the step where it does depends on the order of the
    data (step 219, step 328), so a fixed number of steps would leave very different models.
    """
    exact = _in_float64(model)
    optimizer = torch.optim.AdamW(exact.parameters(), lr=2e-3, betas=(0.9, 0.98), weight_decay=0.0)
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 0.03, total_iters=30)
    losses: list[float] = []
    recent: deque[float] = deque(maxlen=10)
    bar = tqdm(problems.split(batch_size), desc=f"supervised, to a loss of {target}", disable=not progress)
    for batch in bar:
        tokens, labels = (rows[:, 0] for rows in sequences(task.prompts(batch), task.answers(batch)[:, None]))
        logits = exact(tokens, use_cache=False).logits[:, :-1]
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)
        loss.backward()
        nn.utils.clip_grad_norm_(exact.parameters(), 1.0)
        optimizer.step()
        warmup.step()
        optimizer.zero_grad()
        for parameter in exact.parameters():
            parameter.data = _on_grid(parameter.data)
        losses.append(loss.item())
        recent.append(loss.item())
        bar.set_postfix(loss=f"{loss.item():.2f}")
        if len(recent) == recent.maxlen and sum(recent) / len(recent) <= target:
            break
    model.load_state_dict(exact.state_dict())
    return losses


def sequences(prompts: Tensor, responses: Tensor) -> tuple[Tensor, Tensor]:
    """Prompt and response as one row, [n, K, T], and its labels, which are ``IGNORED`` at the prompt."""
    repeated = prompts[:, None].expand(-1, responses.shape[1], -1)
    return torch.cat([repeated, responses], -1), torch.cat([torch.full_like(repeated, IGNORED), responses], -1)


def _on_grid(weights: Tensor) -> Tensor:
    return (weights / GRID).round() * GRID


def _in_float64(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """A copy that computes everything in float64. The Llama of transformers computes norms and rotary angles in float32."""
    exact = copy.deepcopy(model).double()
    exact.model.rotary_emb = _Angles(model.config.hidden_size // HEADS)
    for layer in exact.model.layers:
        for name in ("input_layernorm", "post_attention_layernorm"):
            setattr(layer, name, _norm(getattr(layer, name)))
    exact.model.norm = _norm(exact.model.norm)
    return exact


def _norm(norm: nn.Module) -> nn.RMSNorm:
    assert isinstance(norm, LlamaRMSNorm)
    exact = nn.RMSNorm(norm.weight.shape, eps=norm.variance_epsilon)
    exact.weight = norm.weight
    return exact


class _Angles(nn.Module):
    """The cosines and sines of rotary position embeddings."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self._frequencies = THETA ** -(torch.arange(0, size, 2, dtype=torch.float64) / size)

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        angles = (position_ids[..., None] * self._frequencies).repeat(1, 1, 2)
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)
