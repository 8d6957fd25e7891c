"""The cache of reference log-probs: one pass into a file, whose name depends on all inputs, and which survives a killed run."""

import os
import signal

import pytest
import torch
from accelerate import Accelerator
from architectures import tiny
from datasets import Dataset, Features, List, Value
from peft import LoraConfig, get_peft_model
from test_data import tokenizer
from training import assert_same_weights, config, logged, make_rows, plain_logps, trained, weights, with_ref_logps
from transformers import TrainerCallback

from nca_kernels.integrations.reference import cache as module
from nca_kernels.integrations.reference.cache import cache_key, reference_logps, weights_digest
from nca_kernels.integrations.training.trainer import NCATrainer

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")


@pytest.fixture(autouse=True)
def _users_dispatch(default_dispatch):
    """Triton's interpreter takes seconds where the CPU's kernels take milliseconds."""


LORA = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=64, target_modules=["q_proj", "v_proj"])


def files(folder):
    return sorted(path for path in (folder / "_reference_cache").rglob("*") if path.is_file())


class _Forwards(TrainerCallback):
    """Counts the forwards of a model before its training begins."""

    def __init__(self, model):
        self.calls, self.before_training = 0, None
        model.get_input_embeddings().register_forward_hook(self.count)

    def count(self, *_):
        self.calls += 1

    def on_train_begin(self, *_, **__):
        self.before_training = self.calls


def test_computed_once(tmp_path):
    """The log-probs are the model's own. A second run reads them instead of computing them, and trains to the same bits."""
    rows = make_rows(9)
    runs, forwards = [], []
    for _ in range(2):
        model = tiny("llama", attention_dropout=0.5).train()
        forwards.append(_Forwards(model))
        runs.append(trained(tmp_path, rows, model, loss="kto", callbacks=[forwards[-1]]))
    first, second = runs
    # Both look at the model's head; the first has the 9 rows in 3 batches besides.
    assert forwards[0].before_training - forwards[1].before_training == 3
    model = tiny("llama")
    for i, row in enumerate(first.train_dataset):
        with torch.no_grad():
            wanted = plain_logps(model, row["prompt_ids"], [*row["response_ids"], row["mismatched_ids"]])
        assert [*row["ref_logps"], row["mismatched_ref_logps"]] == pytest.approx(wanted.tolist(), rel=1e-5)
        assert row["mismatched_ids"] in [ids[: len(row["mismatched_ids"])] for ids in rows[i - 1]["response_ids"]]
    assert len(files(tmp_path)) == 1
    assert_same_weights(weights(second), weights(first))


def test_files_of_a_run(tmp_path, monkeypatch):
    """There is one file per data set in the folder that config or environment names; none if the rows have log-probs."""
    rows = make_rows(4)
    NCATrainer(tiny("llama"), config(tmp_path / "a"), rows, {"x": rows[:2], "y": rows[2:]})
    assert len(files(tmp_path / "a")) == 3
    with monkeypatch.context() as patch:
        patch.setenv("NCA_KERNELS_CACHE", str(tmp_path / "b" / "_reference_cache"))
        NCATrainer(tiny("llama"), config(tmp_path / "c"), rows)
    assert len(files(tmp_path / "b")) == 1 and not files(tmp_path / "c")
    NCATrainer(tiny("llama"), config(tmp_path / "d", reference_cache_dir=str(tmp_path / "d" / "_reference_cache")), rows)
    assert len(files(tmp_path / "d")) == 1
    scored = with_ref_logps(rows, tiny("llama"))
    trainer = NCATrainer(tiny("llama"), config(tmp_path / "e"), scored)
    assert not files(tmp_path / "e")
    assert trainer.train_dataset["ref_logps"][:] == [row["ref_logps"] for row in scored]


def test_keys():
    """Another model, other weights, other tokens or another precision give another file; other scores do not."""
    rows = Dataset.from_list(make_rows(5))
    plain = weights_digest(tiny("llama"), base=False)
    key = cache_key(plain, rows, "no")
    assert plain == weights_digest(tiny("llama"), base=False)
    assert key == cache_key(plain, rows, "no") == cache_key(plain, rows.remove_columns("scores").flatten_indices(), "no")
    assert key == cache_key(plain, rows.select([4, *range(5)]).select(range(1, 6)), "no")
    model = tiny("llama")
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] += 1e-6
    models = (model, tiny("llama", rms_norm_eps=1e-3), tiny("gpt2"))
    assert len({plain, *(weights_digest(each, base=False) for each in models)}) == 4
    # Two batches of rows in Arrow.
    many = Dataset.from_list([{"prompt_ids": [3], "response_ids": [[4]]}] * 10_001)
    other = Dataset.from_list([{"prompt_ids": [3], "response_ids": [[4]]}] * 10_000 + [{"prompt_ids": [3], "response_ids": [[5]]}])
    assert cache_key(plain, many, "no") != cache_key(plain, other, "no")
    parts = [[[3], [[4, 5], [6]]], [[3, 4], [[5], [6]]], [[3], [[4], [5, 6]]], [[3], [[4, 5, 6]]]]
    moved = [Dataset.from_list([{"prompt_ids": prompt, "response_ids": responses}]) for prompt, responses in parts]
    keys = {key, cache_key(plain, rows, "bf16"), cache_key(plain, rows.select([1, 0, 2, 3, 4]), "no")}
    keys |= {cache_key(plain, other, "no") for other in moved}
    assert len(keys) == 7


def test_the_base_under_peft_is_the_model(tmp_path):
    """So a run with an adapter reads what a run without one computed."""
    model = get_peft_model(tiny("llama"), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], modules_to_save=["norm"]))
    assert weights_digest(model, base=True) == weights_digest(tiny("llama"), base=False)


def adapted(**options):
    """A model with an adapter that changes its output."""
    torch.manual_seed(0)
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], init_lora_weights=False, **options)
    return get_peft_model(tiny("llama"), lora).eval()


def test_an_adapter_of_a_reference_is_part_of_it():
    """The hash depends on the adapter's weights and scale, and is the same in every process, whatever the order of a set."""
    other = adapted()
    next(p for name, p in other.named_parameters() if "lora_B" in name).data[0, 0] += 1e-6
    models = (tiny("llama"), adapted(), other, adapted(lora_alpha=1))
    assert len({weights_digest(each, base=False) for each in models}) == 4
    again = adapted()
    again.peft_config["default"].target_modules = {"v_proj", "q_proj"}
    assert weights_digest(again, base=False) == weights_digest(adapted(), base=False)


def test_lists_of_a_fixed_size():
    rows = [
        {"prompt_ids": [3, 4], "response_ids": [[5, 6], [7, 8]]},
        {"prompt_ids": [3, 4], "response_ids": [[5, 6], [7, 9]]},
    ]
    fixed = {
        "prompt_ids": List(Value("int64"), length=2),
        "response_ids": List(List(Value("int64"), length=2), length=2),
    }
    plain, same = Dataset.from_list(rows), Dataset.from_list(rows, Features(fixed))
    assert cache_key("", same, "no") == cache_key("", plain, "no")
    assert cache_key("", same.select([1]), "no") == cache_key("", plain.select([1]), "no") != cache_key("", plain.select([0]), "no")


def test_tokenizer_and_truncation_make_other_files(tmp_path):
    words = tokenizer()
    rows = [{"prompt": "the moth", "responses": ["a th", "the oth moth"], "scores": [1.0, 0.0]}]
    for options in ({}, {"max_length": 12}, {"max_length": 12, "max_prompt_length": 4}):
        NCATrainer(tiny("llama", vocab_size=len(words)), config(tmp_path, **options), rows, processing_class=words)
    assert len(files(tmp_path)) == 3
    NCATrainer(tiny("llama", vocab_size=len(words)), config(tmp_path, alpha=0.3, loss="dpo"), rows, processing_class=words)
    assert len(files(tmp_path)) == 3


def fake_logps(rows):
    return torch.tensor([float(sum(response)) for row in rows for response in row["response_ids"]])


def test_a_killed_pass_goes_on(tmp_path, monkeypatch):
    """After SIGKILL in the third part, which leaves no time to clean up, two parts are read and the rest is computed."""
    monkeypatch.setattr(module, "PART", 4)
    rows = Dataset.from_list(make_rows(14))
    file = tmp_path / "_reference_cache" / "key.safetensors"
    child = os.fork()
    if child == 0:
        calls = []

        def killed(rows):
            calls.append(rows)
            if len(calls) > 5:
                os.kill(os.getpid(), signal.SIGKILL)
            return fake_logps(rows)

        reference_logps(rows, killed, file, Accelerator(cpu=True), batch_size=2)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert len(files(tmp_path)) == 2 and not file.exists()
    seen = []
    again = reference_logps(rows, lambda rows: seen.extend(rows) or fake_logps(rows), file, Accelerator(cpu=True), batch_size=2)
    assert len(seen) == 14 - 2 * 4
    assert again == [[float(sum(response)) for response in responses] for responses in rows["response_ids"]]
    assert files(tmp_path) == [file]
    assert reference_logps(rows, None, file, Accelerator(cpu=True), batch_size=2) == again


def test_killed_while_writing(tmp_path, monkeypatch):
    """A half-written file has a temporary name and is never read."""
    rows = Dataset.from_list(make_rows(3))
    file = tmp_path / "_reference_cache" / "key.safetensors"
    replace = os.replace

    def killed(unfinished, file):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        reference_logps(rows, fake_logps, file, Accelerator(cpu=True), batch_size=2)
    monkeypatch.setattr(os, "replace", replace)
    assert not file.exists() and all(path.suffix == ".unfinished" for path in files(tmp_path))
    assert len(reference_logps(rows, fake_logps, file, Accelerator(cpu=True), batch_size=2)) == 3


def test_a_file_of_something_else(tmp_path):
    rows = Dataset.from_list(make_rows(3))
    file = tmp_path / "key.safetensors"
    file.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="key.safetensors: not a file of reference log-probs"):
        reference_logps(rows, fake_logps, file, Accelerator(cpu=True), batch_size=2)
    file.unlink()
    reference_logps(rows, fake_logps, file, Accelerator(cpu=True), batch_size=2)
    with pytest.raises(ValueError, match=r"key.safetensors: holds \[\d+\] log-probs, wanted"):
        reference_logps(rows.select([0]), fake_logps, file, Accelerator(cpu=True), batch_size=2)


@pytest.mark.parametrize("loss", ["nca", "kto"])
def test_at_every_step(loss, tmp_path):
    """A frozen copy gives the log-probs of the cache and writes no file; dropout affects neither."""
    rows = make_rows(8)
    model = {"attention_dropout": 0.5}
    cached = trained(tmp_path / "a", rows, tiny("llama", **model).train(), loss=loss)
    copied = trained(tmp_path / "b", rows, tiny("llama", **model).train(), loss=loss, reference="model")
    assert not (tmp_path / "b" / "_reference_cache").exists()
    assert logged(copied, "loss") == pytest.approx(logged(cached, "loss"), rel=1e-5)
    assert_same_weights(weights(copied), weights(cached), tiny("llama", **model).state_dict(), rtol=2e-3)


@pytest.mark.parametrize("reference", ["precompute", "model"])
def test_a_reference_of_its_own(reference, tmp_path):
    rows = make_rows(4)
    other = tiny("llama", rope_theta=50.0, initializer_range=0.1)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    log = trained(tmp_path, rows, ref_model=other, reference=reference).state.log_history[0]
    change = 0
    for row in rows:
        with torch.no_grad():
            ours, theirs = (plain_logps(model, row["prompt_ids"], row["response_ids"]) for model in (tiny("llama"), other))
        change += float((ours - theirs)[max(range(len(ours)), key=lambda i: row["scores"][i])]) / len(rows)
    assert log["logps/best_change"] == pytest.approx(change, rel=1e-4)
    assert_same_weights(dict(other.state_dict()), before)


@pytest.mark.parametrize("reference", ["precompute", "model"])
def test_a_reference_with_an_adapter(reference, tmp_path):
    """The adapter of a reference model is part of the reference, unlike that of the policy."""
    rows = make_rows(4)
    wanted = with_ref_logps(rows, adapted())
    log = trained(tmp_path, rows, peft_config=LORA, ref_model=adapted(), reference=reference).state.log_history[0]
    scored = trained(tmp_path, wanted, peft_config=LORA).state.log_history[0]
    assert scored["kl"] != pytest.approx(0, abs=0.1)
    assert log["kl"] == pytest.approx(scored["kl"], rel=1e-4)


def test_a_reference_of_its_own_is_not_replaced_by_the_policy(tmp_path):
    """The log-probs of a separate reference model are kept, and the model is released."""
    rows = make_rows(4)
    for keywords in ({}, {"peft_config": LORA}):
        trainer = NCATrainer(tiny("llama"), config(tmp_path), rows, rows, ref_model=adapted(), **keywords)
        for evaluate in (trainer.evaluate, trainer.predict):
            with pytest.raises(ValueError, match='_dataset: rows without ref_logps, and ref_model is no longer kept; .*"model"'):
                evaluate(rows)
        assert trainer.evaluate(with_ref_logps(rows, adapted()))["eval_kl"] == pytest.approx(trainer.evaluate()["eval_kl"])
    trainer = NCATrainer(tiny("llama"), config(tmp_path, reference="model"), rows, rows, ref_model=adapted())
    assert trainer.evaluate(rows)["eval_kl"] == trainer.evaluate()["eval_kl"] != pytest.approx(0, abs=0.1)


@pytest.mark.parametrize("how", ["pissa", "pissa_niter_2", "olora"])
def test_the_reference_of_a_rewritten_base_is_the_policy_at_its_start(how, tmp_path):
    """These adapters subtract from the base what they put into the adapter, so the base alone is another model."""
    rows = make_rows(4)
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=how)
    start = with_ref_logps(rows, tiny("llama"))
    for given, keywords in ((rows, {}), (rows, {"reference": "model"}), (start, {}), (rows, {"ref_model": tiny("llama")})):
        kl = trained(tmp_path, given, peft_config=lora, **keywords).state.log_history[0]["kl"]
        assert kl == pytest.approx(0, abs=1e-4)


def test_what_is_no_reference_is_refused(tmp_path):
    rows, model = make_rows(4), tiny("llama")
    with pytest.raises(TypeError, match="ref_model: got str, wanted a causal LM, loaded"):
        NCATrainer(model, config(tmp_path), rows, ref_model="some/model")
    for keywords in ({}, {"peft_config": LORA}):
        with pytest.raises(ValueError, match="ref_model: shares trained weights with model"):
            NCATrainer(model, config(tmp_path), rows, ref_model=model, **keywords)
    assert not files(tmp_path)


def test_a_policy_that_cannot_be_served_is_refused_before_the_pass(tmp_path):
    """LoRA on the head is refused in the policy, although the reference does not use it."""
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "lm_head"])
    with pytest.raises(ValueError, match="If that is LoRA on the head, leave it out"):
        NCATrainer(tiny("llama"), config(tmp_path), make_rows(4), peft_config=lora)
    assert not files(tmp_path)
