"""The contrasting-driven attention function, CAF (paper, section 3.3), with its temperature as saved state; and the
functions that replace it in the paper's ablations.

Shapes: `B` batch, `C` channels, `H` hidden width, `m` mixtures of the layer, `n` cells of its warehouse.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kw.compute.mixing import mix
from kw.config import KWConfig
from kw.temperature import Tempered
from kw.warehouse import Share

MIN_HIDDEN = 16
MIN_BASIS = 16
EPSILON = 1e-3


# Attentions as a quotient: values `(B, m, n + 1)` and a divisor for each mixture, `(B, m, 1)` or 1.
Quotient = tuple[Tensor, Tensor | float]


def contrast(z: Tensor) -> Quotient:
    """Attentions of either sign, whose absolute values sum to nearly 1."""
    return z, size(z)


def size(z: Tensor) -> Tensor:
    """`sum_j |z_j| + 1e-3` of each mixture, `(B, m, 1)`, in float32 at least: half precision would lose too much."""
    dtype = torch.promote_types(z.dtype, torch.float32)
    norm: Tensor = torch.linalg.vector_norm(z, ord=1, dim=2, keepdim=True, dtype=dtype)
    return norm + EPSILON


def softmax(z: Tensor) -> Quotient:
    """Positive attentions that sum to 1, as in DY-Conv."""
    return z.softmax(dim=2, dtype=torch.promote_types(z.dtype, torch.float32)), 1.0


def sigmoid(z: Tensor) -> Quotient:
    """Attentions in (0, 1), each from its own score, as in CondConv. The zero cell's score has no effect."""
    return z.sigmoid(), 1.0


def tanh(z: Tensor) -> Quotient:
    """Attentions in (-1, 1), each from its own score."""
    return z.tanh(), 1.0


# From all scores `(B, m, n + 1)`; the zero cell's attention is dropped afterwards.
FUNCTIONS: dict[str, Callable[[Tensor], Quotient]] = {
    "caf": contrast,
    "contrast": contrast,
    "softmax": softmax,
    "sigmoid": sigmoid,
    "tanh": tanh,
}


class Attention(Tempered):
    """Pooled features `(B, C)` to the attentions `(B, m, n)` of a layer's mixtures over its warehouse's cells.

        alpha = tau * beta + (1 - tau) * z / (sum_j |z_j| + 1e-3)        (paper, section 3.3)

    A zero cell also has a score. Its attention is dropped after normalization, so the sum of a mixture's CAF attentions
    can be anything in [-1, 1].

    Args:
        channels: input channels of the layer, all groups together.
        share: the layer's share of its warehouse; `share.warehouse.config` sets width, basis and norm.

    Raises:
        ValueError: in `forward`, one sample in training mode with attention_norm="batch", which needs two.
    """

    beta: Tensor | None

    def __init__(self, channels: int, share: Share):
        super().__init__()
        config = share.warehouse.config
        n = len(share.warehouse.cells)
        hidden = max(int(channels * config.reduction), MIN_HIDDEN)
        self.layer_name, self.attention_function = share.kernel.name, config.attention_function
        self.mixtures, self.cells = share.mixtures, n
        self.start = share.start
        self.local = int(config.n * share.mixtures) if config.nonlocal_basis < 1 else n

        self.fc1 = nn.Linear(channels, hidden, bias=config.attention_norm == "layer")
        self.norm = nn.BatchNorm1d(hidden) if config.attention_norm == "batch" else nn.LayerNorm(hidden)
        if self.local == n:
            self.fc2 = nn.Linear(hidden, self.mixtures * (n + 1))
            self.fc3 = None
            self.register_parameter("basis_bias", None)
        else:
            basis = max(int((n - self.local) * config.nonlocal_basis), MIN_BASIS)
            self.fc2 = nn.Linear(hidden, self.mixtures * (self.local + basis + 1), bias=False)
            self.fc3 = nn.Linear(basis, n - self.local, bias=False)
            self.basis_bias = nn.Parameter(torch.empty(self.mixtures * (n + 1)))

        self.anchors = share.anchors
        beta = None if share.anchors is None else _one_hot(share.anchors, n)
        self.register_buffer("beta", beta, persistent=False)  # follows from the anchors
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """He normal with fan-out for the linear layers; zero for biases; one and zero for the norm."""
        self._reset_beta()
        for layer in (self.fc1, self.fc2, self.fc3):
            if layer is not None:
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        self.norm.reset_parameters()
        if self.basis_bias is not None:
            nn.init.zeros_(self.basis_bias)

    def _reset_beta(self) -> None:
        """Compute beta again. It is not saved, and its memory may be new: after `to_empty`, or after a state dict was
        assigned to a model on the meta device."""
        if self.beta is not None and self.anchors is not None:
            device = self.temperature.device if self.beta.is_meta else self.beta.device
            self.beta = _one_hot(self.anchors, self.cells).to(device, self.beta.dtype)

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._reset_beta()

    @property
    def features(self) -> int:
        """The hidden width H."""
        return self.fc1.out_features

    @property
    def is_affine(self) -> bool:
        """Whether attentions are affine in the hidden features, up to one factor for each mixture."""
        return FUNCTIONS[self.attention_function] is contrast

    def hidden(self, pooled: Tensor) -> Tensor:
        """The features that the scores are affine in: `(B, C)` to `(B, H)`."""
        if self.norm.training and isinstance(self.norm, nn.BatchNorm1d) and pooled.shape[0] == 1:
            raise ValueError(
                f"Layer {self.layer_name!r}: BatchNorm in the attention cannot train on a batch of one. "
                f"Use at least two samples per device, model.eval(), or attention_norm='layer' in KWConfig."
            )
        return torch.relu(self.norm(self.fc1(pooled)))

    def scores(self, pooled: Tensor) -> Tensor:
        """`z` of the paper: `(B, C)` to `(B, m, n + 1)`, the zero cell last."""
        return self.scores_of(self.hidden(pooled))

    def scores_of(self, hidden: Tensor) -> Tensor:
        """The scores from `hidden`, an affine map: `(B, H)` to `(B, m, n + 1)`."""
        z: Tensor = self.fc2(hidden)
        if self.fc3 is None:
            return z.view(hidden.shape[0], self.mixtures, self.cells + 1)
        return self._spread(z) + self.basis_bias.view(self.mixtures, self.cells + 1)

    def _spread(self, z: Tensor) -> Tensor:
        """With a non-local basis, the linear map from the output of `fc2` to scores without bias, `(B, m, n + 1)`."""
        assert self.fc3 is not None
        z = z.view(z.shape[0], self.mixtures, -1)
        own, basis, zero = torch.split(z, [self.local, z.shape[2] - self.local - 1, 1], dim=2)
        others = self.fc3(basis)
        return torch.cat([others[..., : self.start], own, others[..., self.start :], zero], dim=2)

    def maps(self) -> Tensor:
        """The affine map to the cells' scores: for each hidden feature and, last, the constant: `(H + 1, m, n)`."""
        if self.fc3 is None:
            weight, bias = self.fc2.weight.t().reshape(-1, self.mixtures, self.cells + 1), self.fc2.bias
        else:
            weight, bias = self._spread(self.fc2.weight.t()), self.basis_bias
        constant = bias.view(1, self.mixtures, self.cells + 1)
        return torch.cat([weight.to(constant.dtype), constant])[..., : self.cells]

    def forward(self, pooled: Tensor, folded: bool = False) -> Tensor:
        """The attentions, `(B, C)` to `(B, m, n)`; or `folded`, the weights `(B, m, J)` for the kernels of `fold`."""
        hidden = self.hidden(pooled)
        return self._folded_weights(hidden) if folded else self._attentions(hidden)

    def _attentions(self, hidden: Tensor) -> Tensor:
        values, divisor = FUNCTIONS[self.attention_function](self.scores_of(hidden))
        values = values[..., : self.cells]
        if self.beta is None or self.shared.is_zero:
            return values / divisor
        values = values.to(torch.promote_types(values.dtype, torch.float32))
        tau = self.temperature.to(values)
        if not isinstance(divisor, Tensor):
            divisor = values.new_ones(())
        return torch.addcdiv(tau * self.beta, (1 - tau) * values, divisor)

    def _folded_weights(self, hidden: Tensor) -> Tensor:
        """Hidden features and 1, divided by the sum of absolute scores; above temperature 0, tau is the last."""
        features = F.pad(hidden, (0, 1), value=1.0)[:, None]  # (B, 1, H + 1)
        weights = features / size(self.scores_of(hidden))
        if self.beta is None or self.shared.is_zero:
            return weights
        tau = self.temperature.to(weights)
        return torch.cat([(1 - tau) * weights, tau.expand(*weights.shape[:2], 1)], dim=2)

    def fold(self, cells: Tensor) -> Tensor:
        """The cells `(n, o, i)` folded by `maps` into kernels `(J, m, o, i)`. A sample's kernel is a weighted sum of
        them (kw/compute/mixing.py). Above temperature 0, the last ones are the anchor cells. Only if `is_affine`."""
        basis = mix(self.maps(), cells)
        if self.beta is None or self.shared.is_zero:
            return basis
        return torch.cat([basis, mix(self.beta[None].to(cells.dtype), cells).to(basis.dtype)])

    @property
    def tau(self) -> float:
        """The temperature; 0 where the layer is not anchored, and the temperature has no effect."""
        return 0.0 if self.beta is None else float(self.temperature)

    def extra_repr(self) -> str:
        return f"{self.mixtures} mixtures of {self.cells} cells"


def attention_parameters(channels: int, mixtures: int, cells: int, config: KWConfig) -> int:
    """Parameters of the `Attention` of a layer with so many input channels and mixtures, in a warehouse of so many
    cells."""
    hidden = max(int(channels * config.reduction), MIN_HIDDEN)
    first = channels * hidden + 2 * hidden + (hidden if config.attention_norm == "layer" else 0)
    local = int(config.n * mixtures) if config.nonlocal_basis < 1 else cells
    if local == cells:
        return first + (hidden + 1) * mixtures * (cells + 1)
    basis = max(int((cells - local) * config.nonlocal_basis), MIN_BASIS)
    return first + hidden * mixtures * (local + basis + 1) + basis * (cells - local) + mixtures * (cells + 1)


def _one_hot(anchors: tuple[int, ...], n: int) -> Tensor:
    """beta of the paper, `(m, n)`: 1 at each mixture's anchor; all 0 where that is the zero cell, number n."""
    beta = torch.zeros(len(anchors), n + 1)
    beta[torch.arange(len(anchors)), torch.tensor(anchors)] = 1
    return beta[:, :n].clone()
