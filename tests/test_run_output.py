"""The readable output of a run: curves, a line per log, and a model card."""

import json
from types import SimpleNamespace

import pytest

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("matplotlib", reason="matplotlib is not installed")

import yaml
from matplotlib.colors import to_hex
from tiny import save_tiny_model
from training import config
from transformers import AutoTokenizer

from nca_kernels.integrations import NCATrainer
from nca_kernels.integrations.training import plots
from nca_kernels.integrations.training.card import Training, card, write_card
from nca_kernels.integrations.training.console import ConsoleCallback, log_line

# --- curves ----------------------------------------------------------------------------------------------------------


def history(K=12, evaluated=True):
    """A log history with three logs, with all that Trainer and the metrics write."""
    logs = []
    for step in (10, 20, 30):
        ranks = {f"rewards/rank_{k}": 1.0 / k + step for k in range(1, K + 1)}
        logs.append({"loss": 1.0 / step, "learning_rate": 1e-5, "grad_norm": 1.0, "epoch": step / 30, "step": step, **ranks})
        if evaluated:
            clocks = {"eval_runtime": 1.0, "eval_samples_per_second": 3.0, "eval_steps_per_second": 1.0}
            more = {f"eval_{name}": value + 0.5 for name, value in ranks.items()}
            logs.append({"eval_loss": 2.0 / step, "epoch": step / 30, "step": step, **clocks, **more})
    logs.append(
        {"train_runtime": 9.0, "train_loss": 0.5, "total_flos": 1e9, "train_samples_per_second": 2.0, "epoch": 1.0, "step": 30}
    )
    return logs


def test_what_is_no_metric_is_not_drawn(tmp_path):
    names = {file.stem for file in plots.draw_curves([*history(), *history()], tmp_path / "plots")}
    assert names == {"loss", "learning_rate", "grad_norm", "rewards_rank"}
    assert {file.stem for file in (tmp_path / "plots").iterdir()} == names


def test_each_rank_has_a_colour_and_evaluation_is_dashed():
    figures = plots._figures(history(K=12))
    figure = plots._figure("rewards/rank", figures["rewards/rank"])
    (axes,) = figure.axes
    lines = {line.get_label(): line for line in axes.get_lines()}
    assert (
        list(lines)[:4] == ["rewards/rank_1", "eval_rewards/rank_1", "rewards/rank_2", "eval_rewards/rank_2"] and len(lines) == 24
    )
    assert len({to_hex(line.get_color()) for line in lines.values()}) == 12
    for k in range(1, 13):
        trained, evaluated = lines[f"rewards/rank_{k}"], lines[f"eval_rewards/rank_{k}"]
        assert to_hex(trained.get_color()) == to_hex(evaluated.get_color())
        assert (trained.get_linestyle(), evaluated.get_linestyle()) == ("-", "--")
        assert trained.get_xydata().tolist() == [[step, 1.0 / k + step] for step in (10, 20, 30)]
    figure.canvas.draw()
    (legend,) = figure.legends
    assert not legend.get_window_extent().overlaps(axes.get_window_extent()), "the legend hides curves"


def test_a_metric_of_one_log_has_no_figure(tmp_path):
    assert plots.draw_curves([{"loss": 1.0, "step": 1}], tmp_path) == []


# --- a line a log ----------------------------------------------------------------------------------------------------


def test_a_training_log_is_one_line():
    logs = {
        "loss": 0.69314,
        "rewards/accuracy": 0.5,
        "rewards/margin": 0.012,
        "kl": -0.001,
        "learning_rate": 5e-6,
        "tokens_per_second": 12345.6,
        "rewards/rank_1": 3.0,
        "epoch": 0.5,
    }
    assert log_line(logs, 10, 100, 754.2) == (
        "step 10/100  loss 0.6931  accuracy 50.0%  margin 0.012  kl -0.001  lr 5e-06  tokens/s 12,346  left 12:34"
    )


def test_an_evaluation_log_is_one_line_also_of_several_sets():
    assert log_line({"eval_loss": 0.5, "eval_rewards/accuracy": 1.0, "eval_runtime": 3.0}, 10, 100, 9.0) == (
        "eval 10/100  loss 0.5000  accuracy 100.0%"
    )
    assert log_line({"eval_easy_loss": 0.5, "eval_hard_loss": 1.5}, 10, 100, None) == (
        "eval 10/100  easy loss 0.5000  hard loss 1.5000"
    )


def test_the_summary_that_ends_a_run_is_no_line():
    assert log_line({"train_runtime": 9.0, "train_loss": 0.5}, 100, 100, 0.0) == ""


def test_hours_are_told():
    assert log_line({"loss": 1.0}, 1, 9, 3723.0).endswith("left 1:02:03")


def test_every_metric_is_in_the_file(tmp_path, capsys):
    callback = ConsoleCallback()
    args = SimpleNamespace(output_dir=str(tmp_path))
    state = SimpleNamespace(is_world_process_zero=True, global_step=0, max_steps=4)
    callback.on_train_begin(args, state, None)
    for step in (2, 4):
        state.global_step = step
        callback.on_log(args, state, None, logs={"loss": 1.0 / step, "rewards/rank_1": 2.0})
    state.is_world_process_zero = False
    callback.on_log(args, state, None, logs={"loss": 9.0})
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert lines == [{"step": step, "loss": 1.0 / step, "rewards/rank_1": 2.0} for step in (2, 4)]
    assert [line.split("  ")[0] for line in capsys.readouterr().out.splitlines()] == ["step 2/4", "step 4/4"]


# --- samples ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def sampled_run(tmp_path, default_dispatch):
    """A trainer for a tiny model with a tokenizer, on rows of text."""
    save_tiny_model(str(tmp_path / "model"))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    rows = [{"prompt": f"{i}:", "responses": ["a", "bc"], "scores": [1.0, 0.0]} for i in range(4)]

    def run(eval_dataset=rows, processing_class=tokenizer, **options):
        strategy = {"eval_strategy": "steps", "eval_steps": 2} if eval_dataset else {}
        args = config(tmp_path / "run", max_steps=4, **strategy, **options)
        return NCATrainer(str(tmp_path / "model"), args, rows, eval_dataset, processing_class=processing_class)

    return run


def test_held_out_prompts_are_sampled_at_every_evaluation(sampled_run, tmp_path, capsys):
    trainer = sampled_run(sample_prompts=3)
    trainer.train()
    lines = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text(encoding="utf-8").split("\n")[:-1]]
    assert [(line["step"], line["prompt"]) for line in lines] == [(step, f"{i}:") for step in (2, 4) for i in range(3)]
    assert all({"text", "finished"} <= line.keys() for line in lines)
    assert capsys.readouterr().out.count("sample ") == 2


def test_samples_without_held_out_prompts_are_refused(sampled_run):
    with pytest.raises(ValueError, match="sample_prompts: got 2 without evaluation data"):
        sampled_run(eval_dataset=None, sample_prompts=2)


# --- the model card --------------------------------------------------------------------------------------------------

TRAINING = Training(
    base="some/model",
    data={"training data": "train.jsonl: 10 prompts, 40 responses, K = 4"},
    settings={"loss": "nca", "beta": 0.1, "alpha": 0.3},
    command="nca-kernels train run.yaml --beta 0.1",
    metrics={"loss": 0.5, "eval_loss": 0.6, "rewards/accuracy": 0.75},
)


def metadata(text):
    return yaml.safe_load(text.split("---")[1])


def test_a_card_says_what_was_trained_on_what(tmp_path):
    write_card(tmp_path, TRAINING, adapter=False)
    text = (tmp_path / "README.md").read_text()
    assert metadata(text)["base_model"] == "some/model" and metadata(text)["library_name"] == "transformers"
    for told in (
        "10 prompts, 40 responses, K = 4",
        "| beta | 0.1 |",
        "| alpha | 0.3 |",
        "2402.05369",
        "nca-kernels train run.yaml",
    ):
        assert told in text
    assert "| loss | 0.5000 | 0.6000 |" in text and "| rewards/accuracy | 0.7500 |  |" in text
    assert "More Information Needed" not in text


@pytest.mark.parametrize("given, told", [("license: apache-2.0", "apache-2.0"), ("tags: [x]", None), ("license: [a", None)])
def test_the_licence_is_the_bases(given, told, tmp_path):
    (tmp_path / "README.md").write_text(f"---\n{given}\n---\n# Base\n")
    text = card(TRAINING._replace(base=str(tmp_path)), adapter=True)
    assert metadata(text).get("license") == told and "base_model" not in metadata(text)
    assert f"| licence of the base | {told or 'see the base model'}" in text
