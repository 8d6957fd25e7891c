"""The toy world of the demo and of the small experiments: sums to work out, a tiny Llama, and rewarded samples of it.

The reward is a known function of a response's digits, so whether one model is better than another is exact.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from nca_kernels import linear_sequence_logps, sequence_logps

DIGITS = 3
CHARS = "0123456789+="
ANSWER_LENGTH = DIGITS + 1
IGNORED = -100
# Rows of a forward without gradients: enough to fill the cores, few enough to stay in their caches.
ROWS = 512


def draw_sums(n: int, generator: torch.Generator) -> Tensor:
    """``n`` different pairs of operands, [n, 2]."""
    low, span = 10 ** (DIGITS - 1), 9 * 10 ** (DIGITS - 1)
    drawn = torch.randperm(span * span, generator=generator)[:n]
    return low + torch.stack([drawn // span, drawn % span], dim=1)


def prompts(sums: Tensor) -> Tensor:
    """``123+456=`` as tokens, [n, P]."""
    return _tokens([f"{a}+{b}=" for a, b in sums.tolist()])


def answers(sums: Tensor) -> Tensor:
    """``0579`` as tokens, [n, R]: of one length, so that no prompt or response needs padding."""
    return _tokens([f"{a + b:0{ANSWER_LENGTH}}" for a, b in sums.tolist()])


def _tokens(texts: list[str]) -> Tensor:
    return torch.tensor([[CHARS.index(char) for char in text] for text in texts])


def share_of_right_digits(sums: Tensor, responses: Tensor) -> Tensor:
    """The reward of responses [n, K, R], in [0, 1], [n, K]."""
    return (responses == answers(sums)[:, None]).float().mean(-1)


def build_model(seed: int, hidden_size: int = 192) -> LlamaForCausalLM:
    """A Llama from its config alone; 1.2 M parameters as it stands.

    Wide and shallow, with a rope base for a dozen positions: this learns sums in 200 to 400 steps of 64. Four layers of
    128 with the usual base of 10,000 had learned next to nothing by then.
    """
    config = LlamaConfig(
        vocab_size=len(CHARS),
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=16,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
        initializer_range=0.06,
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def teach(model: LlamaForCausalLM, sums: Tensor, *, batch_size: int, target: float, progress: bool) -> list[float]:
    """Supervised fine-tuning on the right answers, each seen once, until the loss per token is down to ``target``.

    Returns the losses. The loss falls steeply once the carry is understood, and when that is differs with the data's
    order and the machine's rounding (step 219, step 328): a fixed number of steps would leave very different models.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.98), weight_decay=0.0)
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 0.03, total_iters=30)
    losses, recent = [], deque(maxlen=10)
    bar = tqdm(sums.split(batch_size), desc=f"supervised, to a loss of {target}", disable=not progress)
    for batch in bar:
        tokens, labels = sequences(prompts(batch), answers(batch)[:, None])
        loss = model(tokens[:, 0], labels=labels[:, 0], use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        warmup.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        recent.append(loss.item())
        bar.set_postfix(loss=f"{loss.item():.2f}")
        if len(recent) == recent.maxlen and sum(recent) / len(recent) <= target:
            break
    return losses


def sequences(prompts: Tensor, responses: Tensor) -> tuple[Tensor, Tensor]:
    """Prompt and response as one row, [n, K, T], and the labels that score the response alone."""
    repeated = prompts[:, None].expand(-1, responses.shape[1], -1)
    return torch.cat([repeated, responses], -1), torch.cat([torch.full_like(repeated, IGNORED), responses], -1)


def response_logps(model: LlamaForCausalLM, tokens: Tensor, labels: Tensor, path: str) -> Tensor:
    """The log-probabilities of the responses of rows [n, K, T], [n, K]."""
    hidden = model.model(tokens.flatten(0, 1), use_cache=False).last_hidden_state
    return head_logps(model, hidden, labels, path)


def head_logps(model: LlamaForCausalLM, hidden: Tensor, labels: Tensor, path: str) -> Tensor:
    """From the hidden states [n * K, T, D] to log-probabilities [n, K]: without logits (``linear``), or with them."""
    rows = labels.flatten(0, 1)
    if path == "linear":
        logps = linear_sequence_logps(hidden, model.lm_head.weight, rows, shift=1)
    else:
        logps = sequence_logps(model.lm_head(hidden), rows, shift=1)
    return logps.view(labels.shape[:2])


@torch.no_grad()
def sample(model: LlamaForCausalLM, prompts: Tensor, K: int, generator: torch.Generator) -> Tensor:
    """K responses a prompt, drawn at temperature 1, [n, K, R]. The prompt is computed once."""
    responses = []
    for batch in prompts.split(max(ROWS // K, 1)):
        cache = DynamicCache(config=model.config)
        logits = model(batch, past_key_values=cache).logits[:, -1].repeat_interleave(K, dim=0)
        cache.batch_repeat_interleave(K)
        drawn = [torch.multinomial(logits.softmax(-1), 1, generator=generator)]
        while len(drawn) < ANSWER_LENGTH:
            logits = model(drawn[-1], past_key_values=cache).logits[:, -1]
            drawn.append(torch.multinomial(logits.softmax(-1), 1, generator=generator))
        responses.append(torch.cat(drawn, dim=1).view(len(batch), K, ANSWER_LENGTH))
    return torch.cat(responses)


@dataclass(frozen=True)
class Preferences:
    """K rewarded responses to each of n prompts, and what the reference model thinks of them."""

    tokens: Tensor  # [n, K, T]
    labels: Tensor  # [n, K, T]
    scores: Tensor  # [n, K]
    ref_logps: Tensor  # [n, K]

    def __len__(self) -> int:
        return len(self.scores)

    def pick(self, *index: Tensor) -> Preferences:
        """These rows or, with a second index, these responses of them."""
        return Preferences(self.tokens[index], self.labels[index], self.scores[index], self.ref_logps[index])


@torch.no_grad()
def all_logps(model: LlamaForCausalLM, tokens: Tensor, labels: Tensor, path: str) -> Tensor:
    """:func:`response_logps` of any number of rows, in batches and without a gradient."""
    n = max(ROWS // tokens.shape[1], 1)
    batches = zip(tokens.split(n), labels.split(n), strict=True)
    return torch.cat([response_logps(model, *batch, path) for batch in batches])


def collect(model: LlamaForCausalLM, sums: Tensor, K: int, generator: torch.Generator, path: str) -> Preferences:
    """K rewarded samples of ``model``, the reference, for each sum; without sums whose samples all score alike."""
    responses = sample(model, prompts(sums), K, generator)
    scores = share_of_right_digits(sums, responses)
    differ = scores.amax(1) > scores.amin(1)
    tokens, labels = sequences(prompts(sums[differ]), responses[differ])
    return Preferences(tokens, labels, scores[differ], all_logps(model, tokens, labels, path))


def evaluate(model: LlamaForCausalLM, sums: Tensor, seed: int) -> dict[str, float]:
    """Mean reward and share of exact answers of one sample a prompt."""
    scores = share_of_right_digits(sums, sample(model, prompts(sums), 1, torch.Generator().manual_seed(seed)))
    return {"reward": scores.mean().item(), "exact": (scores == 1).float().mean().item()}
