"""Folders of images in one tar archive."""

from __future__ import annotations

import posixpath
from pathlib import Path

from torchvision.datasets.folder import IMG_EXTENSIONS

from train.data import tar
from train.data.images import ADDED, Files, is_hidden
from train.jobs.errors import ConfigError


class Archive(Files):
    """Images at `.../split/<class>/*` in a tar archive, in the order of a folder with the same files.

    Args:
        setting: the key that names the split, for messages.

    Raises:
        ConfigError: there is no such archive or split, the split is there twice, or a class has no images.
        DataError: the archive is damaged.
    """

    def __init__(self, path: Path, split: str, setting: str):
        if not path.is_file():
            what = "is a folder: data.format=folder reads it" if path.is_dir() else "does not exist"
            raise ConfigError(f"data.root={str(path)!r} {what}; data.format=tar reads a tar archive.")
        self.path, self.stamp = str(path), tar.stamp_of(path)
        files, self.classes = split_of(path, index_archive(path), split, setting)
        self.names, self.offsets, self.sizes = files["names"], files["offsets"], files["sizes"]  # (N,) each
        self.targets = files["targets"]

    def read(self, index: int) -> bytes:
        return tar.read_at(self.path, self.stamp, int(self.offsets[index]), int(self.sizes[index]))

    def describe(self, index: int) -> str:
        return f"{self.path}:{tar.name_of(self.names[index])}"


def index_archive(path: Path) -> tar.Arrays:
    """All folders and images of an archive: `names` (N,) in bytes, `offsets` (N,), `sizes` (N,). From the cache if it
    is there."""

    def build() -> tar.Arrays:
        kept = [member for member in tar.members(path) if member.size == tar.FOLDER or tar.is_image(member.name)]
        return {
            "names": tar.names_array([member.name for member in kept]),
            "offsets": tar.numbers_array([member.offset for member in kept]),
            "sizes": tar.numbers_array([member.size for member in kept]),
        }

    return tar.cached([path], build)


def split_of(path: Path, index: tar.Arrays, split: str, setting: str) -> tuple[tar.Arrays, list[str]]:
    """The images at `.../split/<class>/...` in the order of torchvision's ImageFolder, with their `targets`, and the
    names of the classes.

    Raises:
        ConfigError: there is no such split, it is there twice, or a class has no images.
    """
    names = [tar.name_of(name) for name in index["names"].tolist()]
    base = _split_folder(path, names, split, setting)
    depth = base.count("/") + 1
    files: list[tuple[str, str, str, int]] = []  # class, folder, file, row in the index
    classes = set()
    for row, name in enumerate(names):
        if name.startswith(base + "/"):
            parts = name.split("/")
            if any(map(is_hidden, parts[depth:])):
                continue
            if index["sizes"][row] != tar.FOLDER and len(parts) > depth + 1:
                files.append((parts[depth], posixpath.dirname(name), parts[-1], row))
            elif index["sizes"][row] == tar.FOLDER:
                classes.add(parts[depth])
    files.sort()
    filled = {file[0] for file in files}
    if empty := sorted(classes - filled):
        raise ConfigError(f"{path}: {base}/{empty[0]} has no images ({', '.join(IMG_EXTENSIONS)}).")
    numbers = {name: number for number, name in enumerate(sorted(filled))}
    rows = tar.numbers_array([file[3] for file in files])
    columns = {key: column[rows] for key, column in index.items()}
    return {**columns, "targets": tar.numbers_array([numbers[file[0]] for file in files])}, sorted(filled)


def _split_folder(path: Path, names: list[str], split: str, setting: str) -> str:
    """The path of a split's folder: the highest of that name that has files two levels below."""
    found, others = set(), set()
    for name in names:
        parts = name.split("/")
        if parts[0] in ADDED:
            continue
        if split in parts[:-2]:
            found.add("/".join(parts[: parts.index(split) + 1]))
        elif len(parts) > 2:
            others.add(parts[-3])
    if not found:
        raise ConfigError(
            f"{path} has no folder {split!r} of classes with images; it has "
            f"{', '.join(sorted(others)[:6]) or 'none'}. {setting}: a folder's name."
        )
    depth = min(name.count("/") for name in found)
    highest = sorted(name for name in found if name.count("/") == depth)
    if len(highest) > 1:
        raise ConfigError(f"{path} has {split!r} twice, at {highest[0]!r} and {highest[1]!r}: leave one out.")
    return highest[0]
