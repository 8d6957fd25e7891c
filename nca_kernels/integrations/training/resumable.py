"""A transformers ``Trainer`` whose runs can be killed at any moment and resumed from their own whole checkpoints."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer_utils import TrainOutput, rotate_checkpoints

from ... import _compat, whole_files
from ..models.main_process import on_main, print_main
from . import checkpoints
from .checkpoints import Checkpoint, Fingerprint
from .config import NCAConfig
from .loss_guard import LossGuard

logger = logging.getLogger(__name__)


class ResumableTrainer(Trainer):
    r"""Writes each checkpoint to a temporary folder and then moves it; resumes from the newest whole checkpoint of the same run.

    Every checkpoint holds ``run.yaml`` (``run_settings``) and ``checkpoint.json`` (``fingerprint`` and the size of each file),
    and ``output_dir`` holds ``run.yaml`` as soon as training starts. A subclass sets ``run_settings``, ``fingerprint`` and
    ``loss_guard`` before training.

    The run stops with ``FloatingPointError`` when ``max_bad_losses`` micro-batches in a row have a loss that is not finite. It
    also stops before it saves a model whose last loss or weights are not finite.
    """

    args: NCAConfig
    model: nn.Module
    run_settings: str
    fingerprint: Fingerprint
    loss_guard: LossGuard
    _unfinished: Path | None = None  # the folder in which a checkpoint is being written

    def train(
        self,
        resume_from_checkpoint: str | os.PathLike | bool | None = None,
        trial: object = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """As in transformers; ``resume_from_checkpoint=True`` takes the newest whole checkpoint of the same run.

        A run that was killed before its first checkpoint starts at step 0.

        Raises:
            ValueError: there is nothing to resume; the checkpoint is not whole, or another run wrote it (the message says what
                differs).
            FloatingPointError: the loss or the weights are no longer finite; the message names the last whole checkpoint.
            OSError: a checkpoint cannot be written; the message names the last whole one.
        """
        found = on_main(self.accelerator, self._checkpoint_to_resume, resume_from_checkpoint)
        if found is None:
            on_main(self.accelerator, self._write_settings)
        output = super().train(None if found is None else str(found), trial, ignore_keys_for_eval)
        self._refuse_bad_losses(1)
        return output

    def training_step(self, model: nn.Module, inputs: dict, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.loss_guard.watch(loss)
        return loss

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in transformers, but an existing model is replaced only after the new one has been written in full."""
        if _internal_call:  # part of a checkpoint
            return super().save_model(output_dir, _internal_call)
        folder = Path(output_dir or self.args.output_dir)
        beside = folder / checkpoints.UNFINISHED
        self._prepare_folder(beside)
        super().save_model(str(beside), _internal_call=True)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            whole_files.sync_tree(beside)
            for path in beside.iterdir():
                os.replace(path, folder / path.name)
            beside.rmdir()
            whole_files.sync(folder)
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _refuse_bad_losses(self, limit: int) -> None:
        if (count := self.loss_guard.in_a_row()) >= limit:
            raise FloatingPointError(
                f"loss: not finite in the last {count} micro-batches, up to step {self.state.global_step}; {self._last_whole()}"
            )

    def _last_whole(self) -> str:
        whole = [found.folder for found in self._found() if found.problem is None and found.another_run is None]
        return f"the last good checkpoint is {whole[0]}" if whole else f"{self.args.output_dir} has no checkpoint from before that"

    def _found(self) -> list[Checkpoint]:
        return checkpoints.checkpoints(Path(self.args.output_dir), self.fingerprint)

    # --- writing ---------------------------------------------------------------------------------------------------------

    def _write_settings(self) -> None:
        folder = Path(self.args.output_dir)
        shutil.rmtree(folder / checkpoints.UNFINISHED, ignore_errors=True)
        with whole_files.replacing(folder / checkpoints.RUN) as beside:
            beside.write_text(self.run_settings, encoding="utf-8")

    def _get_output_dir(self, trial: object) -> str:
        return str(self._unfinished) if self._unfinished else _compat.run_folder(self, trial)

    def _save_checkpoint(self, model: nn.Module, trial: object) -> None:
        self._refuse_bad_losses(1)
        if not self.loss_guard.weights_are_finite(p for p in self.model.parameters() if p.requires_grad):
            raise FloatingPointError(f"weights: not finite after step {self.state.global_step}; {self._last_whole()}")
        name = f"checkpoint-{self.state.global_step}"
        folder, push = Path(self._get_output_dir(trial)), self.args.push_to_hub
        beside = folder / checkpoints.UNFINISHED
        try:
            self._prepare_folder(beside)
            self._unfinished, self.args.push_to_hub = beside, False
            try:
                _compat.save_checkpoint(self, model, trial)
            finally:
                self._unfinished, self.args.push_to_hub = None, push
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                self._move_checkpoint(beside / name, folder / name)
            self.accelerator.wait_for_everyone()
        except Exception as error:
            reason = " ".join(str(error).split())
            raise OSError(f"{folder / name}: cannot be written ({reason}); {self._last_whole()}") from error
        if push:
            _compat.push_checkpoint(self, str(folder / name))

    def _move_checkpoint(self, beside: Path, folder: Path) -> None:
        if self.state.best_global_step:
            best = folder.with_name(f"checkpoint-{self.state.best_global_step}")
            if best == folder or best.exists():
                self.state.best_model_checkpoint = str(best)
        self.state.save_to_json(str(beside / "trainer_state.json"))
        checkpoints.seal(beside, self.fingerprint, self.run_settings)
        whole_files.move_folder(beside, folder)
        beside.parent.rmdir()
        rotate_checkpoints(
            output_dir=str(folder.parent),
            save_total_limit=self.args.save_total_limit,
            best_model_checkpoint=self.state.best_model_checkpoint,
            use_mtime=True,
        )

    def _prepare_folder(self, beside: Path) -> None:
        if self.args.should_save:
            shutil.rmtree(beside, ignore_errors=True)
            beside.mkdir(parents=True)
        self.accelerator.wait_for_everyone()

    # --- resuming --------------------------------------------------------------------------------------------------------

    def _checkpoint_to_resume(self, wanted: str | os.PathLike | bool | None) -> Path | None:
        if wanted is None or wanted is False:
            return None
        if wanted is not True:
            return self._accepted(checkpoints.examine(Path(wanted), self.fingerprint))
        others = []
        for found in self._found():
            if found.problem is None and found.another_run is None:
                return self._accepted(found)
            if found.problem is not None:
                print_main(f"resume   {found.folder} is passed over: {found.problem}")
            else:
                others.append(found)
        for other in others[:1]:
            self._accepted(other)  # raises an error that says what differs
        if (Path(self.args.output_dir) / checkpoints.RUN).exists():
            print_main(f"resume   {self.args.output_dir} has no whole checkpoint yet: the run starts at step 0")
            return None
        raise ValueError(f"resume_from_checkpoint: got true, and {self.args.output_dir} has no checkpoint")

    def _accepted(self, found: Checkpoint) -> Path:
        if not found.folder.is_dir():
            raise ValueError(f"resume_from_checkpoint: got {found.folder}, which is not a folder")
        if found.problem is not None:
            raise ValueError(f"resume_from_checkpoint: {found.folder} is not whole: {found.problem}")
        if found.another_run is not None:
            raise ValueError(f"resume_from_checkpoint: {found.folder} is of another run: {found.another_run}")
        print_main(f"resume   {found.folder}: continues after step {found.step}")
        if found.weights_only:
            print_main(
                f"resume   {found.folder} holds weights and no optimizer state (save_only_model): the optimizer's moments and the "
                "learning rate's schedule start from zero"
            )
        return found.folder
