"""Write the tables of README.md and docs/ from their sources, or check that they are up to date.

    python -m scripts.docs            writes every table
    python -m scripts.docs --check    changes nothing; fails if a table is stale (tests/test_docs.py runs this)

A table is between `<!-- begin: NAME -->` and `<!-- end: NAME -->`, and `TABLES` has NAME's function. Published
figures come from scripts.report.published, measured ones from the CSV files in docs/.
"""

from __future__ import annotations

import argparse
import csv
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from kw.baselines import BASELINES
from scripts.cifar10 import table as cifar10_table
from scripts.report.published import CLASSIFICATION, COCO, DETECTION, HANDS, IMAGENET, Published, published

ROOT = Path(__file__).resolve().parents[1]
PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
BLOCK = re.compile(r"(<!-- begin: ([\w-]+) -->\n).*?(<!-- end: \2 -->)", re.DOTALL)
BACKBONES = {
    "resnet18": "ResNet18",
    "resnet50": "ResNet50",
    "convnext_tiny": "ConvNeXt-Tiny",
    "mobilenetv2_100": "MobileNetV2",
    "small": "small images (32 pixels)",
}
MEASURED = {"train": "training step", "eval": "evaluation", "one": "batch of one", "memory": "memory of a step"}

Row = list[str]


def rows_of(table: str) -> list[Published]:
    return [row for row in published() if row.table.title == table]


def csv_rows(name: str) -> list[dict[str, str]]:
    with (ROOT / "docs" / name).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def claim() -> str:
    """ResNet18 on ImageNet, in four rows."""
    rows = {row.n: row for row in rows_of(IMAGENET) if row.backbone == "resnet18"}
    static = rows["static"]
    lines = []
    for n in ("static", "1/4", "1", "4"):
        row, over = rows[n], _top1(rows[n]) - _top1(static)
        lines.append([n, _millions(row.params), f"{_top1(row):.2f}", "" if row is static else f"{over:+.2f}"])
    return table(["budget n", "parameters", "published top-1", "over static"], "l", lines)


def imagenet() -> str:
    """All rows of the paper, with the experiment that trains each."""
    lines = []
    for row in rows_of(IMAGENET):
        top1 = f"{row.gain:+.2f}" if row.gain is not None else _score(row, "top1")
        lines.append([f"`{row.id}`", row.n, _millions(row.params), top1, _score(row, "top5")])
    return table(["ID", "n", "parameters", "top-1", "top-5"], "ll", lines)


def others() -> str:
    """The rows of other tables, with the experiment that trains each."""
    lines = []
    for row in published():
        if row.table.title not in (IMAGENET, COCO) and row.task == CLASSIFICATION:
            source = f"{row.table.source.partition(';')[0].partition(', which')[0]} ({HANDS[row.hand]})"
            command = (
                f"`{row.overrides[0].removeprefix('experiment=')}`" if row.has_code else f"{row.id}: published only"
            )
            lines.append([command, source, _millions(row.params), _score(row, "top1"), _score(row, "top5")])
    return table(["`experiment=`", "source", "parameters", "top-1", "top-5"], "ll", lines)


def coco() -> str:
    rows = [row for row in published() if row.task == DETECTION]
    lines = [
        [
            f"`{row.name}`" if row.has_code else f"{row.name}: published only",
            row.n if row.dynamic not in BASELINES or BASELINES[row.dynamic].budget else "-",
            HANDS[row.hand],
            _score(row, "box_ap"),
            _score(row, "mask_ap"),
        ]
        for row in rows
    ]
    return table(["`config=`", "n", "figures", "box AP", "mask AP"], "lll", lines)


def cifar10() -> str:
    """Runs of docs/cifar10.csv, with what is missing."""
    return cifar10_table.text(csv_rows("cifar10.csv"))


def speed() -> str:
    """Times and memory of docs/benchmark.csv, over those of the static backbone."""
    cases: dict[tuple[str, str], dict[str, dict[str, dict[str, str]]]] = {}
    for row in csv_rows("benchmark.csv"):
        case = cases.setdefault((row["backbone"], row["n"]), {})
        case.setdefault(row["measured"], {})[row["choice"]] = row
    lines = []
    for (backbone, n), measured in cases.items():
        batch = measured["train"]["static"]["batch"]
        lines.append([f"{BACKBONES[backbone]}, n = {n}", batch, *(_ratios(measured[what]) for what in MEASURED)])
    return table(["", "batch", *MEASURED.values()], "l", lines)


def _ratios(choices: dict[str, dict[str, str]]) -> str:
    """Plain, then chosen; in parentheses, the chosen implementations' excess over static in percent of the plain
    one's, where the plain one has an excess worth speaking of."""
    plain, chosen = (float(choices[choice]["over_static"]) for choice in ("grouped", "auto"))
    excess = f"{100 * (chosen - 1) / (plain - 1):.0f}%" if plain > 1.1 else "-"
    return f"{_times(plain)} → {_times(chosen)} ({excess})"


def _times(ratio: float) -> str:
    return f"{ratio:.{1 if ratio >= 10 else 2}f}"


TABLES: dict[str, Callable[[], str]] = {
    "claim": claim,
    "imagenet": imagenet,
    "others": others,
    "coco": coco,
    "cifar10": cifar10,
    "speed": speed,
}


def table(head: Row, left: str, lines: Iterable[Row]) -> str:
    """A Markdown table; its first `len(left)` columns are aligned left, the others right."""
    rule = ["---"] * len(left) + ["---:"] * (len(head) - len(left))
    return "".join(f"| {' | '.join(line)} |\n" for line in (head, rule, *lines))


def _top1(row: Published) -> float:
    score = row.scores["top1"]
    assert score is not None
    return score


def _score(row: Published, key: str) -> str:
    score = row.scores[key]
    return "-" if score is None else f"{score:.{1 if row.task != CLASSIFICATION else 2}f}"


def _millions(count: int | None) -> str:
    return "-" if count is None else f"{count / 1e6:.2f} M"


def filled(text: str, source: str) -> str:
    """A page with its tables written anew.

    Raises:
        ValueError: a table has a name that nothing makes; `source` says where.
    """

    def fill(block: re.Match[str]) -> str:
        if block[2] not in TABLES:
            raise ValueError(f"{source}: no table is called {block[2]!r}; there are {', '.join(TABLES)}.")
        return f"{block[1]}{TABLES[block[2]]()}{block[3]}"

    return BLOCK.sub(fill, text)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.docs", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="change nothing, and fail if a table is stale")
    check = parser.parse_args(arguments).check
    stale = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        new = filled(text, page.name)
        if new != text:
            stale.append(page.relative_to(ROOT))
            if not check:
                page.write_text(new, encoding="utf-8")
    for path in stale:
        print(f"{path}: {'stale; run python -m scripts.docs' if check else 'written'}")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
