"""What one forward pass shows of a model's layers: which run and on how many positions, which feed the outputs alone,
and whose weight the model reads itself.

The pass runs on a copy of the model on the meta device, where nothing is computed and no memory is needed. A model that
cannot run there, because it branches on values, runs once on its own device. The model itself is not touched.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

BATCH = 2
# Sides of inputs to try where a model does not say its own, by dimensions.
SIDES = {1: (1024, 128), 2: (224, 256, 32, 28, 64, 96, 128), 3: (32, 16)}

# Autograd nodes that make features of a layer's output: with one of these between, it is not yet the model's output.
NORMS = ("NativeBatchNorm", "CudnnBatchNorm", "NativeLayerNorm", "NativeGroupNorm", "FusedRms")
ACTIVATIONS = ("Relu", "Gelu", "Silu", "Hardswish", "Hardtanh", "Mish", "LeakyRelu", "Elu", "Prelu", "Softplus")


@dataclass
class Seen:
    """One layer in the pass.

    Args:
        positions: of its output for one sample of the model's input: 1 after pooling.
        per_sample: whether its input's first dimension counts the samples (or their windows, regions and the like).
    """

    positions: int
    per_sample: bool


@dataclass
class Observation:
    """A forward pass, as far as it went.

    Args:
        layers: those that ran, by name, in the order of their first calls.
        complete: whether the pass came to its end, so that a layer not among `layers` does not run.
        read: layers whose weight was read outside of their own forward pass.
        heads: layers whose outputs are the model's outputs, up to their shape.
        roots: layers whose input comes from no other layer: those that read the image.
    """

    layers: dict[str, Seen] = field(default_factory=dict)
    complete: bool = False
    read: set[str] = field(default_factory=set)
    heads: set[str] = field(default_factory=set)
    roots: set[str] = field(default_factory=set)


def observe(model: nn.Module, names: Iterable[str], example: Any = None) -> Observation | None:
    """Watch the layers `names` of `model` in one forward pass in evaluation mode.

    Args:
        example: the model's input, or a tuple of its positional arguments; by default images of the size that timm or
            transformers record for the model, or else of usual sizes.

    Returns:
        None if the model can run on no input that could be guessed, so that nothing is known.
    """
    names = list(names)
    inputs = list(_inputs(model, names, example))
    best: Observation | None = None
    # On the model's own device a pass takes time, so only a batch and a list of images of the likeliest size are tried.
    for move, args in [*((_to_meta, args) for args in inputs), *((_aliased, args) for args in inputs[:2])]:
        try:
            twin = _twin(model, move)
        except Exception:  # whatever a model's own __deepcopy__ may raise
            continue
        seen = _Watch(twin, names).run(_moved(args, move))
        if seen.complete:
            return seen
        if seen.layers and (best is None or len(seen.layers) > len(best.layers)):
            best = seen
    return best


class _Watch:
    """One pass of `twin`, a copy of the model that may be changed."""

    def __init__(self, twin: nn.Module, names: Iterable[str]):
        self.twin = twin.eval()
        self.seen = Observation()
        self.running: set[str] = set()  # layers in their own forward pass
        self.inputs: dict[str, Any] = {}  # autograd node of a layer's input
        self.outputs: dict[Any, str] = {}  # autograd node of a layer's output -> layer
        self.batch = 1
        for module in twin.modules():
            module._forward_hooks.clear()  # the user's, which may keep what they see
        for name in names:
            self._watch(name, twin.get_submodule(name))

    def run(self, args: tuple[Any, ...]) -> Observation:
        self.batch = _samples(args)
        outputs: Any = None
        try:
            with torch.enable_grad(), torch.random.fork_rng(devices=[]):
                outputs = self.twin(*args)
            self.seen.complete = True
        except Exception:  # a model may refuse the input for reasons of its own
            pass
        fed = self._fed(self.inputs.values())
        self.seen.roots = {name for name, node in self.inputs.items() if not self._fed([node])}
        terminal = self.seen.layers.keys() - fed
        if self.seen.complete:
            terminal &= self._fed([tensor.grad_fn for tensor in _tensors(outputs)], to_output=True)
        self.seen.heads = set(terminal)
        return self.seen

    def _watch(self, name: str, layer: nn.Module) -> None:
        """Give this one layer a class that notes its calls and who reads its weight. Forward hooks would not do: torch
        leaves its fused paths, which read weights, where a module has one."""
        read, running = self.seen.read, self.running

        def getattr_(module: nn.Module, key: str) -> Any:  # by which nn.Module finds parameters
            if key == "weight" and name not in running:
                read.add(name)
            return super(watched, module).__getattr__(key)  # type: ignore[misc]

        def forward(module: nn.Module, x: Any, *args: Any, **kwargs: Any) -> Any:
            if isinstance(x, Tensor):
                self.inputs.setdefault(name, x.grad_fn)
            running.add(name)
            try:
                output = super(watched, module).forward(x, *args, **kwargs)  # type: ignore[misc]
            finally:
                running.discard(name)
            self._note(name, layer, x, output)
            return output

        watched: Any = type(type(layer).__name__, (type(layer),), {"__getattr__": getattr_, "forward": forward})
        layer.__class__ = watched

    def _note(self, name: str, layer: nn.Module, x: Any, output: Any) -> None:
        if not isinstance(x, Tensor) or not isinstance(output, Tensor):
            return
        if output.grad_fn is not None:
            self.outputs[output.grad_fn] = name
        first = x.shape[0] if x.dim() else 0
        channels = output.shape[-1] if isinstance(layer, nn.Linear) else output.shape[1]
        positions = max(1, output.numel() // max(1, self.batch * channels))
        self.seen.layers[name] = Seen(positions, first > 0 and first % self.batch == 0)

    def _fed(self, nodes: Iterable[Any], to_output: bool = False) -> set[str]:
        """Layers whose output reaches these autograd nodes without passing another layer. With `to_output`, also
        without a norm or an activation, and without being added to other features."""
        found: set[str] = set()
        stack, met = [node for node in nodes if node is not None], set()
        while stack:
            node = stack.pop()
            if node in met:
                continue
            met.add(node)
            if node in self.outputs:
                found.add(self.outputs[node])
                continue
            before = [previous for previous, _ in node.next_functions if previous is not None]
            added = node.name().startswith("AddBackward") and len(before) > 1
            if not (to_output and (added or node.name().startswith(NORMS + ACTIVATIONS))):
                stack.extend(before)
        return found


def _to_meta(tensor: Tensor) -> Tensor:
    grad = tensor.is_floating_point()
    return torch.empty_like(tensor, device="meta", requires_grad=grad)


def _aliased(tensor: Tensor) -> Tensor:
    """The same memory, for parameters and what a pass in evaluation mode does not write."""
    return tensor.detach().requires_grad_(tensor.is_floating_point())


def _twin(model: nn.Module, move: Any) -> nn.Module:
    """A copy of the model whose tensors are those that `move` makes of the model's."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for tensor in module._parameters.values():
            if tensor is not None and id(tensor) not in memo:
                memo[id(tensor)] = nn.Parameter(move(tensor), requires_grad=tensor.is_floating_point())
        for tensor in (*module._buffers.values(), *vars(module).values()):
            if isinstance(tensor, Tensor) and id(tensor) not in memo:
                memo[id(tensor)] = _to_meta(tensor).detach() if move is _to_meta else tensor.detach().clone()
    return copy.deepcopy(model, memo)


def _inputs(model: nn.Module, names: list[str], example: Any) -> Iterator[tuple[Any, ...]]:
    """Positional arguments to try, on the meta device where they are guessed."""
    if example is not None:
        yield example if isinstance(example, tuple) else (example,)
        return
    for shape in _shapes(model, names):
        yield (torch.empty(BATCH, *shape, device="meta"),)
        if len(shape) == 3:
            yield ([torch.empty(shape, device="meta") for _ in range(BATCH)],)  # torchvision's detectors


def _shapes(model: nn.Module, names: list[str]) -> Iterator[tuple[int, ...]]:
    """Input shapes without the batch: what the model records, or usual ones for its first layer."""
    config: Any = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    size = config.get("input_size") if isinstance(config, dict) else None
    if size is not None:
        yield tuple(size)
    config = getattr(model, "config", None)
    side = getattr(config, "image_size", None)
    if side is not None:
        sides = tuple(side) if isinstance(side, (tuple, list)) else (side, side)
        yield (getattr(config, "num_channels", 3), *sides)
    if size is not None or side is not None or not names:
        return
    first: Any = model.get_submodule(names[0])
    if isinstance(first, nn.Linear):
        yield (first.in_features,)
        return
    dims = first.weight.dim() - 2
    for usual in SIDES[dims]:
        yield (first.in_channels, *(usual,) * dims)


def _moved(args: Any, move: Any) -> Any:
    if isinstance(args, Tensor):
        if move is _to_meta:
            return torch.empty_like(args, device="meta")
        return torch.zeros_like(args, device="cpu") if args.is_meta else args
    if isinstance(args, (tuple, list)):
        return type(args)(_moved(arg, move) for arg in args)
    if isinstance(args, dict):
        return {key: _moved(arg, move) for key, arg in args.items()}
    return args


def _samples(args: tuple[Any, ...]) -> int:
    first = args[0] if args else None
    if isinstance(first, Tensor):
        return max(1, first.shape[0])
    return max(1, len(first)) if isinstance(first, (tuple, list)) else 1


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)


def level(positions: int, most: int, dims: int) -> int:
    """How many times a resolution was halved from `most` positions to `positions`, in `dims` dimensions."""
    return round(math.log2(max(most, 1) / max(positions, 1)) / max(dims, 1))
