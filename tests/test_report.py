"""The table of runs: what was measured beside what was published."""

from pathlib import Path

from scripts.report import HEAD, Row, Run, lines


def row(data, backbone, n):
    summary = {"name": "x", "backbone": backbone, "data": data, "n": n, "params": 1, "macs": 1, "top1": 70.0,
               "top5": 90.0, "images_per_second": 1.0, "epochs": 1, "seed": 0}  # fmt: skip
    return Row([Run(Path("x"), summary, [])])


def test_runs_on_imagenet_have_the_published_figure_beside_them():
    rows = [row("imagenet", "resnet18", "1/4"), row("imagenet", "convnext_tiny", "static")]
    rows += [row("digits", "resnet18", "1"), row("imagenet", "deit_tiny", "static"), row("imagenet", "resnet18", "3")]
    head, *cells = lines(rows)
    place = head.index("published")
    assert head[place - 1] == "top-1" and [line[place] for line in cells] == ["72.73", "82.07", "-", "-", "-"]
    assert lines([row("digits", "resnet18", "1/4")])[0] == HEAD
