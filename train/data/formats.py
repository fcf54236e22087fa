"""The data formats there are (`data.format`), and how a split of a data set is opened."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from train.data.archive import Archive
from train.data.cifar import Cifar10, has_cifar10
from train.data.digits import Digits
from train.data.folder import Folder
from train.data.images import Images
from train.data.remote import is_url
from train.data.remote_shards import RemoteShards
from train.data.shards import LocalShards
from train.jobs.errors import ConfigError

if TYPE_CHECKING:
    from train.config import DataConfig

# Each opens one split. `setting` is the key that names the split, for messages.
FORMATS: dict[str, Callable[[Path, str, str, DataConfig], Images]] = {
    "digits": lambda root, split, setting, data: Digits(split),
    "folder": lambda root, split, setting, data: Folder(root, split, setting),
    "tar": lambda root, split, setting, data: Archive(root, split, setting),
    "shards": lambda root, split, setting, data: (
        RemoteShards(data, split)
        if is_url(str(data.root))
        else LocalShards(root, split, data.window, data.num_classes, (data.train_split, data.eval_split), data.parts)
    ),
    "cifar10": lambda root, split, setting, data: Cifar10(root, split, setting),
}


def open_split(data: DataConfig, split: str, setting: str = "data.train_split, data.eval_split") -> Images:
    """The images of one split.

    Args:
        setting: the key that names the split, for messages.

    Raises:
        ConfigError: the split is missing or empty, or has another number of classes than data.num_classes.
        DataError: an archive is damaged, or shards are missing or cannot be downloaded.
    """
    root = Path(data.root or ".")
    name = detect(root) if data.format == "auto" else data.format
    images = FORMATS[name](root, split, setting, data)
    if data.num_classes is not None and len(images.classes) != data.num_classes:
        raise ConfigError(
            f"data.num_classes={data.num_classes}, but {split!r} of data.root={data.root!r} has "
            f"{len(images.classes)} classes. data.num_classes=null takes the number from the data."
        )
    return images


def detect(root: Path) -> str:
    """The format of `data.format=auto`: CIFAR-10's own files, a tar archive, or folders of images."""
    if has_cifar10(root):
        return "cifar10"
    return "tar" if root.is_file() or root.suffix == ".tar" else "folder"
