"""Prove that a run survives SIGKILL: kill it at random moments, start the same command again until it ends, and compare
it with an undisturbed run. Weights, optimizer, average, step and metrics must be the same to the bit. If a run ends
before the number of kills is reached, another one follows.

    python -m scripts.kill_storm                         30 kills of a small run on digits, one process
    python -m scripts.kill_storm --devices 2 --kills 10
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
from pathlib import Path
from typing import Any

import torch

from scripts.arguments import argument_parser
from train.jobs.checkpoint import read

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


def start(folder: Path, settings: list[str]) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "train", *SMALL, *settings, f"hydra.run.dir={folder}"]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def finish(process: subprocess.Popen[bytes]) -> None:
    _, errors = process.communicate()
    if process.returncode:
        sys.exit(f"The run failed:\n{errors.decode()}")


def storm(folder: Path, settings: list[str], kills: int, span: tuple[float, float], chance: random.Random) -> int:
    """Kill a run at random moments within `span` seconds of its starts, until it ends by itself or the number of kills
    is reached; then let it end. Returns the number of kills."""
    for done in range(kills):
        process = start(folder, settings)
        try:
            process.wait(chance.uniform(*span))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)  # only the launcher: its workers have to notice
            process.wait()
            continue
        finish(process)
        return done
    finish(start(folder, settings))
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
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        del line["images_per_second"]
    return {**{key: value for key, value in state.items() if key != "config"}, "metrics": lines}


def main() -> None:
    parser = argument_parser("kill_storm", __doc__)
    parser.add_argument("--kills", type=int, default=30, help="default: 30")
    parser.add_argument("--devices", type=int, default=1, help="processes of the run")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments")
    parser.add_argument("settings", nargs="*", help="overrides of the run, after --")
    options = parser.parse_args()
    settings = [*options.settings, f"runtime.devices={options.devices}"]
    with tempfile.TemporaryDirectory() as place:
        calm = Path(place) / "calm"
        began = time.monotonic()
        process = start(calm, settings)
        while process.poll() is None and not (calm / "checkpoints" / "last.pt").exists():
            time.sleep(0.05)
        ready = time.monotonic() - began  # to the first checkpoint
        finish(process)
        total = time.monotonic() - began
        # Each start gets a few checkpoints further, so that the kills spread over all of the training.
        span = (0.8 * ready, ready + 2 * (total - ready) / (options.kills + 1))
        reference, chance = outcome(calm), random.Random(options.seed)
        killed, runs, found = 0, 0, []
        while killed < options.kills and not found:  # if a run ends early, another follows
            stormy = Path(place) / f"stormy{runs}"
            done = storm(stormy, settings, options.kills - killed, span, chance)
            found = differences(reference, outcome(stormy))
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
