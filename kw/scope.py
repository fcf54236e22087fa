"""Which layers of a model could be dynamic, which cannot and why, and the stage and kind of each."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from kw.observing import Observation, level, observe
from kw.replace import why_not_plain

KINDS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)

READS_IMAGE = "reads the model's input"
HEAD = "its output is the model's"
GATE = "a gate: it sees one position, as in squeeze-and-excitation"
READ = "the model reads its weight itself"
NEVER_RUNS = "does not run in evaluation mode"
NOT_OF_SAMPLES = "its input is not a batch of samples"
SHARED = "its weight is also another module's"


@dataclass(frozen=True)
class Layer:
    """A convolution or linear layer of a static model.

    Args:
        shape: of its kernel, `(C_out, C_in / groups, *kernel_size)`.
        channels: input channels, all groups together.
        kind: of `kind_of`.
        stage: layers of one resolution have the same; from 1 on in the order of the network, 0 if all are static.
        static: why it cannot be dynamic; None if it can.
    """

    name: str
    shape: tuple[int, ...]
    channels: int
    kind: str
    stage: int
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


def layers_of(model: nn.Module, example: Any = None) -> list[Layer]:
    """The convolutions and linear layers of `model`, in module order. These stay static:

    - the first, which reads the image, and the last: the classifiers (timm's `get_classifier()`, else layers whose
      outputs are the model's);
    - gates, such as squeeze-and-excitation, which are an attention already: layers that see one position and come
      before layers that see more;
    - layers whose weight the model reads itself, or shares with another module, and those that do not run;
    - layers of a class that computes something else (weight standardization), or whose weight is a parametrization's.

    A forward pass on the meta device shows most of it (`kw.observing`). Where a model runs on no input that could be
    guessed, and none is given, names and classes have to do.

    Stages are those of timm's `feature_info` as far as it goes, then resolutions. Without either, names make stages: up
    to the first number after what all names have in common.

    Args:
        example: the model's input, a tensor or a tuple of positional arguments.
    """
    found: dict[str, nn.Module] = {n: module for n, module in model.named_modules() if isinstance(module, KINDS) and n}
    seen = observe(model, found, example)
    static = _static(model, found, seen)
    stages = _stages(model, found, seen)
    dynamic = sorted({stage for name, stage in stages.items() if name not in static})
    ranks = {stage: rank for rank, stage in enumerate(dynamic, start=1)}  # from 1, without gaps
    return [
        Layer(name, _shape(module), _channels(module), kind_of(module), ranks.get(stages[name], 0), static.get(name))
        for name, module in found.items()
    ]


def _shape(layer: nn.Module) -> tuple[int, ...]:
    if isinstance(layer, nn.Linear):
        return (layer.out_features, layer.in_features)
    assert isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
    return (layer.out_channels, layer.in_channels // layer.groups, *layer.kernel_size)


def _channels(layer: nn.Module) -> int:
    return layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels  # type: ignore[return-value]


def _static(model: nn.Module, layers: dict[str, nn.Module], seen: Observation | None) -> dict[str, str]:
    """Layer name -> why it stays static; the first reason that holds."""
    names = list(layers)
    reasons = {name: reason for name, layer in layers.items() if (reason := why_not_plain(layer))}
    shared = shared_weights(model)
    inside = [name for name, module in model.named_modules() if isinstance(module, nn.MultiheadAttention)]
    heads = classifiers(model, [] if seen is not None and seen.complete else names)
    if seen is None:
        first = next((name for name in names if name not in heads), None)
        rules: dict[str, set[Any]] = {
            READS_IMAGE: {first},
            HEAD: heads,
            GATE: {name for name in names if _is_gate_by_name(model, name)},
        }
    else:
        rules = {
            READS_IMAGE: seen.roots,
            HEAD: heads | seen.heads,
            READ: seen.read,
            NEVER_RUNS: layers.keys() - seen.layers.keys() if seen.complete else set(),
            GATE: _gates(seen),
            NOT_OF_SAMPLES: {name for name, layer in seen.layers.items() if not layer.per_sample},
        }
    rules[READ] = rules.get(READ, set()) | {n for n in names if any(n.startswith(f"{part}.") for part in inside)}
    rules[SHARED] = {name for name, layer in layers.items() if id(getattr(layer, "weight", None)) in shared}
    for reason, which in rules.items():
        for name in names:
            if name in which:
                reasons.setdefault(name, reason)
    return reasons


def shared_weights(model: nn.Module) -> set[int]:
    """Identities of parameters that several modules of `model` hold."""
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    return {key for key, count in owners.items() if count > 1}


def _gates(seen: Observation) -> set[str]:
    """Layers that see one position and run before others that see more. In a model of vectors there are none."""
    order = list(seen.layers.items())
    last = max((index for index, (_, layer) in enumerate(order) if layer.positions > 1), default=-1)
    return {name for name, layer in order[: max(last, 0)] if layer.positions == 1}


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
        dims = max((len(_shape(layer)) - 2 for layer in layers.values()), default=0) or 2
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
