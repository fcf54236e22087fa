"""Damaged files: a checkpoint for every reader of one, and images of a folder."""

from __future__ import annotations

import io
import os
import pickle
import random
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from scripts.kill_storm import SMALL
from scripts.storm.settings import train
from scripts.storm.trials import Ended, Row, forked, is_kind, run

ENDED = ["recipe.epochs=1", "recipe.temperature_epochs=0", "recipe.warmup_epochs=0", "data.train_images=64"]


class Malicious:
    """Creates a file when it is unpickled by a reader that calls whatever a pickle names."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, int]]:
        return os.open, (str(self.mark), os.O_CREAT)


def damages(good: Path, mark: Path, chance: random.Random) -> dict[str, bytes]:
    """Contents of damaged checkpoints by what was done to them."""
    content = good.read_bytes()
    flipped = bytearray(content)
    for _ in range(20):
        flipped[chance.randrange(len(flipped))] ^= 1 << chance.randrange(8)
    foreign = io.BytesIO()
    torch.save({"weights": torch.zeros(3), 5: "not a checkpoint"}, foreign)
    malicious = io.BytesIO()
    torch.save({"model": Malicious(mark)}, malicious)
    return {
        "empty": b"",
        "cut to a half": content[: len(content) // 2],
        "without its last byte": content[:-1],
        "20 bits flipped": bytes(flipped),
        "zeros": bytes(len(content)),
        "text": b"this is not a checkpoint\n" * 100,
        "of another program": foreign.getvalue(),
        "a list": pickle.dumps([1, 2]),
        "malicious": malicious.getvalue(),
        "malicious, a plain pickle": pickle.dumps({"model": Malicious(mark)}),
    }


def damage_checkpoints(place: Path, seed: int = 0) -> Row:
    """Each damage for each reader: resuming and evaluating a run, starting from one, its attentions, a released
    checkpoint; a detector's initialization."""
    row, chance = Row("damaged checkpoints"), random.Random(seed)
    static = place / "static"
    run([*SMALL, *ENDED, "n=static", f"hydra.run.dir={static}"])
    good = static / "checkpoints" / "last.pt"
    mark = place / "executed"
    for name, content in damages(good, mark, chance).items():
        bad = place / f"{name.replace(' ', '_')}.pt"
        bad.write_bytes(content)
        for reader, ended in read_by_all(bad, place / f"of_{bad.stem}"):
            wrong = is_kind(ended, may_run=False)
            if mark.exists():
                wrong = "executed what was in the file"
                mark.unlink()
            row.add(f"{reader}, {name}", wrong)
    return row


def read_by_all(bad: Path, place: Path) -> list[tuple[str, Ended]]:
    run_folder = place / "run" / "checkpoints"
    run_folder.mkdir(parents=True)
    (run_folder / "last.pt").write_bytes(bad.read_bytes())
    new = f"hydra.run.dir={place / 'new'}"
    return [
        ("resume", forked(lambda: train((*SMALL, *ENDED, f"hydra.run.dir={run_folder.parent}")))),
        ("evaluate", forked(lambda: train((f"evaluate={bad}",)))),
        ("evaluate as released", forked(lambda: train((f"evaluate={bad}", "backbone=resnet18", "data=digits")))),
        ("start_from", forked(lambda: train((*SMALL, *ENDED, f"start_from={bad}", new)))),
        ("attentions", forked(lambda: attentions(bad, place / "attentions"))),
        ("init of a detector", forked(lambda: into_detector(bad))),
    ]


def attentions(bad: Path, out: Path) -> None:
    from scripts.attentions.__main__ import main

    main([f"checkpoint={bad}", f"out={out}"])


def into_detector(bad: Path) -> None:
    from detection.plugin.backbone import KWBackbone
    from detection.plugin.errors import PretrainedError

    backbone = KWBackbone(name="resnet18", n=1, init_cfg={"type": "Pretrained", "checkpoint": str(bad)})
    try:
        backbone.init_weights()
    except PretrainedError as error:  # which the program reports
        sys.exit(f"{type(error).__name__}: {error}")


def corrupt_images(count: int, place: Path, seed: int = 0) -> Row:
    """A folder of so many broken images among good ones, trained on with data.on_error=stop, which names one; and with
    substitute, which lists all."""
    row, chance = Row("corrupted images"), random.Random(seed)
    folder = place / "images"
    numbers = np.random.default_rng(seed)
    for split, good, bad in (("train", 400, count), ("val", 20, 0)):
        for name in ("a", "b"):
            (folder / split / name).mkdir(parents=True)
            for number in range((good + bad) // 2):
                path = folder / split / name / f"{number:05}.{'png' if number % 2 else 'jpg'}"
                Image.fromarray(numbers.integers(0, 255, (20, 20, 3), np.uint8)).save(path)
                if number >= good // 2:
                    path.write_bytes(corrupted(path.read_bytes(), number, chance))
    settings = [*SMALL, "data=folder", f"data.root={folder}", "data.image_size=16", *ENDED[:3]]
    stopped = run([*settings, f"hydra.run.dir={place / 'stopped'}"])
    row.add("stop", is_kind(stopped, may_run=False) or (None if str(folder) in stopped.text else "names no file"))
    went_on = run([*settings, "data.on_error=substitute", f"hydra.run.dir={place / 'went_on'}"], seconds=900)
    listed = [path for path in (place / "went_on").rglob("*") if path.is_file() and "broken" in path.name]
    found = sum(len(path.read_text().splitlines()) for path in listed)
    wrong = is_kind(went_on)
    row.add("substitute", wrong or (None if went_on.status == 0 else went_on.last_line))
    # A flipped bit may leave an image that decodes; all others must be counted.
    row.add(f"list: {found} of {count}", None if found >= count // 2 else "too few are listed")
    row.tried += count - 3
    row.survived += count - 3 if went_on.status == 0 else 0
    return row


def corrupted(content: bytes, number: int, chance: random.Random) -> bytes:
    kind = number % 5
    if kind == 0:
        return content[: len(content) // 2]
    if kind == 1:
        flipped = bytearray(content)
        for _ in range(8):
            flipped[chance.randrange(len(flipped))] ^= 1 << chance.randrange(8)
        return bytes(flipped)
    return (b"", bytes(len(content)), b"<html>not found</html>")[kind - 2]
