"""Implementation "triton": a convolution with a different kernel for each sample, as two Triton kernels.

A convolution is a matrix product with the *unfolded* input: a row for each output position, with the inputs that it
reads side by side. These kernels never write that matrix. They read its blocks from the input when they need them,
which is called an implicit GEMM. They read the sample's kernel as it was assembled, cell by cell, without moving it.

    out[b, s, n] = sum over taps t and channels c of  x[b, c, position(s, t)] * kernel[b, t, n, c]

Three products are needed, and two kernels do them:

    _convolve        forward; and the gradient of the input, which is a convolution of the output's gradient with the
                     kernel's taps in reverse, one for each *phase* (input positions with the same remainder modulo the
                     stride)
    _grad_kernels    the gradient of each sample's kernel: for each tap, output gradients times the inputs that it reads

Triton in brief: the function below runs once for each element of a grid, in parallel. Each run is a *program*, which
computes one block of one sample's output. Names in capitals are constants when the function is compiled; the others are
arguments of each call. `tl.arange` makes a vector of indices. A pointer plus a matrix of offsets is a matrix of
pointers; `tl.load` reads what they point to, and 0 where `mask` is false. `tl.dot` is a product on the tensor cores,
here always summed in float32 (float64 for float64).

Shapes: `B` batch, `P` taps, `R` by `C` cells of a kernel at a tap, `o` by `i` channels of a cell; kernels are
`(B, P, R, C, o, i)`, inputs and outputs `(B, channels, height, width)` of any strides.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kw.compute.geometry import Geometry

try:
    import triton
    import triton.language as tl
    from triton import knobs
except ImportError:  # as on macOS, or Triton before 3.4 (torch before 2.8): then `samples.applies` is False
    triton = None

AVAILABLE = triton is not None
INTERPRETED = AVAILABLE and bool(knobs.runtime.interpret)  # TRITON_INTERPRET=1: on the CPU, for tests
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Block(NamedTuple):
    """The work of one program: rows, columns and depth of its product; warps of 32 threads; and pipeline stages, each
    of which takes `(rows + columns) * depth` numbers of shared memory."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


def blocks(rows: int, columns: int, dtype: torch.dtype) -> Block:
    """The block for a product with this many rows and columns: the largest that stays mostly full.

    Depth is 128 bytes, a cache line. With 3 stages no block needs more than 96 KiB of shared memory. A multiprocessor
    has 164 KiB (compute capability 8.0) or 228 KiB (9.0).
    """
    height, width = _side(rows), _side(columns)
    return Block(height, width, 128 // dtype.itemsize, 8 if height * width >= 128 * 128 else 4, 3)


def _side(size: int) -> int:
    """The side of a block that wastes least, if each block costs as much as 8 more rows."""
    return min((128, 64, 16), key=lambda side: cdiv(size, side) * (side + 8))


if AVAILABLE:
    # Triton compiles variants for integers that are 1, or multiples of 16. For strides and channels that widens loads;
    # for these arguments it would only mean more compilations.
    NOT_SPECIALIZED = [
        "height",
        "width",
        "out_width",
        "move_h",
        "move_w",
        "tap_h",
        "tap_w",
        "from_h",
        "from_w",
        "taps_w",
        "steps",
    ]

    @triton.jit(do_not_specialize=[*NOT_SPECIALIZED, "positions", "first", "next_h", "next_w", "sum_blocks"])
    def _convolve(
        source, kernels, out,
        # Strides: of the source, by sample, channel, row and column;
        source_b, source_c, source_h, source_w,
        # of the kernels, by sample and tap; by cell and by channel of a cell, along the sum and across it.
        kernel_b, kernel_t, sum_cell, sum_one, across_cell, across_one,
        out_b, out_c, out_h, out_w,
        height, width,  # of the source
        positions, out_width,  # of the output: rows times columns, and columns
        sums, across,  # channels of the source, and of the output
        # At tap (u, v), the output at (h, w) reads the source at (h * move_h + u * tap_h + from_h, ...).
        move_h, move_w, tap_h, tap_w, from_h, from_w,
        # Tap (u, v) is the kernel's position first + u * next_h + v * next_w; v is below `taps_w`.
        taps_w, first, next_h, next_w,
        sum_blocks,  # of DEPTH channels each
        steps,  # taps times sum_blocks
        SUM_CELL: tl.constexpr, ACROSS_CELL: tl.constexpr,  # channels of a cell along the sum, and across it
        SUM: tl.constexpr, PRECISION: tl.constexpr,
        ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
        STEPS: tl.constexpr,  # `steps` for the interpreter, whose loops need a constant; None for the compiler
    ):  # fmt: skip
        # The block and the sample of this program.
        column_blocks = tl.cdiv(across, COLUMNS)
        position = tl.program_id(0) // column_blocks * ROWS + tl.arange(0, ROWS)
        column = tl.program_id(0) % column_blocks * COLUMNS + tl.arange(0, COLUMNS)
        sample = tl.program_id(1).to(tl.int64)  # times a stride, it may exceed 32 bits
        source += sample * source_b
        kernels += sample * kernel_b
        out += sample * out_b
        out_y = position // out_width
        out_x = position % out_width
        of_column = column // ACROSS_CELL * across_cell + column % ACROSS_CELL * across_one

        total = tl.zeros((ROWS, COLUMNS), SUM)
        for step in range(steps if STEPS is None else STEPS):  # over taps, and over each tap's blocks of channels
            tap = step // sum_blocks
            depth = step % sum_blocks * DEPTH + tl.arange(0, DEPTH)
            u = tap // taps_w
            v = tap % taps_w
            y = out_y * move_h + (u * tap_h + from_h)
            x = out_x * move_w + (v * tap_w + from_w)
            inside = (position < positions) & (y >= 0) & (y < height) & (x >= 0) & (x < width)  # else it is padding
            read = source + (y * source_h + x * source_w)[:, None] + (depth * source_c)[None, :]
            left = tl.load(read, mask=inside[:, None] & (depth < sums)[None, :], other=0.0)
            of_depth = depth // SUM_CELL * sum_cell + depth % SUM_CELL * sum_one
            read = kernels + (first + u * next_h + v * next_w) * kernel_t + of_depth[:, None] + of_column[None, :]
            right = tl.load(read, mask=(depth < sums)[:, None] & (column < across)[None, :], other=0.0)
            if STEPS is not None:  # the interpreter cannot multiply bfloat16
                left = left.to(SUM)
                right = right.to(SUM)
            total = tl.dot(left, right, total, input_precision=PRECISION, out_dtype=SUM)
        write = out + (out_y * out_h + out_x * out_w)[:, None] + (column * out_c)[None, :]
        tl.store(
            write, total.to(out.dtype.element_ty), mask=(position < positions)[:, None] & (column < across)[None, :]
        )

    @triton.jit(do_not_specialize=[*NOT_SPECIALIZED, "position_count"])
    def _grad_kernels(
        grad, source, out,
        grad_b, grad_c, grad_h, grad_w,
        source_b, source_c, source_h, source_w,
        # Strides of the gradient of the kernels: by sample and tap; by cell and channel of outputs, and of inputs.
        out_b, out_t, row_cell, row_one, column_cell, column_one,
        height, width,  # of the source
        out_width, rows, columns,  # of `grad`; channels of outputs and inputs
        move_h, move_w, tap_h, tap_w, from_h, from_w,  # as in `_convolve`
        taps_w, position_count,
        steps,  # blocks of DEPTH positions
        ROW_CELL: tl.constexpr, COLUMN_CELL: tl.constexpr,
        SUM: tl.constexpr, PRECISION: tl.constexpr,
        ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
        STEPS: tl.constexpr,  # `steps` for the interpreter, whose loops need a constant; None for the compiler
    ):  # fmt: skip
        # The tap, and the block of one sample's kernel there, of this program.
        column_blocks = tl.cdiv(columns, COLUMNS)
        blocks_of_tap = tl.cdiv(rows, ROWS) * column_blocks
        tap = tl.program_id(0) // blocks_of_tap
        block = tl.program_id(0) % blocks_of_tap
        row = block // column_blocks * ROWS + tl.arange(0, ROWS)
        column = block % column_blocks * COLUMNS + tl.arange(0, COLUMNS)
        sample = tl.program_id(1).to(tl.int64)
        grad += sample * grad_b
        source += sample * source_b
        out += sample * out_b + tap * out_t
        u = tap // taps_w
        v = tap % taps_w

        total = tl.zeros((ROWS, COLUMNS), SUM)
        for step in range(steps if STEPS is None else STEPS):
            position = step * DEPTH + tl.arange(0, DEPTH)
            out_y = position // out_width
            out_x = position % out_width
            known = position < position_count
            read = grad + (row * grad_c)[:, None] + (out_y * grad_h + out_x * grad_w)[None, :]
            left = tl.load(read, mask=(row < rows)[:, None] & known[None, :], other=0.0)
            y = out_y * move_h + (u * tap_h + from_h)
            x = out_x * move_w + (v * tap_w + from_w)
            inside = known & (y >= 0) & (y < height) & (x >= 0) & (x < width)
            read = source + (y * source_h + x * source_w)[:, None] + (column * source_c)[None, :]
            right = tl.load(read, mask=inside[:, None] & (column < columns)[None, :], other=0.0)
            if STEPS is not None:  # the interpreter cannot multiply bfloat16
                left = left.to(SUM)
                right = right.to(SUM)
            total = tl.dot(left, right, total, input_precision=PRECISION, out_dtype=SUM)
        of_row = row // ROW_CELL * row_cell + row % ROW_CELL * row_one
        of_column = column // COLUMN_CELL * column_cell + column % COLUMN_CELL * column_one
        write = out + of_row[:, None] + of_column[None, :]
        tl.store(write, total.to(out.dtype.element_ty), mask=(row < rows)[:, None] & (column < columns)[None, :])


def forward(x: Tensor, kernels: Tensor, geometry: Geometry, out: Tensor) -> None:
    """Write the convolution of `x` with `kernels` to `out`."""
    P, R, C, o, i = kernels.shape[1:]
    x, out, plane = _plane(x), _plane(out), Plane.of(geometry)
    k_b, k_p, k_r, k_c, k_o, k_i = kernels.stride()
    block = blocks(out.shape[2] * out.shape[3], R * o, x.dtype)
    sum_blocks = cdiv(C * i, block.depth)
    options = _options(x.dtype, block, P * sum_blocks)
    grid = (cdiv(out.shape[2] * out.shape[3], block.rows) * cdiv(R * o, block.columns), len(x))
    _convolve[grid](
        x, kernels, out, *x.stride(), k_b, k_p, k_c, k_i, k_r, k_o, *out.stride(), *x.shape[2:],
        out.shape[2] * out.shape[3], out.shape[3], C * i, R * o,
        *plane.stride, *plane.dilation, -plane.padding[0], -plane.padding[1],
        plane.kernel[1], 0, plane.kernel[1], 1, sum_blocks, P * sum_blocks, i, o, **options,
    )  # fmt: skip


def grad_input(grad: Tensor, kernels: Tensor, geometry: Geometry, out: Tensor) -> None:
    """Write the gradient of the input to `out`, from that of the output.

    Output position (q + padding - u * dilation) / stride reads input position q at tap u, if that is an integer. For
    the q of one phase it is one at every `step`-th tap, and there successive q have successive readers.
    """
    _, R, C, o, i = kernels.shape[1:]
    grad, out, plane = _plane(grad), _plane(out), Plane.of(geometry)
    k_b, k_p, k_r, k_c, k_o, k_i = kernels.stride()
    for y, x, taps in plane.phases(out.shape[2:]):
        if taps is None:  # nothing reads these positions
            out[:, :, y :: plane.stride[0], x :: plane.stride[1]] = 0
            continue
        part = out[:, :, y :: plane.stride[0], x :: plane.stride[1]]
        block = blocks(part.shape[2] * part.shape[3], C * i, grad.dtype)
        sum_blocks = cdiv(R * o, block.depth)
        programs = cdiv(part.shape[2] * part.shape[3], block.rows) * cdiv(C * i, block.columns)
        (first_h, step_h, count_h, move_h, from_h), (first_w, step_w, count_w, move_w, from_w) = taps
        steps = count_h * count_w * sum_blocks
        _convolve[(programs, len(grad))](
            grad, kernels, part, *grad.stride(), k_b, k_p, k_r, k_o, k_c, k_i, *part.stride(), *grad.shape[2:],
            part.shape[2] * part.shape[3], part.shape[3], R * o, C * i,
            1, 1, move_h, move_w, from_h, from_w,
            count_w, first_h * plane.kernel[1] + first_w, step_h * plane.kernel[1], step_w,
            sum_blocks, steps, o, i, **_options(grad.dtype, block, steps),
        )  # fmt: skip


def grad_kernels(grad: Tensor, x: Tensor, geometry: Geometry, out: Tensor) -> None:
    """Write the gradient of each sample's kernel to `out`."""
    P, R, C, o, i = out.shape[1:]
    grad, x, plane = _plane(grad), _plane(x), Plane.of(geometry)
    k_b, k_p, k_r, k_c, k_o, k_i = out.stride()
    block = blocks(R * o, C * i, x.dtype)
    programs = P * cdiv(R * o, block.rows) * cdiv(C * i, block.columns)
    positions = grad.shape[2] * grad.shape[3]
    steps = cdiv(positions, block.depth)
    _grad_kernels[(programs, len(x))](
        grad, x, out, *grad.stride(), *x.stride(), k_b, k_p, k_r, k_o, k_c, k_i, *x.shape[2:],
        grad.shape[3], R * o, C * i,
        *plane.stride, *plane.dilation, -plane.padding[0], -plane.padding[1],
        plane.kernel[1], positions, steps, o, i, **_options(x.dtype, block, steps),
    )  # fmt: skip


# For the input positions of a phase, in one dimension: the first tap at which an output reads them, the step to the
# next such tap, their number, how far the reader moves for each, and the reader of the first position.
Taps = tuple[int, int, int, int, int]


class Plane(NamedTuple):
    """A geometry of one or two dimensions, in two dimensions."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]

    @staticmethod
    def of(geometry: Geometry) -> "Plane":
        sizes = (geometry.kernel_size, geometry.stride, geometry.padding, geometry.dilation)
        return Plane(*((neutral, *size)[-2:] for neutral, size in zip((1, 1, 0, 1), sizes, strict=True)))  # type: ignore[arg-type]

    def phases(self, size: tuple[int, ...]) -> list[tuple[int, int, tuple[Taps, Taps] | None]]:
        """The first position of each phase of an input of `size`, and its taps; None if no tap reads it."""
        found: list[tuple[int, int, tuple[Taps, Taps] | None]] = []
        for y in range(min(self.stride[0], size[0])):
            for x in range(min(self.stride[1], size[1])):
                down, across = self._taps(0, y), self._taps(1, x)
                found.append((y, x, None if down is None or across is None else (down, across)))
        return found

    def _taps(self, dim: int, start: int) -> Taps | None:
        stride, dilation, kernel = self.stride[dim], self.dilation[dim], self.kernel[dim]
        reached = [tap for tap in range(kernel) if (start + self.padding[dim] - tap * dilation) % stride == 0]
        if not reached:
            return None
        step = stride // math.gcd(stride, dilation)
        reader = (start + self.padding[dim] - reached[0] * dilation) // stride
        return reached[0], step, len(reached), -(step * dilation // stride), reader


def runs_on(device: torch.device) -> bool:
    """Whether Triton compiles for this device: NVIDIA GPUs from compute capability 8.0 on. True for fake tensors on a
    machine without a GPU."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return not torch.cuda.is_available() or torch.cuda.get_device_capability(device) >= (8, 0)


def _plane(x: Tensor) -> Tensor:
    """`(B, channels, length)` as `(B, channels, 1, length)`."""
    return x.unsqueeze(2) if x.dim() == 3 else x


def _options(dtype: torch.dtype, block: Block, steps: int) -> dict[str, Any]:
    """Constants to compile the kernels with."""
    return {
        "SUM": tl.float64 if dtype == torch.float64 else tl.float32,
        "PRECISION": "tf32" if dtype == torch.float32 and tf32() else "ieee",
        "ROWS": block.rows,
        "COLUMNS": block.columns,
        "DEPTH": block.depth,
        "STEPS": steps if INTERPRETED else None,
        "num_warps": block.warps,
        "num_stages": block.stages,
    }


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def tf32() -> bool:
    """Whether torch allows TF32 for convolutions of float32, by its new setting or the older one."""
    convolutions = getattr(torch.backends.cudnn, "conv", None)
    if convolutions is None:
        return torch.backends.cudnn.allow_tf32
    return bool(convolutions.fp32_precision == "tf32")
