"""Arguments of the commands that take a training configuration: KEY=VALUE, as `python -m train` does.

A command declares its own keys as a dataclass. All other keys are overrides of the training configuration, for
`train.config.compose`.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TypeVar

from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from train.config import TrainConfig
from train.jobs.advice import advice
from train.jobs.errors import ConfigError, RunError, writing

T = TypeVar("T")


def parse(kind: type[T], words: Sequence[str], doc: str | None) -> tuple[T, list[str]]:
    """The command's own options, and the words that are not among them. With --help, prints `doc` and exits.

    Raises:
        ConfigError: a word is not KEY=VALUE or is nearly one of the options, or an option has a wrong value; the
            message names it.
    """
    own = OmegaConf.structured(kind)
    if {"-h", "--help"} & set(words):
        defaults = " ".join(f"{key}={value}" for key, value in OmegaConf.to_container(own).items())  # type: ignore[union-attr]
        sys.exit(print(f"{doc}\nDefaults: {defaults}"))
    others = []
    for word in words:
        key, equals, _ = word.partition("=")
        if not equals and not word.startswith("~"):  # ~KEY is Hydra's: remove this key
            raise ConfigError(f"{word!r} is not KEY=VALUE. Keys of this command: {', '.join(own)}.")
        if key not in own:
            _refuse_mistyped(word, key, list(map(str, own)))
            others.append(word)
            continue
        try:
            own = OmegaConf.merge(own, OmegaConf.from_dotlist([word]))
        except OmegaConfBaseException as error:
            raise ConfigError(f"{word}: {str(error).splitlines()[0]}.") from None
    options = OmegaConf.to_object(own)
    assert isinstance(options, kind)
    return options, others


def _refuse_mistyped(word: str, key: str, own: list[str]) -> None:
    """Raises ConfigError: the key is nearly one of the command's own, and is not one of the training configuration."""
    known = {one.name for one in fields(TrainConfig)}
    near = difflib.get_close_matches(key, own, n=1, cutoff=0.8)
    if near and key not in known:
        raise ConfigError(f"{word}: did you mean {near[0]}=...? Keys of this command: {', '.join(own)}.")


def imagenet_defaults(overrides: list[str]) -> list[str]:
    """Overrides that make the data ImageNet's, where none are named; no image is read."""
    keys = {word.partition("=")[0] for word in overrides}
    data = [] if keys & {"data", "experiment"} else ["data=imagenet"]
    return data + ([] if "data.root" in keys else ["data.root=unused"])


@contextmanager
def one_line_errors() -> Iterator[None]:
    """End the program with one line where a setting, a checkpoint or a file is at fault."""
    try:
        yield
    except RunError as error:
        sys.exit(str(error).splitlines()[0])
    except HydraException as error:
        sys.exit(advice(error, "train"))


def make_folder(folder: Path) -> Path:
    """The folder, made if it is not there. Raises WriteError: it cannot be."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return folder
