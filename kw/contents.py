"""What config.json of a model folder (kw/folder.py) says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# How timm prepares an image for evaluation (`timm.data.create_transform`).
DATA = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")


@dataclass(frozen=True)
class Contents:
    """What config.json says.

    Args:
        description: of the model, as `kw.description.describe` makes it.
        data: how images are prepared, by the keys `DATA`.
        classes: names, in the order of the outputs; None if they are not known.
        temperature: of the attentions; None if the model has none.
        figures: what was measured of the model, for the card: name -> value.
        provenance: where it is from, for the card: name -> value.
        more: others of timm's `pretrained_cfg`, such as the name of the classifier.
    """

    description: Mapping[str, Any]
    data: Mapping[str, Any]
    num_classes: int
    classes: tuple[str, ...] | None = None
    temperature: float | None = None
    figures: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    more: Mapping[str, Any] = field(default_factory=dict)
