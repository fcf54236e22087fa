"""Deterministic numbers for the golden cases (tests/golden/README.md): no random generator, no stored weights.

`values(name, shape)` gives the same float64 array on every machine and every NumPy:
it hashes (name, flat index) with splitmix64 and maps the top 53 bits to (-1, 1).

A case of cases.json has: `state_dict` (keys and shapes of the released format), `input_shape`, `params`, `settings`
(as the release names them), `warehouses` (shapes), `layers` (in module order: name, warehouse, cells, mixtures, hidden)
and `grad_norms` (per released key). cases.npz has, per case NAME, computed in float64 with drop path and dropout off:

- `NAME/eval_logits`: evaluation mode, temperature 0, input `image(case)`, shape (4, 1000);
- `NAME/alpha/LAYER`: attentions in that pass of the first and the last dynamic layer, rows (sample, mixture), columns
  cells, zero cell dropped; float32, at most the first 2,000 rows where the whole is large;
- `NAME/train_logits`: training mode (batch statistics), temperature 0.5, the same input;
- `grad_norms`: of `sum(logits * values("cotangent", logits.shape))` in that training pass.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import numpy as np

HERE = Path(__file__).parents[1] / "golden"


def values(name: str, shape) -> np.ndarray:
    """Uniform values in (-1, 1), shape `shape`, float64, a pure function of (name, index)."""
    size = int(np.prod(shape)) if len(shape) else 1
    with np.errstate(over="ignore"):
        x = np.arange(size, dtype=np.uint64) + np.uint64(zlib.crc32(name.encode())) * np.uint64(0x100000001)
        x = (x + np.uint64(0x9E3779B97F4A7C15)) * np.uint64(0xBF58476D1CE4E5B9)
        x ^= x >> np.uint64(30)
        x *= np.uint64(0x94D049BB133111EB)
        x ^= x >> np.uint64(27)
        x *= np.uint64(0xBF58476D1CE4E5B9)
        x ^= x >> np.uint64(31)
    return ((x >> np.uint64(11)).astype(np.float64) / float(1 << 52) - 1.0).reshape(tuple(shape))


def fill(key: str, shape) -> np.ndarray:
    """The value of one state-dict entry: scaled so that activations neither die nor blow up."""
    v = values(key, shape)
    if key.endswith("num_batches_tracked"):
        return np.zeros(tuple(shape), dtype=np.int64)
    if key.endswith("running_var"):
        return 1.0 + 0.2 * v
    if key.endswith("running_mean"):
        return 0.05 * v
    if len(shape) <= 1:  # norm scales, biases
        is_scale = key.endswith("weight")
        return (1.0 + 0.1 * v) if is_scale else 0.05 * v
    if key.endswith("gamma"):
        return 0.3 + 0.1 * v
    if ".attention." in key:
        return v * (3.0 / shape[-1]) ** 0.5
    if "warehouse_manager" in key:  # cells: mixtures of n of them; keep the assembled kernel O(He)
        fan_in = int(np.prod(shape[2:])) if len(shape) > 2 else shape[-1]
        return v * (0.5 * shape[0] / fan_in) ** 0.5
    fan_in = int(np.prod(shape[1:]))
    return v * (4.0 / fan_in) ** 0.5


def load_cases(path: Path | None = None) -> dict:
    return json.loads((path or HERE / "cases.json").read_text())


def state_dict(case: dict) -> dict[str, np.ndarray]:
    return {key: fill(key, shape) for key, shape in case["state_dict"].items()}


def image(case: dict) -> np.ndarray:
    return 2.0 * values("image", case["input_shape"])
