"""Services that show a run while it runs: TensorBoard and wandb. They show the lines of metrics.jsonl; after a
resume they are brought up to date with that file."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from train.config import TrainConfig, to_plain
from train.jobs.errors import ConfigError
from train.jobs.metrics import MetricsFile
from train.jobs.weights_and_biases import import_wandb, settings

Line = dict[str, Any]


class Service(Protocol):
    def start(self, config: TrainConfig, folder: Path) -> None:
        """Begin, or continue after a resume. metrics.jsonl then holds the epochs that are not repeated."""

    def log(self, line: Line) -> None:
        """Show a line of metrics.jsonl."""

    def finish(self, summary: Line | None) -> None:
        """End; `summary` is None if the run was stopped."""


class Services:
    """The services of logger.services, called together. Ranks other than 0 have none."""

    def __init__(self, names: list[str], main: bool):
        self.services: list[Service] = [SERVICES[name]() for name in names] if main else []

    def start(self, config: TrainConfig, folder: Path) -> None:
        for service in self.services:
            service.start(config, folder)

    def log(self, line: Line) -> None:
        for service in self.services:
            service.log(line)

    def finish(self, summary: Line | None) -> None:
        for service in self.services:
            service.finish(summary)


class TensorBoard:
    """Event files in the run folder's tensorboard/, one for each start of the run."""

    writer: Any = None

    def start(self, config: TrainConfig, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigError(f"logger.services: tensorboard cannot be imported ({error}).") from None
        place = folder / "tensorboard"
        lines = unseen(folder, place)
        self.writer = SummaryWriter(place, purge_step=lines[0]["step"] if lines else 0)
        for line in lines:
            self.log(line)

    def log(self, line: Line) -> None:
        for key, value in numbers(line).items():
            self.writer.add_scalar(key, value, line["step"])
        self.writer.flush()

    def finish(self, summary: Line | None) -> None:
        if self.writer:
            self.writer.close()


class Wandb:
    """One wandb run for one run folder, however often it is resumed: wandb/id there holds the run's id."""

    run: Any = None

    def start(self, config: TrainConfig, folder: Path) -> None:
        wandb = import_wandb(config.logger.mode)
        place = folder / "wandb"
        lines = unseen(folder, place)
        options = settings(config.logger, place, config.name, config.seed)
        try:
            self.run = wandb.init(dir=str(folder), config=to_plain(config), allow_val_change=True, **options)
        except wandb.Error as error:
            raise ConfigError(f"logger.mode={config.logger.mode}: wandb does not start: {error}") from None
        for line in lines:
            self.log(line)

    def log(self, line: Line) -> None:
        self.run.log(numbers(line), step=line["step"])  # a step that wandb knows already is not doubled

    def finish(self, summary: Line | None) -> None:
        if self.run is None:
            return
        self.run.summary.update(summary or {})
        self.run.finish(exit_code=1 if summary is None else 0)
        self.run = None


SERVICES: dict[str, type[Service]] = {"tensorboard": TensorBoard, "wandb": Wandb}


def unseen(folder: Path, place: Path) -> list[Line]:
    """The lines of metrics.jsonl that a service with files in `place` may lack: all of them if it was not used before,
    else the last one, since the run may have been killed right after it wrote that line."""
    lines = MetricsFile(folder / "metrics.jsonl").read()
    return lines[-1:] if place.exists() else lines


def numbers(line: Line) -> dict[str, float]:
    return {key: value for key, value in line.items() if isinstance(value, int | float) and key != "step"}
