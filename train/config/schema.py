"""The schema that Hydra composes configs/ into. Hydra refuses unknown keys and values of a wrong type, the checks here
values out of range; every message names the key.

A field is marked as `resumable` if its value may change when a run is resumed.
"""

import difflib
import math
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import timm
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING
from timm.data import create_transform
from timm.optim import list_optimizers

from kw import KWConfig
from kw.baselines.registry import check_budget, check_settings, choices, startable
from kw.config import KW, STATIC, parse_budget
from train.data.formats import FORMATS
from train.data.remote import is_url
from train.jobs.errors import ConfigError, check, check_choice
from train.jobs.settings import RESUMABLE, LoggerConfig, Runtime, resumable

FROZEN = ("float32", "bfloat16", "int8")  # what cells of a frozen model are kept in
Number = int | float | str  # 0.25, or "1/4"


@dataclass
class BackboneConfig:
    """A timm model. Those of `kw.backbones` have the published warehouses, others those of `kw.plan`."""

    name: str = MISSING
    label: str = "${backbone.name}"  # what run folders and reports call it
    kwargs: dict[str, Any] = field(default_factory=dict)  # passed on to timm.create_model

    def __post_init__(self) -> None:
        near = difflib.get_close_matches(self.name, timm.list_models(), n=3)
        rule = f"timm has no such model; near are {', '.join(near) or 'none'}"
        check(self.name == MISSING or timm.is_model(self.name), "backbone.name", self.name, rule)


@dataclass
class SettingsConfig:
    """Settings of `kw.KWConfig` in place of the published ones. None: the published one."""

    reduction: Number | None = None
    cell_in: Number | None = None
    cell_out: Number | None = None
    nonlocal_basis: Number | None = None
    attention_norm: str | None = None
    # The paper's ablations (what each value means: kw/config.py).
    # caf (published), contrast, softmax, sigmoid, tanh; dyconv and condconv: their own, or caf
    attention_function: str | None = None
    anchoring: str | None = None  # one_to_one (published), all_to_one, random, none
    sharing: str | None = None  # stage (published), none, kind, model
    partition: str | None = None  # spatial_channel (published), channel, none

    def changes(self) -> dict[str, Any]:
        """The settings that are not None, as keyword arguments of `kw.KWConfig`."""
        return {f.name: value for f in fields(self) if (value := getattr(self, f.name)) is not None}

    def __post_init__(self) -> None:
        try:
            checked = KWConfig(**self.changes())
        except ValueError as error:
            raise ConfigError(f"kw.{error}") from None
        for key in ("reduction", "cell_in", "cell_out", "nonlocal_basis"):  # 0.25 and "1/4" become the same
            if getattr(self, key) is not None:
                setattr(self, key, str(getattr(checked, key)))


@dataclass
class RemoteConfig:
    """With data.root=URL: how shards are downloaded, and how many stay on each node's disk."""

    index: str | None = None  # where the splits' indexes are, a folder or URL; null: at data.root
    cache: str | None = None  # a folder on a local disk; null: in the folder for temporary files
    cache_gb: float = 100.0  # what the folder may hold; the shards not used for longest make room
    retries: int = 8  # after a download that failed, with longer and longer waits: about three minutes
    timeout: float = 60.0  # seconds without a byte after which a connection counts as lost

    def __post_init__(self) -> None:
        check(self.retries >= 0, "data.remote.retries", self.retries, "must not be negative")
        for key in ("timeout", "cache_gb"):
            check(getattr(self, key) > 0, f"data.remote.{key}", getattr(self, key), "must be positive")


@dataclass
class DataConfig:
    name: str = "digits"  # in run folders and reports
    # digits: of scikit-learn, without root; folder: root/train/<class>/*, root/val/<class>/*; tar: the same in an
    # uncompressed archive whose path is root; shards: root/train-*.tar, root/val-*.tar of WebDataset, where root may be
    # a URL or a command (pipe:COMMAND); cifar10: root/cifar-10-batches-py, as torchvision has it; auto: tar if root is
    # a file, cifar10 if root has that folder, else folder
    format: str = "digits"
    root: str | None = resumable(None)  # data may be moved: what is in it is compared instead
    train_split: str = "train"
    eval_split: str = "val"
    image_size: int = 224
    train_images: int | None = None  # train on this many, with every class in proportion; null: on all
    on_error: str = "stop"  # at a broken training image; substitute: use the next one that can be read
    window: int = 8  # format=shards: the number of shards whose samples are shuffled together
    # format=shards: the shards are cut into so many parts, and a batch takes equally many samples of each. With a
    # multiple of the number of devices times the micro-batches of a step on one, each device reads its own shards
    parts: int = 1
    remote: RemoteConfig = field(default_factory=RemoteConfig, metadata=RESUMABLE)
    num_classes: int | None = None  # null: read from the data; else the data must have this many
    mean: list[float] = field(default_factory=lambda: [0.485, 0.456, 0.406])
    std: list[float] = field(default_factory=lambda: [0.229, 0.224, 0.225])

    def __post_init__(self) -> None:
        check_choice("data.format", self.format, ("auto", *FORMATS))
        check_choice("data.on_error", self.on_error, ("stop", "substitute"))
        check(self.window >= 1, "data.window", self.window, "must be at least 1 shard")
        check(self.parts >= 1, "data.parts", self.parts, "must be at least 1")
        check(
            self.parts == 1 or self.format == "shards", "data.parts", self.parts, "applies to data.format=shards only"
        )
        some = self.train_images
        check(some is None or some >= 1, "data.train_images", some, "must be at least 1 image, or null for all")
        check(self.image_size >= 1, "data.image_size", self.image_size, "must be at least 1 pixel")
        for key in ("mean", "std"):
            values = getattr(self, key)
            rule = "three numbers, one a color; std positive"
            check(len(values) == 3 and (key == "mean" or min(values) > 0), f"data.{key}", values, rule)
        if self.format != "digits":
            check(self.root is not None, "data.root", self.root, "name the data's folder, data.root=PATH")
            if is_url(str(self.root)):
                rule = "only shards are read from a URL: data=remote, after python -m scripts.data.shards"
                check(self.format == "shards", "data.root", self.root, rule)
            else:
                self.root = str(Path(str(self.root)).expanduser())


@dataclass
class AugmentConfig:
    """How timm's transforms change an image in training, and crop it in evaluation."""

    scale: list[float] = field(default_factory=lambda: [0.08, 1.0])  # the share of the image's area in a crop
    hflip: float = 0.5
    color_jitter: float = 0.0
    auto_augment: str | None = None  # timm's notation, such as rand-m9-mstd0.5-inc1
    interpolation: str = "bicubic"
    random_erasing: float = 0.0
    erasing_mode: str = "pixel"
    repeats: int = 1  # copies of an image in one epoch, each with its own augmentation (DeiT)
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
    """How to train. Warm-ups are in epochs and may be fractions; `batch_size` is that of all devices together."""

    epochs: int = 300
    batch_size: int = 256
    optimizer: str = "adamw"  # any of timm's
    lr: float = 1e-3
    min_lr: float = 0.0
    warmup_epochs: float = 0.0
    warmup_from_zero: bool = False  # the first step's rate is 0, as in KernelWarehouse's release, and learns nothing
    schedule: str = "cosine"
    decay_epochs: list[float] = field(default_factory=list)  # schedule=step: when lr is multiplied by decay_rate
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
    ema_decay: float | None = None  # also keep an average of the weights, evaluate it and save it
    augment: AugmentConfig = field(default_factory=AugmentConfig)

    def __post_init__(self) -> None:
        check_choice("recipe.optimizer", self.optimizer, tuple(map(str, list_optimizers())))
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
            self.warmup_epochs < self.epochs,
            "recipe.warmup_epochs",
            self.warmup_epochs,
            "must be under recipe.epochs (0: none)",
        )


@dataclass
class RuntimeConfig(Runtime):
    precision: str = "float32"  # of forward and backward; weights stay float32
    micro_batch: int | None = resumable(None)  # samples at a time on a device; null: the device's share of the batch
    workers: int = resumable(0)  # processes that load data
    channels_last: bool = resumable(False)
    compile: bool = resumable(False)  # torch.compile
    sync_norm: bool = False  # batch statistics over all devices (GPUs only)
    checkpoint_steps: int | None = resumable(None)  # checkpoints within an epoch, besides those at its end
    keep_best: int = resumable(1)  # checkpoints of the best epochs to keep
    profile_steps: int = resumable(0)  # this many steps, from the fifth on, are profiled: profile/ in the run folder

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("runtime.precision", self.precision, ("float32", "bfloat16", "float16"))
        for key in ("workers", "keep_best", "profile_steps"):
            check(getattr(self, key) >= 0, f"runtime.{key}", getattr(self, key), "must not be negative")
        steps = self.checkpoint_steps
        check(steps is None or steps >= 1, "runtime.checkpoint_steps", steps, "must be at least 1, or null")
        check(self.micro_batch is None or self.micro_batch >= 1, "runtime.micro_batch", self.micro_batch, "at least 1")


@dataclass
class TrainConfig:
    n: Number = 1  # budget; of the methods of kw.baselines, the number of kernels in a layer
    dynamic: str = KW  # the method: kw, static (the vanilla backbone), or one of kw.baselines
    kw: SettingsConfig = field(default_factory=SettingsConfig)
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    data: DataConfig = field(default_factory=DataConfig)
    recipe: RecipeConfig = field(default_factory=RecipeConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig, metadata=RESUMABLE)
    seed: int = 0
    start_from: str | None = None  # a run or checkpoint of the same backbone at n=static: train on from its weights
    resume: str = resumable("auto")
    evaluate: str | None = resumable(None)
    freeze: str | None = resumable(None)  # with evaluate: of the frozen model, its cells float32, bfloat16 or int8
    label: str = resumable("${backbone.label}")  # the run's name begins with it
    name: str = resumable("")  # of the run folder; empty: `train.config.names`

    def __post_init__(self) -> None:
        check_choice("dynamic", self.dynamic, choices())
        if STATIC in (self.n, self.dynamic):
            self.dynamic = self.n = STATIC
        else:
            try:
                self.n = str(parse_budget(self.n) if self.dynamic == KW else check_budget(self.dynamic, self.n))
            except ValueError as error:
                raise ConfigError(f"{error} Or n={STATIC} for the vanilla backbone.") from None
        if self.kw.changes() and self.is_static:
            raise ConfigError(f"kw.{next(iter(self.kw.changes()))} applies to dynamic=kw only, not to n={STATIC}.")
        if self.dynamic not in (KW, STATIC):
            try:
                check_settings(self.dynamic, self.kw.changes())
            except ValueError as error:
                raise ConfigError(f"kw.{error}") from None
        rule = f"needs dynamic={', '.join(startable())}; {self.dynamic} has no place for static weights"
        check(self.start_from is None or self.dynamic in startable(), "start_from", self.start_from, rule)
        check_choice("resume", self.resume, ("auto", "never"))
        if self.freeze is not None:
            check_choice("freeze", self.freeze, FROZEN)
            check(self.evaluate is not None, "freeze", self.freeze, "needs evaluate=RUN_FOLDER_OR_CHECKPOINT")
        check(0 <= self.seed < 2**31, "seed", self.seed, "must be in [0, 2**31)")

    @property
    def is_static(self) -> bool:
        return self.dynamic == STATIC


ConfigStore.instance().store(name="schema", node=TrainConfig)
