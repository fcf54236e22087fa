"""Timing a training step of a published row: a line that the report understands."""

import json
from functools import partial

import pytest

from scripts.bench import step_time, trainer
from scripts.bench.timing import rounded
from scripts.report.steps import read_steps

SMALL = ["data.image_size=32", "runtime.device=cpu"]


def test_a_row_is_timed_and_read_by_the_report(tmp_path):
    out = tmp_path / "runs" / "steps.jsonl"
    step_time.main(["rows=mobilenetv2_050_kw1x", "repeats=1", f"out={out}", *SMALL, "runtime.micro_batch=2"])
    line = json.loads(out.read_text())
    assert (line["row"], line["micro_batch"], line["precision"]) == ("mobilenetv2_050_kw1x", 2, "float32")
    (step,), remarks = read_steps(out)
    assert 0.05 < step.memory_gb == line["memory_gb"] < 100
    assert step.images_per_second == line["images_per_second"] > 0 and step.device.startswith("cpu") and not remarks


@pytest.mark.slow
def test_a_detectors_step_is_timed_too(tmp_path, monkeypatch):
    pytest.importorskip("mmdet")
    from scripts.bench import detector_step

    monkeypatch.setattr(detector_step, "measure", partial(detector_step.measure, size=(64, 64)))
    out = tmp_path / "steps.jsonl"
    step_time.main(["rows=mask_rcnn_mobilenetv2_100", "repeats=1", f"out={out}", "runtime.device=cpu"])
    (step,), remarks = read_steps(out)
    assert step.row == "mask_rcnn_mobilenetv2_100" and step.images_per_second > 0 and step.memory_gb > 0.1
    assert step.device.startswith("cpu, ") and not remarks


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "rows=: must name rows. .*resnet18_kw1d4x"),
        (["rows=resnet19"], "there is no resnet19. .*resnet18_kw1d4x"),
        (["rows=resnet18", "repeat=3"], "repeat"),
        (["rows=resnet18", "--repeats"], "--repeats.* is not KEY=VALUE"),
    ],
)
def test_what_is_not_known_is_named_in_one_line(words, said):
    with pytest.raises(SystemExit, match=said) as exit:
        step_time.main(words)
    assert "\n" not in str(exit.value)


def test_help_has_the_keys_and_their_defaults(capsys):
    with pytest.raises(SystemExit) as exit:
        step_time.main(["--help"])
    assert not exit.value.code and step_time.__doc__ in (text := capsys.readouterr().out) and "repeats=3" in text


def test_the_trainers_step_is_compared_with_a_bare_one(capsys):
    trainer.main(
        ["backbone=resnet_digits", "data.image_size=16", "recipe.batch_size=4", "steps=2", "runtime.device=cpu"]
    )
    assert "n=static, 16 pixels, batch 4" in (text := capsys.readouterr().out) and "ms a step: " in text


def test_a_slow_step_is_not_rounded_to_zero():
    assert [rounded(value) for value in (0.000123456, 0.0139, 24472.18)] == [0.0001235, 0.0139, 24470.0]
