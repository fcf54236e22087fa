"""What both programs print in a log: the first step at once, then a line a minute at least."""

import io
from types import SimpleNamespace

import pytest
from helpers.training import ALONE, NARROW, TINY, config

from train.jobs.display import Display, duration, per_second, progress
from train.trainer import Trainer


def printed(folder, seconds, monkeypatch, capsys, *overrides):
    """The lines of a run of two epochs of five steps, with a line in so many seconds."""
    monkeypatch.setattr(Display, "LINE_SECONDS", seconds)
    settings = (*TINY, *NARROW, "n=static", "recipe.epochs=2", "recipe.temperature_epochs=0", *overrides)
    Trainer(config(*settings), folder, ALONE).fit()
    return capsys.readouterr().out.splitlines()


def test_the_first_step_is_shown_at_once_and_others_by_the_clock(tmp_path, monkeypatch, capsys):
    first, *epochs = printed(tmp_path / "rare", 1e9, monkeypatch, capsys)
    assert first.startswith("epoch 1/2  loss ") and "  step 1/10  " in first
    for part in ("  loss ", "  acc ", "  lr ", " images/s  ", " left"):
        assert part in first
    assert [line[:9] for line in epochs] == ["epoch   1", "epoch   2"]


def test_each_step_and_evaluation_is_shown_that_the_clock_asks_for(tmp_path, monkeypatch, capsys):
    lines = printed(tmp_path / "each", 0, monkeypatch, capsys, "runtime.micro_batch=64")
    steps = [line for line in lines if "  step " in line]
    assert [line.partition("  step ")[2].partition("/")[0] for line in steps] == [str(n) for n in range(1, 11)]
    assert lines.count("evaluating: 5/6 batches") == 2  # 359 images


def test_a_warning_before_the_first_step_does_not_delay_it(tmp_path, monkeypatch, capsys):
    lines = printed(tmp_path / "warned", 1e9, monkeypatch, capsys, "recipe.temperature_epochs=5", "n=1")
    assert lines[0].startswith("Warning: ") and "  step 1/10  " in lines[1]


def test_other_ranks_show_nothing_and_fetch_nothing():
    display = Display(False, 10)
    display.start(0)
    assert not display.wants()


def test_a_detector_s_lines_have_the_same_parts(monkeypatch):
    pytest.importorskip("mmdet")
    from detection.display import DisplayHook

    out = io.StringIO()
    monkeypatch.setattr(Display, "LINE_SECONDS", 1e9)
    hook = DisplayHook(Display(True, out=out))
    scalar = SimpleNamespace(mean=lambda window_size: 2.5, current=lambda: 0.02)
    hub = SimpleNamespace(get_scalar={"train/loss": scalar, "train/lr": scalar}.__getitem__)
    runner = SimpleNamespace(iter=0, epoch=0, max_iters=4, max_epochs=2, world_size=2, message_hub=hub)
    runner.val_dataloader = [None] * 7
    hook.before_train(runner)
    hook.before_train_epoch(runner)
    for runner.iter in range(4):
        hook.after_train_iter(runner, runner.iter, {"inputs": [None] * 8})
    (line,) = out.getvalue().splitlines()
    assert line.startswith("epoch 1/2  loss 2.500  lr 0.02  ") and " images/s  step 1/4  " in line
    assert line.endswith(" left")
    monkeypatch.setattr(Display, "LINE_SECONDS", 0)
    hook.after_val_iter(runner, 2)
    assert out.getvalue().splitlines()[-1] == "evaluating: 3/7 batches"


@pytest.mark.parametrize("speed, text", [(12345.6, "12,346"), (12.3, "12"), (9.87, "9.9"), (0.123, "0.12")])
def test_speeds_have_two_digits_at_least(speed, text):
    assert per_second(speed) == text


def test_a_line_of_progress():
    assert progress(3, 100, 2.3456, 0.1, 1234.5, "  acc 45.1%") == (
        "epoch 3/100  loss 2.346  acc 45.1%  lr 0.1  1,234 images/s"
    )
    assert duration(3723.4) == "1:02:03"
