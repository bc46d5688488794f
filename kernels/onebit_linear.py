"""A linear on onebit's packed codes, in Triton; sums are scaled once, at their end.

    y = std * (x L^T) + mean * s + bias,  L = level[code],  s[m] = sum of x[m]

Few rows by the kernel in CUDA, where it was built; more by a product that unpacks inside; many by
panels of std * L for the library's product, which adds them to mean * s + bias.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftkern import _native
from peftkern.kernels import qlora_paths as paths
from peftkern.kernels.common import dot, load, narrow, rows_of, widen
from peftkern.kernels.onebit_codes import decode
from peftkern.kernels.onebit_levels import load_statistics, value_of
from peftkern.kernels.qlora_forward import add_up
from peftkern.kernels.qlora_panels import PANEL_BYTES, PANEL_STEP
from peftkern.onebit import fallback, reference


@triton.jit
def levels_tile(
    words_ptr,  # [rows, width] int32
    row,  # the tile's first row and column, multiples of BLOCK_N and BLOCK_K
    column,
    rows,
    width,
    dtype: tl.constexpr,
    BITS: tl.constexpr,
    LEVELS: tl.constexpr,
    EVEN: tl.constexpr,  # columns % BLOCK_K == 0
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """level[code] of a tile [BLOCK_N, BLOCK_K] in this dtype, rounded once.

    Beyond the last column stand levels, which the other factor's zeros have to take out; beyond the
    last row that row again.
    """
    EACH: tl.constexpr = 32 // BITS
    n = tl.minimum(row + tl.arange(0, BLOCK_N), rows - 1).to(tl.int64)
    w = column // EACH + tl.arange(0, BLOCK_K // EACH)[None, :]
    word = load(words_ptr + n[:, None] * width + w, w < width, EVEN)
    shift = BITS * tl.arange(0, EACH)[None, None, :]
    level = value_of((word[:, :, None] >> shift) & (2**BITS - 1), 0.0, 1.0, LEVELS)
    return tl.reshape(narrow(level, dtype), (BLOCK_N, BLOCK_K))


@triton.jit(do_not_specialize=["inputs"])
def packed_linear_kernel(
    x_ptr,  # [inputs, columns], float32, bfloat16 or float16
    words_ptr,  # [rows, width] int32
    statistics_ptr,  # [2] float32
    bias_ptr,  # [rows] of any float dtype, or None
    out_ptr,  # [splits, inputs, rows]
    inputs,
    rows,
    columns,
    width,  # words of a row: given, since what is divided here no longer counts as aligned
    part,  # columns that one split adds up, a multiple of BLOCK_K
    factor,  # what LEVELS were divided by
    BITS: tl.constexpr,
    LEVELS: tl.constexpr,
    EVEN: tl.constexpr,  # columns % BLOCK_K == 0
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A tile of y, or of one split's share of it.

    Floor: BITS / 8 bytes a weight once for each tile of rows (L2 holds them between), the bytes of
    x and y; 2 inputs rows columns operations, and about 4 instructions a weight of 1 bit, 15 of 4.
    The transposed tile is made, whose decoded factor stays in registers; s is one more product, of
    16 rows, since a sum over columns would pass numbers from lane to lane at each step.
    """
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    start = tl.program_id(1) * BLOCK_N
    split = tl.program_id(2)
    begin = split * part
    # Triton 3.6's interpreter makes no constants in bfloat16.
    sixteenths = tl.full((16, BLOCK_K), 1 / 16, tl.float32).to(dtype)
    sum = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    total = tl.zeros((16, BLOCK_M), tl.float32)
    for column in range(begin, tl.minimum(begin + part, columns), BLOCK_K):
        k = column + tl.arange(0, BLOCK_K)
        place = x_ptr + tl.minimum(m, inputs - 1)[:, None] * columns + k[None, :]
        x = tl.trans(load(place, k[None, :] < columns, EVEN))
        level = levels_tile(
            words_ptr, start, column, rows, width, dtype, BITS, LEVELS, EVEN, BLOCK_N, BLOCK_K
        )
        sum = dot(level, x, sum)
        total = dot(sixteenths, x, total)
    mean, std = load_statistics(statistics_ptr, 0)
    n = start + tl.arange(0, BLOCK_N)
    sum = (factor * std) * sum + mean * tl.sum(total, 0)[None, :]
    if bias_ptr is not None:
        if split == 0:
            sum += widen(tl.load(bias_ptr + n, mask=n < rows, other=0))[:, None]
    place = out_ptr + (split.to(tl.int64) * inputs + m)[:, None] * rows + n[None, :]
    mask = (m < inputs)[:, None] & (n < rows)[None, :]
    tl.store(place, narrow(tl.trans(sum), out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["inputs"])
def start_kernel(
    x_ptr,  # [inputs, columns], float32, bfloat16 or float16
    statistics_ptr,  # [2] float32
    bias_ptr,  # [rows] of any float dtype, or None
    out_ptr,  # [inputs, rows]
    inputs,
    rows,
    columns,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out = mean * s + bias, of BLOCK_M rows. Floor: the bytes of x read, of `out` written."""
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    lane = tl.arange(0, BLOCK_K)[None, :]
    sums = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for start in range(0, columns, BLOCK_K):
        inside = (m < inputs) & (start + lane < columns)
        sums += widen(tl.load(x_ptr + m * columns + start + lane, mask=inside, other=0))
    mean, _ = load_statistics(statistics_ptr, 0)
    first = mean * tl.sum(sums, 1, keep_dims=True)
    for start in range(0, rows, BLOCK_K):
        n = start + lane
        value = tl.broadcast_to(first, (BLOCK_M, BLOCK_K))
        if bias_ptr is not None:
            value += widen(tl.load(bias_ptr + n, mask=n < rows, other=0))
        place = out_ptr + m * rows + n
        mask = (m < inputs) & (n < rows)
        tl.store(place, narrow(value, out_ptr.dtype.element_ty), mask=mask)


START_ROWS, START_BLOCK = 4, 1024


def lay_out(packed: Tensor, bits: int, width: int) -> Tensor:
    return fallback.in_words(packed)


def linear(
    x: Tensor, laid_out: Tensor, statistics: Tensor, bits: int, rows: int, bias: Tensor | None
) -> Tensor:
    if x.dtype == torch.float64:
        return fallback.decode(x, laid_out, statistics, bits, rows, bias)
    flat = rows_of(x)
    decodes = _native.serves("onebit_decode", x.device.type)
    path = paths.choose(x.device, x.dtype, len(flat), 1, bits, decodes)
    if path == "decode":
        y = torch.ops.peftkern.onebit_decode(flat, laid_out, statistics, bits, rows, bias)
    else:
        y = flat.new_empty(len(flat), rows)
        if y.numel():
            way = gemm if path == "gemm" else panels
            way(flat, laid_out, statistics, bits, bias, y)
    return y.view(*x.shape[:-1], rows)  # type: ignore[no-any-return]


def gemm(
    x: Tensor, laid_out: Tensor, statistics: Tensor, bits: int, bias: Tensor | None, out: Tensor
) -> None:
    """Unpacks inside the product; `out` is `[inputs, rows]` and has an element at least."""
    (inputs, rows), columns = out.shape, x.shape[1]
    levels = reference.levels(bits)
    # Of one bit, the product is exact: a factor's digits are not cut off.
    factor = levels[1] if bits == 1 else 1.0
    tile = paths.tile("onebit", x.device, x.dtype, inputs)
    programs = triton.cdiv(inputs, tile.rows), triton.cdiv(rows, tile.outputs)
    splits = paths.splits(tile, programs[0] * programs[1], columns, x.device)
    parts = out if splits == 1 else out.new_empty(splits, *out.shape, dtype=torch.float32)
    part = triton.cdiv(triton.cdiv(columns, splits), tile.inner) * tile.inner
    packed_linear_kernel[(*programs, splits)](
        x, laid_out.view(torch.int32), statistics, bias, parts, inputs, rows, columns,
        triton.cdiv(columns * bits, 32), part, factor,
        BITS=bits,
        LEVELS=tuple(level / factor for level in levels),
        EVEN=columns % tile.inner == 0,
        BLOCK_M=tile.rows,
        BLOCK_N=tile.outputs,
        BLOCK_K=tile.inner,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )  # fmt: skip
    if splits > 1:
        add_up(parts, out)


def panels(
    x: Tensor, laid_out: Tensor, statistics: Tensor, bits: int, bias: Tensor | None, out: Tensor
) -> None:
    """std * L in panels that lie in the cache when the library's product reads them."""
    (inputs, rows), columns = out.shape, x.shape[1]
    start_kernel[(triton.cdiv(inputs, START_ROWS),)](
        x, statistics, bias, out, inputs, rows, columns, BLOCK_M=START_ROWS, BLOCK_K=START_BLOCK
    )
    if columns == 0:
        return
    count = triton.cdiv(rows * columns * x.element_size(), PANEL_BYTES)
    size = triton.cdiv(triton.cdiv(rows, count), PANEL_STEP) * PANEL_STEP
    packed = laid_out.view(-1, triton.cdiv(columns * bits, 32) * 4)
    buffer = x.new_empty(min(size, rows), columns)
    for begin in range(0, rows, size):
        end = min(begin + size, rows)
        panel = buffer[: end - begin]
        decode(packed[begin:end], statistics, bits, panel, centred=True)
        out[:, begin:end].addmm_(x, panel.t())
