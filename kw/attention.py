"""The contrasting-driven attention function, CAF (paper, section 3.3), with its temperature as saved state; and the
functions that replace it in the paper's ablations.

Shapes: `B` batch, `C` channels, `H` hidden width, `m` mixtures of the layer, `n` cells of its warehouse.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

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
        ValueError: in `forward`, one sample in training mode, and the norm is a BatchNorm without running statistics.
    """

    beta: Tensor | None  # (m, n), one-hot. It follows from the anchors: not a buffer, and made again where it is needed

    def __init__(self, channels: int, share: Share):
        super().__init__()
        config = share.warehouse.config
        n = len(share.warehouse.cells)
        hidden, self.local, basis = widths(channels, share.mixtures, n, config)
        self.layer_name, self.attention_function = share.kernel.name, config.attention_function
        self.mixtures, self.cells = share.mixtures, n
        self.start = share.start

        self.fc1 = nn.Linear(channels, hidden, bias=config.attention_norm == "layer")
        self.norm = nn.BatchNorm1d(hidden) if config.attention_norm == "batch" else nn.LayerNorm(hidden)
        if self.local == n:
            self.fc2 = nn.Linear(hidden, self.mixtures * (n + 1))
            self.fc3 = None
            self.register_parameter("basis_bias", None)
        else:
            self.fc2 = nn.Linear(hidden, self.mixtures * (self.local + basis + 1), bias=False)
            self.fc3 = nn.Linear(basis, n - self.local, bias=False)
            self.basis_bias = nn.Parameter(torch.empty(self.mixtures * (n + 1)))

        self.anchors = share.anchors
        self.beta = None
        self._place_beta(self.fc1.weight.device)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """He normal with fan-out for the linear layers; zero for biases; one and zero for the norm."""
        for layer in (self.fc1, self.fc2, self.fc3):
            if layer is not None:
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        self.norm.reset_parameters()
        if self.basis_bias is not None:
            nn.init.zeros_(self.basis_bias)

    def _place_beta(self, device: torch.device) -> None:
        """Make beta on `device`, if it is not there."""
        if self.anchors is not None and (self.beta is None or self.beta.device != device):
            self.beta = _one_hot(self.anchors, self.cells, device)

    def _apply(self, fn: Any, recurse: bool = True) -> Attention:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._place_beta(self.fc1.weight.device)
        return self

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._place_beta(self.temperature.device)  # a model on the meta device may have been assigned its state

    def _beta_like(self, x: Tensor) -> Tensor:
        """beta on the device and in the dtype of `x`. What moves single tensors, such as accelerate, or replaces them,
        such as fake ones, does not know of beta; then it is made for this call."""
        assert self.anchors is not None and self.beta is not None
        at_hand = type(x) is Tensor and self.beta.device == x.device
        return (self.beta if at_hand else _one_hot(self.anchors, self.cells, x.device)).to(x.dtype)

    @torch.no_grad()
    def prefer_anchors(self) -> None:
        """Let each mixture's scores be 1 for its anchor and 0 for all other cells, whatever the input: `fc2` starts at
        zero, as adapters do, and learns from there."""
        assert self.anchors is not None
        bias = self.fc2.bias if self.fc3 is None else self.basis_bias
        scores = torch.zeros(self.mixtures, self.cells + 1)
        scores[torch.arange(self.mixtures), torch.tensor(self.anchors)] = 1
        bias.copy_(scores.flatten())
        self.fc2.weight.zero_()

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
        return torch.relu(self._normed(self.fc1(pooled)))

    def _normed(self, features: Tensor) -> Tensor:
        """The features after the norm. BatchNorm has no statistics of a batch of one: it takes its running ones, and
        leaves them as they are."""
        norm = self.norm
        # In evaluation mode, what is exported must not depend on the batch size.
        if not (norm.training and isinstance(norm, _BatchNorm) and features.shape[0] < 2) or _is_synced(norm):
            normed: Tensor = norm(features)
            return normed
        if norm.running_mean is None:
            raise ValueError(
                f"Layer {self.layer_name!r}: BatchNorm in the attention has no running statistics, and cannot train on "
                f"a batch of one. Use at least two samples per device, or attention_norm='layer' in KWConfig."
            )
        if not (self.shared.has_warned or torch.compiler.is_compiling()):
            self.shared.has_warned = True
            warnings.warn(
                f"Layer {self.layer_name!r} had a batch of {features.shape[0]} in training mode, and BatchNorm in its "
                f"attention took the running statistics instead. If most batches are like this, use more samples per "
                f"device, or attention_norm='layer' in KWConfig. There are no more warnings of this for the model.",
                stacklevel=2,
            )
        return F.batch_norm(
            features, norm.running_mean, norm.running_var, norm.weight, norm.bias, training=False, eps=norm.eps
        )

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
        return torch.addcdiv(tau * self._beta_like(values), (1 - tau) * values, divisor)

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
        return torch.cat([basis, mix(self._beta_like(basis)[None].to(cells.dtype), cells).to(basis.dtype)])

    @property
    def tau(self) -> float:
        """The temperature; 0 where the layer is not anchored, and the temperature has no effect."""
        return 0.0 if self.beta is None else float(self.temperature)

    def extra_repr(self) -> str:
        return f"{self.mixtures} mixtures of {self.cells} cells"


def widths(channels: int, mixtures: int, cells: int, config: KWConfig) -> tuple[int, int, int]:
    """Of the attention of a layer with so many input channels and mixtures, in a warehouse of so many cells: the hidden
    width, the cells that are scored directly, and the width of the basis for the others."""
    hidden = max(int(channels * config.reduction), MIN_HIDDEN)
    local = int(config.n * mixtures) if config.nonlocal_basis < 1 else cells
    return hidden, local, max(int((cells - local) * config.nonlocal_basis), MIN_BASIS)


def attention_parameters(channels: int, mixtures: int, cells: int, config: KWConfig) -> int:
    """Parameters of that attention."""
    hidden, local, basis = widths(channels, mixtures, cells, config)
    first = channels * hidden + 2 * hidden + (hidden if config.attention_norm == "layer" else 0)
    if local == cells:
        return first + (hidden + 1) * mixtures * (cells + 1)
    return first + hidden * mixtures * (local + basis + 1) + basis * (cells - local) + mixtures * (cells + 1)


def _one_hot(anchors: tuple[int, ...], n: int, device: torch.device) -> Tensor:
    """beta of the paper, `(m, n)`: 1 at each mixture's anchor; all 0 where that is the zero cell, number n."""
    cells = torch.arange(n, device=device)
    return (torch.tensor(anchors, device=device)[:, None] == cells).float()


def _is_synced(norm: _BatchNorm) -> bool:
    """Whether the norm takes its statistics from several processes, which have more samples together."""
    if not (isinstance(norm, nn.SyncBatchNorm) and dist.is_available() and dist.is_initialized()):
        return False
    return dist.get_world_size(norm.process_group) > 1
