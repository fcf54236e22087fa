"""What one forward pass shows of a model's layers: which run and on how many positions, which feed which, which are
gates, and whose weight the model reads itself.

The pass runs on a copy of the model on the meta device, where nothing is computed and no memory is needed. A model that
cannot run there, because it branches on values, runs on its own device. The model itself is not touched. A second pass,
on twice as many samples, shows in which layers' inputs the first dimension counts them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from kw.replace import PLAIN

Example = Any  # a model's input: a tensor or whatever it takes, or a tuple of positional arguments
Move = Callable[[Tensor], Tensor]

BATCH = 2
# Sides of inputs to try where a model does not say its own, by dimensions.
SIDES = {1: (1024, 128), 2: (224, 256, 32, 28, 64, 96, 128), 3: (32, 16)}
IMAGE = ""  # stands for the model's input among the names of layers

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
        error: why the pass did not come to its end; None if it did, so that a layer not among `layers` does not run.
        read: layers whose weight was read outside of their own forward pass.
        heads: layers whose outputs are the model's outputs, up to their shape; if there are none, the last layers
            before them. None if the pass has no end.
        roots: layers whose input comes from no other layer: those that read the image.
        cut_off: layers whose input has no gradient.
        gates: layers of one position whose output scales features of more positions, and layers of one position before.
    """

    layers: dict[str, Seen] = field(default_factory=dict)
    error: str | None = None
    read: set[str] = field(default_factory=set)
    heads: set[str] = field(default_factory=set)
    roots: set[str] = field(default_factory=set)
    cut_off: set[str] = field(default_factory=set)
    gates: set[str] = field(default_factory=set)


def observe(model: nn.Module, names: Iterable[str], example: Example = None) -> Observation | None:
    """Watch the layers `names` of `model` in one forward pass in evaluation mode.

    Args:
        example: the model's input, with at least two samples; by default images of the size that timm or transformers
            record for the model, or else of usual sizes.

    Returns:
        The first pass that comes to its end, or the one that runs most layers. None if no layer ran on any input.

    Raises:
        ValueError: the model does not run on `example`.
    """
    names = list(names)
    best: Observation | None = None
    with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(devices=[]):
        for move, args in _attempts(model, example):
            try:
                copied = _copy(model, move)
            except Exception:  # whatever a model's own __deepcopy__ may raise
                continue
            watch = _Watch(copied, names)
            seen, firsts = watch.run(_moved(args, move)), watch.firsts
            if seen.error is None:
                del watch, copied  # and the pass's graph
                twice = _Watch(_copy(model, move), names)
                if twice.run(_doubled(_moved(args, move))).error is None:
                    _compare(seen, firsts, twice.firsts)
                return seen
            if best is None or len(seen.layers) > len(best.layers):
                best = seen
    if example is not None and best is not None:
        raise ValueError(f"This {type(model).__name__} does not run on example=...: {best.error}")
    return best if best is not None and best.layers else None


class _Watch:
    """One pass of a copy of the model, which may be changed."""

    def __init__(self, model: nn.Module, names: Iterable[str]):
        self.model = model.eval()
        self.seen = Observation()
        self.running: set[str] = set()  # layers in their own forward pass
        self.inputs: dict[str, Node | None] = {}  # of a layer's input
        self.outputs: dict[Node, str] = {}  # of a layer's output, or of the image -> the layer's name
        self.firsts: dict[str, list[int]] = {}  # the first dimension of a layer's input in each of its calls
        self.batch = 1
        for module in model.modules():
            _forget_hooks(module)
        for name in names:
            self._watch(name, model.get_submodule(name))

    def run(self, args: tuple[Any, ...]) -> Observation:
        self.batch = _samples(args)
        outputs: Any = None
        try:
            outputs = self.model(*self._tracked(args))
        except Exception as error:  # a model may refuse the input for reasons of its own
            self.seen.error = f"{type(error).__name__}: {error}".splitlines()[0]
        fed = {name: self._fed([node]) for name, node in self.inputs.items()}
        self.seen.cut_off = {name for name, node in self.inputs.items() if node is None}
        self.seen.roots = {name for name, layers in fed.items() if layers <= {IMAGE}} - self.seen.cut_off
        if self.seen.error is None:
            terminal = self.seen.layers.keys() - set().union(*fed.values())
            ends = [tensor.grad_fn for tensor in _tensors(outputs)]
            self.seen.heads = terminal & (self._fed(ends, to_output=True) or self._fed(ends))
        self.seen.gates = self._gates(fed, [tensor.grad_fn for tensor in _tensors(outputs)])
        return self.seen

    def _tracked(self, args: Any) -> Any:
        """The same arguments, with a gradient, so that layers that read them are known."""
        if isinstance(args, Tensor) and args.is_floating_point():
            tracked = args.clone().requires_grad_() * 1  # no leaf, so that models may write into it
            assert tracked.grad_fn is not None
            self.outputs[tracked.grad_fn] = IMAGE
            return tracked
        return _mapped(self._tracked, args)

    def _watch(self, name: str, layer: nn.Module) -> None:
        """Give this one layer a class that notes its calls and who reads its weight. Forward hooks would not do: torch
        leaves its fused paths, which read weights, where a module has one."""
        read, running = self.seen.read, self.running

        def getattr_(module: nn.Module, key: str) -> Any:  # by which nn.Module finds parameters
            if key == "weight" and name not in running:
                read.add(name)
            return super(watched, module).__getattr__(key)  # type: ignore[misc]

        def forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            x = next(iter((*args, *kwargs.values())), None)
            if isinstance(x, Tensor):
                self.inputs.setdefault(name, x.grad_fn)
            running.add(name)
            try:
                output = super(watched, module).forward(*args, **kwargs)  # type: ignore[misc]
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
        self.firsts.setdefault(name, []).append(first)
        self.seen.layers[name] = Seen(positions, all(one > 0 and one % self.batch == 0 for one in self.firsts[name]))

    def _fed(self, nodes: Iterable[Node | None], to_output: bool = False) -> set[str]:
        """Layers whose output reaches these autograd nodes without passing another layer. With `to_output`, also
        without a norm or an activation, and without being added to other features."""
        found: set[str] = set()
        for node in self._behind(nodes, to_output):
            if node in self.outputs:
                found.add(self.outputs[node])
        return found

    def _behind(self, nodes: Iterable[Node | None], to_output: bool = False, past_layers: bool = False) -> set[Node]:
        """The autograd nodes that lead to these, back to layers' outputs, or also past them."""
        stack, met = [node for node in nodes if node is not None], set()
        while stack:
            node = stack.pop()
            if node in met:
                continue
            met.add(node)
            if node in self.outputs and not past_layers:
                continue
            before = _inputs_of(node)
            added = node.name().startswith("AddBackward") and len(before) > 1
            if not (to_output and (added or node.name().startswith(NORMS + ACTIVATIONS))):
                stack.extend(before)
        return met

    def _gates(self, fed: dict[str, set[str]], ends: list[Node | None]) -> set[str]:
        small = {name for name, layer in self.seen.layers.items() if layer.positions == 1}
        found: set[str] = set()
        for node in self._behind([*self.inputs.values(), *ends], past_layers=True) if small else ():
            factors = [self._fed([factor]) for factor in _inputs_of(node)]
            if node.name().startswith("MulBackward") and len(factors) == 2:
                for gate, gated in (factors, factors[::-1]):
                    if gate <= small and not gated <= small:
                        found |= gate
        stack = list(found)
        while stack:
            before = (fed.get(stack.pop(), set()) & small) - found
            found |= before
            stack.extend(before)
        return found


def _compare(seen: Observation, once: dict[str, list[int]], twice: dict[str, list[int]]) -> None:
    """Twice as many samples double the first dimension of what a layer takes, summed over its calls, if that counts
    samples. In a model with positions first, `(L, B, C)`, L stays, which may be a multiple of the batch by chance. If
    no layer has twice as many, the samples are where `_doubled` does not find them, and nothing is known."""
    doubled = {name for name in seen.layers if sum(twice.get(name, ())) == 2 * sum(once[name]) > 0}
    for name, layer in seen.layers.items() if doubled else ():
        layer.per_sample = name in doubled


def _doubled(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Positional arguments with every sample twice."""
    batch = _samples(args)

    def double(arg: Any) -> Any:
        if isinstance(arg, Tensor):
            return torch.cat([arg, arg]) if arg.dim() and arg.shape[0] == batch else arg
        return arg * 2 if type(arg) is list and len(arg) == batch else _mapped(double, arg)

    return tuple(double(arg) for arg in args)


def _inputs_of(node: Node) -> list[Node]:
    """The nodes before this one, without parameters."""
    before = [previous for previous, _ in node.next_functions if previous is not None]
    return [previous for previous in before if not previous.name().endswith("AccumulateGrad")]


def _forget_hooks(module: nn.Module) -> None:
    """Drop the user's hooks, which may keep what they see; torch's own compute weights."""
    module._forward_hooks.clear()
    for key, hook in list(module._forward_pre_hooks.items()):
        if not type(hook).__module__.startswith("torch."):
            del module._forward_pre_hooks[key]


def _to_meta(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, device="meta", requires_grad=tensor.is_floating_point())


def _aliased(tensor: Tensor) -> Tensor:
    """The same memory, for parameters and what a pass in evaluation mode does not write."""
    return tensor.detach().requires_grad_(tensor.is_floating_point())


def _copy(model: nn.Module, move: Move) -> nn.Module:
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


def _attempts(model: nn.Module, example: Example) -> Iterator[tuple[Move, tuple[Any, ...]]]:
    """How to move the model and positional arguments for it. On the model's own device a pass takes time, so only a
    batch and a list of images of the likeliest size are tried."""
    if example is not None:
        inputs = [example if isinstance(example, tuple) else (example,)]
    else:
        like = next((parameter for parameter in model.parameters() if parameter.is_floating_point()), torch.empty(0))
        inputs = []
        for shape in _shapes(model):
            batch = like.new_zeros(1).expand(BATCH, *shape)  # without memory
            inputs += (
                [(batch,), (list(batch),)] if len(shape) == 3 else [(batch,)]
            )  # torchvision's detectors take lists
    yield from ((_to_meta, args) for args in inputs)
    if not any(parameter.is_meta for parameter in model.parameters()):
        yield from ((_aliased, args) for args in inputs[:2])


def _shapes(model: nn.Module) -> Iterator[tuple[int, ...]]:
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
    first: Any = next((module for module in model.modules() if isinstance(module, PLAIN)), None)
    if size is not None or side is not None or first is None:
        return
    if isinstance(first, nn.Linear):
        yield (first.in_features,)
        return
    dims = len(first.kernel_size)
    for usual in SIDES[dims]:
        yield (first.in_channels, *(usual,) * dims)


def _moved(args: Any, move: Move) -> Any:
    if isinstance(args, Tensor):
        return torch.empty_like(args, device="meta") if move is _to_meta else args
    return _mapped(lambda arg: _moved(arg, move), args)


def _mapped(change: Callable[[Any], Any], args: Any) -> Any:
    """`args` with what is in its lists, tuples and dictionaries changed."""
    if isinstance(args, dict):
        return {key: change(arg) for key, arg in args.items()}
    return type(args)(change(arg) for arg in args) if type(args) in (tuple, list) else args


def _samples(args: tuple[Any, ...]) -> int:
    """The samples of an input: the first dimension of its first tensor that has one, or the length of a list, which has
    a tensor for each sample, as torchvision's detectors take them."""
    return next(filter(None, map(_count, args)), 1)


def _count(arg: Any) -> int:
    if isinstance(arg, Tensor):
        return arg.shape[0] if arg.dim() else 0
    if isinstance(arg, list):
        return len(arg)
    inside = arg.values() if isinstance(arg, dict) else arg if isinstance(arg, tuple) else ()
    return next(filter(None, map(_count, inside)), 0)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
