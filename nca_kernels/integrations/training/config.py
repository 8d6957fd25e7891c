"""The configuration of :class:`~nca_kernels.integrations.training.trainer.NCATrainer`."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import TrainingArguments

from ... import checks
from ...loss_table import LOSSES, PAIRS
from ...losses import check_terms
from ..data.rows import RowOptions

logger = logging.getLogger(__name__)

REFERENCES = ("precompute", "model")
LOGITS_DTYPES = {"float32": torch.float32}
# The keys that only some losses read, each with the argument of the loss that it sets.
_OF_SOME_LOSSES = {"alpha": "alpha", "pairs": "pairs", "kto_threshold": "desirable"}


def _option(default: Any, about: str) -> Any:
    return field(default=default, metadata={"help": about})


@dataclass
class NCAConfig(TrainingArguments):
    r"""``transformers.TrainingArguments`` with the settings of K-way alignment.

    Batch sizes count prompts: a batch holds ``per_device_train_batch_size`` prompts with all their responses.

    Args:
        loss: ``"info_nca"``, ``"nca"``, ``"dpo"``, ``"ipo"``, ``"kto"``, ``"plackett_luce"`` or ``"biased_nca"``
            (:func:`nca_kernels.group_loss`).
        beta: > 0, the strength of the implicit reward.
        alpha: >= 0, the temperature of the scores, in their unit; 0: all weight on the best-scored responses.
        pairs: ``"best_vs_rest"`` or ``"all"``, for ``dpo`` and ``ipo``.
        label_smoothing: in [0, 0.5), for ``dpo``: the share of pairs whose order is taken to be wrong.
        nll_weight: >= 0, the weight of the negative log-likelihood per token of the best-scored responses (of all by their
            weights, where the loss takes ``alpha``), which is added to the loss.
        num_responses: how many of each prompt's responses are kept, >= 2; ``None`` for all. Kept are a best-scored one, one
            scored below it, then others at random, drawn by ``seed`` once for the whole run.
        average: log-probs and reference log-probs are averages over a response's tokens, not sums.
        share_prompt: compute each prompt once for all its responses (:mod:`~nca_kernels.integrations.data.shared_prompt`); compared
            with separate rows on the model itself before the first step.
        max_length, max_prompt_length: in tokens, for rows not yet tokenized
            (:func:`~nca_kernels.integrations.data.tokenize.tokenize_groups`).
        chat_template_kwargs: further variables of the chat template, such as ``{"enable_thinking": False}``.
        skip_bad_rows: leave out rows that cannot be used, and say which, in place of raising.
        kto_threshold: for ``kto``, the least score of a desirable response; ``None``: labels decide, or the scores' sign.
        reference: ``"precompute"``: the reference log-probs are computed once, into a cache on disk that later runs use.
            ``"model"``: at every step, by the base under PEFT, or by a frozen copy of the model.
        reference_cache_dir: the folder of that cache; ``None`` for ``$NCA_KERNELS_CACHE``, or ``<output_dir>/_reference_cache``
            (which ``push_to_hub`` leaves out, for its underscore).
        model_init_kwargs: keywords of ``from_pretrained`` for a ``model`` given by its name (``dtype``, ``attn_implementation``,
            ``revision``, ``quantization_config``, ...).
        logits_dtype: ``"float32"``: logits of a 16-bit head are kept in float32, so that a log-prob is right to 1e-5
            (:func:`nca_kernels.linear_token_logps`); ``None``: in the dtype of the head's input.
        save_budget: bytes of logits tiles that a trained head keeps (:func:`nca_kernels.linear_token_logps`).
        skip_mass: in [0, 1), the most probability that the head's backward may leave out of a token's gradient; 0: exact
            (:func:`nca_kernels.linear_token_logps`).
        token_metrics: add the metrics ``entropy/best`` and ``token_accuracy/best``, of the tokens of the best-scored responses
            (:class:`~nca_kernels.integrations.training.metrics.GroupMetrics`). They are read off the logits that the loss needs
            anyway, which then cost one more sum over the vocabulary; the loss and its gradients stay the same.
        sample_prompts: how many held-out prompts get a sampled response at every evaluation, in ``<output_dir>/samples.jsonl``.
        max_bad_losses: >= 1; so many micro-batches in a row with a NaN or infinite loss stop the run, at the next log. A model
            whose last loss or weights are not finite is never saved.

    ``train_sampling_strategy="group_by_length"`` puts prompts of similar length into a batch. The length of a prompt is that of its
    longest sequence, or with ``share_prompt`` the number of tokens of the prompt and all its responses. The order depends only on
    ``data_seed`` (``seed`` if that is None) and the epoch.

    These defaults differ from those of transformers. ``learning_rate`` is 5e-6, the authors' value. ``logging_steps`` is 10, for
    runs of a few hundred steps. ``remove_unused_columns`` is false, because batches are not passed as ``model(**batch)``.
    ``logging_nan_inf_filter`` is false, because it would hide a loss that is NaN and costs a host sync at every step.

    A warning is logged if ``alpha``, ``pairs`` or ``kto_threshold`` differs from its default and the loss does not read it.

    Raises:
        ValueError, TypeError: an argument has a wrong type or is out of range (the message names it), or a setting of transformers
            contradicts K-way alignment: ``label_smoothing_factor``, which smooths losses over tokens, ``remove_unused_columns``
            or ``dispatch_batches``.

    Source: Chen et al. 2024 (arXiv 2402.05369).

    Example:
        >>> NCAConfig(output_dir="out", loss="info_nca", beta=0.3, use_cpu=True).alpha
        1.0
    """

    loss: str = _option("nca", "info_nca, nca, dpo, ipo, kto, plackett_luce or biased_nca")
    beta: float = _option(0.1, "strength of the implicit reward, > 0")
    alpha: float = _option(1.0, "temperature of the scores, >= 0; 0: all weight on the best-scored responses")
    pairs: str = _option("best_vs_rest", "best_vs_rest or all, for dpo and ipo")
    label_smoothing: float = _option(0.0, "share of pairs taken to be in the wrong order, in [0, 0.5), for dpo")
    nll_weight: float = _option(0.0, "weight of the best responses' negative log-likelihood per token, >= 0")
    num_responses: int | None = _option(None, "responses kept of each prompt, >= 2; None: all")
    average: bool = _option(False, "average log-probs over a response's tokens")
    share_prompt: bool = _option(False, "compute each prompt once for all its responses")
    max_length: int | None = _option(1024, "the most tokens of a prompt with a response; None: no limit")
    max_prompt_length: int | None = _option(None, "fewest tokens that the prompt keeps; None: half of max_length")
    chat_template_kwargs: dict[str, Any] | None = _option(None, "further variables of the chat template")
    skip_bad_rows: bool = _option(False, "leave out rows that cannot be used")
    kto_threshold: float | None = _option(None, "least score of a desirable response, for kto; None: labels or the sign")
    reference: str = _option("precompute", "precompute: once, into a cache on disk; model: at every step")
    reference_cache_dir: str | None = _option(None, "folder of the cache; None: $NCA_KERNELS_CACHE or in output_dir")
    model_init_kwargs: dict[str, Any] | None = _option(None, "keywords of from_pretrained: dtype, attn_implementation, ...")
    logits_dtype: str | None = _option(None, "float32: keep the logits of a 16-bit head in float32; None: in its own dtype")
    save_budget: int = _option(0, "bytes of logits tiles that a trained head keeps")
    skip_mass: float = _option(0.0, "probability that the head's backward may leave out of a token's gradient, in [0, 1); 0: exact")
    max_bad_losses: int = _option(3, "NaN or infinite losses in a row that stop the run, >= 1")
    token_metrics: bool = _option(False, "add entropy and token accuracy of the best responses to the metrics")
    sample_prompts: int = _option(0, "held-out prompts that are sampled at every evaluation")
    learning_rate: float = _option(5e-6, "initial learning rate")
    logging_steps: float = _option(10, "steps between logs; a share of all steps if below 1")
    remove_unused_columns: bool = _option(False, "must be false: batches are not passed as model(**batch)")
    logging_nan_inf_filter: bool = _option(False, "replace a NaN or infinite loss in the log, at a host sync a step")

    if TYPE_CHECKING:
        output_dir: str = "trainer_output"  # None until TrainingArguments' __post_init__, which gives it this name

    def __post_init__(self) -> None:
        checks.one_of("loss", self.loss, LOSSES)
        checks.positive("beta", self.beta)
        checks.non_negative("alpha", self.alpha)
        checks.one_of("pairs", self.pairs, PAIRS)
        check_terms(self.loss, self.label_smoothing, self.nll_weight)
        checks.one_of("reference", self.reference, REFERENCES)
        checks.flag("token_metrics", self.token_metrics)
        checks.share("skip_mass", self.skip_mass)
        if self.logits_dtype is not None:
            checks.one_of("logits_dtype", self.logits_dtype, LOGITS_DTYPES)
        for name, low in (
            ("num_responses", 2),
            ("max_length", 4),
            ("max_prompt_length", 2),
            ("save_budget", 0),
            ("sample_prompts", 0),
            ("per_device_train_batch_size", 1),
            ("per_device_eval_batch_size", 1),
            ("gradient_accumulation_steps", 1),
            ("max_bad_losses", 1),
        ):
            value = getattr(self, name)
            if value is None and name in ("num_responses", "max_length", "max_prompt_length"):
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise ValueError(f"{name}: got {value!r}, wanted an int >= {low}")
        checks.one_of("train_sampling_strategy", self.train_sampling_strategy, ("random", "sequential", "group_by_length"))
        if self.label_smoothing_factor != 0:
            raise ValueError(f"label_smoothing_factor: got {self.label_smoothing_factor}, wanted 0: label_smoothing is the key")
        if self.remove_unused_columns:
            raise ValueError("remove_unused_columns: got True, wanted False: it would remove prompts, responses and scores")
        super().__post_init__()
        if self.accelerator_config.dispatch_batches:  # type: ignore[union-attr]  # an AcceleratorConfig by now
            raise ValueError(
                "accelerator_config: got dispatch_batches True, wanted False: batches of unequal K cannot be split among processes"
            )
        if self.reference_cache_dir is None:
            self.reference_cache_dir = os.environ.get("NCA_KERNELS_CACHE", os.path.join(self.output_dir, "_reference_cache"))
        if self.process_index == 0:
            self._warn_of_unread_keys()

    def unread_keys(self) -> list[str]:
        """The keys that have no effect on this loss."""
        return [key for key, argument in _OF_SOME_LOSSES.items() if argument not in LOSSES[self.loss].takes]

    def _warn_of_unread_keys(self) -> None:
        for key in self.unread_keys():
            if (value := getattr(self, key)) != getattr(NCAConfig, key):
                others = ", ".join(name for name, loss in LOSSES.items() if _OF_SOME_LOSSES[key] in loss.takes)
                logger.warning("%s: got %r, which has no effect on the loss %r, only on %s", key, value, self.loss, others)

    def loss_options(self, **of_batch: Tensor | None) -> dict[str, Any]:
        """The keyword arguments of :func:`nca_kernels.group_loss` that the loss takes, from the configuration and the batch."""
        given = {"alpha": self.alpha, "pairs": self.pairs, "label_smoothing": self.label_smoothing, **of_batch}
        taken = {*LOSSES[self.loss].takes, *(("lengths",) if self.nll_weight > 0 else ())}
        return {"beta": self.beta, "nll_weight": self.nll_weight} | {name: given[name] for name in given if name in taken}

    def head_options(self) -> dict[str, Any]:
        """The keyword arguments of :func:`~nca_kernels.integrations.model_logps` that are keys of the configuration."""
        return {
            "logits_dtype": None if self.logits_dtype is None else LOGITS_DTYPES[self.logits_dtype],
            "save_budget": self.save_budget,
            "skip_mass": self.skip_mass,
        }

    def row_options(self) -> RowOptions:
        """The keys that say how rows are prepared."""
        return RowOptions(**{name: getattr(self, name) for name in RowOptions._fields})
