"""The file metrics.jsonl of a run folder."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from train.jobs.errors import writing
from train.jobs.folder import write_atomically


def devices(lines: list[dict[str, Any]], unsaid: str = "unknown") -> str:
    """The devices on which the epochs ended, in the order of their first, as "NVIDIA H100 then cpu".

    Args:
        unsaid: that of lines that do not say theirs, which older versions wrote.
    """
    return " then ".join(dict.fromkeys(line.get("device", unsaid) for line in lines))


class MetricsFile:
    """One line an epoch, on disk before the checkpoint of that epoch is."""

    def __init__(self, path: Path):
        self.path = path

    def read(self) -> list[dict[str, Any]]:
        """The complete lines."""
        if not self.path.exists():
            return []
        return [json.loads(line) for line in self.path.read_text().splitlines(keepends=True) if line.endswith("\n")]

    def keep_before(self, epoch: int) -> None:
        """Remove the lines of `epoch` and later, which a resumed run writes again, and an incomplete one."""
        lines = [json.dumps(line) + "\n" for line in self.read() if line["epoch"] < epoch]
        write_atomically(self.path, "".join(lines))

    def append(self, line: dict[str, Any]) -> None:
        """Raises WriteError: the disk is full; `read` then skips the part of the line that was written."""
        with writing(self.path), self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
