"""`python -m helpers.agreeing FOLDER`: what four processes on two pretended nodes share and agree on, in lines."""

import os
import socket
import sys
from pathlib import Path

from helpers.training import NARROW, TINY
from train.config import RuntimeConfig, compose
from train.data import run_data
from train.jobs.agreement import agree, once_per_node
from train.jobs.errors import ConfigError, DataError, RunError
from train.jobs.world import connect, disconnect
from train.trainer import Trainer

RANK = int(os.environ["RANK"])
NODE = RANK // 2
HERE = Path(sys.argv[1])


def note(word: str) -> None:
    """A line in one file for all: which process did what."""
    with (HERE / "notes").open("a") as file:
        file.write(f"{word} {RANK}\n")


def say(*words: object) -> None:
    print(f"{RANK}: {' '.join(map(str, words))}\n", end="", flush=True)


def refused(make) -> None:
    try:
        make()
    except RunError as error:
        say("refused", type(error).__name__, error.everywhere, error)


def made() -> list[int]:
    note("made")
    return [NODE]


def fails() -> None:
    if NODE == 1:
        raise DataError("node 1 has no images")


def counted(*of: object):
    note("scanned")
    return open_split(*of)


def trainer(*words: str) -> Trainer:
    settings = ["n=static", "recipe.batch_size=64", *words]
    return Trainer(compose([*TINY, *NARROW, *settings]), HERE / "run", world)


world = connect(RuntimeConfig(device="cpu"))
os.environ["LOCAL_RANK"] = str(RANK % 2)
socket.gethostname = lambda: f"node{NODE}"
open_split, run_data.open_split = run_data.open_split, counted
try:
    say("shared", once_per_node(world, made))
    refused(lambda: once_per_node(world, fails))
    refused(lambda: agree(world, "the code", "a", "."))
    refused(lambda: agree(world, "the code", "ab"[NODE], "Bring them together."))
    one = trainer()
    one.save()
    if RANK == 3:  # a file system that does not show the newest files yet
        one.checkpoints.newest = lambda: None
    refused(one.resume)
    refused(lambda: trainer("data.train_images=640" if NODE else "data.train_images=704"))
except ConfigError as error:
    say("not expected", error)
finally:
    disconnect()
