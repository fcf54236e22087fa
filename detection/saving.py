"""A run's checkpoints and metrics, and how it leaves when it is asked to: as a classification run does."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import mmengine
from mmengine.hooks import Hook

import kw
from detection.config import DetectionConfig
from detection.display import in_percent
from detection.evaluation import EvaluationHook
from detection.guard import Guard, unwrapped
from detection.loading import ALLOWED
from train.jobs.checkpoints import Checkpoints, Found, State
from train.jobs.display import Display
from train.jobs.errors import CheckpointError, ConfigError
from train.jobs.metrics import MetricsFile
from train.jobs.signals import leave
from train.jobs.substitutes import SubstituteList
from train.jobs.world import World

FORMAT = "kernelwarehouse detector 1"  # under "format" in checkpoints; the rest is as MMEngine saves it


def checkpoints_in(folder: Path, keep_best: int = 1) -> Checkpoints:
    """Those of a detector's run folder."""
    return Checkpoints(folder / "checkpoints", keep_best, FORMAT, ALLOWED)


def latest(folder: Path) -> Path:
    """The newest checkpoint in a run folder of `python -m detection` or of MMDetection's tools. Warns of newer files
    that cannot be read.

    Raises:
        CheckpointError: there is none that is complete.
    """
    if found := checkpoints_in(folder).newest():
        found.warn()
        return found.path
    if (folder / "last_checkpoint").exists():
        return Path((folder / "last_checkpoint").read_text().strip())
    raise CheckpointError(f"{folder} has no checkpoint of a run.")


class SavingHook(Hook):
    """Saves every `runtime.checkpoint_steps` steps, at the end of every epoch, after its evaluation, and when a signal
    asks the run to leave. An evaluation that has ended is a line of metrics.jsonl.

    A checkpoint after the last step of an epoch is saved before the evaluation, in which a job's time may run out: the
    resumed run does the evaluation.

    Raises:
        SystemExit: a signal asked to leave; the state is saved.
        ConfigError: the checkpoint that was loaded is of epochs of another number of steps.
        CheckpointError, WriteError: the disk is full or the folder cannot be written.
    """

    priority = "LOWEST"  # after the schedulers and all hooks that save a state

    def __init__(
        self, config: DetectionConfig, folder: Path, world: World, guard: Guard, evaluation: EvaluationHook,
        display: Display,
    ):  # fmt: skip
        self.config, self.world, self.guard, self.evaluation, self.display = config, world, guard, evaluation, display
        self.checkpoints = checkpoints_in(folder, config.runtime.keep_best)
        self.metrics = MetricsFile(folder / "metrics.jsonl")
        self.substitutes = SubstituteList(folder, world.rank) if config.data.on_error == "substitute" else None
        self.training = self.due = False
        self.images, self.began = 0, 0.0  # of this epoch in this process
        self.speed: float | None = None  # images per second of the last epoch

    def resume_from(self, found: Found) -> None:
        """Forget what the run repeats after the state `found`. On rank 0 only."""
        self.checkpoints.resume_from(found)
        self.metrics.keep_before(found.state["meta"]["epoch"])

    # ---- hooks, in the order of their calls --------------------------------------------------------------------------

    def after_load_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        before, now = checkpoint.get("steps_per_epoch"), len(runner.train_dataloader)
        if before not in (None, now):
            raise ConfigError(
                f"The run had {before} steps an epoch, now it has {now}: batch sizes are those of a process, and "
                f"runtime.devices={self.config.runtime.devices} x nodes={self.config.runtime.nodes}. Set the number of "
                f"processes back to {checkpoint['processes']}, or set name=... for a new run."
            )

    def before_train(self, runner: Any) -> None:
        self.training = True

    def before_train_epoch(self, runner: Any) -> None:
        self.images, self.began = 0, time.monotonic()

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        if self.substitutes:
            known = [sample.metainfo for sample in data_batch["data_samples"]]
            replaced = [one for one in known if "substitutes_for" in one]
            epoch = runner.epoch
            self.substitutes.append(
                (epoch, one["index"], 0, one["substitutes_for"], str(one.get("img_path"))) for one in replaced
            )

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        self.images += len(data_batch["inputs"]) * self.world.size
        step, every, stopping = runner.iter + 1, self.config.runtime.checkpoint_steps, self.guard.stopping
        self.due |= self.end_of_epoch(runner.train_dataloader, batch_idx) or (every is not None and step % every == 0)
        if (self.due or stopping) and runner.optim_wrapper.should_update():  # not between accumulated gradients
            self._save(self._state(runner, step))
            if stopping:
                self._leave(stopping, step, runner)

    def after_train_epoch(self, runner: Any) -> None:
        seconds = time.monotonic() - self.began
        self.speed = self.images / seconds if self.images else None

    def before_val_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        # Ranks whose share is one image smaller may have a batch less; only those before it are common to all.
        loader = runner.val_dataloader
        common = -(-(len(loader.dataset) // self.world.size) // loader.batch_size)
        if self.training and batch_idx < common and (stopping := self.guard.agree()):
            self._leave(stopping, runner.iter, runner)

    def after_val_epoch(self, runner: Any, metrics: dict[str, float] | None = None) -> None:
        if not self.training:
            return
        line = self._line(runner, dict(metrics or {}))
        if self.world.is_main:
            self.metrics.append(line)
            score = next((line[key] for key in ("box_ap", "mask_ap") if key in line), 0.0)
            self.checkpoints.save_epoch(self._state(runner, runner.iter), runner.epoch - 1, score)
        self.world.barrier()

    def after_train(self, runner: Any) -> None:
        self.training = False

    # ---- what they do ------------------------------------------------------------------------------------------------

    def _save(self, state: State) -> None:
        """A collective."""
        if self.world.is_main:
            self.checkpoints.save(state)
        self.world.barrier()
        self.due = False

    def _leave(self, number: int, step: int, runner: Any) -> None:
        leave(number, self.world.is_main, f"after step {step} of {runner.max_iters}", self.display.print)

    def _state(self, runner: Any, step: int) -> State:
        """As MMEngine's `Runner.resume` reads it, after `step` steps of the run."""
        model = unwrapped(runner.model)
        state = {
            "format": FORMAT,
            "meta": {
                "epoch": runner.epoch,
                "iter": step,
                "seed": runner.seed,
                "cfg": runner.message_hub.get_info("cfg"),
                "experiment_name": self.config.name,
                "mmengine_version": mmengine.__version__,
                "dataset_meta": runner.train_dataloader.dataset.metainfo,
            },
            "state_dict": model.state_dict(),
            "message_hub": runner.message_hub.state_dict(),
            "optimizer": runner.optim_wrapper.state_dict(),
            "param_schedulers": [scheduler.state_dict() for scheduler in runner.param_schedulers or []],
            "steps_per_epoch": len(runner.train_dataloader),
            "processes": self.world.size,
        }
        runner.call_hook("before_save_checkpoint", checkpoint=state)
        return state

    def _line(self, runner: Any, metrics: dict[str, float]) -> dict[str, Any]:
        """The line of metrics.jsonl of the epoch that was evaluated."""
        hub, epoch = runner.message_hub, runner.epoch - 1
        line = {
            "epoch": epoch,
            "step": runner.iter,
            "train_loss": float(hub.get_scalar("train/loss").mean(len(runner.train_dataloader))),  # of rank 0
            **in_percent(metrics),
            "eval_images": self.evaluation.images,
            "lr": hub.get_scalar("train/lr").current(),
            "temperature": max((float(one.read()) for one in kw.temperatures(unwrapped(runner.model))), default=0.0),
            "images_per_second": self.speed,
            "device": self.world.device_name,  # that ended the epoch
            "devices": self.world.size,
        }
        if self.substitutes:  # all ranks have finished the epoch
            line["substituted"] = self.substitutes.count(epoch)
        return line
