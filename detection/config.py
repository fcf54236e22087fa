"""The settings of `python -m detection` besides the keys of MMDetection's configuration file, which compose.py sets."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from kw.baselines.registry import choices
from kw.config import STATIC, parse_budget
from train.jobs.errors import ConfigError, check, check_choice
from train.jobs.settings import RESUMABLE, LoggerConfig, Runtime, resumable


@dataclass
class DataConfig:
    root: str | None = resumable(None)  # in place of data_root in the file; laid out as COCO is
    classes: str = "config"  # those that the file names (COCO's 80); data: those of the annotations, heads follow
    on_error: str = "stop"  # at a broken training image; substitute: use the next one that can be read

    def __post_init__(self) -> None:
        check_choice("data.on_error", self.on_error, ("stop", "substitute"))
        check_choice("data.classes", self.classes, ("config", "data"))


@dataclass
class RuntimeConfig(Runtime):
    """A batch size in the file is that of each process."""

    workers: int | None = resumable(None)  # processes that load data; null: as in the file
    checkpoint_steps: int | None = resumable(None)  # checkpoints within an epoch, besides those at its end
    keep_best: int = resumable(1)  # checkpoints of the best epochs to keep

    def __post_init__(self) -> None:
        super().__post_init__()
        steps = self.checkpoint_steps
        check(steps is None or steps >= 1, "runtime.checkpoint_steps", steps, "must be at least 1, or null")
        check(self.keep_best >= 0, "runtime.keep_best", self.keep_best, "must not be negative")
        check(self.workers is None or self.workers >= 0, "runtime.workers", self.workers, "must not be negative")


# A setting that decides what is learnt, and is compared on a resume by its effect on MMDetection's configuration.
IN_THE_FILE = {**RESUMABLE, "in the file": True}


@dataclass
class DetectionConfig:
    """What `python -m detection` sets itself; all other keys are those of MMDetection's file."""

    config: str = field(default="", metadata=IN_THE_FILE)
    n: int | float | str | None = field(default=None, metadata=IN_THE_FILE)
    dynamic: str | None = field(default=None, metadata=IN_THE_FILE)  # kw, static, or a method of kw.baselines
    init: str | None = field(default=None, metadata=IN_THE_FILE)  # a checkpoint of the backbone
    start_from: str | None = field(default=None, metadata=IN_THE_FILE)  # one of the static backbone
    scratch: bool = False
    data: DataConfig = field(default_factory=DataConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig, metadata=RESUMABLE)
    seed: int = 0
    resume: str = resumable("auto")
    evaluate: str | None = resumable(None)
    name: str = resumable("")  # of the run folder; empty: `detection.names`

    def __post_init__(self) -> None:
        check(self.config != "", "config", self.config, "must name a file of detection/configs/, or a path")
        if self.n is not None and self.n != STATIC:
            try:
                self.n = str(parse_budget(self.n))
            except ValueError as error:
                raise ConfigError(f"{error} Or n={STATIC} for the vanilla backbone.") from None
        if self.dynamic is not None:
            check_choice("dynamic", self.dynamic, choices())
        given = [key for key in ("init", "start_from") if getattr(self, key) is not None]
        check(len(given) < 2, "start_from", self.start_from, f"contradicts init={self.init}: set one")
        for key in given:
            rule = f"means to begin without a checkpoint, but {key}={getattr(self, key)}"
            check(not self.scratch, "scratch", self.scratch, rule)
        check_choice("resume", self.resume, ("auto", "never"))
        check(0 <= self.seed < 2**31, "seed", self.seed, "must be in [0, 2**31)")


OWN = {f.name for f in fields(DetectionConfig)} | {"hydra"}


def open_up(words: Sequence[str]) -> list[str]:
    """The command line as Hydra takes it. Keys of MMDetection's file, which our schema lacks, are added to it: by "++"
    if the file must have them, and by "+" if the user typed that, to add a key to the file too."""
    opened = []
    for word in words:
        key = re.match(r"(\+*)([A-Za-z_]\w*)[\w.]*=", word)
        if key is None or key[2] in OWN:
            opened.append(word)
        else:
            opened.append(f"{'+' if key[1] else '++'}{word.lstrip('+')}")
    return opened


def added_keys(words: Sequence[str]) -> list[str]:
    """The keys that the file need not have, of overrides as `open_up` makes them."""
    return [word[1:].partition("=")[0] for word in words if re.match(r"\+[^+]", word)]


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


ConfigStore.instance().store(name="detection_schema", node=DetectionConfig)
