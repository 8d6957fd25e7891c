"""One optimisation step of a Llama by NCA: forward, backward, clipping and AdamW, through this trainer and others."""

from __future__ import annotations

import copy
import dataclasses
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nca_kernels.dispatch import resolve

from .cases import IGNORE_INDEX, Call, Implementation, Problem, Tensors, Unsupported, plain_logps, value_error

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

BETA = 0.1
SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)
MODELS = {
    "small": (32000, 512, 1408, 4, 8, 8),
    "1B": (128256, 2048, 8192, 16, 32, 8),  # Llama 3.2's
    "tiny": (50, 16, 32, 1, 2, 2),
}
# The output folder of the trainers, which write nothing.
FOLDER = str(Path(tempfile.gettempdir(), "nca_kernels-bench"))
# model, dtype, prompts, responses each, tokens of a prompt, tokens of a response
CASES = {
    "cpu": [("small", "float32", 4, 4, 64, 64), ("small", "float32", 8, 2, 64, 64)],
    "cuda": [("1B", "bfloat16", 4, 4, 256, 256), ("1B", "bfloat16", 8, 2, 256, 256)],
}
TINY = [("tiny", "float32", 2, 2, 5, 4), ("tiny", "float32", 2, 3, 5, 4)]


def problems(device: str, cases: list[tuple]) -> Iterator[tuple[Problem, list[Implementation]]]:
    for name, dtype, prompts, responses, prompt_tokens, response_tokens in cases:
        model = _model(name, getattr(torch, dtype), device)
        vocab = model.config.vocab_size
        tensors = {
            "prompts": torch.randint(vocab, (prompts, prompt_tokens), device=device),
            "responses": torch.randint(vocab, (prompts, responses, response_tokens), device=device),
            "scores": torch.rand(prompts, responses, device=device).argsort(-1).float(),
        }
        with torch.no_grad():
            logps = _plain_logps(model, tensors)
        tensors["ref_logps"] = logps + torch.randn(prompts, responses, device=device)
        truth = _truth(model, tensors)
        problem = Problem(
            case=f"{name} Llama, B={prompts} K={responses}, prompts of {prompt_tokens}, responses of {response_tokens}",
            pass_name="step",
            dtype=dtype,
            tensors=tensors,
            # The loss, and the norm of all gradients before clipping.
            truth=partial(_errors, truth),
            kind="tokens",
            amount=prompts * responses * (prompt_tokens + response_tokens),
        )
        yield problem, implementations(model, device, responses)


def _errors(truth: Tensor, values: Tensor, grads: list[Tensor]) -> tuple[float, None]:
    return value_error(values, truth), None


def _model(name: str, dtype: torch.dtype, device: str) -> LlamaForCausalLM:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: dict[str, Any] = dict(zip(SIZES, MODELS[name], strict=True))
    config = LlamaConfig(**sizes, tie_word_embeddings=True, use_cache=False, pad_token_id=0, eos_token_id=1)
    with torch.device(device):  # where random numbers for a billion weights cost nothing
        return LlamaForCausalLM(config).to(dtype)  # type: ignore[arg-type]  # transformers' wrapper of `to`


def _rows(tensors: Tensors) -> tuple[Tensor, Tensor]:
    """Prompt and response as one row, ``[B * K, T]``, and its labels, which ignore the prompt."""
    prompts = tensors["prompts"].repeat_interleave(tensors["responses"].shape[1], 0)
    responses = tensors["responses"].flatten(0, 1)
    return torch.cat([prompts, responses], 1), torch.cat([torch.full_like(prompts, IGNORE_INDEX), responses], 1)


def _plain_logps(model: LlamaForCausalLM, tensors: Tensors) -> Tensor:
    input_ids, labels = _rows(tensors)
    return plain_logps(model(input_ids).logits[:, :-1], labels[:, 1:]).sum(-1).view(tensors["scores"].shape)


def _loss(logps: Tensor, tensors: Tensors) -> Tensor:
    """NCA with all weight on the best response; at K = 2 TRL calls it ``nca_pair``."""
    r = BETA * (logps - tensors["ref_logps"])
    best = tensors["scores"].argmax(-1, keepdim=True)
    return -(F.logsigmoid(r).gather(-1, best).squeeze(-1) + F.logsigmoid(-r).mean(-1)).mean()


def _truth(model: LlamaForCausalLM, tensors: Tensors) -> Tensor:
    """Loss and gradient norm in float64, row by row: what all rows keep for backward does not fit on a GPU."""
    double = copy.deepcopy(model).double()
    rows = [(ids[None], labels[None, 1:]) for ids, labels in zip(*_rows(tensors), strict=True)]

    def logp(ids: Tensor, labels: Tensor) -> Tensor:
        return plain_logps(double(ids).logits[:, :-1], labels, torch.float64).sum()

    with torch.no_grad():
        logps = torch.stack([logp(*row) for row in rows]).view(tensors["scores"].shape)
    logps.requires_grad_()
    loss = _loss(logps, tensors)
    (dlogps,) = torch.autograd.grad(loss, logps)
    for row, dlogp in zip(rows, dlogps.flatten(), strict=True):
        logp(*row).backward(dlogp)
    norm = torch.nn.utils.get_total_norm([p.grad for p in double.parameters() if p.grad is not None])
    return torch.stack([loss.detach(), norm])


def implementations(model: LlamaForCausalLM, device: str, responses: int) -> list[Implementation]:
    # At a learning rate of 0 AdamW does all of its work and leaves the weights as they were, so all implementations that do not
    # patch the model share one model and one AdamW: five of each do not fit on a GPU.
    shared = torch.optim.AdamW(model.parameters(), lr=0.0)
    model.train()

    def step(backward: Call, optimizer: torch.optim.Optimizer = shared) -> Call:
        """``backward``, which returns the loss, and what every implementation does after it."""
        parameters = optimizer.param_groups[0]["params"]

        def call(tensors: Tensors) -> Tensor:
            try:
                loss = backward(tensors)
                norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
            finally:
                optimizer.zero_grad()  # a step that fails must leave no gradients to the next
            return torch.stack([loss.detach(), norm])

        return call

    def nca_kernels(share_prompt: bool = False) -> Call:
        from nca_kernels.integrations.training.config import NCAConfig
        from nca_kernels.integrations.training.trainer import NCATrainer

        arguments = NCAConfig(
            FOLDER,
            loss="nca",
            beta=BETA,
            alpha=0.0,
            share_prompt=share_prompt,
            use_cpu=device == "cpu",
            report_to="none",
        )
        first = [{"prompt_ids": [2, 3], "response_ids": [[4], [5]], "scores": [1.0, 0.0], "ref_logps": [0.0, 0.0]}]
        trainer = NCATrainer(model, arguments, first)

        def backward(tensors: Tensors) -> Tensor:
            names = {"prompts": "prompt_ids", "responses": "response_ids", "scores": "scores", "ref_logps": "ref_logps"}
            columns = {name: tensors[key].tolist() for key, name in names.items()}
            rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
            return trainer.training_step(model, trainer.data_collator(rows), num_items_in_batch=len(rows))

        return step(backward)

    def plain() -> Call:
        def backward(tensors: Tensors) -> Tensor:
            loss = _loss(_plain_logps(model, tensors), tensors)
            loss.backward()
            return loss

        return step(backward)

    def trl() -> Call:
        if responses != 2:
            raise Unsupported("takes only pairs")
        from datasets import Dataset
        from trl import DPOConfig, DPOTrainer

        own = copy.deepcopy(model)  # this trainer patches it
        # TRL turns it on; its name depends on the version of transformers.
        names = {field.name for field in dataclasses.fields(DPOConfig)}
        checkpointing = "activation_checkpointing" if "activation_checkpointing" in names else "gradient_checkpointing"
        options: dict[str, Any] = {"loss_type": "nca_pair", "precompute_ref_log_probs": True, checkpointing: False}
        options |= {"use_cpu": device == "cpu", "report_to": "none", "bf16": False, "max_length": None}
        arguments = DPOConfig(FOLDER, beta=BETA, **options)
        first = Dataset.from_list([{"prompt": "2 3", "chosen": " 4", "rejected": " 5"}])
        trainer = DPOTrainer(own, args=arguments, train_dataset=first, processing_class=_numbers(own.config.vocab_size))
        trainer.current_gradient_accumulation_steps = 1  # as its train() would

        def backward(tensors: Tensors) -> Tensor:
            best = tensors["scores"].argmax(-1)
            rows = []
            for prompt, pair, logps, b in zip(
                *(tensors[name].tolist() for name in ("prompts", "responses", "ref_logps")), best.tolist(), strict=True
            ):
                row = {"prompt_ids": prompt, "chosen_ids": pair[b], "rejected_ids": pair[1 - b]}
                rows.append({**row, "ref_chosen_logps": logps[b], "ref_rejected_logps": logps[1 - b]})
            return trainer.training_step(own, trainer.data_collator(rows))

        return step(backward, torch.optim.AdamW(own.parameters(), lr=0.0))

    mine = f"nca_kernels {resolve('linear_token_logps', None, torch.device(device), model.dtype)}"  # the one that the trainer gets
    return [
        Implementation(mine, nca_kernels),
        Implementation(f"{mine} again", nca_kernels),
        Implementation(f"{mine}, share_prompt", lambda: nca_kernels(share_prompt=True)),
        Implementation("plain", plain),
        Implementation("TRL DPOTrainer", trl),
    ]


def _numbers(vocab: int) -> PreTrainedTokenizerFast:
    """A tokenizer whose words are the ids: the trainer wants one, and reads no text here."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({str(i): i for i in range(vocab)}, unk_token="0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="0", pad_token="0", eos_token="1")
