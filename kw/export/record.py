"""Recording a model with torch.export, for inputs of other sizes."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kw.export.check import ExportError

Examples = Tensor | tuple[Tensor, ...]
MANY = 2**20  # pixels: a size that may not be larger is bounded by the model


def tuple_of(example: Examples, model: nn.Module) -> tuple[Tensor, ...]:
    """The example inputs on the model's device, with at least two samples: torch would take a batch of one for a
    constant.

    Raises:
        ExportError: one is not a tensor with a batch.
    """
    examples = example if isinstance(example, (tuple, list)) else (example,)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    found = []
    for one in examples:
        if not isinstance(one, Tensor) or one.dim() == 0:
            raise ExportError(
                f"example has a {type(one).__name__}; it must be a tensor (B, ...), or several in a tuple."
            )
        one = one.to(device)
        found.append(one if len(one) > 1 else one.repeat(2, *(1,) * (one.dim() - 1)))
    return tuple(found)


@torch.no_grad()
def record(
    model: nn.Module, examples: tuple[Tensor, ...], sizes: bool
) -> tuple[torch.export.ExportedProgram, tuple[str, ...]]:
    """The model's program in evaluation mode, and the names of the dimensions that may vary.

    Args:
        sizes: also let the image's height and width vary, where the model allows.

    Raises:
        ExportError: torch cannot export it with a varying batch.
    """
    if not hasattr(torch.export.Dim, "AUTO"):
        raise ExportError(f"exports with a varying batch need torch 2.6 or newer, and this is {torch.__version__}.")
    try:
        with evaluating(model):
            if sizes and all(one.dim() == 4 for one in examples):
                program = _of_any_size(model, examples)
                if program is not None:
                    dims = (("height", 2), ("width", 3))
                    return program, ("batch", *(name for name, dim in dims if _varies(program, examples, dim)))
            return _program(model, examples, ()), ("batch",)
    except Exception as error:  # torch raises many kinds
        line = str(error).strip().splitlines()[0] if str(error).strip() else ""
        raise ExportError(
            f"torch.export cannot record this {type(model).__name__} ({type(error).__name__}: {line}). If its own code "
            f"depends on the batch size, that is what to change; fewer sizes vary with sizes=False."
        ) from error


def _of_any_size(model: nn.Module, examples: tuple[Tensor, ...]) -> torch.export.ExportedProgram | None:
    """The program for images of other sizes; None if there is none that holds for larger ones too.

    Where a map of the model has one row or column, torch takes that 1 for a constant, and the program holds up to that
    size only: then larger images are recorded.
    """
    for times in (1, 2, 4):
        try:
            program = _program(model, tuple(one.repeat(1, 1, times, times) for one in examples), (2, 3))
        except Exception:  # torch raises many kinds
            if times == 1:
                raise
            return None  # the model does not take larger images
        if not any(_is_bounded(program, size) for size in _sizes(program, examples, (2, 3))):
            return program
    return None


def _is_bounded(program: torch.export.ExportedProgram, size: Any) -> bool:
    symbols = () if isinstance(size, int) else size.node.expr.free_symbols
    return any(bool(program.range_constraints[one].upper < MANY) for one in symbols if one in program.range_constraints)


def _program(model: nn.Module, examples: tuple[Tensor, ...], more: tuple[int, ...]) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch", min=1)
    auto: Any = torch.export.Dim.AUTO
    shapes = tuple({0: batch, **dict.fromkeys(more, auto)} for _ in examples)
    return torch.export.export(model, examples, dynamic_shapes=(shapes,) if _takes_all(model) else shapes, strict=False)


def _takes_all(model: nn.Module) -> bool:
    """Whether `forward` takes its inputs as *args, for which torch.export wants the shapes in one more tuple."""
    kinds = [parameter.kind for parameter in inspect.signature(model.forward).parameters.values()]
    return kinds[:1] == [inspect.Parameter.VAR_POSITIONAL]


def _varies(program: torch.export.ExportedProgram, examples: tuple[Tensor, ...], dim: int) -> bool:
    # A size that was found to be constant may still be a SymInt.
    found = _sizes(program, examples, (dim,))
    return bool(found) and not any(str(size).isdigit() for size in found)


def _sizes(program: torch.export.ExportedProgram, examples: tuple[Tensor, ...], dims: tuple[int, ...]) -> list[Any]:
    """The recorded sizes of the inputs in these dimensions."""
    names = program.graph_signature.user_inputs
    inputs = [node for node in program.graph.nodes if node.op == "placeholder" and node.name in names]
    return [node.meta["val"].shape[dim] for node in inputs[: len(examples)] for dim in dims]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, and each of its modules as it was afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
