"""Prove that a run survives SIGKILL: kill it at random moments, start the same command again until it ends, and compare
it with an undisturbed run. Weights, optimizer, average, step and metrics must be the same to the bit. If a run ends
before the number of kills is reached, another one follows.

    python -m scripts.kill_storm                         30 kills of a small run on digits, one process
    python -m scripts.kill_storm --devices 2 --kills 10
    python -m scripts.kill_storm --program detection --kills 20     of a small detector of digits
    python -m scripts.kill_storm -- n=1/4 recipe.mixup=0.2   with overrides of `python -m train`
"""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from scripts.arguments import argument_parser
from train.jobs.reading import read

SMALL = [
    "recipe.batch_size=64",
    "recipe.epochs=4",
    "recipe.warmup_epochs=1",
    "recipe.temperature_epochs=2",
    "recipe.ema_decay=0.9",
    "recipe.drop_path=0.1",
    "recipe.mixup=0.2",
    "data.image_size=16",
    "runtime.checkpoint_steps=3",
    "runtime.device=cpu",
    "backbone.kwargs.channels=[8,8,8,16]",
    "backbone.kwargs.stem_width=8",
]
# A detector of which nothing is frozen, on images that are flipped at random, whose temperature falls.
SMALL_DETECTOR = [
    "config=mask_rcnn_kw1x_digits",
    "train_cfg.max_epochs=3",
    "train_cfg.val_interval=1",
    "train_dataloader.batch_size=2",
    "train_dataloader.dataset.pipeline=[{type:LoadImageFromFile},{type:LoadAnnotations,with_bbox:true,with_mask:true},"
    "{type:RandomFlip,prob:0.5},{type:PackDetInputs}]",
    "+custom_hooks=[{type:TemperatureWarmup,steps:30}]",
    "+model.backbone.norm_eval=attention",
    "model.backbone.kwargs.channels=[16,16,16,16]",
    "model.backbone.kwargs.stem_width=16",
    "model.rpn_head.anchor_generator.scales=[2]",
    "runtime.checkpoint_steps=3",
    "runtime.device=cpu",
]


@dataclass
class Case:
    """A program to kill: `python -m MODULE SETTINGS`, and what is compared of its run folder."""

    module: str
    settings: list[str]
    outcome: Callable[[Path], dict[str, Any]]

    def start(self, folder: Path) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", self.module, *self.settings, f"hydra.run.dir={folder}"]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def case_of(program: str, place: Path) -> Case:
    """A small case of `python -m PROGRAM`; data that have to be made for it are below `place`."""
    if program == "train":
        return Case(program, SMALL, outcome)
    import numpy as np

    from scripts.data.digits_coco import SPLITS, make_split
    from train.data.digits import Digits

    for (folder, split), count in zip(SPLITS.items(), (24, 6), strict=True):
        make_split(place / "digits", folder, Digits(split), count, 64, np.random.default_rng(count))
    return Case(program, [*SMALL_DETECTOR, f"data.root={place / 'digits'}"], outcome_of_detector)


def finish(process: subprocess.Popen[bytes]) -> None:
    _, errors = process.communicate()
    if process.returncode:
        sys.exit(f"The run failed:\n{errors.decode()}")


def storm(case: Case, folder: Path, kills: int, span: tuple[float, float], chance: random.Random) -> int:
    """Kill a run at random moments within `span` seconds of its starts, until it ends by itself or the number of kills
    is reached; then let it end. Returns the number of kills."""
    for done in range(kills):
        process = case.start(folder)
        try:
            process.wait(chance.uniform(*span))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)  # only the launcher: its workers have to notice
            process.wait()
            continue
        finish(process)
        return done
    finish(case.start(folder))
    return kills


def differences(one: Any, other: Any, path: str = "") -> list[str]:
    """Paths at which two nests of dictionaries, lists, tensors and values differ in any bit."""
    if isinstance(one, dict) and isinstance(other, dict):
        keys = sorted(one.keys() | other.keys(), key=str)
        return [found for key in keys for found in differences(one.get(key), other.get(key), f"{path}.{key}")]
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)) and len(one) == len(other):
        pairs = enumerate(zip(one, other, strict=True))
        return [found for index, (a, b) in pairs for found in differences(a, b, f"{path}[{index}]")]
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return [] if torch.equal(one, other) else [path]
    return [] if type(one) is type(other) and one == other else [path]


def outcome(folder: Path) -> dict[str, Any]:
    """What kills must not change: the state without its configuration, which has paths, and metrics without times."""
    state = read(folder / "checkpoints" / "last.pt")
    return {**{key: value for key, value in state.items() if key != "config"}, "metrics": metrics(folder)}


def outcome_of_detector(folder: Path) -> dict[str, Any]:
    """As `outcome`. MMEngine's log in the checkpoint is compared as well, without its times, paths and names."""
    from detection.loading import load

    state = load(str(folder / "checkpoints" / "last.pt"))
    log = state.pop("message_hub")
    scalars = {key: [part.tolist() for part in log["log_scalars"][key].data] for key in log["log_scalars"]}
    state["log"] = {key: values for key, values in scalars.items() if not key.endswith("time")}
    state["meta"] = {key: value for key, value in state["meta"].items() if key != "cfg"}
    return {**state, "metrics": metrics(folder)}


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without times."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "images_per_second"} for line in lines]


def main() -> None:
    parser = argument_parser("kill_storm", __doc__)
    parser.add_argument("--program", choices=("train", "detection"), default="train", help="default: train")
    parser.add_argument("--kills", type=int, default=30, help="default: 30")
    parser.add_argument("--devices", type=int, default=1, help="processes of the run")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments")
    parser.add_argument("settings", nargs="*", help="overrides of the run, after --")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        case = case_of(options.program, Path(place))
        case.settings = [*case.settings, *options.settings, f"runtime.devices={options.devices}"]
        calm = Path(place) / "calm"
        began = time.monotonic()
        process = case.start(calm)
        while process.poll() is None and not (calm / "checkpoints" / "last.pt").exists():
            time.sleep(0.05)
        ready = time.monotonic() - began  # to the first checkpoint
        finish(process)
        total = time.monotonic() - began
        # Each start gets a few checkpoints further, so that the kills spread over all of the training.
        span = (0.8 * ready, ready + 2 * (total - ready) / (options.kills + 1))
        reference, chance = case.outcome(calm), random.Random(options.seed)
        killed, runs, found = 0, 0, []
        while killed < options.kills and not found:  # if a run ends early, another follows
            stormy = Path(place) / f"stormy{runs}"
            done = storm(case, stormy, options.kills - killed, span, chance)
            found = differences(reference, case.outcome(stormy))
            killed, runs = killed + done, runs + 1
            if not done:  # the machine is faster now than in the first run
                span = (0.7 * span[0], 0.7 * span[1])
    print(
        f"Killed {killed} times, in {runs} runs. "
        + (f"Different: {', '.join(found)}" if found else "The same to the bit.")
    )
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
