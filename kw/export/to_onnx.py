"""ONNX, by torch's exporter of recorded programs."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kw.compute import stand_in
from kw.export.check import BATCHES, CLOSE, CLOSE_HALF, Exported, ExportError, compare, outputs
from kw.export.per_sample import write_out
from kw.export.record import Examples, evaluating, record, tuple_of

OPSET = 18
SMALL = 1024  # entries, below which weights stay float32


def onnx(
    model: nn.Module,
    path: str | Path,
    example: Examples,
    *,
    opset: int = OPSET,
    sizes: bool = True,
    half: bool = False,
    check: bool = True,
) -> Exported:
    """Write a model as an ONNX file: in evaluation mode, with any batch size.

    Args:
        model: any model, dynamic, static or frozen (`kw.freeze`).
        example: an input `(B, ...)`, or several in a tuple; the file's input is "input", or "input_0" and so on, its
            output "output", or "output_0" and so on.
        opset: of the operators, 18 or higher.
        sizes: also let height and width of images vary, where the model allows.
        half: store weights in float16, half the file. Runtimes cast them to float32 when they load it.
        check: read the file by onnx's checker, and compare onnxruntime with the model: at batches of 1, 3 and 8, and at
            twice the height and twice the width where these vary.

    Raises:
        ExportError: a package is missing, torch cannot export the model, or the file computes something else.
    """
    for name in ("onnx", "onnxscript", *(["onnxruntime"] if check else [])):
        _import(name)
    path = Path(path).expanduser()
    examples = tuple_of(example, model)
    with stand_in.recorded():
        program, varying = record(model, examples, sizes)
    with torch.no_grad(), evaluating(model):
        count = len(outputs(model(*examples)))
    proto = _convert(program, opset, _names("input", len(examples)), _names("output", count))
    _rename_sizes(proto, varying)
    if half:
        _halve(proto)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(proto.SerializeToString())
    checked: tuple[Any, ...] = ()
    if check:
        _import("onnx").checker.check_model(str(path), full_check=True)
        run = runner(path)
        with evaluating(model):
            checked = compare(model, run, examples, varying, CLOSE_HALF if half else CLOSE, path)
    weights = ", float16 weights" if half else ""
    runtime = f", onnxruntime {_import('onnxruntime').__version__}" if check else ""
    return Exported(path, f"ONNX, opset {opset}{weights}{runtime}", varying, *checked)


def runner(path: Path, threads: int = 0) -> Any:
    """The file in onnxruntime, on the CPU: from a tuple of inputs to a list of outputs."""
    runtime = _import("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_inputs()]

    def run(inputs: tuple[Tensor, ...]) -> list[Tensor]:
        found = session.run(None, {name: one.cpu().numpy() for name, one in zip(names, inputs, strict=True)})
        return [torch.from_numpy(one) for one in found]

    return run


def _convert(program: torch.export.ExportedProgram, opset: int, inputs: list[str], outputs: list[str]) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch's and onnxscript's own code
            made: Any = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=opset,
                input_names=inputs,
                output_names=outputs,
                verbose=False,
            )
            proto = made.model_proto
    except Exception as error:  # torch raises many kinds
        raise ExportError(f"torch.onnx cannot convert the model: {str(error).strip().splitlines()[0]}") from error
    write_out(proto)
    return proto


def _names(name: str, count: int) -> list[str]:
    return [name] if count == 1 else [f"{name}_{k}" for k in range(count)]


def _rename_sizes(model: Any, varying: tuple[str, ...]) -> None:
    """Call sizes of the first input that vary "batch", "height" and "width", also where others are computed of them."""
    sizes = model.graph.input[0].type.tensor_type.shape.dim
    dims = {"batch": 0, "height": 2, "width": 3}
    names = {sizes[dims[name]].dim_param: name for name in varying if sizes[dims[name]].dim_param}
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        for size in value.type.tensor_type.shape.dim:
            if size.dim_param:
                size.dim_param = re.sub(r"\w+", lambda word: names.get(word[0], word[0]), size.dim_param)


def _halve(model: Any) -> None:
    """Store large float32 initializers as float16, and cast them."""
    onnx, numpy = _import("onnx"), _import("numpy")
    casts = []
    for tensor in model.graph.initializer:
        if tensor.data_type != onnx.TensorProto.FLOAT:
            continue
        values = onnx.numpy_helper.to_array(tensor)
        if values.size < SMALL:
            continue
        name = tensor.name
        low = onnx.numpy_helper.from_array(values.astype(numpy.float16), f"{name}_half")
        tensor.CopyFrom(low)
        casts.append(onnx.helper.make_node("Cast", [low.name], [name], to=onnx.TensorProto.FLOAT))
    nodes = [*casts, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def _import(name: str) -> Any:
    from importlib import import_module

    try:
        return import_module(name)
    except ImportError:
        raise ExportError(f"{name} is not installed: pip install 'kernelwarehouse[export]', or {name}.") from None


__all__ = ["BATCHES", "onnx", "runner"]
