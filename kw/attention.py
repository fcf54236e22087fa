"""The contrasting-driven attention function, CAF (paper, section 3.3), with its temperature as saved state; and what
the paper's ablations put in its place.

Shapes: `B` batch, `C` channels, `H` hidden width, `m` mixtures of the layer, `n` cells of its warehouse.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kw.compute.mixing import mix
from kw.temperature import Tempered
from kw.warehouse import Draw

MIN_HIDDEN = 16
MIN_BASIS = 16
EPSILON = 1e-3


# Attentions as a quotient: values `(B, m, n + 1)` over a divisor for each mixture `(B, m, 1)`.
Quotient = tuple[Tensor, Tensor | float]  # a number: 1


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
    """Attentions in (0, 1), each for itself, as in CondConv: the zero cell's score has no effect."""
    return z.sigmoid(), 1.0


def tanh(z: Tensor) -> Quotient:
    """Attentions in (-1, 1), each for itself."""
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

    A score for a zero cell takes part in the normalization and is dropped, so a row sums to anything in [-1, 1] (of
    CAF; `FUNCTIONS` has others).

    Args:
        channels: input channels of the layer, all groups together.
        draw: the layer's share in its warehouse; `draw.warehouse.config` gives width, basis and norm.

    Raises:
        ValueError: one sample in training mode with attention_norm="batch", which needs two for its statistics.
    """

    beta: Tensor | None

    def __init__(self, channels: int, draw: Draw):
        super().__init__()
        config = draw.warehouse.config
        n = len(draw.warehouse.cells)
        hidden = max(int(channels * config.reduction), MIN_HIDDEN)
        self.layer_name, self.attention_function = draw.kernel.name, config.attention_function
        self.mixtures, self.cells = draw.mixtures, n
        self.start = draw.start
        self.local = int(config.n * draw.mixtures) if config.nonlocal_basis < 1 else n

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

        self.anchors = draw.anchors
        beta = None if draw.anchors is None else _one_hot(draw.anchors, n)
        self.register_buffer("beta", beta, persistent=False)  # follows from the anchors
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """He normal, fan-out, for the linear layers; zero for biases; one and zero for the norm."""
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
        """It is not saved, and its memory may be new: `to_empty`, or a state dict that is assigned to a meta model."""
        if self.beta is not None and self.anchors is not None:
            device = self.temperature.device if self.beta.is_meta else self.beta.device
            self.beta = _one_hot(self.anchors, self.cells).to(device, self.beta.dtype)

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._reset_beta()

    @property
    def features(self) -> int:
        """H."""
        return self.fc1.out_features

    @property
    def is_affine(self) -> bool:
        """Whether attentions are affine in the hidden features, up to one factor for each mixture."""
        return FUNCTIONS[self.attention_function] is contrast

    def hidden(self, pooled: Tensor) -> Tensor:
        """What the scores are affine in: `(B, C)` to `(B, H)`."""
        if len(pooled) == 1 and self.norm.training and isinstance(self.norm, nn.BatchNorm1d):
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
            return z.view(len(hidden), self.mixtures, self.cells + 1)
        return self._spread(z) + self.basis_bias.view(self.mixtures, self.cells + 1)

    def _spread(self, z: Tensor) -> Tensor:
        """With a non-local basis, what `fc2` gives to scores but for their bias, a linear map: to `(B, m, n + 1)`."""
        assert self.fc3 is not None
        z = z.view(len(z), self.mixtures, -1)
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
        """The attentions, `(B, C)` to `(B, m, n)`; or `folded`, the weights `(B, m, J)` of `fold`'s kernels."""
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
        """Hidden features and 1, over the sum of absolute scores; above temperature 0, tau is the last."""
        features = F.pad(hidden, (0, 1), value=1.0)[:, None]  # (B, 1, H + 1)
        weights = features / size(self.scores_of(hidden))
        if self.beta is None or self.shared.is_zero:
            return weights
        tau = self.temperature.to(weights)
        return torch.cat([(1 - tau) * weights, tau.expand(*weights.shape[:2], 1)], dim=2)

    def fold(self, cells: Tensor) -> Tensor:
        """The cells `(n, o, i)` folded by `maps` into kernels `(J, m, o, i)`, of which a sample's are sums
        (kw/compute/mixing.py). Above temperature 0, the anchors' cells are the last. Only where `is_affine`."""
        basis = mix(self.maps(), cells)
        if self.beta is None or self.shared.is_zero:
            return basis
        return torch.cat([basis, mix(self.beta[None].to(cells.dtype), cells).to(basis.dtype)])

    @property
    def tau(self) -> float:
        """The temperature as far as it counts: 0 where nothing is anchored."""
        return 0.0 if self.beta is None else float(self.temperature)

    def extra_repr(self) -> str:
        return f"{self.mixtures} mixtures of {self.cells} cells"


def _one_hot(anchors: tuple[int, ...], n: int) -> Tensor:
    """Which cell each mixture is anchored to, `(m, n)`; nothing for the zero cell, number n."""
    beta = torch.zeros(len(anchors), n + 1)
    beta[torch.arange(len(anchors)), torch.tensor(anchors)] = 1
    return beta[:, :n].clone()
