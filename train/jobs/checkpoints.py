"""Checkpoints that survive a kill at any moment: writes are atomic, and reads find the newest complete file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from train.jobs.errors import CheckpointError, warn, writing
from train.jobs.folder import link
from train.jobs.reading import FORMAT, read

State = dict[str, Any]
NAMES = ("fresh.pt", "last.pt", "previous.pt")  # of a run's checkpoints, newest first


def write(path: Path, state: State) -> None:
    """Write atomically: a temporary file next to it, fsync, rename. After an error the former file is still there.

    Raises:
        CheckpointError: the disk is full or the folder cannot be written.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        # On a full disk torch raises a RuntimeError of its own, about file positions, in place of the OSError.
        cause = error.__context__
        reason = cause if isinstance(error, RuntimeError) and isinstance(cause, OSError) else error
        raise CheckpointError(
            f"{path} could not be written ({reason}); earlier checkpoints are as they were."
        ) from error


class Found(NamedTuple):
    path: Path
    state: State
    remarks: list[str]  # one for each newer file that was passed over

    def warn(self) -> None:
        for remark in self.remarks:
            warn(f"{remark} {self.path.name} is read in its place.")


def newest(folder: Path, form: str = FORMAT, allowed: Sequence[Any] = ()) -> Found:
    """The newest complete state in a run's folder of checkpoints. Changes nothing there: all ranks may call it.

    Args:
        form: what a state of this program has under "format".
        allowed: classes and functions that its pickle may use besides tensors and plain values.

    Raises:
        CheckpointError: there is no checkpoint of a run that is complete.
    """
    remarks = []
    for path in (folder / name for name in NAMES):
        if not path.exists():
            continue
        try:
            state = read(path, allowed)
        except CheckpointError as error:
            remarks.append(str(error))
            continue
        if state.get("format") == form:
            return Found(path, state, remarks)
        remarks.append(f"{path} is not a checkpoint of a run.")
    raise CheckpointError(f"{folder}: no checkpoint can be read. " + (" ".join(remarks) or "There is none."))


def newest_or_warn(folder: Path) -> tuple[Path, State]:
    """As `newest`, for readers that only take the weights: it warns of each newer file that was passed over."""
    found = newest(folder)
    found.warn()
    return found.path, found.state


class Checkpoints:
    """A run's checkpoints: `last.pt`, the one before it as `previous.pt`, and the best epochs' as `best-{epoch}.pt`.
    `form` and `allowed` are as in `newest`."""

    def __init__(self, folder: Path, keep_best: int = 1, form: str = FORMAT, allowed: Sequence[Any] = ()):
        self.folder, self.keep_best, self.form, self.allowed = folder, keep_best, form, allowed
        self.best: list[tuple[float, int]] = []  # (score, epoch), best first

    def save(self, state: State) -> None:
        """Replace `last.pt`. The former one becomes `previous.pt` once the new one is complete.

        Raises:
            CheckpointError, WriteError: the disk is full or the folder cannot be written.
        """
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        last, fresh = self.folder / "last.pt", self.folder / "fresh.pt"
        write(fresh, {**state, "best": self.best})
        with writing(last):
            if last.exists():
                last.replace(self.folder / "previous.pt")
            fresh.replace(last)
            _sync_folder(self.folder)

    def save_epoch(self, state: State, epoch: int, score: float) -> None:
        """`save`, and keep the file if its score is one of the best."""
        ranked = sorted([*self.best, (score, epoch)], key=lambda entry: (-entry[0], entry[1]))
        self.best = ranked[: self.keep_best]
        self.save({**state, "epoch": epoch})
        self._keep_best_of(self.folder / "last.pt", epoch)

    def newest(self) -> Found | None:
        """As the function `newest`, but None if no checkpoint was ever written."""
        if not any((self.folder / name).exists() for name in NAMES):
            return None
        return newest(self.folder, self.form, self.allowed)

    def resume_from(self, found: Found) -> None:
        """Resume after a state that was found here, as if it had just been saved. On one rank only."""
        self.best = [(float(score), int(epoch)) for score, epoch in found.state["best"]]
        self._keep_best_of(found.path, found.state.get("epoch"))

    def what_is_kept(self) -> str:
        """For the message of an error that ends a run."""
        last = self.folder / "last.pt"
        if last.exists():
            return f"Nothing after the last good checkpoint was kept: {last}."
        return "There is no checkpoint yet: nothing was kept."

    def _keep_best_of(self, path: Path, epoch: int | None = None) -> None:
        """Link the checkpoint of an epoch if the epoch is one of the best, and remove files of epochs that are not."""
        wanted = {self.folder / f"best-{number:04d}.pt" for _, number in self.best}
        kept = self.folder / f"best-{epoch:04d}.pt" if epoch is not None else None
        with writing(kept or self.folder):
            if kept in wanted and not kept.exists():
                link(path, kept)  # checkpoints are replaced, never rewritten: so a link is as good as a copy
            for stale in set(self.folder.glob("best-*.pt")) - wanted:
                stale.unlink()


def _sync_folder(folder: Path) -> None:
    """A rename is on disk only once its folder is synchronized."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
