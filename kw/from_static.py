"""Starting from a trained static model: its kernels become the cells that anchor each mixture, or what another method
makes of a static kernel (`set_kernel` of its layer: FDConv takes the spectrum).

In KernelWarehouse, at temperature 1 every mixture is its anchor, so the outputs are the static model's to rounding. At
temperature 0 the attentions start as those of the anchors alone: a score of 1 for the anchor and of 0 for all other
cells makes each mixture 1 / (1 + 1e-3) times its anchor, so every kernel is 0.999 times the static one. The scores'
weights start at zero and train from there; above n = 1, cells that anchor no mixture keep their random values.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kw.config import KWConfig
from kw.layers import DynamicLayer, KWLayer


def check_startable(configs: Iterable[KWConfig]) -> None:
    """Raises ValueError if warehouses of these settings cannot hold the kernels of a static model."""
    for config in configs:
        if config.n < 1:
            raise ValueError(
                f"n={config.n} has fewer cells than kernels have parts, so static weights do not fit into them: "
                f"starting from them needs n of at least 1."
            )
        if config.anchoring != "one_to_one" or config.attention_function != "caf":
            raise ValueError(
                f"Starting from static weights needs one anchor for each mixture: anchoring='one_to_one' and "
                f"attention_function='caf', not {config.anchoring!r} and {config.attention_function!r}."
            )


@torch.no_grad()
def load_static(model: nn.Module, weights: Mapping[str, Any]) -> None:
    """Load the state dict of a static model into `model`, the same one converted (or itself static), in place.

    Args:
        model: with n of at least 1 in all its warehouses; or with layers of a method that can begin from a static
            kernel, as FDConv can.
        weights: of the static model, all of them; on any device.

    Raises:
        ValueError: entries are missing, left over, or of another shape; or the model's method or settings have no place
            for static kernels. The model is then unchanged.
    """
    modules = model.named_modules(remove_duplicate=False)  # a layer may have several names
    layers = {name: module for name, module in modules if isinstance(module, DynamicLayer)}
    for name, layer in layers.items():
        if not isinstance(layer, KWLayer) and layer.set_kernel is None:
            raise ValueError(
                f"Layer {name!r} ({type(layer).__name__}) has no place for a static kernel: its method cannot start "
                f"from static weights, as KernelWarehouse and FDConv can."
            )
    check_startable({layer.warehouse.config for layer in layers.values() if isinstance(layer, KWLayer)})
    _check(model, layers, weights)
    kernels = {f"{name}.weight": layer for name, layer in layers.items()}
    model.load_state_dict({key: value for key, value in weights.items() if key not in kernels}, strict=False)
    for key, layer in kernels.items():
        if isinstance(layer, KWLayer):
            place(layer, weights[key])
        else:
            layer.set_kernel(weights[key])


@torch.no_grad()
def place(layer: KWLayer, kernel: Tensor) -> None:
    """Make a static kernel that of `layer`: at temperature 1 exactly, at temperature 0 nearly."""
    assert layer.share.anchors is not None
    cells = layer.warehouse.cells
    cells[list(layer.share.anchors)] = cut(kernel, layer.share.grid, tuple(cells.shape[1:])).to(cells)
    layer.attention.prefer_anchors()


def cut(kernel: Tensor, grid: tuple[int, int, int], cell: tuple[int, ...]) -> Tensor:
    """A static kernel `(C_out, C_in / groups, *kernel_size)` as the cells of its mixtures, `(m, o, i)`: the inverse of
    `kw.functional.assemble` at temperature 1."""
    (positions, rows, columns), (o, i) = grid, cell
    return kernel.reshape(rows, o, columns, i, positions).permute(4, 0, 2, 1, 3).reshape(-1, o, i)


def _check(model: nn.Module, layers: Mapping[str, DynamicLayer], weights: Mapping[str, Any]) -> None:
    own = {
        key: value for key, value in model.state_dict().items() if not key.startswith(tuple(f"{n}." for n in layers))
    }
    own |= {f"{name}.bias": layer.bias for name, layer in layers.items() if layer.bias is not None}
    expected = {key: _shape(value) for key, value in own.items()}
    expected |= {f"{name}.weight": layer.kernel_shape for name, layer in layers.items()}
    found = {key: _shape(value) for key, value in weights.items()}
    wrong = [f"{key!r} is missing" for key in expected.keys() - found.keys()]
    wrong += [f"{key!r} is left over" for key in found.keys() - expected.keys()]
    wrong += [
        f"{key!r} has shape {found[key]}, not {expected[key]}"
        for key in expected.keys() & found.keys()
        if found[key] != expected[key]
    ]
    if wrong:
        raise ValueError(
            f"These are not the weights of the static {type(model).__name__}: {'; '.join(sorted(wrong)[:4])}"
            f"{f'; and {len(wrong) - 4} more' if len(wrong) > 4 else ''}."
        )


def _shape(value: Any) -> tuple[int, ...] | None:
    """None for a module's extra state, which need not be a tensor."""
    return tuple(value.shape) if isinstance(value, Tensor) else None
