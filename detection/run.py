"""One process of a job: MMEngine's runner, set up to train (or resume) or to evaluate in a run folder."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mmdet
import mmengine
import numpy as np
import torch.distributed as dist
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.device import utils as mmengine_device
from mmengine.hooks import Hook
from mmengine.registry import init_default_scope
from mmengine.runner import Runner, find_latest_checkpoint, set_random_seed

from detection import loading, torchvision_ops
from detection.compose import learnt_settings
from detection.config import DetectionConfig
from detection.data import check_data
from detection.display import DisplayHook, line
from detection.errors import as_job_errors
from detection.services import watch
from kw.config import KW, STATIC
from train.jobs.display import Display
from train.jobs.errors import CheckpointError, ConfigError, warn
from train.jobs.folder import lock, write_atomically
from train.jobs.launch import launch
from train.jobs.provenance import provenance
from train.jobs.world import World, connect, disconnect

SETTINGS = "settings.json"  # in a run folder: `learnt_settings`
RESULTS = {"coco/bbox_mAP": "box_ap", "coco/bbox_mAP_50": "box_ap50", "coco/segm_mAP": "mask_ap",
           "coco/segm_mAP_50": "mask_ap50"}  # fmt: skip

AT_RANDOM = (
    "no init=CHECKPOINT, so the backbone begins at random, but is set to be fine-tuned: frozen_stages and norm_eval "
    "are as in the file, and the temperature is 0. Set init=..., or scratch=true to train all of it."
)


def start(config: DetectionConfig, cfg: Config, folder: Path) -> None:
    """Check the data before workers start, and launch the job.

    Raises:
        RunError: with a message for the user.
    """
    calm()
    with quiet():
        init_default_scope("mmdet")
        check_data(cfg, ["test"] if config.evaluate is not None else ["train", "val"])
    launch(run, (config, cfg, folder), config.runtime, f"{config.name}-seed{config.seed}")


@as_job_errors()
def run(config: DetectionConfig, cfg: Config, folder: Path) -> None:
    """The part of one process in the job."""
    calm()
    loading.install()
    init_default_scope("mmdet")
    world = connect(config.runtime)
    try:
        set_devices(cfg, world)
        if config.evaluate is None:
            with lock(folder) if world.is_main else contextlib.nullcontext():
                train(config, cfg, folder, world)
        else:
            results = evaluate(config, cfg, folder)
            if world.is_main:
                print(json.dumps(results, indent=2))
    finally:
        disconnect()


def set_devices(cfg: Config, world: World) -> None:
    """Have MMEngine use the device of this process, and the process group that there is."""
    cpu = world.device.type == "cpu"
    if cpu:
        mmengine_device.DEVICE = "cpu"  # MMEngine has no public setting for it
        if get_device() != "cpu":
            raise ConfigError(f"runtime.device=cpu: MMEngine {mmengine.__version__} would use {get_device()}.")
    if dist.is_initialized():
        cfg.launcher = "pytorch"
        if cpu:
            wrapper = {"type": "MMDistributedDataParallel", "device_ids": None, "broadcast_buffers": False}
            cfg.model_wrapper_cfg = wrapper


def train(config: DetectionConfig, cfg: Config, folder: Path, world: World) -> None:
    """Train, or continue from the folder's newest checkpoint, and write summary.json."""
    latest = resumed(config, cfg, folder)
    cfg.resume, cfg.load_from = latest is not None, latest or cfg.get("load_from")
    if latest is not None:
        cfg.model.backbone.pop("init_cfg", None)  # the weights are in the checkpoint
    elif world.is_main:
        write_atomically(folder / SETTINGS, learnt_settings(config, cfg))
    if world.is_main:
        watch(config, cfg, folder)
    with quiet() as out:
        display = Display(world.is_main, out=out)
        shown = DisplayHook(display)
        runner = build(config, cfg, folder)
        runner.register_hook(shown, priority="LOWEST")
        runner.register_hook(EpochSeed(config.seed))
        if latest is not None:
            display.print(f"Resumed from {latest}.")
        elif begins_at_random(config, cfg):
            warn(AT_RANDOM)
        runner.train()
        metrics = shown.metrics or runner.val()  # a run that was at its end has not evaluated
    if world.is_main:
        results = {**summary(config, cfg, metrics, runner), "devices": world.size}
        write_atomically(folder / "summary.json", json.dumps(results, indent=2) + "\n")
        display.print(f"{config.name}: {line(metrics)}. Everything is in {folder}.")


def begins_at_random(config: DetectionConfig, cfg: Config) -> bool:
    """Whether a KernelWarehouse backbone has no checkpoint, and scratch=true does not say that it needs none."""
    backbone = cfg.model.backbone
    return backbone.type == "KWBackbone" and not (config.scratch or backbone.get("init_cfg") or cfg.load_from)


class EpochSeed(Hook):
    """Seeds every epoch by (seed, epoch, rank), so that a resumed run is like one that was not stopped: on a CPU to
    the bit, if no worker processes load the data."""

    def __init__(self, seed: int):
        self.seed = seed

    def before_train_epoch(self, runner: Runner) -> None:
        state = np.random.SeedSequence([self.seed, runner.epoch, runner.rank]).generate_state(1)
        set_random_seed(int(state[0]))


def evaluate(config: DetectionConfig, cfg: Config, folder: Path) -> dict[str, Any]:
    """Box and mask AP, in percent, of a checkpoint, which must fit the model in every entry.

    Raises:
        CheckpointError: it cannot be read, or does not fit.
    """
    path = Path(str(config.evaluate)).expanduser()
    found = find_latest_checkpoint(str(path)) if path.is_dir() else str(path)
    if found is None:
        raise CheckpointError(f"{path} has no checkpoint of a run.")
    with quiet():
        runner = build(config, cfg, folder)
        try:
            runner.load_checkpoint(found, map_location="cpu", strict=True)
        except CheckpointError:  # it cannot be read
            raise
        except RuntimeError as error:
            raise CheckpointError(f"{found} does not fit {config.name}: {error}") from None
        metrics = runner.test()
    return {"checkpoint": found, **in_percent(metrics)}


def build(config: DetectionConfig, cfg: Config, folder: Path) -> Runner:
    """Raises ConfigError: MMEngine cannot make the parts that the configuration names."""
    cfg.work_dir = str(folder)
    cfg.randomness = {"seed": config.seed}
    cfg.experiment_name = config.name
    try:
        runner = Runner.from_cfg(cfg)
    except (TypeError, KeyError) as error:  # unknown arguments or types
        raise ConfigError(f"{config.config}: {error}") from error
    for handler in runner.logger.handlers:  # the complete log is in a file; the terminal has the display
        if type(handler) is logging.StreamHandler:
            handler.setStream(sys.stderr)
            handler.setLevel(logging.ERROR)
    return runner


def calm() -> None:
    """Ignore warnings about what MMDetection could do with other packages or environment variables."""
    warnings.filterwarnings("ignore", category=UserWarning, module=r"mm(det|engine|cv)\.")


@contextlib.contextmanager
def quiet() -> Iterator[Any]:
    """In the block, drop what libraries print on standard output; yields the real standard output."""
    out = sys.stdout
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield out


def resumed(config: DetectionConfig, cfg: Config, folder: Path) -> str | None:
    """The checkpoint to continue from, or None.

    Raises:
        ConfigError: there is one, but resume=never, or settings that decide what is learnt have changed.
    """
    begun = (folder / "last_checkpoint").exists()  # MMEngine's note of which is the latest
    latest: str | None = find_latest_checkpoint(str(folder)) if begun else None
    if latest is None:
        return None
    if config.resume == "never":
        raise ConfigError(f"resume=never, but {folder} has a checkpoint: move it away, or set name=...")
    before, now = json.loads((folder / SETTINGS).read_text()), json.loads(learnt_settings(config, cfg))
    changed = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    if changed:
        raise ConfigError(
            f"The run in {folder} was begun with other settings: {', '.join(changed[:5])}. "
            f"Set them back, or set name=... for a new run."
        )
    return latest


def in_percent(metrics: dict[str, Any]) -> dict[str, float]:
    """COCO's metrics in percent, by the names of summary.json."""
    return {name: round(100 * metrics[key], 2) for key, name in RESULTS.items() if key in metrics}


def summary(config: DetectionConfig, cfg: Config, metrics: dict[str, Any], runner: Runner) -> dict[str, Any]:
    """Results, and what decides them besides the configuration."""
    backbone = cfg.model.backbone
    of = {"name": config.name, "backbone": backbone.get("name", backbone.type), "n": str(backbone.get("n", STATIC))}
    of["dynamic"] = STATIC if of["n"] == STATIC else backbone.get("dynamic", KW)
    operators = "torchvision" if torchvision_ops.in_use() else "compiled"
    params = sum(parameter.numel() for parameter in runner.model.parameters())
    ran = {"epochs": runner.epoch, "params": params, "operators": operators}
    return {**of, "seed": config.seed, **in_percent(metrics), **ran, **provenance(mmdet, mmengine)}
