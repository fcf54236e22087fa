from __future__ import annotations
import math
from kw.ways.task import Task


def applies(way, x_shape, task):
    if way == "grouped":
        return True
    if x_shape[0] == 0:
        return False
    return way == "samples" or task.groups == 1


def choose(x, cells, task):
    if not applies("samples", x, task):
        return "grouped"
    if task.groups > 1:
        return "grouped" if task.groups == x[1] else "samples"
    if task.grid[0] == 1:
        return "blocks"
    return "samples"
