"""Starting from a trained static model: its kernels become the cells that anchor each mixture.

At temperature 1 every mixture is its anchor, so the outputs are the static model's to rounding. At temperature 0 the
attentions start as those of the anchors alone: a score of 1 for the anchor and of 0 for all other cells makes each
mixture 1 / (1 + 1e-3) times its anchor, so every kernel is 0.999 times the static one. The scores' weights start at
zero and train from there; above n = 1, cells that anchor no mixture keep their random values.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from kw.config import KWConfig
from kw.layers import KWLayer


def check_startable(configs: Iterable[KWConfig]) -> None:
    """Raises ValueError if warehouses of these settings cannot hold the kernels of a static model."""
    for config in configs:
        if config.n < 1:
            raise ValueError(
                f"n={config.n} has fewer cells than kernels have parts, so static weights do not fit into them: "
                f"from_weights needs n of at least 1."
            )
        if config.anchoring != "one_to_one" or config.attention_function != "caf":
            raise ValueError(
                f"from_weights needs one anchor for each mixture: anchoring='one_to_one' and attention_function='caf', "
                f"not {config.anchoring!r} and {config.attention_function!r}."
            )


@torch.no_grad()
def load_static(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Load the state dict of a static model into `model`, the same one converted (or itself static), in place.

    Args:
        model: with n of at least 1 in all its warehouses.
        weights: of the static model, all of them; on any device.

    Raises:
        ValueError: entries are missing, left over, or of another shape; or the model's settings have no place for
            static kernels. The model is then unchanged.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, KWLayer)}
    check_startable({layer.warehouse.config for layer in layers.values()})
    kernels = {name: weights.get(f"{name}.weight") for name in layers}
    rest = {key: value for key, value in weights.items() if key.removesuffix(".weight") not in layers}
    _check(model, layers, kernels, rest)
    model.load_state_dict(rest, strict=False)
    for name, layer in layers.items():
        kernel = kernels[name]
        assert kernel is not None and layer.share.anchors is not None
        cells = layer.warehouse.cells
        cells[list(layer.share.anchors)] = cut(kernel, layer.share.grid, tuple(cells.shape[1:])).to(cells)
        layer.attention.prefer_anchors()


def cut(kernel: Tensor, grid: tuple[int, int, int], cell: tuple[int, ...]) -> Tensor:
    """A static kernel `(C_out, C_in / groups, *kernel_size)` as the cells of its mixtures, `(m, o, i)`: the inverse of
    `kw.functional.assemble` at temperature 1."""
    (positions, rows, columns), (o, i) = grid, cell
    return kernel.reshape(rows, o, columns, i, positions).permute(4, 0, 2, 1, 3).reshape(-1, o, i)


def _check(
    model: nn.Module,
    layers: Mapping[str, KWLayer],
    kernels: Mapping[str, Tensor | None],
    rest: Mapping[str, Tensor],
) -> None:
    own = model.state_dict()
    dynamic = tuple(f"{name}.{part}." for name in layers for part in ("attention", "warehouse"))
    expected = {key: tuple(value.shape) for key, value in own.items() if not key.startswith(dynamic)}
    expected |= {f"{name}.weight": layer.kernel_shape for name, layer in layers.items()}
    found = {key: tuple(value.shape) for key, value in rest.items()}
    found |= {f"{name}.weight": tuple(kernel.shape) for name, kernel in kernels.items() if kernel is not None}
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
