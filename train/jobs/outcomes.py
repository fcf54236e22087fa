"""What the jobs of a sweep leave for each other where each is a process of its own, as under SLURM: which job has which
run folder, and how a job ended. These are small files in `<hydra.sweep.dir>/.sweeps/<time>`, which is removed once all
jobs are done."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from train.jobs.errors import ConfigError
from train.jobs.folder import make, write_atomically, write_once

PLACE = ".sweeps"
FOLDER = "KW_SWEEP"  # the environment variable that tells a job where the files of its sweep are
RUNS, DONE = "has begun, and runs or was killed", "done"


def begin(sweep_dir: Path) -> Path:
    """Called before a sweep starts: this process and its jobs then know the sweep's place, which is returned."""
    name = f"{time.strftime('%Y-%m-%d_%H-%M-%S')}_{uuid.uuid4().hex[:6]}"
    folder = Path(os.path.abspath(sweep_dir), PLACE, name)
    make(folder)
    os.environ[FOLDER] = str(folder)
    return folder


def forget() -> None:
    """This process starts no sweep, or one of jobs in this process."""
    os.environ.pop(FOLDER, None)


def place() -> Path | None:
    """The sweep's place; None for a job that is none of a sweep, or of one in this process."""
    return Path(os.environ[FOLDER]) if FOLDER in os.environ else None


def note(sweep: Path, number: int, job: str, state: str, folder: str = "") -> None:
    """Write how a job is.

    Args:
        job: its overrides.
        folder: of its run, once it is known.
    """
    write_atomically(sweep / f"{number:05}.json", json.dumps({"job": job, "state": state, "folder": folder}))


def tell_folder(sweep: Path, number: int, folder: Path) -> None:
    """Add a job's run folder to what it noted last."""
    noted = json.loads((sweep / f"{number:05}.json").read_text())
    note(sweep, number, noted["job"], noted["state"], str(folder))


def claim(sweep: Path, number: int, folder: Path, settings: Any) -> int | None:
    """Claim a run folder for a job.

    Returns:
        None, or the number of another job of the sweep that has the folder and the same settings.

    Raises:
        ConfigError: another job has it, and other settings.
    """
    digests = [hashlib.sha1(text.encode()).hexdigest() for text in (str(folder), json.dumps(settings, default=str))]
    owner = json.loads(write_once(sweep / f"{digests[0]}.claim", json.dumps({"job": number, "settings": digests[1]})))
    if owner["job"] == number:
        return None
    if owner["settings"] != digests[1]:
        raise taken(folder)
    return int(owner["job"])


def taken(folder: Path) -> ConfigError:
    return ConfigError(
        f"Another job of this sweep has the run folder {folder}. Put what is swept over into its path, by "
        f"name=... or label=..., such as 'label=x${{runtime.micro_batch}}'."
    )


def not_done(sweeps: Iterable[Path]) -> list[str]:
    """The jobs of sweeps that have not ended well since, with how they are: `n=3/2: ConfigError: ...`.

    Args:
        sweeps: their places.
    """
    states: dict[str, str] = {}
    for sweep in sorted(sweeps):
        for path in sorted(sweep.glob("*.json")):
            one = json.loads(path.read_text())
            states.pop(one["job"], None)
            states[one["job"]] = one["state"]
    return [f"{job}: {state}" for job, state in states.items() if state != DONE]


def end(sweep: Path) -> list[str]:
    """Called when a sweep's jobs have ended: the jobs that are not done. If all are, their files are removed."""
    left = not_done([sweep])
    if not left:
        shutil.rmtree(sweep, ignore_errors=True)
        if sweep.parent.is_dir() and not os.listdir(sweep.parent):
            sweep.parent.rmdir()
    return left
