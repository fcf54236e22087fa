"""`data.on_error=substitute`: the images that a batch has in place of broken ones."""

from __future__ import annotations

from pathlib import Path

import torch

from train.data.images import Images
from train.data.loader import Loaded
from train.jobs.substitutes import SubstituteList


class Substitutes(SubstituteList):
    """The list of a run's replaced images, which `images` can name."""

    def __init__(self, folder: Path, images: Images, rank: int = 0):
        super().__init__(folder, rank)
        self.images = images

    def record(self, batch: Loaded) -> None:
        """Append what was replaced in a batch to this rank's file.

        Raises:
            WriteError: the disk is full or the folder cannot be written.
        """
        columns = (torch.as_tensor(column).tolist() for column in (batch.epoch, batch.index, batch.copy, batch.used))
        rows = [row for row in zip(*columns, strict=True) if row[1] != row[3]]
        describe = self.images.describe
        self.append((epoch, index, copy, describe(index), describe(used)) for epoch, index, copy, used in rows)
