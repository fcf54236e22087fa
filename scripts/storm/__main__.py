"""Faults on purpose: what a cluster does to runs, once each. Prints a table: tried, survived, wrong.

    python -m scripts.storm                        all of it; about half an hour on two cores
    python -m scripts.storm --only settings --count 100
    python -m scripts.storm --seed 1               other random faults

A trial is survived if the program ends with an error that is no traceback, or runs; and, where a run goes on after the
fault, if weights, optimizer, average and metrics are those of an undisturbed run to the bit. Detectors are killed by
`python -m scripts.kill_storm --program detection`.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.table import Table

from scripts.arguments import argument_parser
from scripts.kill_storm import SMALL
from scripts.storm import disk, files, kills, settings
from scripts.storm.trials import Row, run

SHOWN = 20  # of what was wrong with one fault


def main(arguments: list[str] | None = None) -> None:
    parser = argument_parser("storm", __doc__)
    names = ["settings", "checkpoints", "images", "disk", "read_only", "clock", "folder", "kills"]
    parser.add_argument(
        "--only", nargs="+", choices=names, default=names, metavar="FAULT", help=f"of {', '.join(names)}"
    )
    parser.add_argument("--count", type=int, default=500, help="random settings (default: 500)")
    parser.add_argument("--images", type=int, default=2000, help="corrupted images (default: 2000)")
    parser.add_argument("--kills", type=int, default=3, help="of each kind of process (default: 3)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    console = Console(highlight=False, soft_wrap=True)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        calm = {devices: place / f"calm{devices}" for devices in (1, 2)}
        if {"disk", "clock", "folder", "kills"} & set(options.only):
            for devices, where in calm.items():
                ended = run([*SMALL, f"runtime.devices={devices}", f"hydra.run.dir={where}"])
                if ended.status:
                    sys.exit(f"The undisturbed run failed: {ended.last_line}")
        parts: dict[str, Callable[[], Row]] = {
            "settings": lambda: settings.misconfigure(options.count, place, options.seed),
            "checkpoints": lambda: files.damage_checkpoints(place / "files", options.seed),
            "images": lambda: files.corrupt_images(options.images, place / "images", options.seed),
            "disk": lambda: disk.full_disks(place / "disks", calm[1]),
            "read_only": lambda: disk.read_only(place / "read_only"),
            "clock": lambda: disk.clock_back(place, calm[1]),
            "folder": lambda: kills.many_on_one_folder(8, place, calm[1]),
            "kills": lambda: kills.kills(options.kills, place / "kills", calm, options.seed),
        }
        for name in options.only:
            began = time.monotonic()
            rows.append(parts[name]())
            console.print(f"{rows[-1].fault}: {time.monotonic() - began:.0f} s")
    show(rows, console)
    sys.exit(any(row.wrong for row in rows))


def show(rows: list[Row], console: Console) -> None:
    table = Table("fault", "tried", "survived", "wrong")
    for row in rows:
        table.add_row(row.fault, str(row.tried), str(row.survived), row.left_out or str(len(row.wrong)))
    console.print(table)
    for row in rows:
        for line in row.wrong[:SHOWN]:
            console.print(f"{row.fault}: {line}", markup=False)
        if len(row.wrong) > SHOWN:
            console.print(f"{row.fault}: {len(row.wrong) - SHOWN} more")


if __name__ == "__main__":
    main()
