"""Configurations of `python -m detection`; and it itself, in this process or in forks of it, with a run that may be
disturbed on purpose.

A start of the program of its own takes ten seconds, nearly all of them to import MMDetection.
"""

from __future__ import annotations

import copy
import functools
import math
import multiprocessing
import os
import signal
import socket
import sys
from pathlib import Path
from unittest import mock

import torch
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from mmengine.config import Config
from mmengine.hooks import Hook

import detection.__main__ as entry
from detection import run
from detection.compose import compose
from detection.config import added_keys, open_up, validate
from helpers.programs import ROOT
from train.jobs.command import Jobs

SECONDS = 240  # after which a process counts as hung
build = run.build
_from_file = functools.cache(Config.fromfile)


def speed_up(monkeypatch) -> None:
    """MMEngine looks through an index of 300 files for those of MMDetection: each configuration is read once. And it
    formats one by yapf, several times in a run and for 1.5 s each time: they are left as they are."""
    monkeypatch.setattr(Config, "fromfile", lambda *of, **more: copy.deepcopy(_from_file(*of, **more)))
    monkeypatch.setattr("yapf.yapflib.yapf_api.FormatCode", lambda text, **_: (text, True))


def validated(*overrides):
    """The program's settings, checked, and all that Hydra composed."""
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        composed = hydra_compose("detection", open_up(overrides))
    return validate(composed), composed


def config(*overrides):
    """The program's settings, and MMDetection's configuration."""
    ours, composed = validated(*overrides)
    return ours, compose(ours, composed, added_keys(open_up(overrides)))


def detect(*words: str, code: str = "") -> None:
    """`python -m detection WORDS`, but `code` is run first with the run's `runner`. It may add to it by

    `at(step, do)`: `do()` after the step of this number, from 1, and after its checkpoint if it has one;
    `in_evaluation(do)`: `do()` before each batch of an evaluation;
    `in_loss(step, change)`: the losses of one of its heads, after `step` steps, are replaced by `change(losses)`.
    """
    with (
        mock.patch.object(run, "build", functools.partial(disturbed, code)),
        mock.patch.object(entry, "jobs", Jobs()),
        mock.patch.object(sys, "argv", ["detection", *open_up(words)]),
    ):
        entry.jobs.run(entry.main, "detection")


def disturbed(code: str, config, cfg, folder):
    """The program's runner, to which `code` adds."""
    runner = build(config, cfg, folder)
    hook = Disturbance()

    def in_loss(step, change):
        head = runner.model.module.rpn_head if hasattr(runner.model, "module") else runner.model.rpn_head
        losses = head.loss_by_feat

        def changed(*of, **more):
            found = losses(*of, **more)
            return change(found) if runner.iter == step else found

        head.loss_by_feat = changed

    tools = {"at": hook.at, "in_evaluation": hook.evaluating.append, "in_loss": in_loss}
    exec(code, {**tools, "math": math, "os": os, "signal": signal, "torch": torch, "runner": runner})

    class Last(Hook):
        """Registers the disturbance when the hooks of the program are there, to come after them."""

        def before_run(self, runner):
            runner.register_hook(hook)

    runner.register_hook(Last())
    return runner


class Disturbance(Hook):
    priority = "LOWEST"

    def __init__(self):
        self.steps, self.evaluating = {}, []

    def at(self, step, do):
        self.steps[step] = do

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.steps.get(runner.iter + 1, lambda: None)()

    def before_val_iter(self, runner, batch_idx, data_batch=None):
        for do in self.evaluating:
            do()


def fork(folder: Path, *words: str, code: str = "", ranks: int = 1) -> list[tuple[int, str]]:
    """Exit status and output of `ranks` forks of this process that call `detect`, as torchrun starts them if there are
    several."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        world = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "localhost",
                 "MASTER_PORT": free.getsockname()[1]}  # fmt: skip
    processes, outputs = [], [folder / f"out{rank}.txt" for rank in range(ranks)]
    for rank, output in enumerate(outputs):
        output.unlink(missing_ok=True)
        more = {**world, "RANK": rank, "LOCAL_RANK": rank} if ranks > 1 else {}
        process = multiprocessing.get_context("fork").Process(target=_in_fork, args=(output, words, code, more))
        process.start()
        processes.append(process)
    for process in processes:
        process.join(SECONDS)
        if process.exitcode is None:
            process.kill()
    return [(process.exitcode, output.read_text()) for process, output in zip(processes, outputs, strict=True)]


def _in_fork(output: Path, words: tuple[str, ...], code: str, more: dict[str, object]) -> None:
    os.environ.update({key: str(value) for key, value in more.items()})
    sys.stdout = sys.stderr = output.open("w", buffering=1)
    detect(*words, code=code)
