"""A table as plain text, for the reports of `kw.profile` and `kw.freeze`."""

from __future__ import annotations

from collections.abc import Sequence


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Columns aligned; those of numbers to the right, with thousands separated."""
    numbers = [all(isinstance(row[k], int) or row[k] == "-" for row in rows) for k in range(len(head))]
    lines = [head, *([f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in row] for row in rows)]
    widths = [max(len(line[k]) for line in lines) for k in range(len(head))]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "  ".join(
            c.rjust(w) if right else c.ljust(w) for c, w, right in zip(line, widths, numbers, strict=True)
        ).rstrip()
        for line in lines
    )
