"""What `python -m detection` can be told beside the keys of MMDetection's configuration file, which compose.py sets."""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from kw.config import STATIC, format_budget, parse_budget
from train.jobs.errors import ConfigError, check, check_choice


@dataclass
class DataConfig:
    root: str | None = None  # in place of data_root in the file; laid out as COCO is
    classes: str = "config"  # those that the file names (COCO's 80); data: those of the annotations, heads follow

    def __post_init__(self) -> None:
        check_choice("data.classes", self.classes, ("config", "data"))


@dataclass
class RuntimeConfig:
    device: str = "auto"  # cuda where there is one, else cpu
    devices: int = 1  # processes on a node, a GPU each; a batch size in the file is that of each
    nodes: int = 1  # the same command runs on each
    rendezvous: str | None = None  # host:port of the first of several nodes
    workers: int | None = None  # processes that load data; null: as in the file

    def __post_init__(self) -> None:
        check_choice("runtime.device", self.device, ("auto", "cpu", "cuda"))
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
            check_choice("logger.services", service, ("tensorboard", "wandb"))
        check_choice("logger.mode", self.mode, ("offline", "online"))


@dataclass
class DetectionConfig:
    config: str = ""
    n: Any = None
    init: str | None = None
    scratch: bool = False
    data: DataConfig = field(default_factory=DataConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    seed: int = 0
    resume: str = "auto"
    evaluate: str | None = None
    name: str = ""
    added: list[str] = field(default_factory=list)  # keys of the file that it need not have; set by the program itself

    def __post_init__(self) -> None:
        check(self.config != "", "config", self.config, "must name a file of detection/configs/, or a path")
        if self.n not in (None, STATIC):
            try:
                self.n = str(parse_budget(self.n))
            except ValueError as error:
                raise ConfigError(f"{error} Or n={STATIC} for the vanilla backbone.") from None
        both = self.scratch and self.init is not None
        check(not both, "scratch", self.scratch, f"means to begin without a checkpoint, but init={self.init}")
        check_choice("resume", self.resume, ("auto", "never"))
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


OmegaConf.register_new_resolver("detection_name", run_name, replace=True)
ConfigStore.instance().store(name="detection_schema", node=DetectionConfig)
