"""`data.on_error=substitute`: the list of training images that were broken and replaced."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from train.jobs.errors import writing
from train.jobs.folder import write_atomically

Row = tuple[int, int, int, str, str]  # epoch, index, copy, file, file in its place


class SubstituteList:
    """The replaced images of a run, in `substituted.txt` of its folder: a line for each replacement, `epoch, index,
    copy, file, file in its place`.

    A rank writes a line to its own file before the step that uses the image, and equal lines count once. So the list is
    exact even if a run was killed and repeats some steps.
    """

    def __init__(self, folder: Path, rank: int = 0):
        self.rank = rank
        self.list, self.parts = folder / "substituted.txt", folder / "substituted"

    def append(self, rows: Iterable[Row]) -> None:
        """Append replacements to this rank's file.

        Raises:
            WriteError: the disk is full or the folder cannot be written.
        """
        lines = [_line(*row) for row in rows]
        if not lines:
            return
        part = self.parts / f"{self.rank}.txt"
        with writing(part):
            self.parts.mkdir(parents=True, exist_ok=True)
            with part.open("a", encoding="utf-8") as file:
                file.writelines(lines)
                file.flush()
                os.fsync(file.fileno())

    def count(self, epoch: int) -> int:
        """The replacements of an epoch, which all ranks must have finished. Rank 0 also writes `substituted.txt`."""
        lines: set[str] = set()
        for part in self.parts.glob("*.txt"):
            lines |= {line for line in part.read_text("utf-8").splitlines(keepends=True) if line.endswith("\n")}
        if lines and self.rank == 0:
            write_atomically(self.list, "".join(sorted(lines, key=lambda line: [int(x) for x in line.split("\t")[:3]])))
        return sum(line.startswith(f"{epoch}\t") for line in lines)


def _line(epoch: int, index: int, copy: int, name: str, used: str) -> str:
    return "\t".join((str(epoch), str(index), str(copy), printable(name), printable(used))) + "\n"


def printable(name: str) -> str:
    """A name on one line, with escapes for what cannot be printed."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)
