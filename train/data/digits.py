"""scikit-learn's handwritten digits: real images that need no download."""

from __future__ import annotations

import numpy as np
from PIL import Image

from train.data.images import Images
from train.jobs.errors import ConfigError


class Digits(Images):
    """Every fifth digit is in the split `val`, the others are in `train`; `all` has both.

    Raises:
        ConfigError: there is no such split.
    """

    def __init__(self, split: str):
        from sklearn.datasets import load_digits  # here, since importing scikit-learn takes a second

        if split not in ("train", "val", "all"):
            raise ConfigError(f"data: the digits have no split {split!r}; there are train, val and all.")
        digits = load_digits()
        held_out = np.arange(len(digits.images)) % 5 == 4
        kept = {"train": ~held_out, "val": held_out, "all": np.ones_like(held_out)}[split]
        self.images = (digits.images[kept] * (255 / 16)).astype(np.uint8)  # (N, 8, 8); scikit-learn's are 0 to 16
        self.targets = digits.target[kept]
        self.classes = [str(name) for name in digits.target_names]

    def load(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.images[index]).convert("RGB"), int(self.targets[index])

    def describe(self, index: int) -> str:
        return f"digit {index}"
