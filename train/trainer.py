"""The training loop: what a step does, what an epoch's end does, and how a run goes on after it was stopped."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import signal
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
from omegaconf import OmegaConf
from timm.layers import convert_sync_batchnorm
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import kw
from train.checkpoint import Checkpoints, State
from train.config import TrainConfig, learnt_settings, to_plain, validate
from train.data.images import Part, open_split
from train.data.loader import (
    MicroBatches,
    Sample,
    Samples,
    Substitutes,
    eval_loader,
    identity,
    seed_everything,
    train_loader,
)
from train.data.transforms import eval_transform, train_transform
from train.evaluate import cast, evaluate
from train.jobs.checkpoint import FORMAT
from train.jobs.errors import CheckpointError, ConfigError, NonFiniteError, RunError
from train.jobs.folder import write_whole
from train.jobs.provenance import provenance
from train.jobs.signals import StopRequest, first_signal, requeue
from train.jobs.world import World
from train.logging import Display, MetricsFile
from train.model import build_model
from train.optim import build_loss, build_mixup, build_optimizer, restore
from train.profiling import StepProfiler
from train.schedule import learning_rate, temperature
from train.services import Services
from train.watch import Step, Watch


class Trainer:
    """One run in its folder. Everything random is a function of the seed and the step, so that a checkpoint of
    weights, optimizer and step is all that it takes to go on exactly.

    Raises:
        ConfigError: data, model and recipe do not go together.
    """

    def __init__(self, config: TrainConfig, folder: Path, world: World):
        self.config, self.folder, self.world = config, folder, world
        recipe = config.recipe
        train_images = open_split(config.data, config.data.train_split)
        if config.data.train_images is not None:
            train_images = Part(train_images, config.data.train_images, "data.train_images")
        eval_images = open_split(config.data, config.data.eval_split)
        if train_images.classes != eval_images.classes:
            raise ConfigError(f"data.root={config.data.root!r}: the splits do not have the same classes.")
        substitute = config.data.on_error == "substitute"
        self.train_samples = Samples(train_images, train_transform(config.data, recipe), config.seed, substitute)
        self.substitutes = Substitutes(folder, train_images, world.rank) if substitute else None
        self.eval_samples = Samples(eval_images, eval_transform(config.data, recipe), config.seed)
        self.data = {"training": identity(train_images), "evaluation": identity(eval_images)}
        self.accumulation = accumulation(recipe.batch_size, config.runtime.micro_batch, world.size)
        micro = recipe.batch_size // (self.accumulation * world.size)
        if micro % 2 and (recipe.mixup or recipe.cutmix):
            raise ConfigError(
                f"recipe.mixup and cutmix pair the samples of a micro-batch, which has {micro}: an odd number."
            )
        self.steps_per_epoch = len(train_images) // recipe.batch_size
        if self.steps_per_epoch == 0:
            raise ConfigError(
                f"recipe.batch_size={recipe.batch_size} is more than the {len(train_images)} training images: lower it."
            )
        self.steps = recipe.epochs * self.steps_per_epoch
        self.step = 0

        seed_everything(config.seed)
        num_classes = len(train_images.classes)
        model = build_model(config, num_classes)
        if config.runtime.sync_norm:
            model = convert_sync_batchnorm(model)
        model.to(world.device)
        if config.runtime.channels_last:
            model.to(memory_format=torch.channels_last)
        self.model = model
        self.warms_up = bool(kw.temperatures(model))
        self._tau: float | None = None  # the temperature that was set last
        self.ema = ModelEmaV3(model, decay=recipe.ema_decay) if recipe.ema_decay else None
        self.optimizer = build_optimizer(model, recipe)
        self.mixup = build_mixup(recipe, num_classes)
        self.loss = build_loss(recipe, self.mixup)
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=config.runtime.precision == "float16")
        self.forward: nn.Module = model  # the same weights, as a step goes through them
        if world.size > 1:
            devices = [world.device] if world.device.type == "cuda" else None
            # Running statistics stay each process's own: `World.share_buffers` takes the first one's when it matters.
            self.forward = DistributedDataParallel(model, device_ids=devices, broadcast_buffers=False)
        if config.runtime.compile:
            self.forward.compile()

        # This epoch's samples, loss and hits, on this process.
        self.sums = torch.zeros(3, dtype=torch.float64, device=world.device)
        # Images per second of an epoch that is trained and not evaluated yet.
        self.unevaluated: float | None = None
        self.watch = Watch()  # of the step before: whether it was broken, and the signals that had come
        self.stop = StopRequest(alone=world.size == 1)
        self.checkpoints = Checkpoints(folder / "checkpoints", config.runtime.keep_best)
        self.metrics = MetricsFile(folder / "metrics.jsonl")
        self.display = Display(world.is_main, recipe.epochs, self.steps_per_epoch)
        self.services = Services(config.logger.services, world.is_main)
        self.profiler = StepProfiler(config.runtime.profile_steps if world.is_main else 0, folder, world.device)

    # ---- going on -------------------------------------------------------------------------------------------------

    def resume(self) -> None:
        """Go on from the folder's newest checkpoint, if there is one.

        1. Read the newest whole checkpoint, passing over damaged ones.
        2. Compare its settings and its data with this run's.
        3. Load weights, average, optimizer, scaler, the epoch's sums and the step.
        4. On the first process: drop the metrics of epochs that will be repeated, and files of epochs no longer best.

        Raises:
            ConfigError: there is one and resume=never, or it was trained with other settings or on other data.
            CheckpointError: all checkpoints are damaged, or the newest does not fit the model.
        """
        found = self.checkpoints.newest()
        if found is None:
            return
        state = found.state
        for remark in found.remarks:
            self.display.print(f"Passed over: {remark}")
        if self.config.resume == "never":
            raise ConfigError(
                f"resume=never, but {self.folder} has checkpoints: move it away, or set another label=..."
            )
        self._check_same_settings(state["config"])
        self._check_same_data(state)
        self.load(state)
        if self.world.is_main:  # others may still be reading checkpoints; these are not touched
            self.checkpoints.go_on_from(found)
            self.metrics.keep_before(self.step // self.steps_per_epoch - (self.unevaluated is not None))
        self.display.print(f"Resumed {self.folder} at step {self.step} of {self.steps}.")

    def load(self, state: State) -> None:
        try:
            self.model.load_state_dict(state["model"])
            if self.ema:
                self.ema.module.load_state_dict(state["ema"])
            restore(self.optimizer, state["optimizer"])
            self.scaler.load_state_dict(state["scaler"])
            self.step = state["step"]
            self._tau = None
            self.unevaluated = state.get("unevaluated")
            self._load_sums(state["sums"])
        except (KeyError, RuntimeError, ValueError) as error:
            raise CheckpointError(f"The checkpoint in {self.folder} does not fit this run: {error}") from error

    def _load_sums(self, sums: Tensor) -> None:
        """Each process takes its own; of another number of processes the first takes all, which add up the same."""
        if len(sums) == self.world.size:
            self.sums.copy_(sums[self.world.rank])
            return
        self.display.print(f"Going on with {self.world.size} processes; there were {len(sums)}.")
        if self.world.is_main:
            self.sums.copy_(sums.sum(dim=0))

    def state(self) -> State:
        """All that it takes to go on. Every process must call it, the first one saves it."""
        sums = self.world.stack(self.sums)
        return {
            "format": FORMAT,
            "model": self.model.state_dict(),
            "ema": self.ema.module.state_dict() if self.ema else None,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "sums": sums,
            "step": self.step,
            "unevaluated": self.unevaluated,
            "config": to_plain(self.config),
            "classes": list(self.train_samples.images.classes),
            "data": self.data,
        }

    def _check_same_settings(self, saved: dict[str, Any]) -> None:
        then, now = validate(OmegaConf.create(saved)), self.config
        before, after = learnt_settings(then), learnt_settings(now)
        for key in sorted(before.keys() | after.keys()):
            if before.get(key) != after.get(key):
                raise ConfigError(
                    f"{self.folder} was trained with {key}={before.get(key)}, now it is {after.get(key)}. "
                    f"Set it back to go on, or give the new run a label=... of its own."
                )
        was, is_now = then.runtime.micro_batch, now.runtime.micro_batch
        if was != is_now:  # changes batch statistics, but another number of devices may need it
            self.display.print(f"Going on with runtime.micro_batch={is_now}; it was {was}.")

    def _check_same_data(self, state: State) -> None:
        then, now = list(state["classes"]), self.train_samples.images.classes
        other = [] if then == now else [f"other classes ({_some(then)}; now {_some(now)})"]
        for split, before in state.get("data", {}).items():  # older checkpoints do not have it
            images, names = before["images"], before["names"]
            if images != self.data[split]["images"]:
                other.append(f"{images} {split} images (now {self.data[split]['images']})")
            elif names != self.data[split]["names"]:
                other.append(f"other names of {split} images")
        if other:
            raise ConfigError(
                f"data.root={self.config.data.root!r}: {self.folder} was trained on other data, with "
                f"{' and '.join(other)}. Set it back to go on, or give the new run a label=... of its own."
            )

    # ---- training -------------------------------------------------------------------------------------------------

    def fit(self) -> dict[str, Any]:
        """Train from where it is to the end, and return the summary.

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
            finally:
                self.display.stop()
                self.profiler.stop()
                self.services.finish(summary)
        return summary

    def _train(self) -> None:
        self._warn_of_temperature()
        loader = self._loader()
        self.model.train()
        if self.unevaluated is not None:
            self._end_epoch()
        started, first = time.monotonic(), self.step
        while self.step < self.steps:
            stopping = self._train_step(loader)
            self.profiler.step()
            if self.display.wants(self.step - 1):
                self._show(started, first)
            last = self.step % self.steps_per_epoch == 0
            if last:
                self.unevaluated = self._speed(started, first)
            if last or stopping or self.step % (self.config.runtime.checkpoint_steps or self.steps + 1) == 0:
                stopping = self._settle() or stopping  # a step that was broken is not saved
                self._save()  # at an epoch's end too: its evaluation may take longer than one is given to leave
            if stopping:
                self._leave(stopping)
            if last:
                self._end_epoch()
                started, first = time.monotonic(), self.step

    def _loader(self) -> Iterator[Sample]:
        recipe = self.config.recipe
        batches = MicroBatches(
            len(self.train_samples.images),
            batch_size=recipe.batch_size,
            accumulation=self.accumulation,
            steps=self.steps,
            seed=self.config.seed,
            start=self.step,
            repeats=recipe.augment.repeats,
            rank=self.world.rank,
            world=self.world.size,
            order=self.train_samples.order,
        )
        pin = self.world.device.type == "cuda"
        return iter(train_loader(self.train_samples, batches, self.config.runtime.workers, pin, self.substitutes))

    def _save(self) -> None:
        state = self.state()
        if self.world.is_main:
            self.checkpoints.save(state)
        self.world.barrier()

    def _leave(self, number: int) -> None:
        """Signal `number` asked for it, and the last step is saved. SIGUSR1 says that the time is up, so that the
        job goes back into SLURM's queue; at SIGTERM SLURM does that itself, or the user has cancelled the job."""
        again = self.world.is_main and number == signal.SIGUSR1 and requeue()
        how = "it is back in the queue" if again else "the same command goes on from here"
        self.display.print(f"Stopped by a signal after step {self.step} of {self.steps}, and saved: {how}.")
        raise SystemExit(128 + number)

    def _train_step(self, loader: Iterator[Sample]) -> int:
        """One optimizer step on the global batch, in micro-batches. The signal by which one of the processes was asked
        to stop before the step before ended, or 0."""
        lr = learning_rate(self.step, self.steps_per_epoch, self.config.recipe)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        indices = []
        losses = self.sums.new_zeros(())
        for turn in range(self.accumulation):
            images, targets, index = next(loader)
            indices.append(index)
            self._set_temperature(self.step * self.accumulation + turn)
            # Of mixup, dropout and drop path: by the micro-batch's place in the global batch, whoever has it.
            seed_everything(self.config.seed, self.step, turn * self.world.size + self.world.rank)
            last = turn == self.accumulation - 1
            with contextlib.nullcontext() if last or self.world.size == 1 else self.forward.no_sync():
                loss = self._forward(images, targets)
                self.scaler.scale(loss / self.accumulation).backward()
            losses += loss.detach()
        stopping = self._update(losses, indices)
        if self.ema:
            self.ema.update(self.model)
            if self._tau:  # not an average of it; once both are 0, their average is
                kw.set_temperature(self.ema.module, self._tau)
        self.step += 1
        return stopping

    def _forward(self, images: Tensor, targets: Tensor) -> Tensor:
        images, targets = (t.to(self.world.device, non_blocking=True) for t in (images, targets))
        if self.config.runtime.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        if self.mixup:
            images, targets = self.mixup(images, targets)
        with cast(self.config, self.world.device):
            logits = self.forward(images)
            loss = self.loss(logits.float(), targets)
        labels = targets.argmax(dim=1) if self.mixup else targets
        hits = (logits.detach().argmax(dim=1) == labels).sum()
        self.sums += torch.stack([torch.full_like(hits, len(images)), loss.detach() * len(images), hits]).double()
        return loss

    def _update(self, losses: Tensor, indices: list[Tensor]) -> int:
        """Apply the gradients, and learn how the step before went (`_settle`). Whether this step's loss and gradients
        are finite is summed over the processes together with the signals that came, and read when the next step is
        queued or before a checkpoint is written: the host does not wait for the device.

        In float16 a gradient that overflows makes the scaler pass over the step and lower its scale. At a scale of 1
        and less (without a scaler it is 1) that is no overflow."""
        self.scaler.unscale_(self.optimizer)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        norm = nn.utils.clip_grad_norm_(parameters, self.config.recipe.clip_grad or math.inf)
        scale = self.scaler.scale(torch.ones_like(norm))  # get_scale() would wait for the device
        broken = ~torch.isfinite(losses) | (~torch.isfinite(norm) & (scale <= 1))
        counts = self.world.sum(torch.cat([broken[None].int(), self.world.place(self.stop.came())]))
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        stopping = self._settle()
        self.watch.put(counts, Step(self.step, losses / self.accumulation, norm, indices))
        return stopping

    def _settle(self) -> int:
        """Read how the last step went, of those not read yet: the signal by which one was asked to stop, or 0. All
        processes read the same.

        Raises:
            NonFiniteError: its loss or gradients are not finite.
        """
        taken = self.watch.take()
        if taken is None:
            return 0
        (broken, *came), step = taken
        if broken:
            self._refuse(step)
        return first_signal(came)

    def _refuse(self, step: Step) -> None:
        losses = self.world.stack(step.loss).tolist()
        everyone = self.world.stack(torch.cat(step.indices).to(self.world.device)).cpu()
        culprits = everyone[[not math.isfinite(each) for each in losses]]
        shown = (culprits if len(culprits) else everyone).flatten()[:64].tolist()
        last = self.checkpoints.folder / "last.pt"
        raise NonFiniteError(
            f"Step {step.number}: loss {step.loss.item():.4g}, gradient norm {step.norm.item():.4g}. "
            f"Indices of its samples: {', '.join(map(str, shown))}. "
            + (
                f"Nothing after the last good checkpoint was kept: {last}."
                if last.exists()
                else "There is no checkpoint yet: nothing was kept."
            )
        )

    def _set_temperature(self, micro_batch: int) -> None:
        """The same for the model and its average, which would otherwise be evaluated with an averaged temperature."""
        if not self.warms_up:
            return
        tau = self._temperature(micro_batch)
        if tau == self._tau:
            return
        kw.set_temperature(self.model, tau)
        if self.ema:
            kw.set_temperature(self.ema.module, tau)
        self._tau = tau

    def _warn_of_temperature(self) -> None:
        """It may be wanted, as in a trial of a few epochs: no error."""
        end = self._temperature(self.steps * self.accumulation - 1)
        if self.warms_up and end > 0:
            recipe = self.config.recipe
            self.display.print(
                f"Warning: recipe.temperature_epochs={recipe.temperature_epochs:g} is more than "
                f"recipe.epochs={recipe.epochs}: the temperature ends at {end:.2f}, not at 0."
            )

    def _temperature(self, micro_batch: int) -> float:
        per_epoch = self.steps_per_epoch * self.accumulation
        return temperature(micro_batch, per_epoch, self.config.recipe.temperature_epochs)

    # ---- the end of an epoch ----------------------------------------------------------------------------------------

    def _evaluate(self, model: nn.Module) -> dict[str, float]:
        self.world.share_buffers(model)
        runtime = self.config.runtime
        batch = runtime.micro_batch or min(256, self.config.recipe.batch_size)
        pin = self.world.device.type == "cuda"
        loader = eval_loader(self.eval_samples, batch, runtime.workers, pin, self.world.rank, self.world.size)
        return evaluate(model, self._stoppable(loader, batch), self.world, cast(self.config, self.world.device))

    def _stoppable(self, loader: Iterable[Sample], batch: int) -> Iterator[Sample]:
        """The batches of an evaluation; before each, the processes agree on whether to leave. They may have different
        numbers of batches, and the first process has the most."""
        batches, watch = iter(loader), Watch()
        most = math.ceil(math.ceil(len(self.eval_samples.images) / self.world.size) / batch)
        for _ in range(most):
            if stopping := self._asked(watch):
                self._leave(stopping)
            yield from itertools.islice(batches, 1)

    def _asked(self, watch: Watch) -> int:
        """The signal by which any of the processes had been asked to stop when this was called last; of a process
        alone, by now. 0 if none did."""
        if self.world.size == 1:
            return self.stop.signal
        taken = watch.take()
        watch.put(self.world.sum(self.world.place(self.stop.came())))
        return first_signal(taken[0]) if taken else 0

    def _end_epoch(self) -> None:
        """Evaluate, and save with the epoch's line. A run that was stopped in the midst of it does it again."""
        epoch = self.step // self.steps_per_epoch - 1
        samples, loss, hits = self.world.sum(self.sums.clone()).tolist()
        speed = self.unevaluated
        line: dict[str, Any] = {
            "epoch": epoch,
            "step": self.step,
            "train_loss": loss / samples,
            "train_top1": 100 * hits / samples,
            **self._evaluate(self.model),
        }
        if self.ema:
            if self._tau == 0:  # the average of zeros is 0, but not known to be: evaluate without anchors
                kw.set_temperature(self.ema.module, 0)
            line |= {f"ema_{key}": value for key, value in self._evaluate(self.ema.module).items()}
        line["lr"] = learning_rate(self.step - 1, self.steps_per_epoch, self.config.recipe)
        line["temperature"] = self._temperature(self.step * self.accumulation - 1) if self.warms_up else 0.0
        line["images_per_second"] = speed
        if self.substitutes:  # by now all processes are through with the epoch: their samples were summed
            line["substituted"] = self.substitutes.count(epoch)
        self.sums.zero_()
        self.unevaluated = None
        state = self.state()
        if self.world.is_main:
            self.metrics.append(line)
            self.checkpoints.save_epoch(state, epoch, _score(line))
        self.services.log(line)
        self.world.barrier()
        self.display.epoch(line, (self.steps - self.step) * self.config.recipe.batch_size / speed)

    def _show(self, started: float, first: int) -> None:
        samples, loss, hits = self.sums.tolist()
        self.display.show(self.step - 1, loss / samples, 100 * hits / samples, self._speed(started, first))

    def _speed(self, started: float, first: int) -> float:
        """Images per second since step `first`."""
        self.sums.tolist()  # waits for the device: then the time is right
        return (self.step - first) * self.config.recipe.batch_size / (time.monotonic() - started)

    def _summarize(self) -> dict[str, Any]:
        lines = self.metrics.read()
        if not lines:
            raise RunError(
                f"{self.metrics.path} has no line of any epoch, though the run is finished: it was removed or emptied. "
                f"Put it back; or move {self.folder} away, to train once more."
            )
        last = lines[-1]
        size = (3, self.config.data.image_size, self.config.data.image_size)
        costs = kw.profile(self.model, size)
        summary = {
            "name": self.config.name,
            "backbone": self.config.backbone.label,
            "dynamic": self.config.dynamic,
            "n": self.config.n,
            "data": self.config.data.name,
            "top1": last["top1"],
            "top5": last["top5"],
            **({"ema_top1": last["ema_top1"], "ema_top5": last["ema_top5"]} if self.ema else {}),
            "best_top1": max(_score(line) for line in lines),
            "eval_samples": last["eval_samples"],
            "epochs": len(lines),
            "params": costs.params,
            "macs": costs.macs,
            "images_per_second": median(line["images_per_second"] for line in lines),
            "seed": self.config.seed,
            "device": _device_name(self.world.device),
            **provenance(),
        }
        if self.world.is_main:
            write_whole(self.folder / "summary.json", json.dumps(summary, indent=2) + "\n")
        return summary


def accumulation(batch_size: int, micro_batch: int | None, world: int) -> int:
    """Into how many micro-batches a device cuts its share of the global batch: as few as fit, of equal size.

    Raises:
        ConfigError: the batch cannot be shared out evenly, or only in micro-batches of under half the size asked for.
    """
    if batch_size % world:
        raise ConfigError(f"recipe.batch_size={batch_size} cannot be shared out evenly to {world} devices.")
    share = batch_size // world
    asked = min(micro_batch or share, share)
    if not _cuts_well(share, asked):
        larger = next(size for size in range(asked, share + 1) if share % size == 0)
        fewer = next(size for size in range(share, 0, -1) if _cuts_well(size, asked))
        more = next(size for size in itertools.count(share) if _cuts_well(size, asked))
        raise ConfigError(
            f"runtime.micro_batch={micro_batch}: a device's {share} samples of recipe.batch_size={batch_size} are cut "
            f"into equal parts of at most {share // _cuts(share, asked)}. The nearest that work are "
            f"runtime.micro_batch={larger}, or recipe.batch_size={fewer * world} or {more * world}."
        )
    return _cuts(share, asked)


def _cuts(share: int, most: int) -> int:
    """The fewest equal parts of a share, of at most `most`."""
    return next(count for count in range(-(-share // most), share + 1) if share % count == 0)


def _cuts_well(share: int, most: int) -> bool:
    return 2 * (share // _cuts(share, most)) >= min(share, most)


def _score(line: dict[str, Any]) -> float:
    """What the best epoch is chosen by: the average's accuracy, if there is one."""
    return line.get("ema_top1", line["top1"])


def _some(names: list[str]) -> str:
    return f"{len(names)}: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
