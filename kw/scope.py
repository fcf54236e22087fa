"""Which layers of a model could be dynamic, which cannot and why, and the stage and kind of each."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from kw.observing import Example, Observation, observe
from kw.replace import PLAIN, shared_weights, why_not_plain

READS_IMAGE = "reads the model's input"
HEAD = "its output is the model's"
GATE = "a gate, as in squeeze-and-excitation: it sees one position and scales features of more"
CUT_OFF = "no gradient reaches its input"
READ = "the model reads its weight itself"
NEVER_RUNS = "does not run in evaluation mode"
NOT_OF_SAMPLES = "its input is not a batch of samples"
SHARED = "its weight is also another module's"
# Reasons for layers that count among those that could be dynamic.
WITHIN = (GATE, CUT_OFF, READ, NEVER_RUNS, NOT_OF_SAMPLES, SHARED)


@dataclass(frozen=True)
class Layer:
    """A convolution or linear layer of a static model.

    Args:
        shape: of its kernel, `(C_out, C_in / groups, *kernel_size)`.
        channels: input channels, all groups together.
        kind: of `kind_of`.
        stage: layers of one resolution have the same; from 1 on in the order of the network, 0 if all are static.
        trained: whether its weight has a gradient.
        static: why it cannot be dynamic; None if it can.
    """

    name: str
    shape: tuple[int, ...]
    channels: int
    kind: str
    stage: int
    trained: bool
    static: str | None

    @property
    def weights(self) -> int:
        return math.prod(self.shape)


def kind_of(layer: nn.Module) -> str:
    """`linear`, `pointwise`, `depthwise`, `grouped` or `conv`: kernels of a kind can be cut into the same cells."""
    if isinstance(layer, nn.Linear):
        return "linear"
    assert isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
    if layer.groups > 1:
        return "depthwise" if layer.groups == layer.in_channels else "grouped"
    return "pointwise" if math.prod(layer.kernel_size) == 1 else "conv"


def layers_of(model: nn.Module, example: Example = None) -> list[Layer]:
    """The convolutions and linear layers of `model`, in module order. These stay static:

    - the first, which reads the image, and the last: the classifiers (timm's `get_classifier()`, else layers whose
      outputs are the model's);
    - gates, such as squeeze-and-excitation, which are an attention already: layers that see one position and scale
      features of more;
    - layers whose weight the model reads itself, or shares with another module, and those that do not run;
    - layers of a class that computes something else (weight standardization), or whose weight or bias is a
      parametrization's.

    A forward pass on the meta device shows most of it (`kw.observing`). Where a model runs on no input that could be
    guessed, and none is given, names and classes have to do.

    Stages are those of timm's `feature_info` as far as it goes, then resolutions. Without either, names make stages: up
    to the first number after what all names have in common.

    Args:
        example: the model's input, a tensor or a tuple of positional arguments.
    """
    found: dict[str, Any] = {n: module for n, module in model.named_modules() if isinstance(module, PLAIN) and n}
    seen = observe(model, found, example)
    if found and (seen is None or seen.error is not None):
        why = f" ({seen.error})" if seen is not None else ""
        warnings.warn(
            f"No forward pass of this {type(model).__name__} came to its end{why}: names decide on what it did not "
            f"show. Pass an input, example=...",
            stacklevel=4,
        )
    static = _static(model, found, seen)
    stages = _stages(model, found, seen)
    dynamic = sorted({stage for name, stage in stages.items() if name not in static})
    ranks = {stage: rank for rank, stage in enumerate(dynamic, start=1)}  # from 1, without gaps
    return [
        Layer(
            name,
            shape_of(layer),
            channels_of(layer),
            kind_of(layer),
            ranks.get(stages[name], 0),
            layer.weight is None or layer.weight.requires_grad,
            static.get(name),
        )
        for name, layer in found.items()
    ]


def shape_of(layer: nn.Module) -> tuple[int, ...]:
    """Of a layer's kernel, as that of its weight."""
    if isinstance(layer, nn.Linear):
        return (layer.out_features, layer.in_features)
    assert isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
    return (layer.out_channels, layer.in_channels // layer.groups, *layer.kernel_size)


def channels_of(layer: nn.Module) -> int:
    """Input channels of a layer, all groups together."""
    return layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels  # type: ignore[return-value]


def _static(model: nn.Module, layers: dict[str, nn.Module], seen: Observation | None) -> dict[str, str]:
    """Layer name -> why it stays static; the first reason that holds."""
    names = list(layers)
    reasons = {name: reason for name, layer in layers.items() if (reason := why_not_plain(layer))}
    shared = shared_weights(model)
    heads = classifiers(model, [] if seen is not None and seen.error is None else names)
    if seen is None:
        first = next((name for name in names if name not in heads), None)
        rules: dict[str, set[Any]] = {
            READS_IMAGE: {first} - {None},
            HEAD: heads,
            GATE: {name for name in names if _is_gate_by_name(model, name)},
        }
    else:
        rules = {
            READS_IMAGE: seen.roots,
            HEAD: heads | seen.heads,
            READ: seen.read,
            NEVER_RUNS: layers.keys() - seen.layers.keys() if seen.error is None else set(),
            CUT_OFF: seen.cut_off,
            GATE: seen.gates,
            NOT_OF_SAMPLES: {name for name, layer in seen.layers.items() if not layer.per_sample},
        }
    rules[READ] = rules.get(READ, set()) | read_by_torch(model, names)
    rules[SHARED] = {name for name, layer in layers.items() if id(getattr(layer, "weight", None)) in shared}
    for reason, which in rules.items():
        for name in names:
            if name in which:
                reasons.setdefault(name, reason)
    return reasons


def read_by_torch(model: nn.Module, names: Iterable[str]) -> set[str]:
    """Those of `names` whose weight torch's attention reads, or its fast path in evaluation without gradients, which no
    pass with gradients shows."""
    encoder = nn.TransformerEncoderLayer
    inside = tuple(
        f"{name}." if name else ""
        for name, module in model.named_modules()
        if isinstance(module, nn.MultiheadAttention) or getattr(type(module), "forward", None) is encoder.forward
    )
    return {name for name in names if name.startswith(inside)}


def _is_gate_by_name(model: nn.Module, name: str) -> bool:
    parts = name.split(".")
    owners = (type(model.get_submodule(".".join(parts[:k]))).__name__ for k in range(1, len(parts)))
    return "se" in parts or any(re.search(r"Squeeze|^SE|SEModule|Excit", owner) for owner in owners)


def classifiers(model: nn.Module, names: Iterable[str]) -> set[str]:
    """Names of the model's last layers: those of `model.get_classifier()`, or else the last of `names`."""
    get_classifier = getattr(model, "get_classifier", None)
    if get_classifier is None:
        return set(list(names)[-1:])
    try:
        head = get_classifier()
    except Exception:  # a method of this name that is not timm's
        return set(list(names)[-1:])
    heads = {part for one in (head if isinstance(head, (tuple, list)) else [head]) for part in _parts(one)}
    return {name for name, module in model.named_modules() if module in heads}


def _parts(module: Any) -> Iterable[nn.Module]:
    return module.modules() if isinstance(module, nn.Module) else ()


def _stages(model: nn.Module, layers: dict[str, nn.Module], seen: Observation | None) -> dict[str, int]:
    """The stage of each layer."""
    stages = _features(model, layers)
    if seen is not None and seen.layers:
        most = max(layer.positions for layer in seen.layers.values())
        dims = max((len(shape_of(layer)) - 2 for layer in layers.values()), default=0) or 2
        after = max(stages.values(), default=0) + 1
        for name, layer in seen.layers.items():
            stages.setdefault(name, after + level(layer.positions, most, dims))
    rest = [name for name in layers if name not in stages]
    common = _common(rest)
    prefixes = {name: _up_to_number(name[len(common) :]) for name in rest}
    after = max(stages.values(), default=0) + 1
    numbers = {prefix: after + number for number, prefix in enumerate(dict.fromkeys(prefixes.values()))}
    stages |= {name: numbers[prefix] for name, prefix in prefixes.items()}
    return stages


def level(positions: int, most: int, dims: int) -> int:
    """How many times a resolution was halved from `most` positions to `positions`, in `dims` dimensions."""
    return round(math.log2(most / positions) / dims)


def _features(model: nn.Module, layers: dict[str, nn.Module]) -> dict[str, int]:
    """Stages up to each module of timm's `feature_info`, those of one resolution together; without the layers after the
    last. Other libraries' `feature_info` is not read."""
    order = {name: index for index, (name, _) in enumerate(model.named_modules())}
    try:
        ends: dict[int, int] = {}  # resolution -> index of the last module of its last feature
        for feature in getattr(model, "feature_info", None) or ():
            module = feature["module"]
            inside = [index for name, index in order.items() if f"{name}.".startswith(f"{module}.")]
            if inside:
                ends[feature["reduction"]] = max(inside)
    except (TypeError, KeyError):
        return {}
    last = sorted(ends.values())
    found = {name: next((s for s, end in enumerate(last) if order[name] <= end), None) for name in layers}
    return {name: stage for name, stage in found.items() if stage is not None}


def _common(names: list[str]) -> str:
    """The parts of names, with dots, that all of these begin with."""
    parts = [name.split(".")[:-1] for name in names]
    shared = []
    for column in zip(*parts, strict=False):
        if len(set(column)) > 1:
            break
        shared.append(column[0] + ".")
    return "".join(shared)


def _up_to_number(name: str) -> str:
    return match[0] if (match := re.match(r"[^\d]*\d+", name)) else ""
