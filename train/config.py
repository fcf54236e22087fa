"""What can be set: the schema that Hydra composes configs/ into. Unknown keys and values of a wrong type are refused by
Hydra, values out of range here; every message names the key.
"""

import contextlib
import difflib
import hashlib
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import hydra
import timm
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from timm.data import create_transform
from timm.optim import list_optimizers

from kw import KWConfig
from kw.baselines.registry import BASELINES, check_budget, choices
from kw.config import KW, STATIC, format_budget, parse_budget
from train.data.formats import FORMATS
from train.jobs import slurm
from train.jobs.errors import ConfigError, check, check_choice


@dataclass
class BackboneConfig:
    """A timm model. Those of `kw.backbones` have the published warehouses, others those of `kw.default_scope`."""

    name: str = MISSING
    label: str = "${backbone.name}"  # what run folders and reports call it
    kwargs: dict[str, Any] = field(default_factory=dict)  # passed on to timm.create_model

    def __post_init__(self) -> None:
        near = difflib.get_close_matches(self.name, timm.list_models(), n=3)
        rule = f"timm has no such model; near are {', '.join(near) or 'none'}"
        check(self.name == MISSING or timm.is_model(self.name), "backbone.name", self.name, rule)


@dataclass
class SettingsConfig:
    """Settings of `kw.KWConfig` to use in place of the published ones; None leaves those."""

    reduction: Any = None
    cell_in: Any = None
    cell_out: Any = None
    nonlocal_basis: Any = None
    attention_norm: str | None = None
    # The paper's ablations (what each value means: kw/config.py).
    attention_function: str | None = None  # caf (published), contrast, softmax, sigmoid, tanh
    anchoring: str | None = None  # one_to_one (published), all_to_one, random, none
    sharing: str | None = None  # stage (published), none, kind, model
    partition: str | None = None  # spatial_channel (published), channel, none

    def given(self) -> dict[str, Any]:
        return {f.name: value for f in fields(self) if (value := getattr(self, f.name)) is not None}

    def __post_init__(self) -> None:
        try:
            KWConfig(**self.given())
        except ValueError as error:
            raise ConfigError(f"kw.{error}") from None


@dataclass
class DataConfig:
    name: str = "digits"  # run folders and reports go by it
    # digits; folder: root/train/<class>/*, root/val/<class>/*; tar: the same in an uncompressed archive, root is its
    # path; shards: root/train-*.tar, root/val-*.tar of WebDataset; cifar10: root/cifar-10-batches-py, as torchvision
    # keeps it; auto: tar if root is a file, cifar10 if that is in it, folder otherwise
    format: str = "digits"
    root: str | None = None
    train_split: str = "train"
    eval_split: str = "val"
    image_size: int = 224
    train_images: int | None = None  # train on so many, of each class its share; null: on all
    on_error: str = "stop"  # at a broken training image; substitute: the next that can be read takes its place
    window: int = 8  # format=shards: of how many shards the samples are shuffled together
    num_classes: int | None = None  # read from the data; given, it is checked
    mean: list[float] = field(default_factory=lambda: [0.485, 0.456, 0.406])
    std: list[float] = field(default_factory=lambda: [0.229, 0.224, 0.225])

    def __post_init__(self) -> None:
        check_choice("data.format", self.format, ("auto", *FORMATS))
        check_choice("data.on_error", self.on_error, ("stop", "substitute"))
        check(self.window >= 1, "data.window", self.window, "must be at least 1 shard")
        some = self.train_images
        check(some is None or some >= 1, "data.train_images", some, "must be at least 1 image, or null for all")
        check(self.image_size >= 1, "data.image_size", self.image_size, "must be at least 1 pixel")
        for key in ("mean", "std"):
            values = getattr(self, key)
            rule = "three numbers, one a color; std positive"
            check(len(values) == 3 and (key == "mean" or min(values) > 0), f"data.{key}", values, rule)
        if self.format != "digits":
            check(self.root is not None, "data.root", self.root, "name the data's folder, data.root=PATH")
            self.root = str(Path(str(self.root)).expanduser())


@dataclass
class AugmentConfig:
    """What timm's transforms do to an image in training, and how it is cut in evaluation."""

    scale: list[float] = field(default_factory=lambda: [0.08, 1.0])  # share of the image's area that a crop takes
    hflip: float = 0.5
    color_jitter: float = 0.0
    auto_augment: str | None = None  # timm's notation, such as rand-m9-mstd0.5-inc1
    interpolation: str = "bicubic"
    random_erasing: float = 0.0
    erasing_mode: str = "pixel"
    repeats: int = 1  # copies of an image in one epoch, each augmented anew (DeiT)
    eval_resize: int = 256  # the short side, in pixels, for an image_size of 224; in proportion for others
    eval_interpolation: str = "bicubic"

    def __post_init__(self) -> None:
        for key in ("hflip", "random_erasing"):
            check(0 <= getattr(self, key) <= 1, f"recipe.augment.{key}", getattr(self, key), "a chance, in [0, 1]")
        for key in ("interpolation", "eval_interpolation"):
            check_choice(f"recipe.augment.{key}", getattr(self, key), ("bilinear", "bicubic", "random"))
        low, high = self.scale if len(self.scale) == 2 else (0, 0)
        check(0 < low <= high <= 1, "recipe.augment.scale", self.scale, "must be [low, high] in (0, 1]")
        for key in ("repeats", "eval_resize"):
            check(getattr(self, key) >= 1, f"recipe.augment.{key}", getattr(self, key), "must be at least 1")
        check(self.color_jitter >= 0, "recipe.augment.color_jitter", self.color_jitter, "must not be negative")
        check_choice("recipe.augment.erasing_mode", self.erasing_mode, ("const", "rand", "pixel"))
        try:
            create_transform(224, is_training=True, auto_augment=self.auto_augment)
        except (AssertionError, ValueError, KeyError) as error:
            rule = f"timm does not take it ({error}); rand-m9-mstd0.5-inc1 would do"
            check(False, "recipe.augment.auto_augment", self.auto_augment, rule)


@dataclass
class RecipeConfig:
    """How to train. Lengths of warm-ups may be fractions of epochs; `batch_size` is that of all devices together."""

    epochs: int = 300
    batch_size: int = 256
    optimizer: str = "adamw"  # any of timm's
    lr: float = 1e-3
    min_lr: float = 0.0
    warmup_epochs: float = 0.0
    schedule: str = "cosine"
    decay_epochs: list[float] = field(default_factory=list)  # schedule=step: where lr is multiplied by decay_rate
    decay_rate: float = 0.1
    momentum: float = 0.9
    nesterov: bool = True
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    eps: float = 1e-8
    weight_decay: float = 0.05  # not on biases and one-dimensional parameters
    layer_decay: float | None = None
    clip_grad: float | None = None  # norm
    temperature_epochs: float = 20.0
    label_smoothing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    drop_path: float = 0.0
    drop_path_rule: str | None = None  # constant, or linear from 0 to drop_path; null: constant in ResNets, else linear
    dropout: float = 0.0
    ema_decay: float | None = None  # evaluates, and saves, an average of the weights too
    augment: AugmentConfig = field(default_factory=AugmentConfig)

    def __post_init__(self) -> None:
        check_choice("recipe.optimizer", self.optimizer, tuple(list_optimizers()))
        check(len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas), "recipe.betas", self.betas, "two in [0, 1)")
        for key in ("eps", "decay_rate"):
            check(getattr(self, key) > 0, f"recipe.{key}", getattr(self, key), "must be positive")
        check(0 <= self.momentum < 1, "recipe.momentum", self.momentum, "must be in [0, 1)")
        for key in ("epochs", "batch_size"):
            check(getattr(self, key) >= 1, f"recipe.{key}", getattr(self, key), "must be at least 1")
        check(math.isfinite(self.lr) and self.lr > 0, "recipe.lr", self.lr, "must be positive")
        for key in ("min_lr", "warmup_epochs", "weight_decay", "temperature_epochs", "mixup", "cutmix"):
            check(getattr(self, key) >= 0, f"recipe.{key}", getattr(self, key), "must not be negative")
        for key in ("drop_path", "dropout", "label_smoothing"):
            check(0 <= getattr(self, key) < 1, f"recipe.{key}", getattr(self, key), "must be in [0, 1)")
        for key in ("ema_decay", "layer_decay"):
            value = getattr(self, key)
            check(value is None or 0 < value < 1, f"recipe.{key}", value, "must be in (0, 1), or null")
        check(
            self.clip_grad is None or self.clip_grad > 0,
            "recipe.clip_grad",
            self.clip_grad,
            "must be positive, or null",
        )
        check_choice("recipe.schedule", self.schedule, ("cosine", "step", "constant"))
        if self.drop_path_rule is not None:
            check_choice("recipe.drop_path_rule", self.drop_path_rule, ("constant", "linear"))
        check(
            self.warmup_epochs < self.epochs, "recipe.warmup_epochs", self.warmup_epochs, "must be under recipe.epochs"
        )


@dataclass
class RuntimeConfig:
    device: str = "auto"  # cuda where there is one, else cpu
    precision: str = "float32"  # of forward and backward; weights stay float32
    devices: int = 1  # processes on a node, a GPU each
    nodes: int = 1  # the same command runs on each
    rendezvous: str | None = None  # host:port of the first of several nodes; on SLURM it is known
    micro_batch: int | None = None  # samples at a time on a device; null: the whole of its share of the batch
    workers: int = 0  # processes that load data
    channels_last: bool = False
    compile: bool = False  # torch.compile
    sync_norm: bool = False  # batch statistics over all devices (GPUs only)
    checkpoint_steps: int | None = None  # checkpoints within an epoch, beside those at its end
    keep_best: int = 1  # checkpoints of the best epochs to keep
    profile_steps: int = 0  # profile so many steps, from the fifth on: profile/ in the run folder; 0: none

    def __post_init__(self) -> None:
        check_choice("runtime.device", self.device, ("auto", "cpu", "cuda"))
        check_choice("runtime.precision", self.precision, ("float32", "bfloat16", "float16"))
        for key in ("workers", "keep_best", "profile_steps"):
            check(getattr(self, key) >= 0, f"runtime.{key}", getattr(self, key), "must not be negative")
        for key in ("devices", "nodes"):
            check(getattr(self, key) >= 1, f"runtime.{key}", getattr(self, key), "must be at least 1")
        steps = self.checkpoint_steps
        check(steps is None or steps >= 1, "runtime.checkpoint_steps", steps, "must be at least 1, or null")
        check(self.micro_batch is None or self.micro_batch >= 1, "runtime.micro_batch", self.micro_batch, "at least 1")


@dataclass
class LoggerConfig:
    """Services that show a run while it goes on, beside the files of its folder."""

    services: list[str] = field(default_factory=list)  # tensorboard, wandb
    mode: str = "offline"  # of wandb: offline, for `wandb sync` later, or online
    project: str = "kernelwarehouse"  # of wandb, as entity and group
    entity: str | None = None
    group: str | None = "${sweep_name:}"  # the jobs of a sweep are a group

    def __post_init__(self) -> None:
        for service in self.services:
            check_choice("logger.services", service, ("tensorboard", "wandb"))
        check_choice("logger.mode", self.mode, ("offline", "online"))
        check(self.project != "", "logger.project", self.project, "must not be empty")


@dataclass
class TrainConfig:
    n: Any = 1  # budget; of the methods of kw.baselines, kernels in a layer
    dynamic: str = KW  # the method: kw, static (the vanilla backbone), or one of kw.baselines
    kw: SettingsConfig = field(default_factory=SettingsConfig)
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    data: DataConfig = field(default_factory=DataConfig)
    recipe: RecipeConfig = field(default_factory=RecipeConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    seed: int = 0
    resume: str = "auto"
    evaluate: str | None = None
    label: str = "${backbone.label}"  # what the run is called: its name begins with it
    name: str = ""  # the run folder's
    given: list[str] = field(default_factory=list)  # keys on the command line; set by the program itself

    def __post_init__(self) -> None:
        check_choice("dynamic", self.dynamic, choices())
        if STATIC in (self.n, self.dynamic):
            self.dynamic = self.n = STATIC
        else:
            try:
                self.n = str(parse_budget(self.n) if self.dynamic == KW else check_budget(self.dynamic, self.n))
            except ValueError as error:
                raise ConfigError(f"{error} Or n={STATIC} for the vanilla backbone.") from None
        if self.kw.given() and self.dynamic != KW:
            key, none = next(iter(self.kw.given())), f"n={STATIC}" if self.is_static else f"dynamic={self.dynamic}"
            raise ConfigError(f"kw.{key} is a setting of warehouses, which {none} has none of.")
        check_choice("resume", self.resume, ("auto", "never"))
        check(0 <= self.seed < 2**31, "seed", self.seed, "must be in [0, 2**31)")

    @property
    def is_static(self) -> bool:
        return self.dynamic == STATIC


def validate(composed: DictConfig) -> TrainConfig:
    """The composed configuration as checked dataclasses.

    Raises:
        ConfigError: naming the key.
    """
    try:
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(TrainConfig), composed))
    except MissingMandatoryValue as error:
        key = error.full_key or str(error).rpartition(" ")[2]
        raise ConfigError(f"{key} must be set: {key}=... on the command line.") from None
    except OmegaConfBaseException as error:
        raise ConfigError(str(error).splitlines()[0] + (f" ({error.full_key})" if error.full_key else "")) from None
    assert isinstance(config, TrainConfig)
    return config


CONFIGS = Path(__file__).parents[1] / "configs"


def compose(overrides: Sequence[str] = ()) -> TrainConfig:
    """What `python -m train OVERRIDES` would run with, for programs other than it.

    Raises:
        ConfigError: naming the key.
    """
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return validate(hydra.compose("train", list(overrides)))


def to_plain(config: TrainConfig) -> dict[str, Any]:
    """As nested dictionaries of plain values, for config.yaml and checkpoints."""
    plain = OmegaConf.to_container(OmegaConf.structured(config))
    assert isinstance(plain, dict)
    return plain


def learnt_settings(config: TrainConfig) -> dict[str, Any]:
    """The settings that decide what is learnt, as `{"recipe.lr": 0.1}`: a run goes on only where these are the same."""
    flat = flatten(to_plain(config))
    return {key: value for key, value in flat.items() if not HOW_IT_RUNS.fullmatch(key)}


def flatten(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"recipe": {"lr": 1}}` as `{"recipe.lr": 1}`."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


# Where it runs and what it is called; not what is learnt. Data may be moved: whether it is the same is checked by what
# is in it. The size of micro-batches follows the number of devices, which may change.
HOW_IT_RUNS = re.compile(
    r"name|label|given|resume|evaluate|data\.root|logger(\..+)?|runtime(\.(?!(precision|sync_norm)$).+)?"
)
# Beside these, what a run folder's path shows in a word of its own.
IN_THE_PATH = re.compile(r"backbone|data|dynamic|experiment(/ablation)?|n|seed")


def run_name(label: str, dynamic: str, n: Any) -> str:
    """A run folder's name: as published rows are called (`resnet18`, `resnet18_kw1d4x`, `resnet18_odconv4x`; without
    budget `resnet18_se`), then the other settings given on the command line that decide what is learnt
    (`resnet18_kw1d4x+recipe.lr-0.1`). It needs no quoting in a shell or in Hydra."""
    name = label if STATIC in (n, dynamic) else f"{label}_{dynamic}"
    if name != label and (dynamic not in BASELINES or BASELINES[dynamic].budget):
        with contextlib.suppress(ValueError):  # n is no budget: validate says so, once there is a run
            name += format_budget(n)
    given = HydraConfig.get().overrides.task if HydraConfig.initialized() else []
    for override in sorted(given):
        key, _, value = override.lstrip("+~").partition("=")
        if not HOW_IT_RUNS.fullmatch(key) and not IN_THE_PATH.fullmatch(key):
            name += re.sub(r"[^\w.+-]+", "_", f"+{key}-{value}")
    return shorten(name)


MAX_NAME = 120


def shorten(name: str, length: int = MAX_NAME) -> str:
    """Cut where it is too long, and still its own."""
    return name if len(name) <= length else f"{name[:length]}+{hashlib.sha1(name.encode()).hexdigest()[:8]}"


COMMAND = "KW_TRAIN_COMMAND"  # an environment variable: the overrides as typed, for jobs that run elsewhere


def in_sweep() -> bool:
    return HydraConfig.initialized() and not OmegaConf.is_missing(HydraConfig.get().job, "num")


def check_launched() -> None:
    """Hydra would not say that without -m it passes over the launcher, and train where the command was typed."""
    launcher = HydraConfig.get().runtime.choices["hydra/launcher"]
    check(launcher == "basic" or in_sweep(), "hydra/launcher", launcher, "launches sweeps: add -m, also for one run")


def sweep_name() -> str | None:
    """What the jobs of a sweep have in common: its overrides as they were typed, the same when it is resumed. None
    outside of a sweep."""
    if not in_sweep():
        return None
    keys = {word: word.lstrip("+~").partition("=")[0] for word in os.environ.get(COMMAND, "").split()}
    told = [word for word, key in keys.items() if not HOW_IT_RUNS.fullmatch(key) and not key.startswith(("-", "hydra"))]
    return shorten(re.sub(r"[^\w.,+-]+", "-", "+".join(sorted(told))), 100) or None


OmegaConf.register_new_resolver("run_name", run_name, replace=True)
OmegaConf.register_new_resolver("sweep_name", sweep_name, replace=True)
OmegaConf.register_new_resolver("slurm_gpus", slurm.gpus_per_node, replace=True)
OmegaConf.register_new_resolver("slurm_cpus", slurm.cpus_per_task, replace=True)
ConfigStore.instance().store(name="schema", node=TrainConfig)
