"""The ways to make one optimisation step by NCA: this trainer's, plain PyTorch's and TRL's."""

from __future__ import annotations

import copy
import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from nca_kernels.integrations.training.by_length import LengthSampler

from .cases import IGNORE_INDEX, Unsupported, plain_logps
from .step_data import Row, sequences

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

BETA = 0.1
# The output folder that the trainers require; they write nothing.
FOLDER = str(Path(tempfile.gettempdir(), "nca_kernels-bench"))
ALL_LOGITS = 1 << 40  # bytes: save_budget for all logits

Backward = Callable[[list[Row]], Tensor]  # returns the loss of a batch and leaves the gradients in the model's weights


class Way(NamedTuple):
    backward: Backward
    order: list[int]  # the rows of an epoch in order
    share_prompt: bool = False


def plain(model: LlamaForCausalLM, rows: list[Row], prompts: int, *, grouped: bool = False) -> Way:
    """The usual PyTorch code: padded rows, the logits of all positions, ``log_softmax`` and ``gather``."""

    def backward(batch: list[Row]) -> Tensor:
        loss = loss_of(plain_sequence_logps(model, batch), batch)
        loss.backward()
        return loss

    return Way(backward, by_length(rows, prompts) if grouped else _random(rows))


def ours(model: LlamaForCausalLM, rows: list[Row], prompts: int, *, share_prompt: bool = False, save_budget: int = 0) -> Way:
    from nca_kernels.integrations.training.config import NCAConfig
    from nca_kernels.integrations.training.trainer import NCATrainer

    arguments = NCAConfig(
        FOLDER,
        loss="nca",
        beta=BETA,
        alpha=0.0,
        share_prompt=share_prompt,
        save_budget=save_budget,
        train_sampling_strategy="group_by_length",
        per_device_train_batch_size=prompts,
        use_cpu=model.device.type == "cpu",
        report_to="none",
    )
    trainer = NCATrainer(model, arguments, rows)

    def backward(batch: list[Row]) -> Tensor:
        return trainer.training_step(model, trainer.data_collator(batch), num_items_in_batch=len(batch))

    return Way(backward, list(trainer._get_train_sampler() or ()), share_prompt)


def trl(model: LlamaForCausalLM, rows: list[Row], prompts: int) -> Way:
    if len(rows[0]["response_ids"]) != 2:
        raise Unsupported("takes only pairs")
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    # TRL turns it on; its name depends on the version of transformers.
    names = {field.name for field in dataclasses.fields(DPOConfig)}
    checkpointing = "activation_checkpointing" if "activation_checkpointing" in names else "gradient_checkpointing"
    options: dict[str, Any] = {"loss_type": "nca_pair", "precompute_ref_log_probs": True, checkpointing: False}
    options |= {"use_cpu": model.device.type == "cpu", "report_to": "none", "bf16": False, "max_length": None}
    first = Dataset.from_list([{"prompt": "2 3", "chosen": " 4", "rejected": " 5"}])
    trainer = DPOTrainer(
        model,
        args=DPOConfig(FOLDER, beta=BETA, **options),
        train_dataset=first,
        processing_class=_numbers(model.config.vocab_size),
    )
    trainer.current_gradient_accumulation_steps = 1  # its train() would set this

    def backward(batch: list[Row]) -> Tensor:
        pairs = []
        for row in batch:
            best = row["scores"].index(max(row["scores"]))
            (chosen, chosen_ref), (rejected, rejected_ref) = (
                (row["response_ids"][k], row["ref_logps"][k]) for k in (best, 1 - best)
            )
            pair = {"prompt_ids": row["prompt_ids"], "chosen_ids": chosen, "rejected_ids": rejected}
            pairs.append({**pair, "ref_chosen_logps": chosen_ref, "ref_rejected_logps": rejected_ref})
        return trainer.training_step(model, trainer.data_collator(pairs))

    return Way(backward, by_length(rows, prompts))


def plain_sequence_logps(model: LlamaForCausalLM, batch: list[Row], dtype: torch.dtype = torch.float32) -> Tensor:
    """The log-probs of all responses, ``[B, K]``."""
    prompts = [(row["prompt_ids"], response) for row in batch for response in row["response_ids"]]
    ids = _padded([[*prompt, *response] for prompt, response in prompts], 0, model.device)
    labels = _padded([[IGNORE_INDEX] * len(prompt) + response for prompt, response in prompts], IGNORE_INDEX, model.device)
    attended = _padded([[1] * (len(prompt) + len(response)) for prompt, response in prompts], 0, model.device)
    logits = model(ids, attention_mask=attended).logits[:, :-1]
    return plain_logps(logits, labels[:, 1:], dtype).sum(-1).view(len(batch), -1)


def _padded(rows: list[list[int]], value: int, device: torch.device) -> Tensor:
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value).to(device)


def loss_of(logps: Tensor, batch: list[Row]) -> Tensor:
    """NCA with all weight on the best response; for K = 2 it is ``nca_pair`` in TRL."""
    ref_logps, scores = (logps.new_tensor([row[name] for row in batch]) for name in ("ref_logps", "scores"))
    r = BETA * (logps - ref_logps)
    best = scores.argmax(-1, keepdim=True)
    return -(F.logsigmoid(r).gather(-1, best).squeeze(-1) + F.logsigmoid(-r).mean(-1)).mean()


def truth(model: LlamaForCausalLM, batch: list[Row]) -> Tensor:
    """The loss and the gradient norm in float64, row by row: a GPU cannot hold the saved tensors of all rows."""
    double = copy.deepcopy(model).double()
    alone = [{**row, "response_ids": [response]} for row in batch for response in row["response_ids"]]
    with torch.no_grad():
        logps = torch.cat([plain_sequence_logps(double, [row], torch.float64)[0] for row in alone]).view(len(batch), -1)
    logps.requires_grad_()
    loss = loss_of(logps, batch)
    (dlogps,) = torch.autograd.grad(loss, logps)
    for row, dlogp in zip(alone, dlogps.flatten(), strict=True):
        (plain_sequence_logps(double, [row], torch.float64).sum() * dlogp).backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in double.parameters() if p.grad is not None])
    return torch.stack([loss.detach(), norm])


def _random(rows: list[Row]) -> list[int]:
    return torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()


def by_length(rows: list[Row], prompts: int) -> list[int]:
    return list(LengthSampler([max(sequences(row)) for row in rows], prompts, seed=0))


def _numbers(vocab: int) -> PreTrainedTokenizerFast:
    """A tokenizer whose words are the ids: the trainer requires a tokenizer, but here it reads no text."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({str(i): i for i in range(vocab)}, unk_token="0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="0", pad_token="0", eos_token="1")
