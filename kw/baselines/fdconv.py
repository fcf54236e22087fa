"""FDConv (Chen et al., CVPR 2025, arXiv 2503.18783): a kernel whose frequencies are weighted for each sample.

    W = a_filter a_channel a_space a_local * irfft2(sum_j a_group[j] S_j),    y = W conv bands(x) + b

S is the spectrum of one kernel, laid out as a matrix of (C_out kh) x (C_in kw). S_j are its frequencies of group j:
they are sorted by their distance from zero, ties in row-major order, and cut into `kernel_num` runs. `bands` cuts the
input of a 3x3 layer into four bands of frequencies and scales three of them at each position.

Shapes: x `(B, C_in, H, W)`, S `(1, C_out kh, C_in kw / 2 + 1, 2)` of real and imaginary parts, divided by
c = min(C_in, C_out) / 2; a_group `(B, kernel_num)`, a_channel `(B, C_in)`, a_filter `(B, C_out)`, a_space `(B, P)`,
a_local `(B, C_out, P, C_in)`. All are 2 sigmoid(.) of the pooled input, so that zero scores leave W as it is.

As in the release, only layers of 1x1 or 3x3 with more than 16 input and output channels and without groups are dynamic;
others are plain convolutions. Differs from the release: kernels start as those of all methods here (He normal, not
torch's default); where `kernel_num` does not divide the number of frequencies, runs differ by one in length.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kw.baselines.layer import MIN_HIDDEN, DynamicConv2d, he_normal, pool
from kw.baselines.registry import register
from kw.compute.tracing import is_observed, is_recorded, leaf

REDUCTION = 16
MIN_CHANNELS = 17
CUTOFFS = (0.5 / 2, 0.5 / 4, 0.5 / 8)  # of the bands, in cycles per pixel
MASK = 64  # the release makes the bands' masks at this size, and resizes them to the input's
MATRIX_PIXELS = 256  # images of more pixels are cut into bands by Fourier transforms
NEARLY_ZERO = 1e-6  # standard deviation of scores that shall begin near zero


class Attentions(NamedTuple):
    """Factors of a batch; `space` is None for a pointwise layer, and `local` is the sigmoid alone: its factor 2
    is multiplied into `group`, which has the fewest numbers."""

    channel: Tensor
    filter: Tensor
    space: Tensor | None
    group: Tensor
    local: Tensor


class StarReLU(nn.Module):
    """s relu(x)^2 + b, with learnt scalars s and b."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.bias = nn.Parameter(torch.ones(1)), nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x.relu().square() + self.bias


class FrequencyAttention(nn.Module):
    """Pooled features `(B, C_in)` to `Attentions`. The first four are maps of a hidden vector, `local` is a convolution
    over the input channels.

    Raises:
        ValueError: one sample in training mode: BatchNorm needs two for its statistics.
    """

    def __init__(self, layer: FDConv2d):
        super().__init__()
        self.heat = 1.0 if layer.kernel_num is not None else math.sqrt(layer.group_count)
        hidden = max(layer.in_channels // REDUCTION, MIN_HIDDEN)
        self.fc = nn.Linear(layer.in_channels, hidden, bias=False)
        self.norm = nn.BatchNorm1d(hidden)
        self.relu = StarReLU()
        self.channel = nn.Linear(hidden, layer.in_channels)
        self.filter = nn.Linear(hidden, layer.out_channels)
        self.space = None if layer.positions == 1 else nn.Linear(hidden, layer.positions)
        self.group = nn.Linear(hidden, layer.group_count)
        width = round(math.log2(layer.in_channels) / 2 + 0.5) // 2 * 2 + 1
        self.local_norm = nn.LayerNorm(layer.in_channels)
        self.local = nn.Conv1d(1, layer.out_channels * layer.positions, width, padding=width // 2, bias=False)
        he_normal(self)  # a_filter keeps it, since the release re-draws the others alone
        for part in (self.channel, self.space, self.group):
            if part is not None:
                nn.init.normal_(part.weight, std=NEARLY_ZERO)
        nn.init.constant_(self.local.weight, NEARLY_ZERO)

    def forward(self, pooled: Tensor) -> Attentions:
        if self.norm.training and pooled.shape[0] == 1:
            raise ValueError(
                "BatchNorm in the attention of FDConv cannot train on a batch of one: use at least two samples per "
                "device, or model.eval()."
            )
        h = self.relu(self.norm(self.fc(pooled)))
        return Attentions(
            channel=self._factor(self.channel(h)),
            filter=self._factor(self.filter(h)),
            space=None if self.space is None else self._factor(self.space(h)),
            group=self._factor(self.group(h)),
            local=torch.sigmoid(self.local(self.local_norm(pooled)[:, None])),
        )

    def _factor(self, scores: Tensor) -> Tensor:
        return 2 * torch.sigmoid(scores / self.heat)


class Bands(nn.Module):
    """The input `(B, C, H, W)` with its frequencies scaled at each position, by three bands; the lowest stays."""

    def __init__(self, channels: int):
        super().__init__()
        self.scores = nn.Conv2d(channels, len(CUTOFFS), 3, padding=1)
        nn.init.normal_(self.scores.weight, std=NEARLY_ZERO)
        nn.init.zeros_(self.scores.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        weights = _at_least_float(2 * torch.sigmoid(self.scores(x)))
        # sum_t weights_t (low_{t-1} - low_t) + low_3 = weights_1 low_0 + sum_t (weights_{t+1} - weights_t) low_t
        steps = torch.diff(weights, dim=1, append=torch.ones_like(weights[:, :1]))
        whole = _at_least_float(x)
        total = weights[:, :1] * whole
        for low, step in zip(_lower(whole), torch.split(steps, 1, dim=1), strict=True):
            total = torch.addcmul(total, step, low)
        return total.to(x.dtype)


def _lower(x: Tensor) -> list[Tensor]:
    """The input below each cut-off. For small images as a product with a matrix, made by transforming a unit image for
    each pixel, where that is less work than transforming the input."""
    height, width = x.shape[2:]
    pixels = height * width
    if _is_watched(x) or pixels > MATRIX_PIXELS or x.shape[0] * x.shape[1] < pixels:
        return _filtered(x)
    images = torch.eye(pixels, dtype=x.dtype, device=x.device).view(pixels, 1, height, width)
    with _without_autocast(x):
        return [(x.flatten(2) @ matrix.view(pixels, pixels)).view(x.shape) for matrix in _filtered(images)]


def _filtered(x: Tensor) -> list[Tensor]:
    """The input below each cut-off, by Fourier transforms."""
    height, width = x.shape[2:]
    spectrum = torch.fft.rfft2(x, norm="ortho")
    # float32 as in the release, whatever torch's default is: whether a frequency is below its cut-off is rounding.
    axes = (torch.fft.fftfreq, torch.fft.rfftfreq)
    rows, columns = (axis(MASK, device=x.device, dtype=torch.float32) for axis in axes)
    found = []
    for cutoff in CUTOFFS:
        above = _below(cutoff, rows, height)[:, None] * _below(cutoff, columns, width // 2 + 1) == 0
        found.append(torch.fft.irfft2(spectrum.masked_fill(above, 0), s=(height, width), norm="ortho"))
    return found


def _below(cutoff: float, frequencies: Tensor, size: int) -> Tensor:
    """1 where an axis' frequencies are below the cut-off, else 0, resized to `(size,)` as the release does."""
    mask = (frequencies.abs() < cutoff + 1e-8).float()
    return F.interpolate(mask[None, None], size=size, mode="nearest")[0, 0]


def _is_watched(x: Tensor) -> bool:
    """Whether the operations on `x` are recorded or counted: then there is one way for all sizes. Code for
    torch.compile cannot ask who counts."""
    return is_recorded(x.shape) or (not torch.compiler.is_compiling() and is_observed())


def _without_autocast(x: Tensor) -> AbstractContextManager[None]:
    """Products in the dtype of their factors, as Fourier transforms are; a meta device has no autocast."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


def _at_least_float(x: Tensor) -> Tensor:
    """There are no Fourier transforms of half precision in all sizes."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


@register("fdconv", budget=False)
class FDConv2d(DynamicConv2d):
    """`nn.Conv2d` with a kernel assembled of weighted frequencies; equations above.

    Args:
        kernel_num: groups of frequencies. None: C_out / 2, and scores are divided by its square root.
    """

    group_of: Tensor
    trained_when_frozen = ("attention", "bands")  # as in its release

    def __init__(self, *args: Any, kernel_num: int | None = 64, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if kernel_num is not None and kernel_num < 1:
            raise ValueError(f"kernel_num={kernel_num} must be at least 1, or None for half the output channels.")
        self.kernel_num = kernel_num
        small = min(self.in_channels, self.out_channels) < MIN_CHANNELS
        if small or self.groups > 1 or self.kernel_size not in ((1, 1), (3, 3)):
            return
        self.group_count = kernel_num or self.out_channels // 2
        self.weight = nn.Parameter(self._spectrum(self.weight.detach()))
        self.attention = FrequencyAttention(self)
        self.bands = Bands(self.in_channels) if self.positions > 1 else None
        self.register_buffer("group_of", self._groups().to(self.weight.device), persistent=False)

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """The kernel as a matrix: an output channel has kh rows, an input channel kw columns."""
        return self.out_channels * self.kernel_size[0], self.in_channels * self.kernel_size[1]

    @property
    def scale(self) -> float:
        return min(self.in_channels, self.out_channels) // 2

    def reset_parameters(self) -> None:
        """The kernel and bias of all methods; a dynamic layer holds that kernel's spectrum. The attention stays."""
        if getattr(self, "attention", None) is None:  # also while the layer is built
            return super().reset_parameters()
        spectrum = self.weight
        self.weight = nn.Parameter(spectrum.new_empty(self.kernel_shape))
        super().reset_parameters()
        with torch.no_grad():
            spectrum.copy_(self._spectrum(self.weight))
        self.weight = spectrum

    @torch.no_grad()
    def set_kernel(self, kernel: Tensor) -> None:
        """Take a static kernel, `kernel_shape`. The attention stays, and does not begin at 1: a_filter does not."""
        kernel = kernel.to(self.weight)
        self.weight.copy_(kernel if self.attention is None else self._spectrum(kernel))

    def _apply(self, fn: Any, recurse: bool = True) -> FDConv2d:
        """From the meta device, `to_empty` brings no values: the groups follow from the shape."""
        had_none = self.attention is not None and self.group_of.is_meta
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if had_none and not self.group_of.is_meta:
            self.group_of.copy_(self._groups())
        return self

    def _spectrum(self, kernel: Tensor) -> Tensor:
        """A kernel's spectrum, as `weight` holds it."""
        matrix = kernel.transpose(1, 2).reshape(self.matrix_shape)
        return torch.view_as_real(torch.fft.rfft2(_at_least_float(matrix))).to(kernel.dtype)[None] / self.scale

    def _groups(self) -> Tensor:
        """The group of each frequency, `(C_out kh, C_in kw / 2 + 1)`.

        Many distances are equal but for rounding, and the groups at such ties are part of a trained layer. So they are
        computed by steps that every machine rounds alike: as torch's norm of float32 on a CPU with fused
        multiply-adds, with which the release's checkpoints agree.
        """
        rows, columns = self.matrix_shape
        u = torch.fft.fftfreq(rows, dtype=torch.float32, device="cpu").double()[:, None]
        v = torch.fft.rfftfreq(columns, dtype=torch.float32, device="cpu").double()
        squares = (u.square().float().double() + v.square()).float()
        distance = squares.double().sqrt().float().flatten()
        group_of = torch.empty(distance.numel(), dtype=torch.long, device="cpu")
        order = distance.sort(stable=True).indices
        group_of[order] = torch.arange(distance.numel(), device="cpu") * self.group_count // distance.numel()
        return group_of.view(rows, -1)

    def kernels(self, attentions: Attentions) -> Tensor:
        """Each sample's kernel, `(B, *kernel_shape)`, without a_channel and a_filter."""
        group = 2 * _at_least_float(attentions.group)  # and the factor 2 of `local`
        batch, groups = group.shape
        if _is_watched(group) or batch < groups:
            kernels = self._positions(group)
        else:  # fewer transforms: each group's, then a weighted sum for each sample
            basis = self._positions(torch.eye(groups, dtype=group.dtype, device=group.device))
            with _without_autocast(group):
                kernels = (group @ basis.flatten(1)).view(batch, *basis.shape[1:])
        kernels = kernels * attentions.local.view(kernels.shape)
        if attentions.space is not None:
            kernels = kernels * attentions.space[:, None, :, None]
        return kernels.transpose(2, 3).reshape(-1, *self.kernel_shape)

    def _positions(self, group: Tensor) -> Tensor:
        """Kernels `(B, C_out, P, C_in)` of the spectrum, with its groups weighted by `(B, kernel_num)`."""
        real, imaginary = (_at_least_float(self.weight[0]) * self.scale).unbind(-1)
        weights = group[:, self.group_of]
        # Not a complex product, which is slow on a CPU.
        spectrum = torch.complex(real.contiguous() * weights, imaginary.contiguous() * weights)
        matrix: Tensor = torch.fft.irfft2(spectrum, s=self.matrix_shape)
        (high, wide), channels = self.kernel_size, self.in_channels
        return matrix.view(-1, self.out_channels, high, channels, wide).transpose(3, 4).flatten(2, 3)

    def load_released(self, state_dict: Mapping[str, Tensor]) -> None:
        """Load a layer of FDConv's release, strictly (`load_released` below)."""
        load_released(self, state_dict)

    @leaf
    def forward(self, x: Tensor) -> Tensor:
        if self.attention is None:
            return self.add_bias(self.convolve(x, self.weight))
        if not is_recorded(x.shape) and x.shape[0] == 0:  # which no Fourier transform takes
            return self.add_bias(self.convolve(x, x.new_zeros(self.kernel_shape)))
        attentions = self.attention(pool(x))
        kernels = self.kernels(attentions)
        x = x if self.bands is None else self.bands(x)
        channel, filter = attentions.channel[..., None, None], attentions.filter[..., None, None]
        if self._is_small(x):
            kernels = kernels * channel[:, None] * filter[..., None]
            return self.add_bias(self.convolve(x, kernels.to(x.dtype)))
        return self.add_bias(self.convolve(x * channel, kernels.to(x.dtype)) * filter)

    def _is_small(self, x: Tensor) -> bool:
        """Whether a kernel has fewer numbers than input and output: then scaling it is cheaper (as in the release)."""
        if is_recorded(x.shape):
            return True
        return math.prod(self.kernel_shape) < (self.in_channels + self.out_channels) * x.shape[2] * x.shape[3]


# Names in the release of what a dynamic layer has; the bands' scores follow.
RELEASED = {
    "weight": "dft_weight",
    "attention.fc": "KSM_Global.fc",
    "attention.norm": "KSM_Global.bn",
    "attention.relu": "KSM_Global.relu",
    "attention.channel": "KSM_Global.channel_fc",
    "attention.filter": "KSM_Global.filter_fc",
    "attention.space": "KSM_Global.spatial_fc",
    "attention.group": "KSM_Global.kernel_fc",
    "attention.local": "KSM_Local.conv",
    "attention.local_norm": "KSM_Local.norm",
}
MATRICES = {"attention.fc", "attention.channel", "attention.filter", "attention.space", "attention.group"}


def to_released(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of a layer or model under the names and shapes of FDConv's release. Its tensors are those of the
    model, not copies."""
    layers = {
        f"{name}." if name else ""
        for name, module in model.named_modules()
        if isinstance(module, FDConv2d) and module.attention is not None
    }
    found: dict[str, Tensor] = {}
    for key, value in model.state_dict().items():
        layer = next((prefix for prefix in layers if key.startswith(prefix)), None)
        found |= {key: value} if layer is None else _released(layer, key.removeprefix(layer), value)
    return found


def _released(layer: str, key: str, value: Tensor) -> dict[str, Tensor]:
    """One entry of a dynamic layer, as the entries that the release has for it."""
    part, _, leaf = key.rpartition(".")
    if part == "bands.scores":
        return {f"{layer}FBM.freq_weight_conv_list.{k}.{leaf}": row[None] for k, row in enumerate(value)}
    if key in RELEASED:
        return {layer + RELEASED[key]: value}
    is_matrix = part in MATRICES and leaf == "weight"  # a pointwise convolution there
    return {f"{layer}{RELEASED[part]}.{leaf}" if part else layer + key: value[..., None, None] if is_matrix else value}


@torch.no_grad()
def load_released(model: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Load a state dict of FDConv's release into a layer or a model, strictly.

    Raises:
        ValueError: entries are missing, left over or of another shape; the model is then unchanged.
    """
    own = to_released(model)
    wrong = [f"{key!r} is missing" for key in own if key not in state_dict]
    wrong += [f"{key!r} is left over" for key in state_dict if key not in own]
    wrong += [
        f"{key!r} has shape {tuple(state_dict[key].shape)}, not {tuple(value.shape)}"
        for key, value in own.items()
        if key in state_dict and state_dict[key].shape != value.shape
    ]
    if wrong:
        more = f"; and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        raise ValueError(f"The state dict does not fit this {type(model).__name__}: {'; '.join(wrong[:4])}{more}.")
    for key, value in own.items():
        value.copy_(state_dict[key])
