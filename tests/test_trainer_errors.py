"""What NCATrainer refuses: settings, rows, models and modes; each error names them."""

import math
from types import SimpleNamespace

import pytest
from architectures import tiny
from datasets import Dataset, DatasetDict
from peft import LoraConfig, get_peft_model
from test_data import tokenizer
from training import config
from transformers import TrainingArguments

from nca_kernels.integrations.training.trainer import NCATrainer
from nca_kernels.loss_table import LOSSES

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")


@pytest.fixture(autouse=True)
def _users_dispatch(default_dispatch):
    """Triton's interpreter takes seconds where the CPU's kernels take milliseconds."""


@pytest.mark.parametrize(
    "options, message",
    [
        ({"loss": "sft"}, "loss: got 'sft', wanted one of 'info_nca'"),
        ({"beta": 0.0}, "beta: got 0.0, wanted a finite number > 0"),
        ({"alpha": -1.0}, "alpha: got -1.0"),
        ({"pairs": "some"}, "pairs: got 'some'"),
        ({"label_smoothing": 0.1}, "label_smoothing: got a value, wanted none: the loss 'nca' does not take it"),
        ({"loss": "dpo", "label_smoothing": 0.5}, r"label_smoothing: got 0.5, wanted a number in \[0, 0.5\)"),
        ({"nll_weight": -1.0}, "nll_weight: got -1.0, wanted a finite number >= 0"),
        ({"num_responses": 1}, "num_responses: got 1, wanted an int >= 2"),
        ({"reference": "none"}, "reference: got 'none'"),
        ({"max_length": 3}, "max_length: got 3"),
        ({"save_budget": -1}, "save_budget: got -1"),
        ({"skip_mass": 1.0}, "skip_mass: got 1.0, wanted a number >= 0 and < 1"),
        ({"logits_dtype": "bfloat16"}, "logits_dtype: got 'bfloat16', wanted one of 'float32'"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor: got 0.1, wanted 0"),
        ({"train_sampling_strategy": "batch_rebalance"}, "train_sampling_strategy: got 'batch_rebalance'"),
        ({"remove_unused_columns": True}, "remove_unused_columns: got True"),
        (
            {"accelerator_config": {"dispatch_batches": True}},
            "accelerator_config: got dispatch_batches True, wanted False",
        ),
    ],
)
def test_errors_of_the_config(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **options)


@pytest.mark.parametrize("loss", LOSSES)
def test_keys_that_the_loss_does_not_read_give_a_warning(loss, tmp_path, caplog):
    takes = LOSSES[loss].takes
    config(tmp_path, loss=loss, kto_threshold=None)
    assert not caplog.records
    config(tmp_path, loss=loss, alpha=0.3, pairs="all", kto_threshold=0.5)
    told = [record.getMessage().partition(", only on ") for record in caplog.records]
    assert [(message, losses) for message, _, losses in told] == [
        (f"{key}: got {value!r}, which has no effect on the loss {loss!r}", losses)
        for key, value, argument, losses in (
            ("alpha", 0.3, "alpha", "info_nca, nca, biased_nca"),
            ("pairs", "all", "pairs", "dpo, ipo"),
            ("kto_threshold", 0.5, "desirable", "kto"),
        )
        if argument not in takes
    ]


ROW = {"prompt_ids": [3], "response_ids": [[4], [5]], "scores": [1.0, 0.0]}


@pytest.mark.parametrize(
    "rows, message",
    [
        ([], "train_dataset: got no rows"),
        ([ROW, {**ROW, "scores": [1.0]}], "train_dataset: row 2, column scores: wanted one number for each"),
        ([{**ROW, "scores": [1.0, math.nan]}], "train_dataset: row 1, column scores: wanted finite"),
        ([{**ROW, "ref_logps": [-1.0]}], "train_dataset: row 1, column ref_logps: wanted one"),
        ([{**ROW, "ref_logps": [-1.0, -math.inf]}], "train_dataset: row 1, column ref_logps: wanted finite"),
        ([{**ROW, "response_ids": [[4], []]}], "train_dataset: row 1, column response_ids: a response without tokens"),
        ([ROW, {**ROW, "response_ids": []}], "train_dataset: row 2, column response_ids: no responses"),
        ([{**ROW, "prompt_ids": []}], "train_dataset: row 1, column prompt_ids: no tokens"),
        ([{"prompt_ids": [3]}], "train_dataset: got the columns prompt_ids, wanted response_ids, scores as well"),
        ([{"prompt": "a", "chosen": "b", "rejected": "c"}], "processing_class: got None"),
        (
            [ROW, {**ROW, "scores": ["high", "low"]}],
            "train_dataset: column scores: .*; wanted one kind of values in all rows",
        ),
        (
            [{"prompt": "a"}, {"prompt": [{"role": "user", "content": "a"}]}],
            "train_dataset: got the columns prompt; wanted prompt",
        ),
        ([{"question": "a", "answer": "b"}], "train_dataset: got the columns question, answer; wanted prompt"),
    ],
)
def test_errors_of_the_rows(rows, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        NCATrainer(tiny("llama"), config(tmp_path), rows)


def test_errors_of_other_arguments(tmp_path):
    args = config(tmp_path)
    with pytest.raises(TypeError, match="train_dataset: got str, wanted a datasets.Dataset or a list"):
        NCATrainer(tiny("llama"), args, "train.jsonl")
    with pytest.raises(TypeError, match="train_dataset: got DatasetDict, wanted a datasets.Dataset or a list"):
        NCATrainer(tiny("llama"), args, DatasetDict(train=Dataset.from_list([ROW])))
    trainer = NCATrainer(tiny("llama"), args, [ROW], {"a": [ROW]})
    assert trainer.evaluate("a")["eval_loss"] == trainer.evaluate()["eval_a_loss"]
    for given in (Dataset.from_list([ROW]).to_iterable_dataset(), (ROW,), "b"):
        for name, evaluate in (("eval_dataset", trainer.evaluate), ("test_dataset", trainer.predict)):
            with pytest.raises(TypeError, match=f"{name}: got {type(given).__name__}, wanted a datasets.Dataset or a list"):
                evaluate(given)
    with pytest.raises(TypeError, match="args: got TrainingArguments, wanted an NCAConfig"):
        NCATrainer(tiny("llama"), TrainingArguments(str(tmp_path), use_cpu=True), [ROW])
    with pytest.raises(TypeError, match="model: got int"):
        NCATrainer(3, args, [ROW])
    with pytest.raises(OSError, match="no/such/folder"):
        NCATrainer("no/such/folder", args, [ROW])
    with pytest.raises(ValueError, match="peft_config: model has an adapter already"):
        NCATrainer(get_peft_model(tiny("llama"), LoraConfig(task_type="CAUSAL_LM")), args, [ROW], peft_config=LoraConfig())
    with pytest.raises(ValueError, match="train_dataset: row 1, column scores: got 1 scores for 2 responses"):
        bad = [{"prompt": "a", "responses": ["b", "c"], "scores": [1.0]}]
        NCATrainer(tiny("llama"), args, bad, processing_class=tokenizer())
    with pytest.raises(ValueError, match="train_dataset: got 1 row, wanted at least 2: kto"):
        NCATrainer(tiny("llama"), config(tmp_path, loss="kto"), [ROW])


def test_several_gpus_without_a_launcher(tmp_path, monkeypatch):
    args = config(tmp_path)
    assert args.n_gpu <= 1
    monkeypatch.setattr(type(args), "n_gpu", 2)
    with pytest.raises(ValueError, match="args: got 2 GPUs for one process, .*: use accelerate launch, or CUDA_VISIBLE_DEVICES=0"):
        NCATrainer(tiny("llama"), args, [ROW])
    assert not list(tmp_path.iterdir())


def test_modes_that_split_sequences_or_layers_are_refused_by_name(tmp_path, monkeypatch):
    """Each rank would sum only a part of a log-prob."""
    for settings, message in (
        ({"cp_size": 2}, "parallelism_config: got cp_size 2 .context parallelism."),
        ({"sp_size": 2}, "parallelism_config: got sp_size 2 .sequence parallelism."),
        ({"tp_size": 2}, "parallelism_config: got tp_size 2 .tensor parallelism."),
    ):
        args = config(tmp_path)
        args.parallelism_config = SimpleNamespace(**settings)
        with pytest.raises(ValueError, match=message):
            NCATrainer(tiny("llama"), args, [ROW])
        (name, size) = next(iter(settings.items()))
        monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
        monkeypatch.setenv(f"PARALLELISM_CONFIG_{name.upper()}", str(size))  # as accelerate launch says it
        with pytest.raises(ValueError, match=message):
            NCATrainer(tiny("llama"), config(tmp_path), [ROW])
        monkeypatch.undo()
    for key, value in (("sequence_parallel_size", 2), ("tensor_parallel", {"autotp_size": 2})):
        args = config(tmp_path)
        args.deepspeed = {key: value}
        with pytest.raises(ValueError, match=f"deepspeed: got {key}.* parallelism"):
            NCATrainer(tiny("llama"), args, [ROW])
    model = tiny("llama")
    monkeypatch.setattr(type(model), "tp_size", 2)
    with pytest.raises(ValueError, match="model: got a model with tp_plan, split among 2 ranks .tensor parallelism."):
        NCATrainer(model, config(tmp_path), [ROW])
