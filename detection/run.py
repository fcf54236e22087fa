"""One process of a job: MMEngine's runner, set up to train (or go on) or to evaluate in a run folder."""

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
import torch
import torch.distributed as dist
from mmengine.config import Config
from mmengine.device import utils as mmengine_device
from mmengine.hooks import Hook
from mmengine.registry import init_default_scope
from mmengine.runner import Runner, find_latest_checkpoint, set_random_seed

from detection.compose import learnt_settings
from detection.config import DetectionConfig
from detection.data import check_data
from detection.display import Display
from detection.ops import EXTENSION, Extension
from detection.services import watch
from kw.config import STATIC
from train.jobs.errors import CheckpointError, ConfigError
from train.jobs.folder import lock, write_whole
from train.jobs.launch import launch as launch_processes
from train.jobs.provenance import provenance

SETTINGS = "settings.json"  # in a run folder: what decides what is learnt
RESULTS = {"coco/bbox_mAP": "box_ap", "coco/bbox_mAP_50": "box_ap50", "coco/segm_mAP": "mask_ap",
           "coco/segm_mAP_50": "mask_ap50"}  # fmt: skip

AT_RANDOM = (
    "Warning: no init=CHECKPOINT, so the backbone begins at random, but is set to be fine-tuned: frozen_stages and "
    "norm_eval are as in the file, and the temperature is 0. Give init=..., or scratch=true to train all of it."
)


def launch(config: DetectionConfig, cfg: Config, folder: Path) -> None:
    """Check the data, then run: here, if it is one process or if torchrun has started this one; else in new ones.

    Raises:
        RunError: with a message for the user.
    """
    calm()
    with quiet():
        init_default_scope("mmdet")
        check_data(cfg, ["test"] if config.evaluate is not None else ["train", "val"])
    runtime = config.runtime
    if "RANK" in os.environ or runtime.devices * runtime.nodes == 1:
        run(config, cfg, folder)
        return
    endpoint, name = runtime.rendezvous or "localhost:0", None if runtime.nodes == 1 else f"{config.name}-{config.seed}"
    arguments = (config, cfg, folder)
    launch_processes(run, arguments, processes=runtime.devices, nodes=runtime.nodes, endpoint=endpoint, name=name)


def run(config: DetectionConfig, cfg: Config, folder: Path) -> None:
    """Do the job in `folder`, as this process's part of it."""
    calm()
    init_default_scope("mmdet")
    main = os.environ.get("RANK", "0") == "0"
    try:
        connect(config, cfg)
        if config.evaluate is None:
            with lock(folder) if main else contextlib.nullcontext():
                train(config, cfg, folder, main)
        else:
            results = evaluate(config, cfg, folder)
            if main:
                print(json.dumps(results, indent=2))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def connect(config: DetectionConfig, cfg: Config) -> None:
    """Tell MMEngine which devices there are, and meet the other processes.

    Raises:
        ConfigError: runtime.device=cuda without a GPU for this process.
    """
    cuda = torch.cuda.is_available() and config.runtime.device != "cpu"
    local = int(os.environ.get("LOCAL_RANK", 0))
    if config.runtime.device == "cuda" and local >= torch.cuda.device_count():
        raise ConfigError(f"runtime.device=cuda: process {local} of this node finds {torch.cuda.device_count()} GPUs.")
    if not cuda:
        mmengine_device.DEVICE = "cpu"  # MMEngine has no setting for it
    if "RANK" not in os.environ:
        return
    cfg.launcher = "pytorch"
    if cuda:
        torch.cuda.set_device(local)
    else:
        cfg.model_wrapper_cfg = {"type": "MMDistributedDataParallel", "device_ids": None, "broadcast_buffers": False}
    dist.init_process_group("nccl" if cuda else "gloo")


def train(config: DetectionConfig, cfg: Config, folder: Path, main: bool) -> None:
    """Train, or go on from the folder's newest checkpoint, and leave summary.json."""
    latest = resumed(config, cfg, folder)
    cfg.resume, cfg.load_from = latest is not None, latest or cfg.get("load_from")
    if latest is not None:
        cfg.model.backbone.pop("init_cfg", None)  # what it began from
    elif main:
        write_whole(folder / SETTINGS, learnt_settings(cfg))
    watch(config, cfg, folder)
    with quiet() as out:
        display = Display(out if main else None)
        runner = build(config, cfg, folder)
        runner.register_hook(display, priority="LOWEST")
        runner.register_hook(EpochSeed(config.seed))
        if latest is not None:
            display.print(f"Resumed from {latest}.")
        elif main and begins_at_random(config, cfg):
            print(AT_RANDOM, file=sys.stderr, flush=True)
        runner.train()
        if not display.metrics:  # it went on from its end
            display.metrics = runner.val()
    if main:
        told_of = summary(config, cfg, display.metrics, runner)
        write_whole(folder / "summary.json", json.dumps(told_of, indent=2) + "\n")
        display.print(f"{config.name}: {display.line(display.metrics)}. Everything is in {folder}.")


def begins_at_random(config: DetectionConfig, cfg: Config) -> bool:
    """Whether a backbone of ours has no checkpoint, and nobody said that it need have none."""
    backbone = cfg.model.backbone
    return backbone.type == "KWBackbone" and not (config.scratch or backbone.get("init_cfg") or cfg.load_from)


class EpochSeed(Hook):
    """Chance in an epoch follows from (seed, epoch, process): a run that was stopped goes on as it would have, on a CPU
    to the bit if no worker processes load the data."""

    def __init__(self, seed: int):
        self.seed = seed

    def before_train_epoch(self, runner: Runner) -> None:
        state = np.random.SeedSequence([self.seed, runner.epoch, runner.rank]).generate_state(1)
        set_random_seed(int(state[0]))


def evaluate(config: DetectionConfig, cfg: Config, folder: Path) -> dict[str, Any]:
    """Box and mask AP, in percent, of a checkpoint that fits in every entry.

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
    return {"checkpoint": found, **told(metrics)}


def build(config: DetectionConfig, cfg: Config, folder: Path) -> Runner:
    """Raises ConfigError: MMEngine cannot make the parts that the configuration names."""
    cfg.work_dir = str(folder)
    cfg.randomness = {"seed": config.seed}
    cfg.experiment_name = config.name
    try:
        runner = Runner.from_cfg(cfg)
    except (TypeError, KeyError) as error:  # unknown arguments or types
        raise ConfigError(f"{config.config}: {error}") from error
    for handler in runner.logger.handlers:  # the whole log is in a file; the display shows what there is to say
        if type(handler) is logging.StreamHandler:
            handler.setStream(sys.stderr)
            handler.setLevel(logging.ERROR)
    return runner


def calm() -> None:
    """Keep back warnings about what MMDetection could do with other packages or settings of the environment."""
    warnings.filterwarnings("ignore", category=UserWarning, module=r"mm(det|engine|cv)\.")


@contextlib.contextmanager
def quiet() -> Iterator[Any]:
    """Within it, what libraries print on standard output is dropped; gives the real one."""
    out = sys.stdout
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield out


def resumed(config: DetectionConfig, cfg: Config, folder: Path) -> str | None:
    """The checkpoint to go on from, or None.

    Raises:
        ConfigError: there is one, but resume=never, or what is to be learnt was changed since.
    """
    begun = (folder / "last_checkpoint").exists()  # MMEngine's note of which is the latest
    latest: str | None = find_latest_checkpoint(str(folder)) if begun else None
    if latest is None:
        return None
    if config.resume == "never":
        raise ConfigError(f"resume=never, but {folder} has a checkpoint: move it away, or give name=... another one.")
    before, now = json.loads((folder / SETTINGS).read_text()), json.loads(learnt_settings(cfg))
    changed = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    if changed:
        raise ConfigError(
            f"The run in {folder} was begun with other settings: {', '.join(changed[:5])}. "
            f"Set them back, or give name=... another one."
        )
    return latest


def told(metrics: dict[str, Any]) -> dict[str, float]:
    """COCO's metrics under our names, in percent."""
    return {name: round(100 * metrics[key], 2) for key, name in RESULTS.items() if key in metrics}


def summary(config: DetectionConfig, cfg: Config, metrics: dict[str, Any], runner: Runner) -> dict[str, Any]:
    """What a run came to, and what decides its numbers beside the configuration."""
    backbone = cfg.model.backbone
    of = {"name": config.name, "backbone": backbone.get("name", backbone.type), "n": str(backbone.get("n", STATIC))}
    operators = "stand-ins" if isinstance(sys.modules.get(EXTENSION), Extension) else "compiled"
    params = sum(parameter.numel() for parameter in runner.model.parameters())
    ran = {"epochs": runner.epoch, "params": params, "operators": operators}
    return {**of, "seed": config.seed, **told(metrics), **ran, **provenance(mmdet, mmengine)}
