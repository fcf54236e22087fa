"""The states of the jobs of a sweep on this machine (`hydra/launcher=local`), shown while it runs. Each job is a
process of its own, whose output goes to a log, and notes its state in a file (outcomes.py)."""

from __future__ import annotations

import json
import threading
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.table import Table

READ_SECONDS = 1.0

State = dict[str, str]  # job, state, folder


class Watch:
    """Shows the states until it is stopped: a table on a terminal, elsewhere a line for each change.

    Args:
        sweep: where the jobs note them.
    """

    def __init__(self, sweep: Path, console: Console | None = None):
        self.sweep = sweep
        self.console = console or Console(highlight=False, soft_wrap=True)
        self.told: dict[int, str] = {}
        self.ending = threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def stop(self) -> None:
        """Show the last states."""
        self.ending.set()
        self.thread.join()

    def _run(self) -> None:
        if not self.console.is_terminal:
            while not self.ending.wait(READ_SECONDS):
                self._tell()
            self._tell()
            return
        with Live(console=self.console, refresh_per_second=1) as live:
            while not self.ending.wait(READ_SECONDS):
                live.update(table(states_in(self.sweep)))
            live.update(table(states_in(self.sweep)))

    def _tell(self) -> None:
        for number, state in states_in(self.sweep).items():
            text = f"{state['job']}: {state['state']}"
            if self.told.get(number) != text:
                self.told[number] = text
                self.console.print(f"job {number}  {text}", markup=False)


# Of the sweep that this process has started. Hydra sends its callbacks to the jobs, which a thread cannot be.
_watches: list[Watch] = []


def watch(sweep: Path) -> None:
    """Show the states of a sweep until `stop`."""
    _watches.append(Watch(sweep))


def stop() -> None:
    """Called when the command ends, also by an error."""
    while _watches:
        _watches.pop().stop()


def states_in(sweep: Path) -> dict[int, State]:
    """The states by the number of the job."""
    return {int(path.stem): json.loads(path.read_text()) for path in sorted(sweep.glob("*.json"))}


def table(states: dict[int, State]) -> Table:
    shown = Table("job", "settings", "state", "last epoch")
    for number, state in states.items():
        shown.add_row(str(number), state["job"], state["state"], last_epoch(state["folder"]))
    return shown


def last_epoch(folder: str) -> str:
    """What the run's metrics.jsonl says last; nothing if it has none yet."""
    try:
        line = json.loads(Path(folder, "metrics.jsonl").read_text().splitlines()[-1])
    except (OSError, ValueError, IndexError):
        return ""
    shown = {key: value for key, value in line.items() if key == "epoch" or key.startswith(("top1", "coco/bbox_mAP"))}
    return ", ".join(f"{key} {value}" for key, value in list(shown.items())[:2])
