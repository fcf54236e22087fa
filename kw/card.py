"""The model card of a folder: README.md, with the header that the Hub reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from kw.contents import Contents
from kw.description import CURRENT

PAPER = "[KernelWarehouse](https://arxiv.org/abs/2406.07879) (Li and Yao, ICML 2024)"


def card(contents: Contents, weights: Mapping[str, Tensor]) -> str:
    """The text of the card."""
    title = f"{_base(contents)}, {_kind(contents)}"
    height, width = contents.data["input_size"][1:]
    rows = {
        "parameters": f"{sum(value.numel() for name, value in weights.items() if _is_parameter(name)):,}",
        "image": f"{height} x {width} pixels, mean {_numbers(contents.data['mean'])}, std "
        f"{_numbers(contents.data['std'])}, crop {contents.data['crop_pct']:g}, {contents.data['interpolation']}",
        "classes": _classes(contents),
    }
    if contents.temperature is not None:
        early = " (above 0: the warm-up was not over)" if contents.temperature else ""
        rows["temperature"] = f"{contents.temperature:g}{early}"
    method = f"Dynamic convolution by {PAPER}.\n" if "warehouses" in contents.description else ""
    parts = [HEADER, f"# {title}\n", method, _table(rows)]
    parts.append("## Measured\n\n" + (_table(contents.figures) if contents.figures else "Nothing was recorded.\n"))
    parts.append("## Use\n\n" + USE)
    if contents.provenance:
        parts.append("## Where it is from\n\n" + _table(contents.provenance))
    return "\n".join(part for part in parts if part)


HEADER = """---
library_name: timm
pipeline_tag: image-classification
tags: [image-classification, timm, kernelwarehouse]
---
"""

USE = """```python
import kw, timm

model = kw.load("FOLDER")  # or timm.create_model("local-dir:FOLDER", pretrained=True), "hf-hub:USER/NAME"
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
logits = model(transform(image)[None])
```
"""


def _base(contents: Contents) -> str:
    """timm's name of the static model, and which settings it was built with."""
    base = contents.description["base"]
    if base is None:
        return "a model of your own"
    others = sorted(key for key, value in contents.description["args"].items() if value and key not in CURRENT)
    return f"{base} with other {', '.join(others)}" if others else str(base)


def _kind(contents: Contents) -> str:
    if "warehouses" in contents.description:
        budgets = {warehouse["settings"]["n"] for warehouse in contents.description["warehouses"]}
        return f"KernelWarehouse at n = {', '.join(sorted(budgets))}"
    if "method" in contents.description:
        return f"{contents.description['method']}, {contents.description['n']} kernels a layer"
    return "static"


def _classes(contents: Contents) -> str:
    names = contents.classes
    if not names:
        return str(contents.num_classes)
    return f"{contents.num_classes}: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"


def _is_parameter(name: str) -> bool:
    return not name.endswith(("running_mean", "running_var", "num_batches_tracked", ".temperature"))


def _numbers(values: Any) -> str:
    return ", ".join(f"{value:g}" for value in values)


def _table(rows: Mapping[str, Any]) -> str:
    lines = [f"| {_cell(key)} | {_cell(value)} |" for key, value in rows.items()]
    return "\n".join(["| | |", "|---|---|", *lines, ""])


def _cell(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {one}" for key, one in value.items())
    text = f"{value:,.2f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")
