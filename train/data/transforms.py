"""Images to tensors: timm's transforms, with the settings of a recipe."""

from __future__ import annotations

from collections.abc import Callable

from PIL import Image
from timm.data import create_transform
from torch import Tensor

from train.config import DataConfig, RecipeConfig

Transform = Callable[[Image.Image], Tensor]


def train_transform(data: DataConfig, recipe: RecipeConfig) -> Transform:
    """A random crop, flip, color changes and erasing; `(3, image_size, image_size)`, normalized."""
    augment = recipe.augment
    low, high = augment.scale
    transform: Transform = create_transform(
        data.image_size,
        is_training=True,
        scale=(low, high),
        hflip=augment.hflip,
        color_jitter=augment.color_jitter,
        auto_augment=augment.auto_augment,
        interpolation=augment.interpolation,
        mean=tuple(data.mean),
        std=tuple(data.std),
        re_prob=augment.random_erasing,
        re_mode=augment.erasing_mode,
    )
    return transform


def eval_transform(data: DataConfig, recipe: RecipeConfig) -> Transform:
    """Resize the short side to `eval_resize` (for 224 pixels; in proportion for others), and crop the center."""
    transform: Transform = create_transform(
        data.image_size,
        interpolation=recipe.augment.eval_interpolation,
        crop_pct=224 / recipe.augment.eval_resize,
        mean=tuple(data.mean),
        std=tuple(data.std),
    )
    return transform
