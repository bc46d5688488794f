"""The forward of bottleneck in Triton.

    h = N(x) down^T + bias_down              y = residual + scale * (D(act(h)) up^T + bias_up)

Many rows are one kernel's: a program reads its rows of x and writes those of y. Where rows are few,
or the rank is wide, each product has a launch of its own, and what lies between them has one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftkern.kernels import bottleneck_tiles as tiles
from peftkern.kernels import qlora_paths as paths
from peftkern.kernels.bottleneck_norm import statistics
from peftkern.kernels.bottleneck_products import expand, load_factor, project, projected
from peftkern.kernels.bottleneck_tiles import (
    activate,
    add_bias,
    dropped,
    is_one_kernel_s,
    load_hidden,
    store_hidden,
    whole_scale,
)
from peftkern.kernels.common import dot, narrow, widen


@triton.jit
def _store_y(sum, bias_up_ptr, residual_ptr, y_ptr, scale, m, inside, n, outputs):
    """y = residual + scale * (sum + bias_up)."""
    sum = add_bias(sum, bias_up_ptr, n, outputs) * scale
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
        columns, rank, NORM, False, BLOCK_M, BLOCK_R, BLOCK_K,
    )  # fmt: skip
    h = add_bias(h, bias_down_ptr, r, rank)
    store_hidden(hidden_ptr, h, m, inside, r, rank)
    low = dropped(
        activate(h, ACTIVATION), seed_ptr, threshold, factor, m, 0, rank, WHOLE_QUADS, BLOCK_M,
        BLOCK_R,
    )  # fmt: skip
    low = narrow(low, x_ptr.dtype.element_ty)
    scale = whole_scale(scale, gate_ptr)
    for start in range(0, outputs, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        up = load_factor(up_ptr, r, n, rank, outputs, low.dtype, True)
        sum = dot(low, up, tl.zeros((BLOCK_M, BLOCK_N), tl.float32))
        _store_y(sum, bias_up_ptr, residual_ptr, y_ptr, scale, m, inside, n, outputs)


@triton.jit(do_not_specialize=["rows", "threshold"])
def activate_kernel(
    parts_ptr,  # [splits, rows, rank] float32
    hidden_ptr,  # [rows, rank] float32: their sum, where it is one
    low_ptr,  # [rows, rank], of x's dtype
    rows,
    rank,
    seed_ptr,  # as the next two, see `dropped`
    threshold,
    factor,
    ACTIVATION: tl.constexpr,
    WHOLE_QUADS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """A tile of low = D(act(h)). Floor: 4 bytes of each split, and x's of `low`, for an element."""
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = m < rows
    first = tl.program_id(1) * BLOCK_R
    r = first + tl.arange(0, BLOCK_R)
    h = load_hidden(parts_ptr, m, inside, r, rows, rank, SPLITS)
    if SPLITS > 1:
        store_hidden(hidden_ptr, h, m, inside, r, rank)
    low = dropped(
        activate(h, ACTIVATION), seed_ptr, threshold, factor, m, first, rank, WHOLE_QUADS, BLOCK_M,
        BLOCK_R,
    )  # fmt: skip
    store_hidden(low_ptr, narrow(low, low_ptr.dtype.element_ty), m, inside, r, rank)


@triton.jit(do_not_specialize=["rows"])
def expand_kernel(
    low_ptr,  # [rows, rank], of x's dtype
    up_ptr,  # [outputs, rank]
    bias_up_ptr,  # [outputs], or None
    gate_ptr,  # [1], or None
    residual_ptr,  # [rows, outputs], or None
    y_ptr,  # [rows, outputs]
    rows,
    rank,
    outputs,
    scale,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """A tile of y.

    Floor: bytes of y written, of the residual and of `up` read; 2 rows rank outputs operations.
    """
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = m < rows
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    sum = expand(
        low_ptr, up_ptr, m, inside, n, rank, outputs, True, BLOCK_M, BLOCK_N, BLOCK_R
    )  # fmt: skip
    scale = whole_scale(scale, gate_ptr)
    _store_y(sum, bias_up_ptr, residual_ptr, y_ptr, scale, m, inside, n, outputs)


def activated(
    parts: Tensor, hidden: Tensor, activation: int, dropout: float, seed: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """D(act(h)) `[rows, rank]`, h being the sum of the parts, which `hidden` is filled with."""
    rows, rank = hidden.shape
    low = hidden.new_empty(rows, rank, dtype=dtype)
    grid = (
        triton.cdiv(rows, tiles.HIDDEN_BLOCKS["BLOCK_M"]),
        triton.cdiv(rank, tiles.HIDDEN_BLOCKS["BLOCK_R"]),
    )
    if rows:
        activate_kernel[grid](
            parts, hidden, low, rows, rank, ACTIVATION=activation, SPLITS=len(parts),
            **tiles.dropout_arguments(dropout, seed, rank), **tiles.HIDDEN_BLOCKS,
        )  # fmt: skip
    return low


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
    row_programs = triton.cdiv(rows, tile.rows)
    if is_one_kernel_s(rows, rank, tile, x.device):
        linear_kernel[(row_programs,)](
            x, down, up, bias_down, bias_up, gate, residual, norm_weight, norm_bias, y, hidden,
            rows, columns, rank, outputs, scale, eps or 0.0,
            ACTIVATION=activation, NORM=eps is not None,
            **tiles.dropout_arguments(dropout, seed, rank), **tiles.whole_blocks(tile, rank),
        )  # fmt: skip
        return
    parts = projected(x, down, hidden, tile, bias_down, norm_weight, norm_bias, eps)
    low = activated(parts, hidden, activation, dropout, seed, x.dtype)
    if outputs:
        expand_kernel[(row_programs, triton.cdiv(outputs, tile.outputs))](
            low, up, bias_up, gate, residual, y, rows, rank, outputs, scale,
            **tiles.product_blocks(tile, rank, tile.inner, BLOCK_N=tile.outputs),
        )  # fmt: skip
