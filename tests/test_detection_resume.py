"""A detector survives as a classifier does: kills, signals, losses that are not finite, broken images."""

import io
import json
import signal

import numpy as np
import pytest
import torch
from helpers.disturbed_detector import detect, fork, read_once
from mmengine.dataset import DefaultSampler
from mmengine.dataset import sampler as mmengine_sampler
from mmengine.runner import CheckpointLoader
from PIL import Image
from torch.utils.data import DataLoader

from detection import loading
from detection.guard import Guard
from detection.plugin.errors import BrokenImage, UnreadableImage
from detection.plugin.exact import NumberedBatches, SeededDataset
from detection.plugin.images import LoadWholeImage
from detection.prepare import every_image_once
from scripts.data.digits_coco import SPLITS, make_split
from scripts.kill_storm import SMALL_DETECTOR, differences, outcome_of_detector
from train.data.digits import Digits
from train.jobs import signals
from train.jobs.errors import NonFiniteError
from train.jobs.signals import StopRequest
from train.jobs.world import World

ALONE = World(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """Eight canvases to train, four steps of two; and three to evaluate on."""
    folder = tmp_path_factory.mktemp("digits")
    for split, count in zip(SPLITS, (8, 3), strict=True):
        make_split(folder, split, Digits("train"), count, 64, np.random.default_rng(0))
    return folder


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
    """The program registers its own loader of checkpoints."""
    monkeypatch.setattr(CheckpointLoader, "_schemes", CheckpointLoader._schemes)
    read_once(monkeypatch)


def words(digits, folder, *more):
    """Two epochs of four steps: checkpoints after steps 3, 4, 6, 8 and both evaluations."""
    return (*SMALL_DETECTOR, "train_cfg.max_epochs=2", f"data.root={digits}", f"hydra.run.dir={folder}", *more)


def step_of(folder):
    return loading.load(str(folder / "checkpoints" / "last.pt"))["meta"]["iter"]


@pytest.fixture(scope="module")
def calm(digits, tmp_path_factory):
    """What comes of an undisturbed run."""
    folder = tmp_path_factory.mktemp("calm")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CheckpointLoader, "_schemes", CheckpointLoader._schemes)
        read_once(patch)
        detect(*words(digits, folder))
    return outcome_of_detector(folder)


def test_a_run_that_is_killed_within_an_epoch_resumes_to_the_same_end(digits, calm, tmp_path, capsys):
    ((status, _),) = fork(
        tmp_path, *words(digits, tmp_path / "run"), code="at(7, lambda: os.kill(os.getpid(), signal.SIGKILL))"
    )
    assert status == -signal.SIGKILL and step_of(tmp_path / "run") == 6
    detect(*words(digits, tmp_path / "run"))
    assert "Resumed" in capsys.readouterr().out
    assert differences(calm, outcome_of_detector(tmp_path / "run")) == []
    assert len(calm["metrics"]) == 2 and calm["meta"]["iter"] == 8
