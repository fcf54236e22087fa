"""Rows as text: on a terminal, in Markdown, LaTeX and CSV."""

from __future__ import annotations

import csv
from pathlib import Path
from statistics import mean

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kw.config import KW, STATIC
from scripts.report.published import CLASSIFICATION, HANDS, LABELS
from scripts.report.rows import DONE, NOT_RUN, UNFINISHED, Row, Section
from scripts.report.runs import Run

NONE = "-"
RUN_KEYS = ("name", "data", "backbone", "dynamic", "n", "seed", "params", "macs", "images_per_second", "epochs",
            "asked", "finished", "hours", "device")  # fmt: skip
SCORE_KEYS = ("top1", "top5", "box_ap", "mask_ap")


def head(section: Section) -> list[str]:
    names = ["run", "n", *(() if section.published else ("data",)), "state", "parameters", "multiply-adds"]
    for key in section.scores:
        names += [LABELS[key], *(("published", "difference") if section.published else ())]
    return [*names, "images/s", "epochs", "seeds", "device-hours", "memory"]


def left(section: Section) -> int:
    """The number of columns with words; columns with numbers follow."""
    return head(section).index("state") + 1


def cells(row: Row, section: Section) -> list[str]:
    """The row under `head`'s names."""
    data = () if section.published else (row.data,)
    made = [row.name, row.n if row.has_budget else "-", *data, state(row), count(row.params), count(row.macs)]
    for key in section.scores:
        made.append(spread(row.score(key)))
        if section.published:
            figure, difference = row.figure(key), row.difference(key)
            made += [number(figure), NONE if difference is None else f"{difference:+.2f}"]
    done, asked = row.epochs
    epochs = str(done) if done == asked else f"{done}/{asked}"
    return [*made, number(row.images_per_second, 0), epochs, str(row.seeds), hours(row), memory(row)]


def state(row: Row) -> str:
    """With a star for settings that differ from the published ones; the notes name them."""
    return f"{row.state}*" if row.departures else row.state


def hours(row: Row) -> str:
    """Device-hours that the runs took or, after ~, that one would take."""
    if row.hours is None:
        return "not measured" if row.state == NOT_RUN else NONE
    device = row.device or ""
    kind = "" if device in ("", NONE, "unknown") or " then " in device else "CPU" if device.startswith("cpu") else "GPU"
    return f"{'~' if row.state == NOT_RUN else ''}{_rounded(row.hours)} {kind}".rstrip()


def memory(row: Row) -> str:
    """What a step of a row that was not run took, after ~."""
    known = row.state == NOT_RUN and row.step is not None and row.step.memory_gb is not None
    return f"~{row.step.memory_gb:.1f} GB" if known and row.step else NONE


def _rounded(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def notes(section: Section) -> list[str]:
    """Remarks that do not fit into the columns."""
    made = [f"* {row.name}: settings that differ from the published ones: {'; '.join(row.departures)}"
            for row in section.rows if row.departures]  # fmt: skip
    for row in section.rows:
        averages = [run.ema for run in row.runs if run.ema is not None]
        if averages:
            label = LABELS[section.scores[0]]
            made.append(f"{row.name}: {label} of the average of the weights {mean(averages):.2f}")
    for row in section.rows:
        done, asked = row.epochs
        if row.state == UNFINISHED and row.hours and done < asked:
            made.append(f"{row.name}: about {_rounded(row.hours / done * (asked - done))} device-hours to go")
    made += _sources(section) + _best(section) + _sizes(section)
    made += [_gain(row, section) for row in section.rows if row.published and row.published.gain]
    waiting = [row for row in section.rows if row.state == NOT_RUN]
    devices = sorted({str(row.device) for row in waiting if row.hours is not None})
    if devices:
        made.append(
            f"Hours and memory of rows that were not run are estimates from a step timed on {', '.join(devices)}."
        )
    elif waiting:
        rows = "all" if section.task == CLASSIFICATION else "coco"
        made.append(
            f"To see what rows that were not run would take, time a step: python -m scripts.bench.step_time rows={rows}"
        )
    return made


def _sources(section: Section) -> list[str]:
    """Where published figures stand, and remarks on them."""
    table = section.table
    if table is None:
        return []
    others = [row for row in section.rows if row.published and row.published.hand != table.hand]
    made = [f"Published figures: {table.source} ({HANDS[table.hand]})."]
    made += [f"{row.name}: {HANDS[row.published.hand]}." for row in others if row.published]
    return [*made, *table.remarks]


def _best(section: Section) -> list[str]:
    """In a table of several methods, the best row of each budget and backbone; rows beside it take part."""
    if section.table is None or len({row.dynamic for row in section.rows} - {STATIC, KW}) == 0:
        return []
    key, made = section.scores[0], []
    for kind, score in (("measured", Row.score), ("published", Row.figure)):
        groups: dict[tuple[str, str], list[tuple[float, str]]] = {}
        for row in [*section.rows, *section.beside]:
            found = score(row, key)
            value = found[0] if isinstance(found, tuple) else found
            if value is not None and row.published and (kind == "published" or row.state == DONE):
                budget = f"at n = {row.n}" if row.has_budget else "without n"
                groups.setdefault((row.published.backbone, budget), []).append((value, row.name))
        best = [f"{name} ({value:.2f}) {n}" for (_, n), rows in groups.items() if len(rows) > 1
                for value, name in [max(rows)]]  # fmt: skip
        made += [f"Best by budget, {kind} {LABELS[key]}: {'; '.join(best)}."] if best else []
    return made


def _sizes(section: Section) -> list[str]:
    """Rows whose parameters differ from the published ones by over 1%."""
    made = []
    for row in section.rows:
        stated = row.published.stated if row.published and row.published.has_code else None
        if stated and row.params and abs(row.params / 1e6 - stated) > 0.01 * stated:
            made.append(f"{row.name}: {row.params / 1e6:.2f} M parameters here, {stated:.2f} M published "
                        f"(docs/methods.md).")  # fmt: skip
    return made


def _gain(row: Row, section: Section) -> str:
    """DeiT's result was published as a gain over the static row."""
    known = row.published
    assert known is not None and known.gain is not None
    base = next(
        other for other in section.rows if other.published and other.backbone == row.backbone and other.n == STATIC
    )
    ours, theirs = row.score("top1"), base.score("top1")
    measured = (
        f"{ours[0] - theirs[0]:+.2f} measured" if ours and theirs and row.state == base.state == DONE else "not run"
    )
    return f"{row.name}: published as {known.gain:+.2f} top-1 over {base.name}; {measured}."


def count(value: int | None) -> str:
    """`11689512` as `11.69 M`: four digits."""
    if value is None:
        return NONE
    for size, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= size:
            digits = 3 - len(str(int(value / size)))
            return f"{value / size:.{max(digits, 0) + 1}f}{unit}"
    return str(value)


def number(value: float | None, digits: int = 2) -> str:
    return NONE if value is None else f"{value:,.{digits}f}"


def spread(score: tuple[float, float | None] | None) -> str:
    if score is None:
        return NONE
    return f"{score[0]:.2f}" + (f" ± {score[1]:.2f}" if score[1] is not None else "")


def show(section: Section, console: Console) -> None:
    """Print the table. A narrow terminal omits the least important columns; the files have them."""
    lines = [head(section), *(cells(row, section) for row in section.rows)]
    shown = _fitting(lines, console.width)
    table = Table(title=section.title, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold", pad_edge=False)
    for place in shown:
        table.add_column(lines[0][place], justify="left" if place < left(section) else "right", overflow="fold")
    for row, line in zip(section.rows, lines[1:], strict=True):
        table.add_row(*(Text(line[place]) for place in shown), style="" if row.state == DONE else "dim")
    console.print(table)
    for note in notes(section):
        console.print(note, markup=False, soft_wrap=True)


def _fitting(lines: list[list[str]], width: int) -> list[int]:
    """Indices of the columns that fit side by side."""
    widths = [max(map(len, column)) + 3 for column in zip(*lines, strict=True)]
    shown = list(range(len(widths)))
    second = [at for at, name in enumerate(lines[0]) if name in ("published", "difference")][2:]
    dispensable = [*(lines[0].index(name) for name in ("multiply-adds", "seeds", "images/s")), *second]
    for place in dispensable:
        if sum(widths[at] for at in shown) > width:
            shown.remove(place)
    return shown


def markdown(made: list[Section]) -> str:
    parts = []
    for section in made:
        names = head(section)
        rule = ["---" if place < left(section) else "---:" for place in range(len(names))]
        body = [[_escape_markdown(cell) for cell in cells(row, section)] for row in section.rows]
        text = "".join(f"| {' | '.join(line)} |\n" for line in (names, rule, *body))
        notices = "".join(f"\n{_escape_markdown(note)}\n" for note in notes(section))
        parts.append(f"## {section.title}\n\n{text}{notices}")
    return "\n".join(parts)


def _escape_markdown(text: str) -> str:
    return " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$"}
LATEX |= {character: f"\\{character}" for character in "&%$#_{}"}


def latex(made: list[Section]) -> str:
    """A `tabular` of the package booktabs for each section."""
    parts = []
    for section in made:
        names = head(section)
        lines = [" & ".join(_escape_latex(cell) for cell in cells(row, section)) for row in section.rows]
        align = "l" * left(section) + "r" * (len(names) - left(section))
        top = f"% {section.title}\n\\begin{{tabular}}{{{align}}}\n\\toprule\n"
        body = "".join(f"{line} \\\\\n" for line in lines)
        parts.append(f"{top}{' & '.join(names)} \\\\\n\\midrule\n{body}\\bottomrule\n\\end{{tabular}}\n")
    return "% \\usepackage{booktabs}\n" + "\n".join(parts)


def _escape_latex(text: str) -> str:
    text = "".join(LATEX.get(character, character) for character in " ".join(text.split()))
    return f"${text}$" if text[:1] in "+-" and len(text) > 1 else text  # a minus, not a hyphen


def write_csv(made: list[Section], path: Path) -> None:
    """One line a row of a table, every number in full."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        scored = [f"{key}{what}" for key in SCORE_KEYS for what in ("", "_std", "_published", "_difference")]
        ends = ("images_per_second", "epochs", "asked", "seeds", "device_hours", "device", "state", "departures")
        writer.writerow(["table", "run", "data", "backbone", "dynamic", "n", "params", "macs", *scored, *ends])
        for section in made:
            for row in section.rows:
                words = [section.title, row.name, row.data, row.backbone, row.dynamic, row.n, row.params, row.macs]
                scores = [value for key in SCORE_KEYS for value in _score(row, section, key)]
                numbers = [row.images_per_second, *row.epochs, row.seeds, row.hours, row.device]
                writer.writerow([*words, *scores, *numbers, row.state, "; ".join(row.departures)])


def _score(row: Row, section: Section, key: str) -> tuple[float | None, ...]:
    if key not in section.scores:
        return None, None, None, None
    return *(row.score(key) or (None, None)), row.figure(key), row.difference(key)


def write_runs(runs: list[Run], path: Path) -> None:
    """One line a run, every number in full."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*RUN_KEYS, *SCORE_KEYS, "folder"])
        for run in runs:
            scores = [run.scores.get(key) for key in SCORE_KEYS]
            writer.writerow([*(getattr(run, key) for key in RUN_KEYS), *scores, run.folder])
