"""The index of WebDataset shards, which training from a URL needs: SPLIT.index.npz with every sample's place.

    python -m scripts.data.index FOLDER                                            of shards on this disk
    python -m scripts.data.index URL --out FOLDER --splits train --shards train-{000000..000640}.tar

The second reads each shard once, and keeps none. Upload the index to where the shards are, or name its place by
data.remote.index. scripts.data.shards makes the index by itself.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from scripts.arguments import argument_parser
from scripts.options import make_folder
from train.config import RemoteConfig
from train.data.remote import chunks, is_url, retrying, url_of
from train.data.remote_shards import index_name, make_index, write_index
from train.data.shards import list_shards, read_classes
from train.jobs.errors import ConfigError, RunError


def main() -> None:
    parser = argument_parser("data.index", __doc__)
    parser.add_argument("root", help="folder, URL, or pipe:COMMAND with {} for a file's name")
    parser.add_argument("--out", type=Path, help="folder for SPLIT.index.npz (default: root)")
    parser.add_argument("--splits", nargs="+", default=["train", "val"], metavar="SPLIT", help="default: train val")
    parser.add_argument(
        "--shards", nargs="+", default=[], metavar="NAME", help="at a URL: names, which begin with SPLIT-"
    )
    parser.add_argument("--classes", type=Path, help="folder with classes.txt or classes.json (default: root)")
    options = parser.parse_args()
    try:
        index_shards(options.root, options.splits, options.out, options.shards, options.classes)
    except RunError as error:
        sys.exit(f"{type(error).__name__}: {error}")


def index_shards(
    root: str, splits: list[str], out: Path | None = None, shards: list[str] | None = None, classes: Path | None = None
) -> None:
    """Write the indexes of all splits, once all of them are made.

    Raises:
        ConfigError: a split has no shards, or there is no folder for the index.
        DataError: a shard is damaged, or cannot be downloaded.
    """
    out = out or (None if is_url(root) else Path(root))
    if out is None:
        raise ConfigError(f"{root} is a URL: name a folder for the index by --out.")
    indexes = {}
    for split in splits:
        names = sorted(name for name in shards or () if name.startswith(f"{split}-"))
        found = downloaded(root, names) if is_url(root) else list_shards(Path(root), split)
        if not (names if is_url(root) else found):
            raise ConfigError(f"{root} has no shards {split}-*.tar{' in --shards' if is_url(root) else ''}.")
        indexes[split] = make_index(found)
    place = classes or (None if is_url(root) else Path(root))
    named = read_classes(place) if place else []
    most = 1 + max(int(index["targets"].max(initial=0)) for index in indexes.values())
    make_folder(out)
    for split, index in indexes.items():
        write_index(out, split, index, named or [str(number) for number in range(most)])
        print(f"{out / index_name(split)}: {len(index['targets'])} samples in {len(index['shards'])} shards")


def downloaded(root: str, names: list[str]) -> Iterator[Path]:
    """Each shard in turn, which is removed when the next one is asked for."""
    remote = RemoteConfig()
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            path, url = Path(folder) / name, url_of(root, name)

            def attempt(path: Path = path, url: str = url) -> None:
                with path.open("wb") as file:
                    file.writelines(chunks(url, remote.timeout))

            retrying(url, remote, attempt)
            yield path
            path.unlink()


if __name__ == "__main__":
    main()
