"""Makes docs/cifar10.md's table and figure from run folders, complete or not.

    python -m scripts.cifar10 runs/cifar10                    also prints what is missing
    python -m scripts.cifar10 runs/cifar10 MORE --out docs    several folders; where the files go

A folder is recognized by what it learnt (config.yaml), not by its name. cifar10.csv has a line for each epoch of each
run, cifar10.png the curves; python -m scripts.docs writes the table of docs/cifar10.md from docs/cifar10.csv, and runs
at the end. `make cifar10` trains what is missing first.

A finished run that cifar10.csv has already stays there, unless a folder has the same run to its end: so folders may be
deleted, or be on another machine. To forget a run, as after a change of its experiment, delete its lines.
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

from scripts import docs
from scripts.arguments import argument_parser
from scripts.cifar10.cases import COLUMNS, by_run, collect, in_order, merge
from scripts.cifar10.figure import draw
from scripts.cifar10.table import missing
from scripts.options import make_folder, one_line_errors
from train.jobs.errors import writing


def main() -> None:
    parser = argument_parser("cifar10", __doc__)
    parser.add_argument("folders", nargs="*", type=Path, help="run folders, or folders above them")
    parser.add_argument("--out", type=Path, default=docs.ROOT / "docs", help="where the files go (default: docs)")
    options = parser.parse_args()
    absent = [str(folder) for folder in options.folders if not folder.is_dir()]
    if absent:
        sys.exit(f"No such folder: {', '.join(absent)}")
    path = options.out / "cifar10.csv"
    runs, remarks = collect(options.folders)
    try:
        earlier = by_run(_rows(path))
    except (KeyError, ValueError, TypeError, csv.Error) as error:
        sys.exit(f"{path} is damaged ({error!r}): take it from git again, or delete it to start anew.")
    runs, kept = merge(earlier, runs)
    lines = in_order(runs)
    for remark in remarks + kept:
        print(remark)
    if not lines:
        sys.exit(
            f"No run of docs/cifar10.md in {', '.join(map(str, [path, *options.folders]))}: make cifar10 trains them."
        )
    with one_line_errors():
        make_folder(options.out)
    with one_line_errors(), writing(path), path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
    draw(lines, options.out / "cifar10.png")
    for lacking in missing(lines):
        print(f"missing: {lacking}")
    if options.out == docs.ROOT / "docs":
        docs.main([])


def _rows(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


if __name__ == "__main__":
    main()
