"""The toy world of the demo and of the small experiments: sums to work out, a tiny Llama, and rewarded samples of it.

The reward is a known function of the answer's digits, so whether one model is better than another is exact.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

DIGITS = 3
LOW, HIGH = 10 ** (DIGITS - 1), 10**DIGITS  # operands of the same length: prompts need no padding
CHARS = "0123456789+="
EOS = len(CHARS)
ANSWER_LENGTH = DIGITS + 2  # a carry and EOS
SAMPLING_BATCH = 500


def draw_sums(n: int, generator: torch.Generator) -> Tensor:
    """``n`` different pairs of operands, [n, 2]."""
    span = HIGH - LOW
    drawn = torch.randperm(span * span, generator=generator)[:n]
    return LOW + torch.stack([drawn // span, drawn % span], dim=1)


def prompts(sums: Tensor) -> Tensor:
    """``123+456=`` as tokens, [n, P]."""
    return torch.tensor([[CHARS.index(c) for c in f"{a}+{b}="] for a, b in sums.tolist()])


def answers(sums: Tensor) -> Tensor:
    """The right answers as tokens, [n, R], filled up with EOS."""
    texts = (str(a + b)[::-1] for a, b in sums.tolist())
    return torch.tensor([[CHARS.index(c) for c in text] + [EOS] * (ANSWER_LENGTH - len(text)) for text in texts])


def share_of_right_digits(sums: Tensor, responses: Tensor) -> Tensor:
    """The reward, [n, K]: right digits (units under units) over the length of the longer of response and answer."""
    scores = []
    for (a, b), group in zip(sums.tolist(), responses.tolist(), strict=True):
        answer = str(a + b)[::-1]
        texts = ("".join(CHARS[token] for token in response if token != EOS) for response in group)
        scores.append([sum(x == y for x, y in zip(text, answer, strict=False)) / max(len(text), len(answer)) for text in texts])
    return torch.tensor(scores)


def build_model(seed: int, hidden_size: int = 128, layers: int = 4) -> LlamaForCausalLM:
    """A Llama from its config alone; 1.05 M parameters as it stands."""
    config = LlamaConfig(
        vocab_size=EOS + 1,
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=32,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def teach(model: LlamaForCausalLM, sums: Tensor, batch_size: int, lr: float = 2e-3, progress: bool = True) -> None:
    """Supervised fine-tuning on the right answers, each seen once."""
    tokens, labels = sequences(prompts(sums), answers(sums)[:, None])
    batches = list(zip(tokens.flatten(0, 1).split(batch_size), labels.flatten(0, 1).split(batch_size), strict=True))
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=len(batches), pct_start=0.1)
    model.train()
    for input_ids, targets in tqdm(batches, desc="supervised", disable=not progress):
        model(input_ids, labels=targets, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def sequences(prompts: Tensor, responses: Tensor) -> tuple[Tensor, Tensor]:
    """Prompt and response as one row, [n, K, T], and its labels: -100 on the prompt and after the first EOS.

    Causal attention never looks right, so what fills a row up needs no attention mask.
    """
    n, K, _ = responses.shape
    tokens = torch.cat([prompts[:, None].expand(-1, K, -1), responses], dim=-1)
    finished = (responses == EOS).cumsum(-1) - (responses == EOS).long() > 0
    return tokens, torch.cat([prompts.new_full((n, K, prompts.shape[1]), -100), responses.masked_fill(finished, -100)], -1)


@torch.no_grad()
def sample(model: LlamaForCausalLM, prompts: Tensor, K: int, generator: torch.Generator, progress: bool = False) -> Tensor:
    """K responses a prompt at temperature 1, [n, K, R]; EOS fills what follows the first EOS."""
    model.eval()
    responses = []
    for tokens in tqdm(prompts.split(SAMPLING_BATCH), desc="sampling", disable=not progress):
        cache = DynamicCache(config=model.config)
        logits = model(tokens, past_key_values=cache).logits[:, -1].repeat_interleave(K, dim=0)
        cache.batch_repeat_interleave(K)
        drawn = []
        for position in range(ANSWER_LENGTH):
            if position:
                logits = model(drawn[-1], past_key_values=cache).logits[:, -1]
            token = torch.multinomial(logits.softmax(-1), 1, generator=generator)
            drawn.append(token.where(drawn[-1] != EOS, EOS) if drawn else token)
        responses.append(torch.cat(drawn, dim=1).view(len(tokens), K, ANSWER_LENGTH))
    return torch.cat(responses)
