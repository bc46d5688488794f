"""The backward of bottleneck in Triton: what the gradient g of y gives to each operand.

    t       = D(s g up) act'(h)             grad_x    = t down, through the norm; + g onto x
    grad_up = s g^T D(act(h))               grad_down = t^T N(x)
    s       = scale * gate                  t is the gradient of h

t and grad_x take one read of g and no more, as the forward takes one of x; what sums over rows
stands in bottleneck_sums.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftkern.bottleneck import fallback
from peftkern.kernels import bottleneck_tiles as tiles
from peftkern.kernels import qlora_paths as paths
from peftkern.kernels.bottleneck_forward import activated
from peftkern.kernels.bottleneck_norm import centre, load_statistics, norm_sums, statistics_of
from peftkern.kernels.bottleneck_products import expand, load_factor, project, projected
from peftkern.kernels.bottleneck_sums import grad_down, grad_up
from peftkern.kernels.bottleneck_tiles import (
    dropped,
    is_one_kernel_s,
    load_hidden,
    slope,
    store_hidden,
    whole_scale,
)
from peftkern.kernels.common import dot, narrow, rows_of, widen


@triton.jit
def _row_means(low, h, norm_sums_ptr, r, columns, rank):
    """A chunk's part in both means of bottleneck_norm's equation, [BLOCK_M] each."""
    low = widen(low)
    weights = tl.load(norm_sums_ptr + r, mask=r < rank, other=0)
    biases = tl.load(norm_sums_ptr + rank + r, mask=r < rank, other=0)
    along = tl.sum(low * (h - biases[None, :]), 1)
    return tl.sum(low * weights[None, :], 1) / columns, along / columns


@triton.jit
def _store_grad_x(
    sum, x_ptr, onto_ptr, norm_weight_ptr, grad_x_ptr, mean, deviation, level, along, m, inside, k,
    columns, NORM: tl.constexpr,
):  # fmt: skip
    """`sum` is t down; `level` and `along` are the two means."""
    place, mask = m[:, None] * columns + k[None, :], inside[:, None] & (k < columns)[None, :]
    if NORM:
        if norm_weight_ptr is not None:
            sum *= widen(tl.load(norm_weight_ptr + k, mask=k < columns, other=0))[None, :]
        centred = centre(tl.load(x_ptr + place, mask=mask, other=0), mean, deviation)
        sum = deviation[:, None] * (sum - level[:, None] - along[:, None] * centred)
    if onto_ptr is not None:
        sum += widen(tl.load(onto_ptr + place, mask=mask, other=0))
    tl.store(grad_x_ptr + place, narrow(sum, grad_x_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "threshold"])
def linear_bwd_kernel(
    grad_ptr,  # [rows, outputs]
    x_ptr,  # [rows, columns]
    hidden_ptr,  # [rows, rank] float32
    down_ptr,  # [rank, columns], as all parameters of any float dtype
    up_ptr,  # [outputs, rank]
    gate_ptr,  # [1], or None
    onto_ptr,  # grad where the residual is x, else None
    norm_weight_ptr,  # [columns], or None
    statistics_ptr,  # [2, rows] float32, see statistics_kernel
    norm_sums_ptr,  # [2, rank] float32, see norm_sums_kernel
    grad_hidden_ptr,  # [rows, rank] float32
    grad_x_ptr,  # [rows, columns], or None
    rows,
    columns,
    rank,
    outputs,
    scale,
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
    """Floor: bytes of g read and of grad_x written, 8 rows rank bytes of h and t, bytes of x for
    the norm; 2 rows rank (columns + outputs) operations. Onto x, g is read again in the L2 cache.
    """
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = m < rows
    r = tl.arange(0, BLOCK_R)
    zeros = tl.zeros((BLOCK_M,), tl.float32)
    mean, deviation, level, along = zeros, zeros, zeros, zeros
    t = project(
        grad_ptr, up_ptr, None, None, mean, deviation, m, inside, r, 0, outputs, outputs, rank,
        False, True, BLOCK_M, BLOCK_R, BLOCK_K,
    )  # fmt: skip
    h = load_hidden(hidden_ptr, m, inside, r, rows, rank, 1)
    t *= whole_scale(scale, gate_ptr)
    t = dropped(t, seed_ptr, threshold, factor, m, 0, rank, WHOLE_QUADS, BLOCK_M, BLOCK_R)
    t *= slope(h, ACTIVATION)
    store_hidden(grad_hidden_ptr, t, m, inside, r, rank)
    if grad_x_ptr is not None:
        low = narrow(t, grad_ptr.dtype.element_ty)
        if NORM:
            mean, deviation = load_statistics(statistics_ptr, m, inside, rows)
            level, along = _row_means(low, h, norm_sums_ptr, r, columns, rank)
        for start in range(0, columns, BLOCK_N):
            k = start + tl.arange(0, BLOCK_N)
            down = load_factor(down_ptr, r, k, rank, columns, low.dtype, False)
            sum = dot(low, down, tl.zeros((BLOCK_M, BLOCK_N), tl.float32))
            _store_grad_x(
                sum, x_ptr, onto_ptr, norm_weight_ptr, grad_x_ptr, mean, deviation, level, along,
                m, inside, k, columns, NORM,
            )  # fmt: skip


@triton.jit(do_not_specialize=["rows", "threshold"])
def grad_hidden_kernel(
    parts_ptr,  # [splits, rows, rank] float32: g up
    hidden_ptr,  # [rows, rank] float32
    gate_ptr,  # [1], or None
    norm_sums_ptr,  # [2, rank] float32, see norm_sums_kernel
    grad_hidden_ptr,  # [rows, rank] float32
    low_ptr,  # [rows, rank], of x's dtype: the same
    means_ptr,  # [2, rows] float32, or None: what the norm's gradient takes from each row
    rows,
    columns,
    rank,
    scale,
    seed_ptr,  # as the next two, see `dropped`
    threshold,
    factor,
    ACTIVATION: tl.constexpr,
    WHOLE_QUADS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """t of some rows. Floor: 4 bytes of each split, of h and of t, and x's of `low`, an element."""
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = m < rows
    level, along = tl.zeros((BLOCK_M,), tl.float32), tl.zeros((BLOCK_M,), tl.float32)
    scale = whole_scale(scale, gate_ptr)
    for first in range(0, rank, BLOCK_R):
        r = first + tl.arange(0, BLOCK_R)
        t = scale * load_hidden(parts_ptr, m, inside, r, rows, rank, SPLITS)
        h = load_hidden(hidden_ptr, m, inside, r, rows, rank, 1)
        t = dropped(t, seed_ptr, threshold, factor, m, first, rank, WHOLE_QUADS, BLOCK_M, BLOCK_R)
        t *= slope(h, ACTIVATION)
        low = narrow(t, low_ptr.dtype.element_ty)
        store_hidden(grad_hidden_ptr, t, m, inside, r, rank)
        store_hidden(low_ptr, low, m, inside, r, rank)
        if means_ptr is not None:
            more_level, more_along = _row_means(low, h, norm_sums_ptr, r, columns, rank)
            level += more_level
            along += more_along
    if means_ptr is not None:
        tl.store(means_ptr + m, level, mask=inside)
        tl.store(means_ptr + rows + m, along, mask=inside)


@triton.jit(do_not_specialize=["rows"])
def grad_x_kernel(
    low_ptr,  # [rows, rank], of x's dtype: t
    x_ptr,  # [rows, columns]
    down_ptr,  # [rank, columns]
    onto_ptr,  # grad where the residual is x, else None
    norm_weight_ptr,  # [columns], or None
    statistics_ptr,  # [2, rows] float32, see statistics_kernel
    means_ptr,  # [2, rows] float32, see grad_hidden_kernel
    grad_x_ptr,  # [rows, columns]
    rows,
    columns,
    rank,
    NORM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """A tile of grad_x.

    Floor: bytes of grad_x written, of `down` and of g onto x read, of x for the norm; 2 rows rank
    columns operations.
    """
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = m < rows
    k = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    sum = expand(
        low_ptr, down_ptr, m, inside, k, rank, columns, False, BLOCK_M, BLOCK_N, BLOCK_R
    )  # fmt: skip
    zeros = tl.zeros((BLOCK_M,), tl.float32)
    mean, deviation, level, along = zeros, zeros, zeros, zeros
    if NORM:
        mean, deviation = load_statistics(statistics_ptr, m, inside, rows)
        level, along = load_statistics(means_ptr, m, inside, rows)
    _store_grad_x(
        sum, x_ptr, onto_ptr, norm_weight_ptr, grad_x_ptr, mean, deviation, level, along, m, inside,
        k, columns, NORM,
    )  # fmt: skip


def grad_hidden(
    grad: Tensor, x: Tensor, hidden: Tensor, down: Tensor, up: Tensor, bias_down: Tensor | None,
    gate: Tensor | None, scale: float, activation: int, onto_x: bool, norm_weight: Tensor | None,
    norm_bias: Tensor | None, statistics: Tensor | None, dropout: float, seed: Tensor | None,
    grad_x: Tensor | None,
) -> Tensor:  # fmt: skip
    """t, float32 `[rows, rank]`; fills grad_x `[rows, columns]` where it is given.

    statistics: `[2, rows]`, see bottleneck_norm; None: there is no norm.
    """
    (rows, columns), (outputs, rank) = x.shape, up.shape
    t = torch.empty_like(hidden)
    if rows == 0:
        return t
    tile = paths.tile("bottleneck", x.device, x.dtype, rows)
    programs = triton.cdiv(rows, tile.rows)
    sums = None
    if statistics is not None and grad_x is not None:
        sums = norm_sums(x, down, bias_down, norm_weight, norm_bias)
    onto = grad if onto_x else None
    drops = tiles.dropout_arguments(dropout, seed, rank)
    if is_one_kernel_s(rows, rank, tile, x.device):
        linear_bwd_kernel[(programs,)](
            grad, x, hidden, down, up, gate, onto, norm_weight, statistics, sums, t, grad_x,
            rows, columns, rank, outputs, scale, ACTIVATION=activation, NORM=sums is not None,
            **drops, **tiles.whole_blocks(tile, rank),
        )  # fmt: skip
        return t
    parts = projected(grad, up, None, tile, along_rank=True)
    low = torch.empty_like(t, dtype=x.dtype)
    means = None if sums is None else t.new_empty(2, rows)
    grad_hidden_kernel[(triton.cdiv(rows, tiles.HIDDEN_BLOCKS["BLOCK_M"]),)](
        parts, hidden, gate, sums, t, low, means, rows, columns, rank, scale,
        ACTIVATION=activation, SPLITS=len(parts), **drops, **tiles.HIDDEN_BLOCKS,
    )  # fmt: skip
    if grad_x is not None and columns:
        grad_x_kernel[(programs, triton.cdiv(columns, tile.outputs))](
            low, x, down, onto, norm_weight, statistics, means, grad_x, rows, columns, rank,
            NORM=means is not None,
            **tiles.product_blocks(tile, rank, tile.inner, BLOCK_N=tile.outputs),
        )  # fmt: skip
    return t


def linear_bwd(
    grad: Tensor, x: Tensor, hidden: Tensor, down: Tensor, up: Tensor, bias_down: Tensor | None,
    bias_up: Tensor | None, gate: Tensor | None, scale: float, activation: int, onto_x: bool,
    norm_weight: Tensor | None, norm_bias: Tensor | None, eps: float | None, dropout: float,
    seed: Tensor | None, needs: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    if x.dtype == torch.float64:
        return fallback.linear_bwd(
            grad, x, hidden, down, up, bias_down, bias_up, gate, scale, activation, onto_x,
            norm_weight, norm_bias, eps, dropout, seed, needs,
        )  # fmt: skip
    inputs = (x, down, up, bias_down, bias_up, gate, norm_weight, norm_bias)
    grads = [
        torch.empty_like(t) if need and t is not None else None
        for t, need in zip(inputs, needs, strict=True)
    ]
    grad_x, of_down, of_up, of_bias_down, of_bias_up, of_gate, *of_norm = grads
    g, flat = rows_of(grad), rows_of(x)
    if of_up is not None or of_gate is not None:
        low = activated(hidden[None], hidden, activation, dropout, seed, x.dtype)
    else:
        low = None
    grad_up(g, low, up, bias_up, gate, scale, of_up, of_bias_up, of_gate)
    reads_x = any(t is not None for t in (grad_x, of_down, *of_norm))
    if reads_x or of_bias_down is not None:
        statistics = None if eps is None or not reads_x else statistics_of(flat, eps)
        t = grad_hidden(
            g, flat, hidden, down, up, bias_down, gate, scale, activation, onto_x, norm_weight,
            norm_bias, statistics, dropout, seed, rows_of(grad_x),
        )  # fmt: skip
        grad_down(
            t, flat, down, norm_weight, norm_bias, statistics, of_down, of_bias_down, *of_norm
        )
    return [t for t in grads if t is not None]
