"""What a killed run leaves; which checkpoints resuming uses, skips and refuses; losses and weights that are not finite."""

import json

import pytest
import torch
import yaml
from architectures import tiny
from peft import LoraConfig
from training import assert_same_weights, config, make_rows, trained, weights, with_ref_logps
from transformers import TrainerCallback

from nca_kernels.integrations.reference import cache
from nca_kernels.integrations.training.trainer import NCATrainer

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def _users_dispatch(default_dispatch):
    """Triton's interpreter takes seconds where the CPU's kernels take milliseconds."""


ROWS = make_rows(12)
STEPS = {"save_strategy": "steps", "save_steps": 1, "optim": "adamw_torch", "learning_rate": 1e-3}


def run(folder, resume=None, rows=ROWS, **options):
    return trained(folder, rows, resume=resume, **{**STEPS, **options})


@pytest.fixture(scope="module")
def scored():
    return with_ref_logps(ROWS, tiny("llama"))


def damage(folder, how):
    if how == "cut off":
        file = folder / "optimizer.pt"
        file.write_bytes(file.read_bytes()[:-7])
    elif how == "missing":
        (folder / "model.safetensors").unlink()
    elif how == "no manifest":
        (folder / "checkpoint.json").unlink()
    elif how == "manifest cut off":
        (folder / "checkpoint.json").write_text('{"files": {')
    elif how == "empty":
        for path in folder.iterdir():
            path.unlink()


@pytest.mark.parametrize("how", ["cut off", "missing", "no manifest", "manifest cut off", "empty"])
def test_a_half_written_checkpoint_is_passed_over_and_named(how, tmp_path, capsys, scored):
    whole = run(tmp_path, rows=scored)
    damage(tmp_path / "checkpoint-3", how)
    resumed = run(tmp_path, True, scored)
    printed = capsys.readouterr().out
    assert f"{tmp_path / 'checkpoint-3'} is passed over: " in printed
    assert f"{tmp_path / 'checkpoint-2'}: continues after step 2" in printed
    assert_same_weights(weights(resumed), weights(whole))
    damage(tmp_path / "checkpoint-3", how)
    with pytest.raises(ValueError, match="resume_from_checkpoint: .*checkpoint-3 is not whole: "):
        run(tmp_path, str(tmp_path / "checkpoint-3"), scored)


def test_another_runs_checkpoint_is_refused_by_what_differs(tmp_path, scored):
    run(tmp_path, rows=scored)
    for options, difference in (
        ({"beta": 0.5}, "beta: 0.1 there, 0.5 here"),
        ({"loss": "info_nca"}, "loss: nca there, info_nca here"),
        ({"learning_rate": 1e-2}, "learning_rate: 0.001 there, 0.01 here"),
        ({"per_device_train_batch_size": 2}, "per_device_train_batch_size: 4 there, 2 here"),
        ({"rows": scored[:8]}, "rows: 12 there, 8 here"),
        ({"rows": [{**row, "scores": row["scores"][::-1]} for row in scored]}, "data: "),
        ({"peft_config": LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])}, "adapter"),
    ):
        for resume in (True, str(tmp_path / "checkpoint-1")):
            with pytest.raises(ValueError, match=f"checkpoint-. is of another run: .*{difference}"):
                run(tmp_path, resume, **{"rows": scored, **options})
    other = tiny("llama")
    with torch.no_grad():
        other.lm_head.weight[0] += 1
    with pytest.raises(ValueError, match="is of another run: model: "):
        trained(tmp_path, scored, other, resume=True, **STEPS)
    assert run(tmp_path, True, scored, num_train_epochs=2).state.global_step == 6  # more of the same run


def test_the_newest_of_this_very_run(tmp_path, scored, capsys):
    """A newer checkpoint of another run in the same folder is not used."""
    ours = run(tmp_path / "ours", rows=scored)
    run(tmp_path / "other", rows=scored, beta=0.5)
    (tmp_path / "other" / "checkpoint-3").rename(tmp_path / "ours" / "checkpoint-9")
    resumed = run(tmp_path / "ours", True, scored, num_train_epochs=1)
    assert f"{tmp_path / 'ours' / 'checkpoint-3'}: continues after step 3" in capsys.readouterr().out
    assert_same_weights(weights(resumed), weights(ours))


def test_nothing_to_resume(tmp_path, scored, capsys):
    """A run that was killed before its first checkpoint starts at step 0; a folder without any run is refused."""
    with pytest.raises(ValueError, match="resume_from_checkpoint: got true, and .* has no checkpoint"):
        run(tmp_path, True, scored)
    run(tmp_path, rows=scored, save_strategy="no")
    assert run(tmp_path, True, scored, save_strategy="no").state.global_step == 3
    assert "has no whole checkpoint yet: the run starts at step 0" in capsys.readouterr().out
    with pytest.raises(ValueError, match="resume_from_checkpoint: got nope, which is not a folder"):
        run(tmp_path, "nope", scored)


def test_weights_without_an_optimizer_are_told(tmp_path, scored, capsys):
    run(tmp_path, rows=scored, save_only_model=True)
    run(tmp_path, str(tmp_path / "checkpoint-2"), scored, save_only_model=True)
    assert "holds weights and no optimizer state (save_only_model)" in capsys.readouterr().out


def test_the_settings_lie_beside_every_checkpoint(tmp_path, scored):
    run(tmp_path, rows=scored, beta=0.3, save_total_limit=2)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]
    assert not (tmp_path / "_unfinished").exists()
    for folder in (tmp_path, tmp_path / "checkpoint-2", tmp_path / "checkpoint-3"):
        settings = yaml.safe_load((folder / "run.yaml").read_text())
        assert (settings["beta"], settings["loss"], settings["learning_rate"]) == (0.3, "nca", 1e-3)
        assert settings["per_device_train_batch_size"] == 4
    manifest = json.loads((tmp_path / "checkpoint-3" / "checkpoint.json").read_text())
    assert manifest["fingerprint"]["beta"] == 0.3 and "optimizer.pt" in manifest["files"]


class _Poison(TrainerCallback):
    """Writes NaN into a weight after a step."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, model, **kwargs):
        if state.global_step == self.step:
            with torch.no_grad():
                model.lm_head.weight[5] = torch.nan


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, scored):
    """The error names the last good checkpoint, and no weights with NaN are saved."""
    options = {"rows": scored, "per_device_train_batch_size": 1, "num_train_epochs": 2, "max_bad_losses": 3}
    with pytest.raises(FloatingPointError, match="loss: not finite in the last 3 micro-batches, up to step 7; .* no checkpoint"):
        run(tmp_path / "a", callbacks=[_Poison(4)], save_steps=100, **options)
    with pytest.raises(FloatingPointError, match=f"not finite .*; the last good checkpoint is {tmp_path}/b/checkpoint-4"):
        run(tmp_path / "b", callbacks=[_Poison(4)], **options)
    with pytest.raises(FloatingPointError, match="not finite"):
        run(tmp_path / "c", callbacks=[_Poison(22)], save_strategy="no", **options)  # too few for max_bad_losses


def test_a_reference_that_is_not_finite_is_refused(tmp_path):
    model = tiny("llama")
    with torch.no_grad():
        model.lm_head.weight[5] = torch.nan
    with pytest.raises(ValueError, match="reference: row .*: got the log-prob nan .*, wanted finite"):
        NCATrainer(model, config(tmp_path), ROWS)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_full_disk_costs_nothing_that_was_there(tmp_path, scored, monkeypatch):
    whole = run(tmp_path, rows=scored)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(
        OSError, match="checkpoint-4: cannot be written .*No space left.*; the last good checkpoint is .*checkpoint-3"
    ):
        run(tmp_path, True, scored, num_train_epochs=2)
    monkeypatch.undo()
    assert_same_weights(weights(run(tmp_path, True, scored)), weights(whole))


def test_a_cache_file_is_readable_as_the_umask_says(tmp_path):
    NCATrainer(tiny("llama"), config(tmp_path), ROWS)
    (file,) = (tmp_path / "_reference_cache").glob("*.safetensors")
    (tmp_path / "any").touch()
    assert file.stat().st_mode == (tmp_path / "any").stat().st_mode
    assert cache._read(file, sum(len(row["scores"]) for row in ROWS)) is not None
