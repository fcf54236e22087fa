"""What a classification run prints of its steps and epochs."""

from __future__ import annotations

from typing import Any

from train.jobs.display import Display, duration, per_second


class EpochDisplay(Display):
    """The display of a run of `epochs` epochs."""

    def __init__(self, main: bool, epochs: int, steps_per_epoch: int):
        super().__init__(main, epochs * steps_per_epoch)
        self.epochs = epochs

    def epoch(self, line: dict[str, Any], left: float) -> None:
        """Show a line of metrics.jsonl; `left` is in seconds."""
        ema = f"  ema {line['ema_top1']:.2f}" if "ema_top1" in line else ""
        self.print(
            f"epoch {line['epoch'] + 1:>3}/{self.epochs}  loss {line['train_loss']:.3f}  "
            f"top-1 {line['top1']:.2f}  top-5 {line['top5']:.2f}{ema}  tau {line['temperature']:.2f}  "
            f"{per_second(line['images_per_second'])} images/s  {duration(left)} left"
        )
