"""Programs of torch.export, as files that torch alone runs; and compiled for the machine by AOTInductor."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kw.export.check import CLOSE, Exported, ExportError, compare, outputs
from kw.export.record import Examples, evaluating, record, tuple_of


def program(
    model: nn.Module, path: str | Path, example: Examples, *, sizes: bool = True, check: bool = True
) -> Exported:
    """Write a model as a program of torch.export: `torch.export.load(path).module()(x)` runs it, without kw. It has
    only torch's operators.

    Args:
        path: ends in .pt2.
        example, sizes, check: as in `kw.export.onnx`.

    Raises:
        ExportError: torch cannot export the model, or the file computes something else.
    """
    path = _path(path)
    examples = tuple_of(example, model)
    made, varying = record(model, examples, sizes)
    torch.export.save(made, path)
    checked = _check(model, torch.export.load(path).module(), examples, varying, path) if check else ()
    return Exported(path, f"torch.export, torch {torch.__version__}", varying, *checked)


def compiled(
    model: nn.Module, path: str | Path, example: Examples, *, sizes: bool = False, check: bool = True
) -> Exported:
    """Write a model as machine code for this kind of machine, by AOTInductor: `torch._inductor.aoti_load_package(path)`
    runs it, also without Python's interpreter. It needs a C++ compiler, and takes minutes.

    The code does not look at the size of its input, and computes nonsense for one that may not vary, unless the
    environment has AOTI_RUNTIME_CHECK_INPUTS=1.

    Args:
        path: ends in .pt2.
        example, sizes, check: as in `kw.export.onnx`.

    Raises:
        ExportError: torch cannot compile the model here, or the file computes something else.
    """
    # Documented by torch, although under a private name.
    package: Any = getattr(torch, "_inductor", None)
    make, read = (getattr(package, name, None) for name in ("aoti_compile_and_package", "aoti_load_package"))
    if make is None or read is None:
        raise ExportError(f"torch {torch.__version__} has no aoti_compile_and_package: 2.6 or newer is needed.")
    path = _path(path)
    examples = tuple_of(example, model)
    made, varying = record(model, examples, sizes)
    try:
        make(made, package_path=str(path))
    except Exception as error:  # compilers fail in many ways
        line = str(error).strip().splitlines()[0]
        raise ExportError(f"AOTInductor cannot compile the model ({type(error).__name__}: {line}).") from error
    checked = _check(model, read(str(path)), examples, varying, path) if check else ()
    return Exported(path, f"AOTInductor, torch {torch.__version__}", varying, *checked)


def _path(path: str | Path) -> Path:
    path = Path(path).expanduser()
    if path.suffix != ".pt2":
        raise ExportError(f"{path} must end in .pt2, by which torch knows such files.")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _check(
    model: nn.Module, run: Callable[..., Any], examples: tuple[Tensor, ...], varying: tuple[str, ...], path: Path
) -> tuple[float, tuple[tuple[int, int], ...]]:
    with evaluating(model):
        return compare(model, lambda inputs: outputs(run(*inputs)), examples, varying, CLOSE, path)
