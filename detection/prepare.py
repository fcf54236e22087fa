"""What `python -m detection` changes in MMDetection's configuration of a run, right before it is built."""

from __future__ import annotations

from typing import Any

from mmengine.config import Config
from mmengine.dataset import worker_init_fn
from mmengine.dist import get_rank
from mmengine.registry import FUNCTIONS

from train.jobs.errors import warn
from train.jobs.signals import outlast_signals

# Loops that train by epochs; others keep their own way to resume.
BY_EPOCH = ("EpochBasedTrainLoop", "ExactTrainLoop")


def prepare(cfg: Config, on_error: str) -> None:
    """Have a run resume exactly, read images whole, evaluate each once, keep its checkpoints by `detection.saving`, and
    load images until it has saved.

    Args:
        on_error: at a broken training image, stop or substitute.
    """
    loop = cfg.get("train_cfg")
    if loop and loop.get("type") in BY_EPOCH:
        loop.type, loop.substitute = "ExactTrainLoop", on_error == "substitute"
    elif loop:
        warn(f"train_cfg.type={loop.get('type')} does not resume exactly, nor substitute images: ExactTrainLoop does.")
    for split in ("val", "test"):
        if loader := cfg.get(f"{split}_dataloader"):
            every_image_once(loader)
    for split in ("train", "val", "test"):
        if loader := cfg.get(f"{split}_dataloader"):
            read_whole(loader)
            keep_loading(loader, cfg)
    cfg.default_hooks = {**cfg.get("default_hooks", {}), "checkpoint": None}


def every_image_once(loader: Any) -> None:
    """Deal the images to the ranks without repeating some to make the shares equal."""
    if loader.sampler.type == "DefaultSampler":
        loader.sampler.update(shuffle=False, round_up=False)
    loader.pop("batch_sampler", None)
    loader.drop_last = False


def start_worker(worker: int, **seeds: Any) -> None:
    """MMEngine's start of a process that loads images, which then outlasts signals to the whole job."""
    worker_init_fn(worker, **seeds)
    outlast_signals()


FUNCTIONS.register_module(module=start_worker, force=True)


def keep_loading(loader: Any, cfg: Any) -> None:
    """Have the processes that load images go on while the run saves, unless the file sets them up itself."""
    if {"worker_init_fn", "disable_subprocess_warning"} & loader.keys():
        return
    seed = (cfg.get("randomness") or {}).get("seed") or 0
    workers = loader.get("num_workers", 0)
    loader["worker_init_fn"] = {"type": "start_worker", "num_workers": workers, "rank": get_rank(), "seed": seed}


def read_whole(part: Any) -> None:
    """Have all pipelines in a part of the configuration read images by LoadWholeImage."""
    if isinstance(part, dict):
        if part.get("type") == "LoadImageFromFile" and "file_client_args" not in part:
            part["type"] = "LoadWholeImage"
        part = list(part.values())
    if isinstance(part, list | tuple):
        for inner in part:
            read_whole(inner)
