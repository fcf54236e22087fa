"""The model of a checkpoint, and images by class: of a folder, or of the data set that the model was trained on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from PIL import Image
from torch import Tensor, nn

import kw
from kw.layers import KWLayer
from train.checkpoint import State, newest
from train.config import TrainConfig, validate
from train.data.formats import open_split
from train.data.transforms import eval_transform
from train.jobs.checkpoint import FORMAT, read
from train.jobs.errors import CheckpointError, ConfigError
from train.model import build_model

CONFIGS = Path(__file__).parents[2] / "configs"
SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff"}
BATCH = 32


@dataclass(frozen=True)
class Options:
    """`key=value` words of the command line."""

    checkpoint: str = ""  # a file, or a run folder; of ours, or a released one
    images: str = ""  # a folder of images, or of a folder for each class; left out: the data set's
    classes: int = 10  # at most so many, at even distances
    per_class: int = 50  # images of each
    ema: bool = False  # the average of the weights
    out: str = "report/attentions"
    settings: tuple[str, ...] = ()  # of a released checkpoint: backbone=resnet18 n=1/4

    @classmethod
    def parse(cls, words: list[str]) -> Options:
        """Raises ConfigError for a word or value that cannot be understood."""
        kinds = {f.name: type(f.default) for f in fields(cls) if f.name != "settings"}
        made: dict[str, object] = {}
        settings = []
        for word in words:
            key, equals, value = word.partition("=")
            if not equals:
                raise ConfigError(f"{word!r} is no KEY=VALUE; keys are {', '.join(kinds)}.")
            if key not in kinds:
                settings.append(word)
                continue
            made[key] = _parsed(key, value, kinds[key])
        if not made.get("checkpoint"):
            raise ConfigError("checkpoint=PATH is needed: a run folder, or a checkpoint's file.")
        return cls(**made, settings=tuple(settings))  # type: ignore[arg-type]


def _parsed(key: str, value: str, kind: type) -> object:
    if kind is bool:
        if value.lower() not in ("true", "false"):
            raise ConfigError(f"{key}={value}: must be true or false.")
        return value.lower() == "true"
    if kind is int:
        if not value.isdigit() or int(value) < 1:
            raise ConfigError(f"{key}={value}: must be a whole number of at least 1.")
        return int(value)
    return value


def load_model(options: Options) -> tuple[nn.Module, TrainConfig, State, str]:
    """The model in evaluation mode, its configuration, what the checkpoint holds, and the checkpoint's name.

    Raises:
        CheckpointError: it cannot be read or does not fit.
        ConfigError: settings are missing or too many, or the model has no dynamic layer.
    """
    path = Path(options.checkpoint).expanduser()
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    path, state = newest(folder)[:2] if folder.is_dir() else (path, read(path))
    ours = state.get("format") == FORMAT
    if ours and options.settings:
        raise ConfigError(f"{path} knows its own settings: leave {options.settings[0]} out.")
    if ours:
        config = validate(OmegaConf.create(state["config"]))
    elif options.settings:
        config = _composed(options.settings)
    else:
        raise ConfigError(f"{path} is not of `python -m train`: say what it is, by backbone=resnet18 n=1/4 or so.")
    weights = _weights(path, state, options.ema) if ours else state
    model = build_model(config, len(state["classes"]) if ours else config.data.num_classes or 1000)
    if not any(isinstance(module, KWLayer) for module in model.modules()):
        raise ConfigError(
            f"{path} is of {config.backbone.label} at n={config.n}, dynamic={config.dynamic}: "
            f"it has no attentions to a warehouse's cells."
        )
    try:
        model.load_state_dict(weights) if ours else kw.load_released(model, weights)
    except (KeyError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path} does not fit {config.backbone.label} at n={config.n}: {error}") from None
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return model.eval().to(device), config, state if ours else {}, f"{config.name}, {path.name}"


def _composed(settings: tuple[str, ...]) -> TrainConfig:
    data = [] if any(word.startswith(("data=", "experiment=")) for word in settings) else ["data=imagenet"]
    root = [] if any(word.startswith("data.root=") for word in settings) else ["data.root=unused"]
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return validate(compose("train", [*data, *root, *settings]))


def _weights(path: Path, state: State, ema: bool) -> State:
    if ema and not state["ema"]:
        raise ConfigError(f"ema=true, but {path} has no average of the weights.")
    weights: State = state["ema" if ema else "model"]
    return weights


Loads = list[tuple[Callable[[], Image.Image], int]]  # how to load an image, and the number of its class


def choose_images(options: Options, config: TrainConfig) -> tuple[list[str], Loads]:
    """Names of the classes, and their images.

    Raises:
        ConfigError: there are no images.
    """
    classes, loads = _of_folder(options) if options.images else _of_data_set(config)
    kept = _evenly(sorted({target for _, target in loads}), options.classes)
    chosen: Loads = []
    for number, target in enumerate(kept):
        own = [load for load, its in loads if its == target]
        chosen += [(load, number) for load in _evenly(own, options.per_class)]
    return [classes[target] for target in kept], chosen


def _evenly(items: list[Any], most: int) -> list[Any]:
    """At most so many, at even distances."""
    if len(items) <= most:
        return items
    return [items[k * len(items) // most] for k in range(most)]


def _of_folder(options: Options) -> tuple[list[str], Loads]:
    root = Path(options.images).expanduser()
    if not root.is_dir():
        raise ConfigError(f"images={options.images}: no such folder.")
    below = sorted(path for path in root.iterdir() if path.is_dir() and _files(path))
    folders = below or [root]
    loads: Loads = [(_loading(path), k) for k, folder in enumerate(folders) for path in _files(folder)]
    if not loads:
        raise ConfigError(f"images={options.images}: no images there ({', '.join(sorted(SUFFIXES))}).")
    return [folder.name for folder in folders], loads


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)


def _loading(path: Path) -> Callable[[], Image.Image]:
    def load() -> Image.Image:
        try:
            return Image.open(path).convert("RGB")
        except Exception as error:  # decoders raise nearly anything on broken files
            raise ConfigError(f"{path} cannot be read as an image: {error}") from None

    return load


def _of_data_set(config: TrainConfig) -> tuple[list[str], Loads]:
    images = open_split(config.data, config.data.eval_split)
    targets = getattr(images, "targets", None)
    if targets is None:  # shards know an image's class once it is read
        targets = [images.load(index)[1] for index in range(len(images))]
    return list(images.classes), [
        (lambda index=index: images.load(index)[0], int(target)) for index, target in enumerate(targets)
    ]


def batches(loads: Loads, config: TrainConfig) -> Iterator[tuple[Tensor, Tensor]]:
    """Images as the model is evaluated on them, `(B, 3, H, W)`, and the numbers of their classes `(B,)`."""
    transform = eval_transform(config.data, config.recipe)
    for first in range(0, len(loads), BATCH):
        part = loads[first : first + BATCH]
        yield torch.stack([transform(load()) for load, _ in part]), torch.tensor([target for _, target in part])
