"""One optimizer step: forward, backward, update, moving average, temperature.

The host does not wait for the device in a step (tests/test_watch.py). Whether loss and gradients were finite, and
whether a signal came to any rank, is summed over the ranks on the device and read one step later (`settle`).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from timm.layers import convert_sync_batchnorm
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.nn.parallel import DistributedDataParallel

import kw
from train.config import RuntimeConfig, TrainConfig
from train.data.loader import Batch
from train.data.order import seed_everything
from train.data.run_data import RunData
from train.evaluate import cast
from train.jobs.errors import NonFiniteError
from train.jobs.signals import StopRequest, first_signal
from train.jobs.world import World
from train.model import build_model, load_weights, start_from
from train.optim import build_loss, build_mixup, build_optimizer, restore
from train.schedule import learning_rate, temperature
from train.watch import Step, Watch


class Learner:
    """A model with all that an optimizer step changes.

    Attributes:
        model: the model; checkpoints have its `state_dict`.
        ddp_model: the same weights as a step calls them: in DDP if there are several processes, and compiled.
        ema: the moving average of the weights, or None.
        loss: logits `(B, num_classes)` and targets to a loss `()`. May be replaced.
        sums: `(3,)`, of this rank's samples in this epoch: their number, the sum of their losses, and the hits.
        warms_up: whether the model has attentions, whose temperature changes.

    Raises:
        ConfigError: model, optimizer and recipe do not fit together.
    """

    def __init__(self, config: TrainConfig, data: RunData, world: World, stop: StopRequest):
        self.config, self.world, self.stop = config, world, stop
        self.accumulation, self.steps_per_epoch = data.accumulation, data.steps_per_epoch
        recipe, runtime = config.recipe, config.runtime
        seed_everything(config.seed)
        self.model = place(build_model(config, len(data.classes)), runtime, world.device)
        self.ema = ModelEmaV3(self.model, decay=recipe.ema_decay) if recipe.ema_decay else None
        self.optimizer = build_optimizer(self.model, recipe)
        self.mixup = build_mixup(recipe, len(data.classes))
        self.loss = build_loss(recipe, self.mixup)
        self.scaler = GradScaler(world.device.type, enabled=runtime.precision == "float16")
        self.ddp_model: nn.Module = self.model
        if world.size > 1:
            devices = [world.device] if world.device.type == "cuda" else None
            # Each rank has its own BatchNorm statistics. Rank 0's are sent to all before an evaluation
            # (World.share_buffers), and are those that it saves.
            self.ddp_model = DistributedDataParallel(self.model, device_ids=devices, broadcast_buffers=False)
        if runtime.compile:
            self.ddp_model.compile()
        self.sums = torch.zeros(3, dtype=torch.float64, device=world.device)
        self.warms_up = bool(kw.temperatures(self.model))
        self._tau: float | None = None  # the temperature that was set last
        self.watch = Watch()

    # ---- a step -----------------------------------------------------------------------------------------------------

    def step(self, number: int, batches: Iterator[Batch]) -> int:
        """Optimizer step `number` on the global batch, in micro-batches.

        Returns:
            The signal that asked a rank to stop before the previous step ended, or 0. The same on all ranks.

        Raises:
            NonFiniteError: loss or gradients of the previous step are not finite.
        """
        self._set_learning_rate(number)
        indices = []
        losses = self.sums.new_zeros(())
        for turn in range(self.accumulation):
            images, targets, index = next(batches)
            indices.append(index)
            self._set_temperature(number * self.accumulation + turn)
            # For mixup, dropout and drop path. The seed follows the micro-batch's place in the global batch.
            seed_everything(self.config.seed, number, turn * self.world.size + self.world.rank)
            with self._no_sync() if turn < self.accumulation - 1 else contextlib.nullcontext():
                loss = self.compute_loss(images, targets)
                self.scaler.scale(loss / self.accumulation).backward()  # type: ignore[no-untyped-call]
            losses += loss.detach()
        stopping = self._update(number, losses, indices)
        self._update_average()
        return stopping

    def compute_loss(self, images: Tensor, targets: Tensor) -> Tensor:
        """The loss `()` of images `(B, 3, H, W)` and targets `(B,)`, and its part of `sums`."""
        images, targets = (t.to(self.world.device, non_blocking=True) for t in (images, targets))
        if self.config.runtime.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        if self.mixup:
            images, targets = self.mixup(images, targets)
        with cast(self.config, self.world.device):
            logits = self.ddp_model(images)
            loss = self.loss(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets)
        labels = targets.argmax(dim=1) if self.mixup else targets
        hits = (logits.detach().argmax(dim=1) == labels).sum()
        self.sums += torch.stack([torch.full_like(hits, len(images)), loss.detach() * len(images), hits]).double()
        return loss

    def _update(self, number: int, losses: Tensor, indices: list[Tensor]) -> int:
        """Apply the gradients, settle the previous step, and queue what `settle` will read of this one.

        In float16 a gradient that overflows makes the scaler skip the step and lower its scale. At a scale of 1 or less
        (without a scaler it is 1) it is not an overflow: the gradients are broken."""
        self.scaler.unscale_(self.optimizer)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        norm = nn.utils.clip_grad_norm_(parameters, self.config.recipe.clip_grad or math.inf)
        scale = self.scaler.scale(torch.ones_like(norm))  # get_scale() would wait for the device
        broken = ~torch.isfinite(losses) | (~torch.isfinite(norm) & (scale <= 1))
        counts = self.world.sum(torch.cat([broken[None].int(), self.world.place(self.stop.came())]))
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        stopping = self.settle()
        self.watch.put(counts, Step(number, losses / self.accumulation, norm, indices))
        return stopping

    def settle(self) -> int:
        """Read how the last step went, unless that was read before.

        Returns:
            The signal that had asked a rank to stop by then, or 0. The same on all ranks.

        Raises:
            NonFiniteError: its loss or gradients are not finite.
        """
        taken = self.watch.take()
        if taken is None:
            return 0
        (broken, *came), step = taken
        if broken:
            assert step is not None
            self._raise_non_finite(step)
        return first_signal(came)

    def _raise_non_finite(self, step: Step) -> None:
        losses = self.world.stack(step.loss).tolist()
        everyone = self.world.stack(torch.cat(step.indices).to(self.world.device)).cpu()
        culprits = everyone[[not math.isfinite(each) for each in losses]]
        shown = (culprits if len(culprits) else everyone).flatten()[:64].tolist()
        raise NonFiniteError(
            f"Step {step.number}: loss {step.loss.item():.4g}, gradient norm {step.norm.item():.4g}. "
            f"Indices of its samples: {', '.join(map(str, shown))}."
        )

    def _no_sync(self) -> contextlib.AbstractContextManager[None]:
        """Gradients are summed over the ranks in the last micro-batch only."""
        model = self.ddp_model
        return model.no_sync() if isinstance(model, DistributedDataParallel) else contextlib.nullcontext()

    # ---- what follows from the step's number ------------------------------------------------------------------------

    def learning_rate(self, step: int) -> float:
        return learning_rate(step, self.steps_per_epoch, self.config.recipe)

    def temperature(self, micro_batch: int) -> float:
        """tau in forward pass number `micro_batch`; 0 for a model without attentions."""
        per_epoch = self.steps_per_epoch * self.accumulation
        return temperature(micro_batch, per_epoch, self.config.recipe.temperature_epochs) if self.warms_up else 0.0

    def _set_learning_rate(self, step: int) -> None:
        lr = self.learning_rate(step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)

    def _set_temperature(self, micro_batch: int) -> None:
        if not self.warms_up:
            return
        tau = self.temperature(micro_batch)
        if tau == self._tau:
            return
        kw.set_temperature(self.model, tau)
        if self.ema:
            kw.set_temperature(self.ema.module, tau)
        self._tau = tau

    def _update_average(self) -> None:
        if self.ema:
            self.ema.update(self.model)

    def average(self) -> nn.Module | None:
        """The moving average, at the model's temperature; None without recipe.ema_decay."""
        return self.ema.module if self.ema else None

    # ---- checkpoints ------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs of this. A collective: every rank must call it."""
        return {
            "model": self.model.state_dict(),
            "ema": self.ema.module.state_dict() if self.ema else None,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "sums": self.world.stack(self.sums),
        }

    def start_from(self, path: Path) -> None:
        """Begin with the weights of a static run or checkpoint. Raises CheckpointError if they do not fit."""
        for model in (self.model, *([self.ema.module] if self.ema else [])):
            start_from(model, path)

    def load(self, state: dict[str, Any]) -> None:
        """Raises KeyError, RuntimeError or ValueError if it does not fit."""
        load_weights(self.model, state["model"])
        if self.ema:
            load_weights(self.ema.module, state["ema"])
        restore(self.optimizer, state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self._tau = None
        sums = state["sums"]  # (ranks, 3)
        if len(sums) == self.world.size:
            self.sums.copy_(sums[self.world.rank])
        elif self.world.is_main:  # of another number of ranks: all that matters is their total
            self.sums.copy_(sums.sum(dim=0))


def place(model: nn.Module, runtime: RuntimeConfig, device: torch.device) -> nn.Module:
    """The model on its device, with the BatchNorm layers and the memory format that the runtime asks for."""
    if runtime.sync_norm:
        model = convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
    model.to(device)
    if runtime.channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model
