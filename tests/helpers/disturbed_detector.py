"""`python -m helpers.disturbed_detector CODE OVERRIDES...`: `python -m detection OVERRIDES`, but in each process that
trains, the file CODE is run first. It finds MMEngine's `runner` there, and adds hooks to it by `at`, `in_loss` ...

How the process ends is printed in a line.
"""

import math
import os
import signal
import sys
import time
from pathlib import Path

import torch
from mmengine.hooks import Hook

import detection.__main__ as entry
from detection import run
from detection.config import open_up

build = run.build


class At(Hook):
    """Calls `do()` after the training step with a number, counted from 1, and its checkpoint if it has one."""

    priority = "LOWEST"

    def __init__(self, step, do):
        self.step, self.do = step, do

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if runner.iter + 1 == self.step:
            self.do()


def disturbed(config, cfg, folder):
    runner = build(config, cfg, folder)
    late = []

    def at(step, do):
        late.append(At(step, do))

    def in_loss(step, change):
        """Has the losses of the step that follows `step` steps replaced by `change(losses)`."""
        head = runner.model.module.rpn_head if hasattr(runner.model, "module") else runner.model.rpn_head
        losses = head.loss_by_feat
        head.loss_by_feat = lambda *of, **more: (
            change(losses(*of, **more)) if runner.iter == step else losses(*of, **more)
        )

    def until_signalled(mark):
        """Leave the file `mark`, and wait for a signal that asks this process to stop."""
        Path(mark).touch()
        (stop,) = (hook.stop for hook in runner.hooks if hasattr(hook, "stop"))
        while not any(stop.came()):
            time.sleep(0.01)

    tools = {"at": at, "in_loss": in_loss, "until_signalled": until_signalled, "Hook": Hook}
    modules = {"math": math, "os": os, "signal": signal, "torch": torch}
    exec(Path(CODE).read_text(), {**tools, **modules, "runner": runner, "folder": folder})

    class Register(Hook):
        """Registers those of `at` when all of the program's are there, to come after them."""

        def before_run(self, runner):
            for hook in late:
                runner.register_hook(hook)

    runner.register_hook(Register())
    return runner


if __name__ == "__main__":
    CODE = sys.argv.pop(1)
    run.build = disturbed
    sys.argv[1:] = open_up(sys.argv[1:])
    entry.jobs.run(entry.main)
