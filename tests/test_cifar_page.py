"""docs/cifar10.md is made from run folders, complete or not."""

import csv
import json

import pytest
import yaml
from helpers.training import config

from scripts.cifar10.__main__ import main
from scripts.cifar10.cases import AUGMENTED, CASES, COLUMNS, ORDER, by_run, collect, in_order, merge
from scripts.cifar10.table import missing, text
from train.config import to_plain


def put(folder, command, epochs, top1=80.0, finished=True, **changes):
    """A run's folder: `epochs` epochs that end at `top1`."""
    made = to_plain(config(*command.split(), "data.root=elsewhere"))
    made |= changes
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(made))
    lines = [{"epoch": at, "step": 390 * (at + 1), "train_top1": 85.0, "top1": top1 - epochs + at + 1, "top5": 99.0,
              "images_per_second": 390.0} for at in range(epochs)]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if finished:
        summary = {"params": 1000, "macs": 2_000_000, "device": "cpu", "commit": "0123456789" * 4 + "+"}
        (folder / "summary.json").write_text(json.dumps(summary))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    order = "experiment=cifar10/order"
    for seed, top1 in enumerate((79.0, 80.0, 81.0)):
        put(root / f"static{seed}", f"{order} n=static seed={seed}", 16, top1, label="anything", name="else")
    put(root / "kw", f"{order} n=1 seed=1", 16, 83.0)
    put(root / "wide", "experiment=cifar10/order_wide1x seed=2", 16, 81.5)
    put(root / "stopped", f"{order} n=4 seed=0", 5, finished=False)
    put(root / "shorter copy", f"{order} n=1 seed=1", 3, 1.0, finished=False)
    put(root / "no summary", f"{order} n=4 seed=1", 16, 98.0, finished=False)
    put(root / "other", f"{order} n=1 seed=0 recipe.lr=0.1", 16, 99.0)
    put(root / "mixed", "experiment=cifar10/order_augmented n=1 seed=0", 24, 84.0)
    put(root / "broken", f"{order} n=1/2 seed=0", 1)
    (root / "broken/metrics.jsonl").write_text("{\n")
    return root


@pytest.fixture(scope="module")
def collected(runs):
    found, remarks = collect([runs])
    return in_order(found), remarks


def test_the_table_has_spread_differences_and_what_is_missing(runs, collected):
    lines, remarks = collected
    made = text(lines)
    assert "| static | 1,000 | 2.0 M | 85.0 | 80.00 ± 1.00 | 79.00, 80.00, 81.00 |  |  |" in made
    assert "| KernelWarehouse, n = 1 | 1,000 | 2.0 M | 85.0 | 83.00 | 83.00 (1 of 3) | +3.00 | +1.50 |" in made
    assert "| KernelWarehouse, n = 1 | 1,000 | 2.0 M | 85.0 | 84.00 | 84.00 (1 of 3) | - |  |" in made  # no static
    assert "KernelWarehouse, n = 4: seed 0 (5 of 16 epochs), seed 1 (16 of 16 epochs), seed 2;" in made
    assert "99.0" not in made and "98.0" not in made
    assert "Runs by device: cpu (6); by commit: 0123456+ (6)." in made
    assert [remark.partition(": ")[0] for remark in remarks] == [str(runs / "broken")]
    assert not any(lacking.startswith("static: ") for lacking in missing(lines))


def test_time_is_that_of_training(collected):
    lines, _ = collected
    (last,) = [line for line in lines if line["network"] == "KernelWarehouse, n = 4" and line["seed"] == 0][-1:]
    assert last["seconds"] == 5 * 128.0


def test_a_complete_table_says_so():
    lines = [
        {"protocol": case.protocol, "network": case.name, "seed": seed, "params": 1, "macs": 1, "device": "cpu",
         "commit": "0123456", "epoch": epoch, "train_top1": 1.0, "top1": 2.0, "top5": 3.0, "seconds": 4.0}
        for case in CASES for seed in (0, 1, 2) for epoch in (case.epochs - 1, case.epochs)
    ]  # fmt: skip
    assert missing(lines) == [] and "Nothing is missing." in text(lines)


def test_the_cases_are_the_issues():
    names = {(case.protocol, case.name) for case in CASES}
    assert len(names) == len(CASES) == 11 and {case.protocol for case in CASES} == {ORDER, AUGMENTED}
    for case in CASES:
        made = config(*case.command.split(), "data.root=x")
        assert made.recipe.epochs == case.epochs and made.data.train_images is None
    assert {case.large for case in CASES} - {None} <= {case.name for case in CASES}


def test_files_are_written_from_whatever_there_is(runs, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["cifar10", str(runs), "--out", str(tmp_path)])
    main()
    assert (tmp_path / "cifar10.csv").read_text().count("\n") == 1 + 4 * 16 + 16 + 5 + 16 + 24
    assert (tmp_path / "cifar10.png").stat().st_size > 10_000
    assert "missing: DY-Conv, n = 4: seed 0, seed 1, seed 2" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["cifar10", str(tmp_path / "nowhere")])
    with pytest.raises(SystemExit, match="No such folder"):
        main()


def test_finished_runs_outlive_their_folders(collected, tmp_path, capsys, monkeypatch):
    order = "experiment=cifar10/order"
    put(tmp_path / "again", f"{order} n=static seed=0", 16, 79.5)
    put(tmp_path / "begun", f"{order} n=static seed=1", 3, 10.0, finished=False)
    put(tmp_path / "more", f"{order} n=4 seed=2", 16, 82.0)
    table = tmp_path / "out/cifar10.csv"
    table.parent.mkdir()
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(collected[0])
    monkeypatch.setattr("sys.argv", ["cifar10", str(tmp_path), "--out", str(table.parent)])
    main()
    said = capsys.readouterr().out
    assert "static, seed 0: top-1 79.5 in its folder, which counts, and 79.0 before" in said
    assert "static, seed 1: kept from before" in said and "KernelWarehouse, n = 1, augmented, seed 0: kept" in said
    assert "KernelWarehouse, n = 4: seed 0, seed 1\n" in said  # not finished, and their folders gone
    with table.open() as file:
        ends = {(line["network"], line["seed"]): line["top1"] for line in csv.DictReader(file) if line["epoch"] == "16"}
    assert ends["static", "0"] == "79.5" and ends["static", "1"] == "80.0" and len(ends) == 7


def test_an_older_table_has_no_commits(collected):
    lines = [{key: str(value) for key, value in line.items() if key != "commit"} for line in collected[0]]
    made, _ = merge(by_run(lines), {})
    assert "by commit: unknown (6)." in text(in_order(made))
