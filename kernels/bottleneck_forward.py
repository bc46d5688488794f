"""The forward of bottleneck in Triton.

    h = N(x) down^T + bias_down              y = residual + scale * (D(act(h)) up^T + bias_up)

Many rows are one kernel's: a program reads its rows of x and writes those of y. Where rows are few,
or the rank is wide, the first product has a launch of its own, in which programs may share a sum.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftkern.kernels import bottleneck_tiles as tiles
from peftkern.kernels import qlora_paths as paths
from peftkern.kernels.bottleneck_norm import centre, statistics, weigh
from peftkern.kernels.bottleneck_tiles import (
    activate,
    dropped,
    expand,
    load_hidden,
    store_hidden,
    whole_scale,
)
from peftkern.kernels.common import convert, dot, narrow, widen


@triton.jit
def project(
    x_ptr, factor_ptr, norm_weight_ptr, norm_bias_ptr, mean, deviation, m, inside, r, begin, end,
    columns, rank, stride_rank, stride_column, NORM: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """N(x) factor^T over columns [begin, end), for rows m and ranks r; factor lies either way."""
    sum = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for column in range(begin, end, BLOCK_K):
        k = column + tl.arange(0, BLOCK_K)
        is_k = (k < columns)[None, :]
        x = tl.load(x_ptr + m[:, None] * columns + k[None, :], mask=inside[:, None] & is_k, other=0)
        if NORM:
            normed = weigh(centre(x, mean, deviation), norm_weight_ptr, norm_bias_ptr, k, columns)
            x = narrow(normed, x.dtype)
        place = factor_ptr + r.to(tl.int64)[:, None] * stride_rank
        place += k.to(tl.int64)[None, :] * stride_column
        factor = tl.load(place, mask=(r < rank)[:, None] & is_k, other=0)
        sum = dot(x, tl.trans(convert(factor, x.dtype)), sum)
    return sum


@triton.jit
def _add_bias(sum, bias_ptr, r, rank):
    if bias_ptr is not None:
        sum += widen(tl.load(bias_ptr + r, mask=r < rank, other=0))[None, :]
    return sum


@triton.jit
def _store_y(sum, bias_up_ptr, residual_ptr, y_ptr, scale, m, inside, n, outputs):
    """y = residual + scale * (sum + bias_up)."""
    sum = _add_bias(sum, bias_up_ptr, n, outputs) * scale
    place, mask = m[:, None] * outputs + n[None, :], inside[:, None] & (n < outputs)[None, :]
    if residual_ptr is not None:
        sum += widen(tl.load(residual_ptr + place, mask=mask, other=0))
    tl.store(y_ptr + place, narrow(sum, y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "threshold"])
def linear_kernel(
    x_ptr,  # [rows, columns]
    down_ptr,  # [rank, columns], as all parameters of any float dtype
    up_ptr,  # [outputs, rank]
    bias_down_ptr,  # [rank], or None
    bias_up_ptr,  # [outputs], or None
    gate_ptr,  # [1], or None
    residual_ptr,  # [rows, outputs], or None
    norm_weight_ptr,  # [columns], or None
    norm_bias_ptr,  # [columns], or None
    y_ptr,  # [rows, outputs]
    hidden_ptr,  # [rows, rank] float32
    rows,
    columns,
    rank,
    outputs,
    scale,
    eps,
    seed_ptr,  # as the next two, see `dropped`
    threshold,
    factor,
    ACTIVATION: tl.constexpr,
    NORM: tl.constexpr,
    WHOLE_QUADS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,  # the whole rank
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Floor: bytes of x read and of y written, of a residual that is not x read, 4 rows rank bytes
    of h; 2 rows rank (columns + outputs) operations. Both factors lie in the L2 cache, and x does
    for as long as a program takes: for the norm and for a residual it is read there again.
    """
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = m < rows
    r = tl.arange(0, BLOCK_R)
    mean, deviation = tl.zeros((BLOCK_M,), tl.float32), tl.zeros((BLOCK_M,), tl.float32)
    if NORM:
        mean, deviation = statistics(x_ptr, m, inside, columns, eps, BLOCK_M, BLOCK_K)
    h = project(
        x_ptr, down_ptr, norm_weight_ptr, norm_bias_ptr, mean, deviation, m, inside, r, 0, columns,
        columns, rank, columns, 1, NORM, BLOCK_M, BLOCK_R, BLOCK_K,
    )  # fmt: skip
    h = _add_bias(h, bias_down_ptr, r, rank)
    store_hidden(hidden_ptr, h, m, inside, r, rank)
    low = dropped(
        activate(h, ACTIVATION), seed_ptr, threshold, factor, m, 0, rank, WHOLE_QUADS, BLOCK_M,
        BLOCK_R,
    )  # fmt: skip
    low = narrow(low, x_ptr.dtype.element_ty)
    scale = whole_scale(scale, gate_ptr)
    for start in range(0, outputs, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        sum = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        sum = expand(sum, low, up_ptr, r, n, rank, outputs, 1, rank)
        _store_y(sum, bias_up_ptr, residual_ptr, y_ptr, scale, m, inside, n, outputs)


@triton.jit(do_not_specialize=["rows"])
def project_kernel(
    x_ptr,  # [rows, columns]
    factor_ptr,  # [rank, columns] or, for the gradient, [columns, rank], told apart by the strides
    bias_ptr,  # [rank], or None
    norm_weight_ptr,  # [columns], or None
    norm_bias_ptr,  # [columns], or None
    out_ptr,  # [splits, rows, rank] float32
    rows,
    columns,
    rank,
    stride_rank,
    stride_column,
    part,  # columns that one split adds up, a multiple of BLOCK_K
    eps,
    NORM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A tile of N(x) factor^T + bias, or a split of it.

    Floor: bytes of x and of the factor read, of the splits written; 2 rows rank columns operations.
    Each program reads its rows of x once more for the norm.
    """
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = m < rows
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    split = tl.program_id(2)
    begin = split * part
    mean, deviation = tl.zeros((BLOCK_M,), tl.float32), tl.zeros((BLOCK_M,), tl.float32)
    if NORM:
        mean, deviation = statistics(x_ptr, m, inside, columns, eps, BLOCK_M, BLOCK_K)
    sum = project(
        x_ptr, factor_ptr, norm_weight_ptr, norm_bias_ptr, mean, deviation, m, inside, r, begin,
        tl.minimum(begin + part, columns), columns, rank, stride_rank, stride_column, NORM,
        BLOCK_M, BLOCK_R, BLOCK_K,
    )  # fmt: skip
    if split == 0:
        sum = _add_bias(sum, bias_ptr, r, rank)
    store_hidden(out_ptr + split.to(tl.int64) * rows * rank, sum, m, inside, r, rank)


@triton.jit(do_not_specialize=["rows", "threshold"])
def expand_kernel(
    parts_ptr,  # [splits, rows, rank] float32
    up_ptr,  # [outputs, rank]
    bias_up_ptr,  # [outputs], or None
    gate_ptr,  # [1], or None
    residual_ptr,  # [rows, outputs], or None
    y_ptr,  # [rows, outputs]
    hidden_ptr,  # [rows, rank] float32: parts itself where that is no sum
    rows,
    rank,
    outputs,
    scale,
    seed_ptr,  # as the next two, see `dropped`
    threshold,
    factor,
    ACTIVATION: tl.constexpr,
    WHOLE_QUADS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A tile of y, from what project_kernel left.

    Floor: bytes of y written, of the residual and of `up` read; 2 rows rank outputs operations.
    """
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = m < rows
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    sum = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, rank, BLOCK_R):
        r = first + tl.arange(0, BLOCK_R)
        h = load_hidden(parts_ptr, m, inside, r, rows, rank, SPLITS)
        if SPLITS > 1:
            if tl.program_id(1) == 0:
                store_hidden(hidden_ptr, h, m, inside, r, rank)
        low = dropped(
            activate(h, ACTIVATION), seed_ptr, threshold, factor, m, first, rank, WHOLE_QUADS,
            BLOCK_M, BLOCK_R,
        )  # fmt: skip
        low = narrow(low, y_ptr.dtype.element_ty)
        sum = expand(sum, low, up_ptr, r, n, rank, outputs, 1, rank)
    scale = whole_scale(scale, gate_ptr)
    _store_y(sum, bias_up_ptr, residual_ptr, y_ptr, scale, m, inside, n, outputs)


def is_one_kernel_s(rows: int, rank: int, tile: paths.Tile, device: torch.device) -> bool:
    """Whether a program holds the whole rank, and there are programs enough to fill a GPU."""
    programs = triton.cdiv(rows, tile.rows)
    return rank <= tiles.WIDEST and programs >= paths.multiprocessors(device)


def projected(
    x: Tensor, factor: Tensor, out: Tensor | None, tile: paths.Tile, bias: Tensor | None = None,
    norm_weight: Tensor | None = None, norm_bias: Tensor | None = None, eps: float | None = None,
    over_rows: bool = False,
) -> Tensor:  # fmt: skip
    """N(x) factor^T + bias, float32 `[splits, rows, rank]`; one that is not split is put in `out`.

    over_rows: factor is `[columns, rank]`.
    """
    (rows, columns), rank = x.shape, factor.shape[over_rows]
    blocks = tiles.tile_arguments(tile, rank)
    del blocks["BLOCK_N"]
    programs = triton.cdiv(rows, tile.rows), triton.cdiv(rank, blocks["BLOCK_R"])
    splits = paths.splits(tile, programs[0] * programs[1], columns, x.device)
    if splits == 1 and out is not None:
        parts = out[None]
    else:
        parts = x.new_empty(splits, rows, rank, dtype=torch.float32)
    project_kernel[(*programs, splits)](
        x, factor, bias, norm_weight, norm_bias, parts, rows, columns, rank,
        *((1, rank) if over_rows else (columns, 1)),
        triton.cdiv(triton.cdiv(columns, splits), tile.inner) * tile.inner, eps or 0.0,
        NORM=eps is not None, **blocks,
    )  # fmt: skip
    return parts


def linear(
    x: Tensor, down: Tensor, up: Tensor, bias_down: Tensor | None, bias_up: Tensor | None,
    gate: Tensor | None, scale: float, activation: int, residual: Tensor | None,
    norm_weight: Tensor | None, norm_bias: Tensor | None, eps: float | None, dropout: float,
    seed: Tensor | None, y: Tensor, hidden: Tensor,
) -> None:  # fmt: skip
    """Fills y `[rows, outputs]` and hidden `[rows, rank]` of x `[rows, columns]`."""
    (rows, columns), (outputs, rank) = x.shape, up.shape
    if rows == 0:
        return
    tile = paths.tile("bottleneck", x.device, x.dtype, rows)
    blocks = tiles.tile_arguments(tile, rank)
    drops = tiles.dropout_arguments(dropout, seed, rank)
    if is_one_kernel_s(rows, rank, tile, x.device):
        linear_kernel[(triton.cdiv(rows, tile.rows),)](
            x, down, up, bias_down, bias_up, gate, residual, norm_weight, norm_bias, y, hidden,
            rows, columns, rank, outputs, scale, eps or 0.0,
            ACTIVATION=activation, NORM=eps is not None, **drops, **blocks,
        )  # fmt: skip
        return
    parts = projected(x, down, hidden, tile, bias_down, norm_weight, norm_bias, eps)
    del blocks["BLOCK_K"]
    # One program at least: it writes the sum of the splits.
    expand_kernel[(triton.cdiv(rows, tile.rows), max(triton.cdiv(outputs, tile.outputs), 1))](
        parts, up, bias_up, gate, residual, y, hidden, rows, rank, outputs, scale,
        ACTIVATION=activation, SPLITS=len(parts), **drops, **blocks,
    )  # fmt: skip
