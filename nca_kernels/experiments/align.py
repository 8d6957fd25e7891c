"""One alignment run: from a method and rewarded samples to an aligned model and its curves."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor, nn
from tqdm import tqdm
from transformers import LlamaForCausalLM, PrinterCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from nca_kernels import token_logps

from ..integrations.data.collator import Batch, group_logps
from ..integrations.training.config import NCAConfig
from ..integrations.training.plots import PlotsCallback
from ..integrations.training.trainer import NCATrainer
from ..loss_table import LOSSES
from .samples import Preferences, response_logps


@dataclass(frozen=True)
class Method:
    """What the paper varies: the loss, its parameters, and the number of responses per prompt."""

    loss: str
    K: int = 4
    beta: float = 0.3
    alpha: float = 0.1
    pairs: str = "best_vs_rest"
    lr: float = 1e-4


@dataclass
class Curves:
    """The loss of every step, and the log-probs of held-out best and worst responses at each of ``steps``."""

    loss: list[float] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    chosen: list[float] = field(default_factory=list)
    rejected: list[float] = field(default_factory=list)
    loss_time_share: list[float] = field(default_factory=list)  # share of each step's time in the head and the loss


def align(
    reference: LlamaForCausalLM,
    train: Preferences,
    probe: Preferences,
    method: Method,
    *,
    seed: int,
    steps: int = 200,
    batch_size: int = 16,
    path: str = "linear",
    probes: int = 20,
    share_prompt: bool = False,
    progress: bool = False,
) -> tuple[LlamaForCausalLM, Curves]:
    """Align a copy of ``reference`` on ``steps`` batches of ``batch_size`` prompts of ``train``.

    The held-out log-probs are computed before the first step and about ``probes`` times after it. Returns the aligned model and
    its curves.
    """
    model = copy.deepcopy(reference)
    bar = tqdm(total=steps, desc=f"{method.loss}, K = {method.K}", disable=not progress)
    recorder = _Recorder(probe.ends(), path, probes, bar)
    with TemporaryDirectory() as folder:
        arguments = NCAConfig(
            output_dir=folder,
            loss=method.loss,
            beta=method.beta,
            **{name: getattr(method, name) for name in ("alpha", "pairs") if name in LOSSES[method.loss].takes},
            num_responses=method.K,
            share_prompt=share_prompt,
            learning_rate=method.lr,
            lr_scheduler_type="constant_with_warmup",
            warmup_steps=10,
            max_steps=steps,
            per_device_train_batch_size=batch_size,
            seed=seed,
            use_cpu=True,
            bf16=False,
            report_to="none",
            save_strategy="no",
            logging_steps=1,
            disable_tqdm=True,
        )
        trainer = _TRAINERS[path](model, arguments, train.rows(), callbacks=[recorder])
        for callback in (PrinterCallback, PlotsCallback):
            trainer.remove_callback(callback)
        trainer.train()
    return model, recorder.curves


class _LogitsTrainer(NCATrainer):
    """Computes log-probs from the model's logits, for comparison."""

    def compute_logps(self, model: nn.Module, batch: Batch) -> Tensor:
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
        return group_logps(token_logps(logits, batch["labels"], shift=1), batch)


_TRAINERS = {"linear": NCATrainer, "logits": _LogitsTrainer}


class _Recorder(TrainerCallback):
    """Fills :class:`Curves` during a training that logs every step."""

    def __init__(self, ends: Preferences, path: str, probes: int, bar: tqdm) -> None:
        self.curves = Curves()
        self._ends, self._path, self._probes, self._bar = ends, path, probes, bar

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._probe(kwargs["model"], 0)

    # Not in on_step_end, where the time of the probe would count as part of the step.
    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        logs = kwargs["logs"]
        if "loss" not in logs:
            return
        self.curves.loss.append(logs["loss"])
        self.curves.loss_time_share.append(logs["loss_time_share"])
        if state.global_step % max(state.max_steps // self._probes, 1) == 0:
            self._probe(kwargs["model"], state.global_step)
        self._bar.update()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._bar.close()

    def _probe(self, model: LlamaForCausalLM, step: int) -> None:
        chosen, rejected = response_logps(model, self._ends.tokens, self._ends.labels, self._path).mean(0).tolist()
        self.curves.steps.append(step)
        self.curves.chosen.append(chosen)
        self.curves.rejected.append(rejected)
