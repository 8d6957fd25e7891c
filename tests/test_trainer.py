"""NCATrainer in one process: its steps against plain loops, the scaling of its loss, its rows, and what it saves."""

import pytest
import torch
from architectures import tiny
from datasets import Dataset
from matplotlib import colormaps, image
from peft import LoraConfig
from test_data import tokenizer
from training import assert_same_weights, config, logged, make_rows, plain_logps, trained, weights, with_ref_logps
from transformers import AutoModelForCausalLM, AutoTokenizer

from nca_kernels import reference
from nca_kernels.integrations.training.trainer import NCATrainer
from nca_kernels.loss_table import LOSSES

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")


@pytest.fixture(autouse=True)
def _users_dispatch(default_dispatch):
    """Triton's interpreter takes seconds where the CPU's kernels take milliseconds."""


def by_hand(rows, steps, *, loss="nca", batch=4, lr=0.2, average=False, **options):
    """The losses and weights of plain SGD on full logits, one prompt at a time, in float64; the reference is the initial model."""
    policy, start = tiny("llama").double(), tiny("llama").double()
    losses = []
    for step in range(steps):
        chosen = [(i, rows[i]) for i in range(step * batch, min((step + 1) * batch, len(rows)))]
        baseline = None
        if loss == "kto":
            drifts = []
            for i, row in chosen:
                before = rows[i - 1]["response_ids"]
                stranger = [before[i % len(before)]]
                with torch.no_grad():
                    drift = plain_logps(policy, row["prompt_ids"], stranger) - plain_logps(start, row["prompt_ids"], stranger)
                drifts.append(drift / len(stranger[0]) if average else drift)
            baseline = torch.stack(drifts).mean()
        total = 0
        for _, row in chosen:
            with torch.no_grad():
                ref = plain_logps(start, row["prompt_ids"], row["response_ids"])
            logps = plain_logps(policy, row["prompt_ids"], row["response_ids"])
            lengths = torch.tensor([[len(response) for response in row["response_ids"]]])
            if average:
                ref, logps = ref / lengths[0], logps / lengths[0]
            value, _ = reference.group_loss(
                loss,
                logps[None],
                ref[None],
                torch.tensor([row["scores"]]),
                **{"beta": 0.1, "alpha": 1.0, "pairs": "best_vs_rest", **options},
                lengths=torch.ones_like(lengths) if average else lengths,
                baseline=baseline,
                desirable=torch.tensor([row["scores"]]) >= 0.5 if loss == "kto" else None,
            )
            total = total + value.sum() / len(chosen)
        total.backward()
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter -= lr * parameter.grad
                parameter.grad = None
        losses.append(float(total))
    return losses, {name: tensor.float() for name, tensor in policy.state_dict().items()}


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("loss", LOSSES)
def test_steps(loss, average, tmp_path):
    """With ragged K and a last batch of two prompts, steps match the plain loop in float64."""
    rows = make_rows(10)
    losses, wanted = by_hand(rows, 3, loss=loss, average=average)
    trainer = trained(tmp_path, rows, loss=loss, average=average)
    assert logged(trainer, "loss") == pytest.approx(losses, rel=2e-5)
    assert_same_weights(weights(trainer), wanted, tiny("llama").state_dict(), rtol=2e-3)


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("loss, options", [("nca", {"nll_weight": 0.5}), ("dpo", {"nll_weight": 0.5, "label_smoothing": 0.2})])
def test_steps_with_terms_of_every_loss(loss, options, average, tmp_path):
    rows = make_rows(6)
    losses, wanted = by_hand(rows, 2, loss=loss, average=average, **options)
    trainer = trained(tmp_path, rows, loss=loss, average=average, **options)
    assert logged(trainer, "loss") == pytest.approx(losses, rel=2e-5)
    assert_same_weights(weights(trainer), wanted, tiny("llama").state_dict(), rtol=2e-3)


def test_logits_of_a_low_precision_model_in_float32(tmp_path):
    """Log-probs of policy and reference come closer to those of float64 logits, and have another cache than without."""
    model, rows, errors = tiny("llama").bfloat16(), make_rows(4), []
    by_id = [row["prompt_ids"] + row["response_ids"][0] for row in rows]
    for logits_dtype in (None, "float32"):
        options = {"logits_dtype": logits_dtype, "reference_cache_dir": str(tmp_path / "cache")}
        trainer = NCATrainer(model, config(tmp_path, **options), rows)
        error = 0.0
        for row, ids, ref_logps in zip(rows, by_id, trainer.train_dataset["ref_logps"], strict=True):
            with torch.no_grad():
                hidden = model.model(torch.tensor([ids])).last_hidden_state[0].double()
            labels = torch.tensor(row["response_ids"][0])
            logps = (hidden @ model.lm_head.weight.double().T).log_softmax(-1)[len(row["prompt_ids"]) - 1 : -1]
            error += abs(logps.gather(1, labels[:, None]).sum().item() - ref_logps[0])
        errors.append(error)
    assert errors[1] < 0.2 * errors[0], errors
    assert len(list((tmp_path / "cache").glob("*.safetensors"))) == 2


def test_skip_mass(tmp_path):
    """It changes gradients a little and log-probs not at all, so the first loss is the same and the reference's cache, too."""
    rows, cache = make_rows(6), {"reference_cache_dir": str(tmp_path / "cache")}
    exact = trained(tmp_path / "exact", rows, max_steps=1, **cache)
    ours = trained(tmp_path / "ours", rows, max_steps=1, skip_mass=0.3, **cache)
    assert logged(ours, "loss") == pytest.approx(logged(exact, "loss"), rel=1e-6)
    start, name = tiny("llama").state_dict(), "model.embed_tokens.weight"
    change, difference = weights(exact)[name] - start[name], weights(ours)[name] - weights(exact)[name]
    assert 1e-3 * change.norm() < difference.norm() < 0.5 * change.norm()
    assert len(list((tmp_path / "cache").glob("*.safetensors"))) == 1


@pytest.mark.parametrize("loss", ["nca", "dpo", "kto"])
def test_accumulation(loss, tmp_path):
    """4 prompts at once, 2 x 2 and 4 x 1, with ragged K and an uneven end, are the same steps."""
    rows = make_rows(11)
    once = trained(tmp_path, rows, loss=loss)
    for size in (2, 1):
        parts = trained(tmp_path, rows, loss=loss, per_device_train_batch_size=size, gradient_accumulation_steps=4 // size)
        assert parts.state.global_step == once.state.global_step == 3
        assert logged(parts, "loss") == pytest.approx(logged(once, "loss"), rel=1e-5)
        assert_same_weights(weights(parts), weights(once), tiny("llama").state_dict(), rtol=2e-3)
        for name in ("rewards/accuracy", "rewards/margin", "rewards/rank_2", "kl"):
            # Not at the first step, where the rewards are the rounding of zeros.
            assert logged(parts, name)[1:] == pytest.approx(logged(once, name)[1:], rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("loss", ["info_nca", "kto"])
def test_share_prompt(loss, tmp_path):
    rows = make_rows(9)
    separate = trained(tmp_path / "separate", rows, loss=loss)
    shared = trained(tmp_path / "shared", rows, loss=loss, share_prompt=True)
    assert logged(shared, "loss") == pytest.approx(logged(separate, "loss"), rel=1e-5)
    assert_same_weights(weights(shared), weights(separate), tiny("llama").state_dict(), rtol=2e-3)


def test_share_prompt_is_checked_at_the_start(tmp_path):
    with pytest.raises(ValueError, match="share_prompt: MambaForCausalLM carries a state"):
        NCATrainer(tiny("mamba"), config(tmp_path, share_prompt=True), with_ref_logps(make_rows(4), tiny("mamba")))


@pytest.mark.parametrize("loss", LOSSES)
def test_it_learns(loss, tmp_path):
    """With each loss, the order of the rewards becomes that of the scores."""
    rows = make_rows(6)
    options = {
        "num_train_epochs": 10,
        "optim": "adamw_torch",
        "learning_rate": 5e-3,
        "beta": 0.3,
        "alpha": 0.2,
        "pairs": "all",
    }
    trainer = trained(tmp_path, rows, loss=loss, **options)
    losses = logged(trainer, "loss")
    assert sum(losses[-2:]) < sum(losses[:2])
    assert logged(trainer, "rewards/accuracy")[0] == 0 and sum(logged(trainer, "rewards/accuracy")[-2:]) / 2 > 0.8


def test_metrics_at_the_first_step(tmp_path):
    """At the first step policy and reference are the same model."""
    log = trained(tmp_path, make_rows(4)).state.log_history[0]
    for name in ("rewards/rank_1", "rewards/rank_2", "rewards/margin", "logps/best_change", "kl"):
        assert log[name] == 0
    assert log["tokens_per_second"] > 0
    assert 0 < log["loss_time_share"] < 1


@pytest.mark.parametrize("form", ["torch", "numpy"])
def test_rows_formatted_for_tensors(form, tmp_path):
    """Prompts and responses have equal lengths, so that ``+`` on tensors would add them instead of concatenating."""
    rows = [{"prompt_ids": [3, 4 + i], "response_ids": [[5, 6 + i], [7, 8]], "scores": [1.0, 0.0]} for i in range(4)]
    plain = trained(tmp_path, rows)
    formatted = trained(tmp_path, Dataset.from_list(rows).with_format(form))
    assert logged(formatted, "logps/best") == logged(plain, "logps/best")


def test_columns_that_are_not_used_may_be_of_any_kind(tmp_path):
    rows = [{**row, "note": note} for row, note in zip(make_rows(4), (1, "one", {"a": 1}, [None]), strict=True)]
    trainer = NCATrainer(tiny("llama"), config(tmp_path), rows)
    assert trainer.train_dataset.column_names == ["prompt_ids", "response_ids", "scores", "ref_logps"]


def test_what_a_run_would_lose_in_silence(tmp_path, caplog):
    """Small steps of low-precision weights and the load-balancing loss of experts give a warning; other runs give none."""
    scored = with_ref_logps(make_rows(4), tiny("llama"))
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    for model, keywords in (
        (tiny("llama"), {}),
        (tiny("llama").bfloat16(), {"peft_config": lora}),
        (tiny("mixtral"), {}),
    ):
        NCATrainer(model, config(tmp_path), scored, **keywords)
    assert not caplog.records
    NCATrainer(tiny("llama").bfloat16(), config(tmp_path, learning_rate=5e-6), scored)
    assert "model: trains weights in torch.bfloat16, which round steps of 5e-06 to 0; wanted float32" in caplog.text
    NCATrainer(tiny("mixtral", output_router_logits=True), config(tmp_path), scored)
    assert "model: output_router_logits is set; the loss that balances its experts is not added" in caplog.text


@pytest.mark.parametrize("K", [2, 3])
def test_num_responses(K, tmp_path):
    """A best response and one scored below it are kept, and the seed draws the others."""
    rows = make_rows(30)
    for row in rows[::2]:  # many best ones, so that one below them is no matter of course
        row["scores"] = [0.0, *[1.0] * (len(row["scores"]) - 1)]
    scored = with_ref_logps(rows, tiny("llama"))
    trainer = NCATrainer(tiny("llama"), config(tmp_path, num_responses=K), scored, rows[:4])
    drawn = set()
    for row, kept in zip(scored, trainer.train_dataset, strict=True):
        places = [row["response_ids"].index(response) for response in kept["response_ids"]]
        assert len(places) == min(K, len(row["scores"]))
        for column in ("scores", "ref_logps"):
            assert kept[column] == [row[column][i] for i in places]
        assert max(kept["scores"]) == max(row["scores"])
        assert min(kept["scores"]) < max(row["scores"])
        drawn.add(tuple(places))
    assert len(drawn) > 8
    assert trainer.eval_dataset["response_ids"] == trainer.train_dataset["response_ids"][:4]
    again = NCATrainer(tiny("llama"), config(tmp_path, num_responses=K, seed=1), scored)
    assert again.train_dataset["response_ids"] != trainer.train_dataset["response_ids"]


def test_text_and_a_model_by_its_folder(tmp_path):
    """The trainer tokenizes rows of text, and the saved model loads again and gives the same log-probs."""
    words = tokenizer()
    model = tiny("llama", vocab_size=len(words))
    model.save_pretrained(tmp_path / "model")
    rows = [{"prompt": "the moth", "responses": ["ath", " oth"], "scores": [1.0, 0.2]}]
    rows += [{"prompt": "a", "responses": ["th", "t"], "scores": [1.0, 0.0]}]
    trainer = trained(tmp_path / "run", rows, str(tmp_path / "model"), processing_class=words, save_strategy="epoch")
    assert trainer.train_dataset["response_ids"][1] == [[words.vocab[text], words.eos_token_id] for text in ("th", "t")]
    (saved,) = (tmp_path / "run").glob("checkpoint-*")
    assert (saved / "model.safetensors").exists() and not list(saved.glob("pytorch_model*"))
    loaded = AutoModelForCausalLM.from_pretrained(saved)
    assert_same_weights(dict(loaded.state_dict()), weights(trainer))
    assert len(AutoTokenizer.from_pretrained(saved)) == len(words)


def test_plots(tmp_path):
    rows = make_rows(8)
    trainer = NCATrainer(tiny("llama"), config(tmp_path, eval_strategy="steps", eval_steps=1), rows, rows)
    trainer.train()
    names = {path.name for path in (tmp_path / "plots").iterdir()}
    assert names >= {"loss.png", "rewards_rank.png", "rewards_accuracy.png", "kl.png", "tokens_per_second.png"}
    assert "rewards_rank_1.png" not in names and "train_loss.png" not in names
    for path in (tmp_path / "plots").iterdir():
        of_the_curve = image.imread(path) - colormaps["viridis"](0.0)
        assert (abs(of_the_curve) < 0.01).all(-1).any(), f"{path.name} shows no curve"
