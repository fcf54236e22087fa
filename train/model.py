"""The model of a run: a backbone of kw at the budget n, or any other timm model converted with the default scope."""

from __future__ import annotations

from typing import Any

import timm
from torch import nn

import kw
from kw.backbones import BACKBONES
from train.config import TrainConfig
from train.errors import ConfigError


def build_model(config: TrainConfig, num_classes: int) -> nn.Module:
    """Build, with cells and attentions at their initial values.

    Raises:
        ConfigError: timm does not take `backbone.kwargs`, or the kernels cannot be cut as asked.
    """
    name = config.backbone.name
    kwargs: dict[str, Any] = {"num_classes": num_classes, "drop_rate": config.recipe.dropout}
    if config.recipe.drop_path > 0:
        kwargs["drop_path_rate"] = config.recipe.drop_path
    if timm.get_pretrained_cfg(name).fixed_input_size:  # transformers: positions of another image size
        kwargs["img_size"] = config.data.image_size
    kwargs |= config.backbone.kwargs
    settings = config.kw.given()
    try:
        if name in BACKBONES:
            return timm.create_model(f"kw_{name}", n=config.n, **settings, **kwargs)
        model = timm.create_model(name, **kwargs)
        return model if config.is_static else kw.convert(model, config=kw.KWConfig(n=config.n, **settings))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"backbone={name} cannot be built at n={config.n}: {error}") from error
