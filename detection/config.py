"""What `python -m detection` can be told: its own keys, checked here, and those of MMDetection's configuration file."""

import difflib
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from mmengine.config import Config
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from detection.backbone import feature_channels
from detection.data import datasets, read_classes, set_classes
from kw.backbones import STATIC
from kw.config import format_budget, parse_budget
from kw.jobs.errors import ConfigError

CONFIGS = Path(__file__).parent / "configs"


def check(holds: bool, key: str, value: object, rule: str) -> None:
    if not holds:
        raise ConfigError(f"{key}={value!r}: {rule}.")


@dataclass
class DataConfig:
    root: str | None = None  # in place of data_root in the file; laid out as COCO is
    classes: str = (
        "config"  # config: those that the file names (COCO's 80); data: those of the annotations, heads follow
    )

    def __post_init__(self) -> None:
        check(self.classes in ("config", "data"), "data.classes", self.classes, "must be config or data")


@dataclass
class RuntimeConfig:
    device: str = "auto"  # cuda where there is one, else cpu
    devices: int = 1  # processes on a node, a GPU each; a batch size in the file is that of each
    nodes: int = 1  # the same command runs on each
    rendezvous: str | None = None  # host:port of the first of several nodes
    workers: int | None = None  # processes that load data; null: as in the file

    def __post_init__(self) -> None:
        check(self.device in ("auto", "cpu", "cuda"), "runtime.device", self.device, "must be auto, cpu or cuda")
        check(self.devices >= 1, "runtime.devices", self.devices, "must be at least 1")
        check(self.nodes >= 1, "runtime.nodes", self.nodes, "must be at least 1")
        check(self.workers is None or self.workers >= 0, "runtime.workers", self.workers, "must not be negative")
        meets = self.nodes == 1 or self.rendezvous is not None
        check(meets, "runtime.nodes", self.nodes, "where do they meet? runtime.rendezvous=FIRST_NODE:PORT")


@dataclass
class LoggerConfig:
    """Services that show a run while it goes on, through MMEngine's own backends."""

    services: list[str] = field(default_factory=list)  # tensorboard, wandb
    mode: str = "offline"  # of wandb: offline, for `wandb sync` later, or online
    project: str = "kernelwarehouse"  # of wandb, as entity and group
    entity: str | None = None
    group: str | None = None

    def __post_init__(self) -> None:
        for service in self.services:
            check(service in ("tensorboard", "wandb"), "logger.services", service, "must be tensorboard or wandb")
        check(self.mode in ("offline", "online"), "logger.mode", self.mode, "must be offline or online")


@dataclass
class DetectionConfig:
    config: str = "???"
    n: Any = None
    init: str | None = None
    data: DataConfig = field(default_factory=DataConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    seed: int = 0
    resume: str = "auto"
    evaluate: str | None = None
    name: str = ""
    added: list[str] = field(default_factory=list)  # keys of the file that it need not have; set by the program itself

    def __post_init__(self) -> None:
        if self.n not in (None, STATIC):
            try:
                self.n = str(parse_budget(self.n))
            except ValueError as error:
                raise ConfigError(f"{error} Or n={STATIC} for the vanilla backbone.") from None
        check(self.resume in ("auto", "never"), "resume", self.resume, "must be auto or never")
        check(0 <= self.seed < 2**31, "seed", self.seed, "must be in [0, 2**31)")


OWN = {f.name for f in fields(DetectionConfig)} | {"hydra"}


def open_up(words: Sequence[str]) -> list[str]:
    """The command line as Hydra takes it: keys that are not ours, so of MMDetection's file, are added to our schema.
    Those typed with a "+" are noted, as they need not be in that file."""
    opened, added = [], []
    for word in words:
        key = re.match(r"(\+*)(([A-Za-z_]\w*)[\w.]*)=", word)
        if key is None or key[3] in OWN:
            opened.append(word)
            continue
        opened.append(f"++{word.lstrip('+')}")
        if key[1]:
            added.append(key[2])
    return [*opened, f"added=[{','.join(added)}]"] if added else opened


def validate(composed: DictConfig) -> DetectionConfig:
    """Our keys of the composed configuration, checked.

    Raises:
        ConfigError: naming the key.
    """
    ours = OmegaConf.create({key: value for key, value in composed.items_ex(resolve=False) if key in OWN})
    try:
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(DetectionConfig), ours))
    except OmegaConfBaseException as error:
        raise ConfigError(str(error).splitlines()[0] + (f" ({error.full_key})" if error.full_key else "")) from None
    assert isinstance(config, DetectionConfig)
    return config


def compose(config: DetectionConfig, composed: DictConfig) -> Config:
    """MMDetection's configuration: the file, with what the command line sets.

    Args:
        composed: what Hydra composed, whose keys that are not ours are the file's.

    Raises:
        ConfigError: there is no such file or key, or the file's backbone has no budget that could be set.
    """
    cfg = Config.fromfile(find(config.config))
    plain = OmegaConf.to_container(composed, resolve=True)
    assert isinstance(plain, dict)
    given = dict(flatten({key: value for key, value in plain.items() if key not in OWN}))
    for key in given:
        if not any(key == word or key.startswith(f"{word}.") for word in config.added):
            check_known(cfg, key)
    cfg.merge_from_dict(given)
    if config.data.root is not None:
        move_data(cfg, Path(config.data.root).expanduser())
    if config.data.classes == "data":
        set_classes(cfg, read_classes(cfg))
    for loader in (cfg[key] for key in cfg if key.endswith("_dataloader") and cfg[key]):
        if config.runtime.workers is not None:
            loader.num_workers = config.runtime.workers
        loader.persistent_workers = loader.num_workers > 0
    set_backbone(cfg, config, given)
    return cfg


def find(name: str) -> Path:
    """A configuration file by its name in detection/configs/ or its path."""
    known = {path.stem: path for path in CONFIGS.glob("*.py")}
    if name in known:
        return known[name]
    if Path(name).expanduser().is_file():
        return Path(name).expanduser()
    near = difflib.get_close_matches(name, known, n=3)
    raise ConfigError(
        f"config={name!r}: no such file, nor one in detection/configs; near are {', '.join(near) or '-'}."
    )


def flatten(nested: dict[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """`{"train_cfg": {"max_epochs": 1}}` to `("train_cfg.max_epochs", 1)`."""
    for key, value in nested.items():
        if isinstance(value, dict) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def check_known(cfg: Config, key: str) -> None:
    """Raises ConfigError if the file has no such key."""
    place: Any = cfg
    for part in key.split("."):
        if isinstance(place, list) and part.isdigit() and int(part) < len(place):
            place = place[int(part)]
        elif isinstance(place, (dict, Config)) and part in place:
            place = place[part]
        else:
            known = list(place) if isinstance(place, (dict, Config)) else []
            near = difflib.get_close_matches(part, [str(name) for name in known], n=3)
            hint = f"; near are {', '.join(near)}" if near else ""
            raise ConfigError(f"{key}: the configuration has no {part!r} there{hint}. To add it: +{key}=...")


def move_data(cfg: Config, root: Path) -> None:
    """Read all data sets, and the evaluators' annotations, from `root`."""
    for split in ("train", "val", "test"):
        for dataset in datasets(cfg, split):
            dataset.data_root = str(root)
            evaluator = cfg.get(f"{split}_evaluator")
            for metric in evaluator if isinstance(evaluator, list) else [evaluator]:
                if metric and metric.get("ann_file"):
                    metric.ann_file = str(root / dataset.ann_file)


def set_backbone(cfg: Config, config: DetectionConfig, given: dict[str, Any]) -> None:
    """Budget, checkpoint, and the channels that the neck takes."""
    backbone, neck = cfg.model.backbone, cfg.model.get("neck")
    if backbone.type != "KWBackbone":
        for key in ("n", "init"):
            check(getattr(config, key) is None, key, getattr(config, key), f"not for a backbone {backbone.type}")
        return
    if config.n is not None:
        backbone.n = config.n
    if config.init is not None:
        backbone.init_cfg = {"type": "Pretrained", "checkpoint": config.init}
    if isinstance(neck, dict) and "model.neck.in_channels" not in given:
        indices = backbone.get("out_indices", (1, 2, 3, 4))
        neck["in_channels"] = feature_channels(backbone.name, indices, backbone.get("kwargs"))


# Where it runs and how it is watched; not what is learnt.
HOW_IT_RUNS = re.compile(
    r"config|n|name|added|resume|evaluate|seed|data\.root|runtime(\..+)?|logger(\..+)?|(default_hooks|visualizer|log_).*|"
    r"\w+_dataloader\.(num_workers|persistent_workers|dataset\.data_root)|hydra.*"
)
MAX_NAME = 120


def run_name(config: str, n: Any) -> str:
    """A run folder's name: the file's, with the budget if one was given and other settings that decide what is learnt
    (`mask_rcnn_kw1x_resnet50_1x_coco+n4x+train_cfg.max_epochs-1`)."""
    name = Path(config).stem if config.endswith(".py") else config
    if n is not None:
        try:
            name += f"+n-{STATIC if n == STATIC else format_budget(n)}"
        except ValueError:
            name += "+n"  # n is no budget: validate says so, once there is a run
    for override in sorted(HydraConfig.get().overrides.task if HydraConfig.initialized() else []):
        key, _, value = override.lstrip("+~").partition("=")
        if not HOW_IT_RUNS.fullmatch(key):
            name += re.sub(r"[^\w.+-]+", "_", f"+{key}-{value}")
    return name if len(name) <= MAX_NAME else f"{name[:MAX_NAME]}+{hashlib.sha1(name.encode()).hexdigest()[:8]}"


def learnt_settings(cfg: Config) -> str:
    """What decides what is learnt, as text: a run goes on only where it is the same."""
    kept = ("model", "train_dataloader", "train_cfg", "optim_wrapper", "param_scheduler")
    plain = {key: value for key, value in flatten(cfg.to_dict()) if key.startswith(kept)}
    settings = {key: value for key, value in plain.items() if not HOW_IT_RUNS.fullmatch(key) and "init_cfg" not in key}
    return json.dumps(settings, indent=1, sort_keys=True, default=str)


OmegaConf.register_new_resolver("detection_name", run_name, replace=True)
ConfigStore.instance().store(name="detection_schema", node=DetectionConfig)
