"""Compares runs with the published rows: measured, published, difference, cost; as tables and a page with figures.

    python -m scripts.report runs/digits                 every run below a folder
    python -m scripts.report runs/a runs/b --out report
    python -m scripts.report runs --all                  prints the paper's tables even if none of their rows was run

Runs of one name on one data set that differ only in their seed make one row, with mean and standard deviation. Folders
without a finished run are named. The files have every row of the paper, also those that were not run, with what they
would cost if `scripts.bench.step_time` has timed a step. index.html is one file that opens offline; the camera button
of a figure saves it as SVG.
"""

from __future__ import annotations

import sys
from pathlib import Path

from rich.console import Console

from scripts.arguments import argument_parser
from scripts.options import make_folder, one_line_errors
from scripts.report.page import report_page
from scripts.report.rows import Section, sections
from scripts.report.runs import Run, find_runs
from scripts.report.steps import STEPS, read_steps
from scripts.report.tables import latex, markdown, show, write_csv, write_runs
from train.jobs.errors import writing


def main() -> None:
    parser = argument_parser("report", __doc__)
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
    with one_line_errors():
        names = write(made, runs, remarks, options.out)
    console.print(f"Written to {options.out}: {', '.join(names)}")


def write(made: list[Section], runs: list[Run], remarks: list[str], folder: Path) -> list[str]:
    """All files of the report; their names."""
    make_folder(folder)
    with writing(folder):
        (folder / "table.md").write_text(markdown(made), encoding="utf-8")
        (folder / "table.tex").write_text(latex(made), encoding="utf-8")
        (folder / "index.html").write_text(report_page(made, remarks), encoding="utf-8")
        write_csv(made, folder / "table.csv")
        write_runs(runs, folder / "runs.csv")
    return ["table.md", "table.tex", "table.csv", "runs.csv", "index.html"]


if __name__ == "__main__":
    main()
