"""Between the forward and the backward pass of every step the ranks agree on two things: whether a loss is not finite,
and whether one of them was asked to stop."""

from __future__ import annotations

import math
from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from torch import nn

from train.jobs.errors import NonFiniteError
from train.jobs.signals import StopRequest, first_signal
from train.jobs.world import World


class Guard(Hook):
    """Stops a training at a loss or gradient that is not finite, before the optimizer's step.

    Attributes:
        stopping: the signal that had asked any rank to stop by the last forward pass, or 0. The same on all ranks.

    Raises:
        NonFiniteError: in a training step; the message names its images.
    """

    def __init__(self, world: World, stop: StopRequest):
        self.world, self.stop = world, stop
        self.stopping = 0
        self.images: list[str] = []  # of this rank's current step

    def before_train(self, runner: Any) -> None:
        self.runner = runner
        unwrapped(runner.model).register_forward_hook(self._check_loss, with_kwargs=True)
        runner.optim_wrapper.optimizer.register_step_pre_hook(self._check_gradients)

    def agree(self) -> int:
        """The signal that has come to any rank, or 0. A collective."""
        self.stopping = first_signal(self.world.sum(self.world.place(self.stop.came())).tolist())
        return self.stopping

    def _check_loss(self, model: Any, args: Any, settings: dict[str, Any], losses: Any) -> None:
        """A forward hook of the detector."""
        if settings.get("mode") != "loss" or not model.training:
            return
        self.images = [name(sample) for sample in settings.get("data_samples") or []]
        loss, parts = model.parse_losses(losses)
        counts = self.world.place([not bool(torch.isfinite(loss)), *self.stop.came()])
        broken, *came = self.world.sum(counts).tolist()
        self.stopping = first_signal(came)
        if broken:
            wrong = [f"{key} {value.item():g}" for key, value in parts.items() if not torch.isfinite(value)]
            self._stop(", ".join(wrong), self.images if wrong else [])

    def _check_gradients(self, optimizer: Any, args: Any, settings: Any) -> None:
        """A hook before the optimizer's step. The gradients are the same on all ranks. The scaler of float16 leaves out
        the steps whose gradients overflow, and lowers its scale."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        norm = nn.utils.clip_grad_norm_(parameters, math.inf)  # clips nothing
        if not torch.isfinite(norm):
            self._stop(f"gradient norm {norm.item():g}", self.images)

    def _stop(self, what: str, images: list[str]) -> None:
        found = self.world.gather((what, images))
        wrong = next(text for text, _ in found if text)
        names = [name for _, some in found for name in some]
        raise NonFiniteError(f"Step {self.runner.iter}: {wrong}. Its images: {', '.join(names[:64])}.")


def name(sample: Any) -> str:
    """The path of a sample's image, if its metadata have it."""
    known = sample.metainfo
    return str(known.get("img_path", known.get("img_id", "an image without a name")))


def unwrapped(model: Any) -> Any:
    """The detector itself, without DistributedDataParallel."""
    return model.module if is_model_wrapper(model) else model
