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
from peftkern.kernels.bottleneck_forward import is_one_kernel_s, project, projected
from peftkern.kernels.bottleneck_norm import centre, load_statistics, norm_sums, statistics_of
from peftkern.kernels.bottleneck_sums import grad_down, grad_up
from peftkern.kernels.bottleneck_tiles import (
    dropped,
    expand,
    load_hidden,
    slope,
    store_hidden,
    whole_scale,
)
from peftkern.kernels.common import narrow, rows_of, widen


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
        grad_ptr, up_ptr, None, None, mean, deviation, m, inside, r, 0, outputs, outputs, rank, 1,
        rank, False, BLOCK_M, BLOCK_R, BLOCK_K,
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
            sum = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            sum = expand(sum, low, down_ptr, r, k, rank, columns, columns, 1)
            _store_grad_x(
                sum, x_ptr, onto_ptr, norm_weight_ptr, grad_x_ptr, mean, deviation, level, along,
                m, inside, k, columns, NORM,
            )  # fmt: skip


@triton.jit(do_not_specialize=["rows", "threshold"])
def grad_x_kernel(
    parts_ptr,  # [splits, rows, rank] float32: g up
    grad_ptr,  # as linear_bwd_kernel takes them, to grad_x_ptr
    x_ptr,
    hidden_ptr,
    down_ptr,
    gate_ptr,
    onto_ptr,
    norm_weight_ptr,
    statistics_ptr,
    norm_sums_ptr,
    grad_hidden_ptr,
    grad_x_ptr,
    rows,
    columns,
    rank,
    scale,
    seed_ptr,
    threshold,
    factor,
    ACTIVATION: tl.constexpr,
    NORM: tl.constexpr,
    WHOLE_QUADS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A tile of grad_x, from what project_kernel left; those of the first columns write t as well.

    Floor: bytes of grad_x written, of `down` and of g onto x read, of x for the norm; 2 rows rank
    columns operations.
    """
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = m < rows
    k = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    zeros = tl.zeros((BLOCK_M,), tl.float32)
    mean, deviation, level, along = zeros, zeros, zeros, zeros
    sum = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    scale = whole_scale(scale, gate_ptr)
    for first in range(0, rank, BLOCK_R):
        r = first + tl.arange(0, BLOCK_R)
        t = scale * load_hidden(parts_ptr, m, inside, r, rows, rank, SPLITS)
        h = load_hidden(hidden_ptr, m, inside, r, rows, rank, 1)
        t = dropped(t, seed_ptr, threshold, factor, m, first, rank, WHOLE_QUADS, BLOCK_M, BLOCK_R)
        t *= slope(h, ACTIVATION)
        if tl.program_id(1) == 0:
            store_hidden(grad_hidden_ptr, t, m, inside, r, rank)
        if grad_x_ptr is not None:
            low = narrow(t, grad_ptr.dtype.element_ty)
            if NORM:
                more_level, more_along = _row_means(low, h, norm_sums_ptr, r, columns, rank)
                level += more_level
                along += more_along
            sum = expand(sum, low, down_ptr, r, k, rank, columns, columns, 1)
    if grad_x_ptr is not None:
        if NORM:
            mean, deviation = load_statistics(statistics_ptr, m, inside, rows)
        _store_grad_x(
            sum, x_ptr, onto_ptr, norm_weight_ptr, grad_x_ptr, mean, deviation, level, along,
            m, inside, k, columns, NORM,
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
    blocks = tiles.tile_arguments(tile, rank)
    sums = None
    if statistics is not None and grad_x is not None:
        sums = norm_sums(x, down, bias_down, norm_weight, norm_bias)
    onto = grad if onto_x else None
    places = (gate, onto, norm_weight, statistics, sums, t, grad_x, rows, columns, rank)
    ways = {
        "ACTIVATION": activation, "NORM": sums is not None,
        **tiles.dropout_arguments(dropout, seed, rank),
    }  # fmt: skip
    if is_one_kernel_s(rows, rank, tile, x.device):
        linear_bwd_kernel[(triton.cdiv(rows, tile.rows),)](
            grad, x, hidden, down, up, *places, outputs, scale, **ways, **blocks
        )
        return t
    parts = projected(grad, up, None, tile, over_rows=True)
    del blocks["BLOCK_K"]
    programs = 1 if grad_x is None else max(triton.cdiv(columns, tile.outputs), 1)
    grad_x_kernel[(triton.cdiv(rows, tile.rows), programs)](
        parts, grad, x, hidden, down, *places, scale, SPLITS=len(parts), **ways, **blocks
    )
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
    grad_up(
        g, hidden, up, bias_up, gate, scale, activation, dropout, seed, of_up, of_bias_up, of_gate
    )
    if any(t is not None for t in (grad_x, of_down, of_bias_down, *of_norm)):
        statistics = None
        if eps is not None and any(t is not None for t in (grad_x, of_down, *of_norm)):
            statistics = statistics_of(flat, eps)
        t = grad_hidden(
            g, flat, hidden, down, up, bias_down, gate, scale, activation, onto_x, norm_weight,
            norm_bias, statistics, dropout, seed, rows_of(grad_x),
        )  # fmt: skip
        grad_down(
            t, flat, down, norm_weight, norm_bias, statistics, of_down, of_bias_down, *of_norm
        )
    return [t for t in grads if t is not None]
