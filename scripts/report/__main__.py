"""Run folders beside the published rows: measured, published, difference, cost; as text, tables, a picture and a page.

    python -m scripts.report runs/digits                 every run below a folder
    python -m scripts.report runs/a runs/b --out report
    python -m scripts.report runs --all                  also rows of the paper that were not run, on the terminal

Runs of one name on one data set that differ in their seed make one row. Folders that hold no finished run are named.
The files have every row of the paper; with the cost of those not run, once `scripts.bench.step_time` has timed a step.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console

from scripts.report.page import report_page
from scripts.report.picture import draw
from scripts.report.rows import Section, sections
from scripts.report.runs import Run, find_runs
from scripts.report.steps import read_steps
from scripts.report.tables import latex, markdown, show, write_csv, write_runs

STEPS = Path("runs/steps.jsonl")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="+", type=Path, help="run folders, or folders above them")
    parser.add_argument("--out", type=Path, default=Path("report"), help="where the files go (default: report)")
    parser.add_argument("--steps", type=Path, help=f"steps that scripts.bench.step_time has timed (default: {STEPS})")
    parser.add_argument("--all", action="store_true", help="show the paper's tables even if none of their rows was run")
    options = parser.parse_args()
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 240)
    missing = [str(folder) for folder in options.folders if not folder.is_dir()]
    if missing:
        sys.exit(f"No such folder: {', '.join(missing)}")
    if options.steps and not options.steps.is_file():
        sys.exit(f"No such file: {options.steps}. python -m scripts.bench.step_time writes it.")
    path = options.steps or STEPS
    steps, broken = read_steps(path) if path.is_file() else ([], [])
    runs, remarks = find_runs(options.folders)
    made, repeated = sections(runs, steps)
    remarks = [*broken, *remarks, *repeated]
    for remark in remarks:
        console.print(remark, markup=False, soft_wrap=True)
    if not any(run.finished for run in runs) and not options.all:
        sys.exit(f"No finished run below {', '.join(map(str, options.folders))}: a run ends with a summary.json.")
    for section in made:
        if options.all or not section.empty:
            show(section, console)
    names = write(made, runs, remarks, options.out)
    console.print(f"Written to {options.out}: {', '.join(names)}")


def write(made: list[Section], runs: list[Run], remarks: list[str], folder: Path) -> list[str]:
    """All files of the report; their names."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "table.md").write_text(markdown(made), encoding="utf-8")
    (folder / "table.tex").write_text(latex(made), encoding="utf-8")
    (folder / "index.html").write_text(report_page(made, remarks), encoding="utf-8")
    write_csv(made, folder / "table.csv")
    write_runs(runs, folder / "runs.csv")
    names = ["table.md", "table.tex", "table.csv", "runs.csv", "index.html"]
    if runs:
        draw(made, folder / "picture.png")
        names.append("picture.png")
    return names


if __name__ == "__main__":
    main()
