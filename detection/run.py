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
import torch.distributed as dist
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.device import utils as mmengine_device
from mmengine.registry import init_default_scope
from mmengine.runner import Runner

from detection import loading, torchvision_ops
from detection.compose import learnt_settings
from detection.config import DetectionConfig
from detection.data import check_data
from detection.display import RESULTS, DisplayHook, in_percent, line
from detection.errors import as_job_errors
from detection.evaluation import EvaluationHook
from detection.guard import Guard
from detection.plugin.backbone import method_of
from detection.prepare import prepare
from detection.saving import SavingHook, checkpoints_in, latest
from detection.services import watch
from kw.config import STATIC
from train.jobs.agreement import agree, once_per_node
from train.jobs.checkpoints import Found
from train.jobs.display import Display
from train.jobs.errors import CheckpointError, ConfigError, NonFiniteError, RunError, warn
from train.jobs.folder import lock, write_atomically
from train.jobs.launch import launch
from train.jobs.metrics import MetricsFile, devices
from train.jobs.provenance import provenance
from train.jobs.signals import StopRequest
from train.jobs.world import World, connect, disconnect

SETTINGS = "settings.json"  # in a run folder: `learnt_settings`

AT_RANDOM = (
    "no init=CHECKPOINT, so the backbone begins at random, but is set to be fine-tuned: frozen_stages and norm_eval "
    "are as in the file, and the temperature is 0. Set init=..., start_from=..., or scratch=true to train all of it."
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
        code = once_per_node(world, lambda: provenance(mmdet, mmengine))
        agree(world, "the code", code, "Bring all nodes to one commit and its versions.")
        set_devices(cfg, world)
        if config.evaluate is None:
            with lock(folder) if world.is_main else contextlib.nullcontext():
                train(config, cfg, folder, world)
        else:
            results = evaluate(config, cfg, folder, world)
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
    """Train, or continue from the folder's newest checkpoint, and write summary.json.

    Raises:
        SystemExit: a signal asked to stop; the state is saved.
    """
    settings = learnt_settings(config, cfg)
    found = resumed(config, settings, folder, world)
    cfg.resume, cfg.load_from = found is not None, str(found.path) if found else cfg.get("load_from")
    if found:
        cfg.model.backbone.pop("init_cfg", None)  # the weights are in the checkpoint
    elif world.is_main:
        write_atomically(folder / SETTINGS, settings)
    if world.is_main:
        watch(config, cfg, folder)
    given = cfg.copy()
    prepare(cfg, config.data.on_error)
    with quiet() as out:
        display, stop = Display(world.is_main, out=out), StopRequest(alone=world.size == 1)
        guard, evaluation = Guard(world, stop), EvaluationHook(world, folder)
        saving = SavingHook(config, folder, world, guard, evaluation, display)
        runner = build(config, cfg, folder)
        for hook in (guard, evaluation, DisplayHook(display), saving):
            runner.register_hook(hook, priority="LOWEST" if isinstance(hook, DisplayHook) else None)
        for remark in found.remarks if found else []:
            display.print(f"Passed over: {remark}")
        if world.is_main:
            if found:
                saving.resume_from(found)
            given.dump(folder / Path(given.filename).name)  # as MMDetection's own tools want it
        if found:
            display.print(f"Resumed {folder} at step {found.state['meta']['iter']} of the run.")
        elif begins_at_random(config, cfg):
            warn(AT_RANDOM)
        try:
            with stop:
                runner.train()
        except BaseException as error:
            runner.visualizer.close()  # so that services get what they have not sent
            if isinstance(error, NonFiniteError):
                raise NonFiniteError(f"{error} {saving.checkpoints.what_is_kept()}") from None
            raise
        finally:
            display.stop()
    if world.is_main:
        figures = last_figures(saving.metrics, runner)
        device = devices(saving.metrics.read()) or world.device_name  # a run need not evaluate
        results = {**summary(config, cfg, figures, runner), "device": device, "devices": world.size}
        write_atomically(folder / "summary.json", json.dumps(results, indent=2) + "\n")
        without = "nothing was detected, so there is no AP" if figures.get("eval_images") else "not evaluated"
        display.print(f"{config.name}: {line(figures) or without}. Everything is in {folder}.")


def last_figures(metrics: MetricsFile, runner: Runner) -> dict[str, Any]:
    """The last evaluation of a finished run; none where its file sets no evaluation.

    Raises:
        RunError: the file of metrics is gone.
    """
    lines = metrics.read()
    if not lines and runner.val_loop is not None:
        raise RunError(
            f"{metrics.path} has no line of any epoch, though the run is finished: it was removed or emptied. Put it "
            f"back; or move {metrics.path.parent} away, to train once more."
        )
    return lines[-1] if lines else {}


def begins_at_random(config: DetectionConfig, cfg: Config) -> bool:
    """Whether a KernelWarehouse backbone has no checkpoint, and scratch=true does not say that it needs none."""
    backbone = cfg.model.backbone
    return backbone.type == "KWBackbone" and not (config.scratch or backbone.get("init_cfg") or cfg.load_from)


def evaluate(config: DetectionConfig, cfg: Config, folder: Path, world: World) -> dict[str, Any]:
    """Box and mask AP, in percent, of a checkpoint, which must fit the model in every entry.

    Raises:
        CheckpointError: it cannot be read, or does not fit.
    """
    path = Path(str(config.evaluate)).expanduser()
    found = str(latest(path) if path.is_dir() else path)
    prepare(cfg, config.data.on_error)
    with quiet():
        runner = build(config, cfg, folder)
        evaluation = EvaluationHook(world, folder)
        runner.register_hook(evaluation, priority=None)
        try:
            runner.load_checkpoint(found, map_location="cpu", strict=True)
        except CheckpointError:  # it cannot be read
            raise
        except RuntimeError as error:
            raise CheckpointError(f"{found} does not fit {config.name}: {error}") from None
        metrics = runner.test()
    return {"checkpoint": found, **in_percent(metrics), "eval_images": evaluation.images}


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


def resumed(config: DetectionConfig, settings: str, folder: Path, world: World) -> Found | None:
    """The checkpoint to continue from, or None.

    Args:
        settings: this run's `learnt_settings`.

    Raises:
        ConfigError: there is one, but resume=never, or settings that decide what is learnt have changed; or the
            processes find different ones.
        CheckpointError: all checkpoints are damaged.
    """
    found = checkpoints_in(folder).newest()
    which = found and f"{found.path}, of step {found.state['meta']['iter']}"
    agree(world, "the checkpoint", which, "Start again once all nodes see the same files in the run folder.")
    if found is None and (folder / "last_checkpoint").exists():
        raise ConfigError(
            f"{folder} has checkpoints of MMEngine, from which a run cannot resume exactly: move it away, or set "
            f"name=... for a new run."
        )
    if found is None:
        return None
    if config.resume == "never":
        raise ConfigError(f"resume=never, but {folder} has a checkpoint: move it away, or set name=...")
    before, now = json.loads((folder / SETTINGS).read_text()), json.loads(settings)
    changed = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    if changed:
        raise ConfigError(
            f"The run in {folder} was begun with other settings: {', '.join(changed[:5])}. "
            f"Set them back, or set name=... for a new run."
        )
    return found


def summary(config: DetectionConfig, cfg: Config, figures: dict[str, Any], runner: Runner) -> dict[str, Any]:
    """Results, and what decides them besides the configuration."""
    backbone = cfg.model.backbone
    n, dynamic = method_of(backbone.get("n"), backbone.get("dynamic"))
    of = {"name": config.name, "backbone": backbone.get("name", backbone.type), "n": str(n)}
    of["dynamic"] = STATIC if n == STATIC else dynamic
    operators = "torchvision" if torchvision_ops.in_use() else "compiled"
    params = sum(parameter.numel() for parameter in runner.model.parameters())
    ran = {"epochs": runner.epoch, "params": params, "operators": operators}
    shown = {key: figures[key] for key in (*RESULTS.values(), "eval_images", "images_per_second") if key in figures}
    return {**of, "seed": config.seed, **shown, **ran, **provenance(mmdet, mmengine)}
