"""The training loop: steps, checkpoints, the end of an epoch, and how a run resumes.

This is a program's loop, not a library, and nothing here is meant to be subclassed. Tests and benchmarks may build a
`Trainer`, call its public methods (`resume` and `fit`, or `train_step` and `evaluate` by themselves), and append to the
lists of callbacks, `on_step` and `on_epoch_end`. The data of a run is in `train.data.run_data`, one step in
`train.learner`.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from torch import nn

import kw
from train.config import TrainConfig, to_plain
from train.data.loader import Batch
from train.data.run_data import RunData
from train.display import EpochDisplay
from train.evaluate import cast, evaluate
from train.jobs.agreement import agree
from train.jobs.checkpoints import Checkpoints, State
from train.jobs.display import progress
from train.jobs.errors import CheckpointError, ConfigError, NonFiniteError, RunError
from train.jobs.folder import write_atomically
from train.jobs.metrics import MetricsFile
from train.jobs.reading import FORMAT
from train.jobs.signals import StopRequest, first_signal, leave
from train.jobs.world import World
from train.learner import Learner
from train.profiling import StepProfiler
from train.resume import check_same_data, check_same_settings
from train.services import Services
from train.summary import score, summarize
from train.watch import Watch


class Trainer:
    """One run in its folder. Everything random is a function of the seed and the step, so a checkpoint of weights,
    optimizer and step is all that a run needs to resume exactly.

    Attributes:
        step: the number of optimizer steps taken.
        unevaluated: images per second of the last epoch while its evaluation is pending; None otherwise. It is saved,
            so that a resumed run evaluates first.
        on_step: callbacks after each optimizer step, and after its checkpoint if it has one.
        on_epoch_end: callbacks after each epoch, once it is evaluated and saved.

    Raises:
        ConfigError: data, model and recipe do not fit together.
    """

    def __init__(self, config: TrainConfig, folder: Path, world: World):
        self.config, self.folder, self.world = config, folder, world
        self.data = RunData(config, folder, world)
        self.stop = StopRequest(alone=world.size == 1)
        self.learner = Learner(config, self.data, world, self.stop)
        self.model, self.ema = self.learner.model, self.learner.ema
        self.steps_per_epoch = self.data.steps_per_epoch
        self.steps = config.recipe.epochs * self.steps_per_epoch
        self.step = 0
        self.unevaluated: float | None = None
        self.on_step: list[Callable[[Trainer], None]] = []
        self.on_epoch_end: list[Callable[[Trainer], None]] = []
        self.checkpoints = Checkpoints(folder / "checkpoints", config.runtime.keep_best)
        self.metrics = MetricsFile(folder / "metrics.jsonl")
        self.display = EpochDisplay(world.is_main, config.recipe.epochs, self.steps_per_epoch)
        self.services = Services(config.logger.services, world.is_main)
        self.profiler = StepProfiler(config.runtime.profile_steps if world.is_main else 0, folder, world.device)

    # ---- resuming ---------------------------------------------------------------------------------------------------

    def resume(self) -> None:
        """Resume from the folder's newest checkpoint, if there is one. If not, begin with the weights of `start_from`.

        1. Read the newest complete checkpoint, passing over damaged ones. All ranks must find the same.
        2. Compare its settings and its data with this run's.
        3. Load weights, average, optimizer, scaler, the epoch's sums and the step.
        4. On rank 0: drop the metrics of epochs that will be repeated, and checkpoints that are no longer the best.

        Raises:
            ConfigError: there is one and resume=never, or it was trained with other settings or on other data.
            CheckpointError: all checkpoints are damaged, or the newest does not fit the model.
        """
        found = self.checkpoints.newest()
        which = found and f"{found.path}, of step {found.state['step']}"
        agree(self.world, "the checkpoint", which, "Start again once all nodes see the same files in the run folder.")
        if found is None:
            self._start_from(self.config.start_from)
            return
        for remark in found.remarks:
            self.display.print(f"Passed over: {remark}")
        if self.config.resume == "never":
            raise ConfigError(
                f"resume=never, but {self.folder} has checkpoints: move it away, or set another label=..."
            )
        for remark in check_same_settings(found.state["config"], self.config, self.folder):
            self.display.print(remark)
        check_same_data(found.state, self.data, self.folder)
        self.load(found.state)
        if self.world.is_main:  # other ranks may still be reading checkpoints; these are not touched
            self.checkpoints.resume_from(found)
            self.metrics.keep_before(self.step // self.steps_per_epoch - (self.unevaluated is not None))
        self.display.print(f"Resumed {self.folder} at step {self.step} of {self.steps}.")

    def _start_from(self, path: str | None) -> None:
        if path is None:
            return
        self.learner.start_from(Path(path))
        top1 = self.evaluate(self.model)["top1"]
        at = ", at temperature 0" if kw.temperatures(self.model) else ""
        self.display.print(f"Started from {path}: top-1 {top1:.2f} before training{at}.")

    def load(self, state: State) -> None:
        """Take over a state of `state()`.

        Raises:
            CheckpointError: it does not fit.
        """
        try:
            self.learner.load(state)
            self.step, self.unevaluated = state["step"], state.get("unevaluated")
        except (KeyError, RuntimeError, ValueError) as error:
            raise CheckpointError(f"The checkpoint in {self.folder} does not fit this run: {error}") from error
        if len(state["sums"]) != self.world.size:
            self.display.print(f"Resuming with {self.world.size} processes; there were {len(state['sums'])}.")

    def state(self) -> State:
        """All that a run needs to resume. A collective: every rank must call it, and rank 0 saves it."""
        return {
            "format": FORMAT,
            **self.learner.state(),
            "step": self.step,
            "unevaluated": self.unevaluated,
            "config": to_plain(self.config),
            "classes": list(self.data.classes),
            "data": self.data.identity,
        }

    def save(self) -> None:
        """Save a checkpoint. A collective."""
        state = self.state()
        if self.world.is_main:
            self.checkpoints.save(state)
        self.world.barrier()

    # ---- training ---------------------------------------------------------------------------------------------------

    def fit(self) -> dict[str, Any]:
        """Train from the current step to the end, and return the summary.

        Raises:
            NonFiniteError: loss or gradients are not finite.
            DataError: an image cannot be read.
            CheckpointError, WriteError: the disk is full or the folder cannot be written.
            RunError: a finished run's metrics are gone.
            SystemExit: a signal asked to stop; the state is saved.
        """
        summary = None
        with self.stop:
            try:
                self.services.start(self.config, self.folder)
                self.profiler.start()
                self.display.start(self.step)
                self._train()
                summary = self._summarize()
            except NonFiniteError as error:
                raise NonFiniteError(f"{error} {self.checkpoints.what_is_kept()}") from None
            finally:
                self.display.stop()
                self.profiler.stop()
                self.services.finish(summary)
        return summary

    def _train(self) -> None:
        for warning in self.warnings():
            self.display.print(f"Warning: {warning}")
        batches = self.data.train_batches(self.step)
        self.model.train()
        if self.unevaluated is not None:
            self.end_epoch()
        started, first = time.monotonic(), self.step
        while self.step < self.steps:
            stopping = self.train_step(batches)
            self.profiler.step()
            if self.display.wants():
                self._show(started, first)
            last = self.step % self.steps_per_epoch == 0
            if last:
                self.unevaluated = self._speed(started, first)
            if last or stopping or self.step % (self.config.runtime.checkpoint_steps or self.steps + 1) == 0:
                stopping = self.learner.settle() or stopping  # a broken step is not saved
                self.save()  # at an epoch's end before the evaluation, in which a job's time may run out
            for callback in self.on_step:
                callback(self)
            if stopping:
                self._leave(stopping)
            if last:
                self.end_epoch()
                started, first = time.monotonic(), self.step

    def train_step(self, batches: Iterator[Batch]) -> int:
        """One optimizer step on the global batch, of which `batches` are this rank's micro-batches. Returns the signal
        that asks to stop, or 0 (`Learner.step`)."""
        stopping = self.learner.step(self.step, batches)
        self.step += 1
        return stopping

    def warnings(self) -> list[str]:
        """Settings that may be wanted, as in a trial of a few epochs, and may be mistakes."""
        end = self.learner.temperature(self.steps * self.data.accumulation - 1)
        if end == 0:
            return []
        recipe = self.config.recipe
        return [
            f"recipe.temperature_epochs={recipe.temperature_epochs:g} is more than recipe.epochs={recipe.epochs}: "
            f"the temperature ends at {end:.2f}, not at 0."
        ]

    def _leave(self, number: int) -> NoReturn:
        leave(number, self.world.is_main, f"after step {self.step} of {self.steps}", self.display.print)

    def _show(self, started: float, first: int) -> None:
        samples, loss, hits = self.learner.sums.tolist()
        epoch, speed = (self.step - 1) // self.steps_per_epoch + 1, self._speed(started, first)
        rate, accuracy = self.learner.learning_rate(self.step - 1), f"  acc {100 * hits / samples:.1f}%"
        text = progress(epoch, self.config.recipe.epochs, loss / samples, rate, speed, accuracy)
        self.display.show(text, self.step, self._left(speed))

    def _left(self, speed: float) -> float:
        """Seconds of training that are left, at so many images per second."""
        return (self.steps - self.step) * self.config.recipe.batch_size / speed

    def _speed(self, started: float, first: int) -> float:
        """Images per second since step `first`."""
        self.learner.sums.tolist()  # waits for the device, for a true time
        return (self.step - first) * self.config.recipe.batch_size / (time.monotonic() - started)

    # ---- the end of an epoch ----------------------------------------------------------------------------------------

    def end_epoch(self) -> None:
        """Evaluate the epoch that was just trained, and save with its metrics. If a run is stopped before this is
        done, the resumed run does it again."""
        epoch, speed = self.step // self.steps_per_epoch - 1, self.unevaluated
        assert speed is not None
        line = self._metrics(epoch, speed)
        self.learner.sums.zero_()
        self.unevaluated = None
        state = self.state()
        if self.world.is_main:
            self.metrics.append(line)
            self.checkpoints.save_epoch(state, epoch, score(line))
        self.services.log(line)
        self.world.barrier()
        self.display.epoch(line, self._left(speed))
        for callback in self.on_epoch_end:
            callback(self)

    def _metrics(self, epoch: int, speed: float) -> dict[str, Any]:
        """The epoch's line of metrics.jsonl."""
        samples, loss, hits = self.world.sum(self.learner.sums.clone()).tolist()
        line = {
            "epoch": epoch,
            "step": self.step,
            "train_loss": loss / samples,
            "train_top1": 100 * hits / samples,
            **self.evaluate(self.model),
        }
        if average := self.learner.average():
            line |= {f"ema_{key}": value for key, value in self.evaluate(average).items()}
        line["lr"] = self.learner.learning_rate(self.step - 1)
        line["temperature"] = self.learner.temperature(self.step * self.data.accumulation - 1)
        line["images_per_second"] = speed
        line["device"] = self.world.device_name  # that ended the epoch
        line["devices"] = self.world.size
        if self.data.substitutes:  # all ranks have finished the epoch: their sums are here
            line["substituted"] = self.data.substitutes.count(epoch)
        return line

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Accuracies and loss on the evaluation images, with rank 0's buffers. A collective.

        Raises:
            SystemExit: a signal asked to stop.
        """
        self.world.share_buffers(model)
        return evaluate(model, self._eval_batches(), self.world, cast(self.config, self.world.device))

    def _eval_batches(self) -> Iterator[Batch]:
        """The batches of an evaluation. Before each, the ranks agree on whether to leave: also those that have a batch
        less than others, so that no rank waits alone."""
        batches, watch = iter(self.data.eval_batches()), Watch()
        most = self.data.most_eval_batches
        for done in range(most):
            if stopping := self._asked_to_stop(watch):
                self._leave(stopping)
            if self.display.wants():
                self.display.show_evaluation(done, most)
            yield from itertools.islice(batches, 1)

    def _asked_to_stop(self, watch: Watch) -> int:
        """The signal that had come to any rank by the previous call, or 0; with one process, by now."""
        if self.world.size == 1:
            return self.stop.signal
        taken = watch.take()
        watch.put(self.world.sum(self.world.place(self.stop.came())))
        return first_signal(taken[0]) if taken else 0

    # ---- the end of training ----------------------------------------------------------------------------------------

    def _summarize(self) -> dict[str, Any]:
        lines = self.metrics.read()
        if not lines:
            raise RunError(
                f"{self.metrics.path} has no line of any epoch, though the run is finished: it was removed or emptied. "
                f"Put it back; or move {self.folder} away, to train once more."
            )
        path = self.folder / "summary.json"
        try:
            device = json.loads(path.read_text())["device"]  # of a finished run that is started again
        except (OSError, ValueError, KeyError, TypeError):  # there is none, or it is damaged: it is written anew
            device = "unknown"
        summary = summarize(self.config, self.model, lines, device)
        if self.world.is_main:
            write_atomically(path, json.dumps(summary, indent=2) + "\n")
        return summary
