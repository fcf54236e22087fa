"""Timing a training step of a published row: a line that the report understands."""

import json

import pytest

from scripts.bench import step_time
from scripts.report.steps import read_steps


def test_a_row_is_timed_and_read_by_the_report(tmp_path, monkeypatch):
    out = tmp_path / "runs" / "steps.jsonl"
    small = ["--set", "data.image_size=32", "runtime.micro_batch=2", "runtime.device=cpu"]
    monkeypatch.setattr("sys.argv", ["step_time", "mobilenetv2_050_kw1x", "--repeats", "1", "--out", str(out), *small])
    step_time.main()
    line = json.loads(out.read_text())
    assert (line["row"], line["micro_batch"], line["precision"]) == ("mobilenetv2_050_kw1x", 2, "float32")
    (step,), remarks = read_steps(out)
    assert step.images_per_second == line["images_per_second"] > 0 and step.device.startswith("cpu") and not remarks


def test_an_unknown_row_is_refused_with_the_known_ones(monkeypatch):
    monkeypatch.setattr("sys.argv", ["step_time", "resnet19"])
    with pytest.raises(SystemExit, match=r"No such row: resnet19.*resnet18_kw1d4x"):
        step_time.main()
