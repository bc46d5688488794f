"""bottleneck's LayerNorm of x's rows, in Triton.

    N(x)   = (x - mean) * deviation * weight + bias       deviation = 1 / sqrt(variance + eps)
    grad_x = deviation * (n - mean of n - (x - mean) * deviation * c)
             n = weight * (t down), c the mean of n * (x - mean) * deviation, t the gradient of h

Of n, both means are products of t with vectors as short as the rank, so no row is read for them:
the mean of n * (x - mean) * deviation is that of t * (h - what bias gives to h).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftkern.kernels.common import convert, widen

BLOCK_ROWS, BLOCK_COLUMNS = 4, 1024


@triton.jit
def statistics(
    x_ptr, m, inside, columns, eps, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """-> mean and deviation of each row; a tile's squares are of distances from the tile's mean."""
    mean = tl.zeros((BLOCK_M,), tl.float32)
    square = tl.zeros((BLOCK_M,), tl.float32)
    seen = 0.0
    for column in range(0, columns, BLOCK_K):
        k = column + tl.arange(0, BLOCK_K)
        is_k = (k < columns)[None, :]
        place = x_ptr + m[:, None] * columns + k[None, :]
        x = widen(tl.load(place, mask=inside[:, None] & is_k, other=0))
        count = tl.minimum(columns - column, BLOCK_K).to(tl.float32)
        here = tl.sum(x, 1) / count
        apart = tl.where(is_k, x - here[:, None], 0.0)
        away = here - mean
        share = count / (seen + count)
        square += tl.sum(apart * apart, 1) + away * away * (seen * share)
        mean += away * share
        seen += count
    return mean, tl.rsqrt(square / columns + eps)


@triton.jit
def centre(x, mean, deviation):
    """A tile of x, its rows with mean 0 and variance 1, float32."""
    return (widen(x) - mean[:, None]) * deviation[:, None]


@triton.jit
def weigh(centred, weight_ptr, bias_ptr, k, columns):
    """N(x) of a tile that `centre` gave."""
    if weight_ptr is not None:
        centred *= widen(tl.load(weight_ptr + k, mask=k < columns, other=0))[None, :]
    if bias_ptr is not None:
        centred += widen(tl.load(bias_ptr + k, mask=k < columns, other=0))[None, :]
    return centred


@triton.jit
def load_statistics(statistics_ptr, m, inside, rows):
    mean = tl.load(statistics_ptr + m, mask=inside, other=0)
    return mean, tl.load(statistics_ptr + rows + m, mask=inside, other=0)


@triton.jit(do_not_specialize=["rows"])
def statistics_kernel(
    x_ptr,  # [rows, columns]
    out_ptr,  # [2, rows] float32: means, then deviations
    rows,
    columns,
    eps,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Floor: bytes of x read; 5 rows columns operations."""
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = m < rows
    mean, deviation = statistics(x_ptr, m, inside, columns, eps, BLOCK_M, BLOCK_K)
    tl.store(out_ptr + m, mean, mask=inside)
    tl.store(out_ptr + rows + m, deviation, mask=inside)


@triton.jit
def norm_sums_kernel(
    like_ptr,  # of x's dtype, in which `down` is multiplied; nothing is read
    down_ptr,  # [rank, columns]
    bias_down_ptr,  # [rank], or None
    weight_ptr,  # [columns], or None
    bias_ptr,  # [columns], or None
    out_ptr,  # [2, rank] float32
    columns,
    BLOCK: tl.constexpr,
):
    """Of one rank: the sum of its down * weight, and what h has of both biases.

    Floor: bytes of `down` read.
    """
    r = tl.program_id(0).to(tl.int64)
    weights = tl.zeros((BLOCK,), tl.float32)
    biases = tl.zeros((BLOCK,), tl.float32)
    for column in range(0, columns, BLOCK):
        k = column + tl.arange(0, BLOCK)
        down = tl.load(down_ptr + r * columns + k, mask=k < columns, other=0)
        down = widen(convert(down, like_ptr.dtype.element_ty))
        if weight_ptr is None:
            weights += down
        else:
            weights += down * widen(tl.load(weight_ptr + k, mask=k < columns, other=0))
        if bias_ptr is not None:
            biases += down * widen(tl.load(bias_ptr + k, mask=k < columns, other=0))
    of_biases = tl.sum(biases, 0)
    if bias_down_ptr is not None:
        of_biases += widen(tl.load(bias_down_ptr + r))
    tl.store(out_ptr + r, tl.sum(weights, 0))
    tl.store(out_ptr + tl.num_programs(0) + r, of_biases)


def statistics_of(x: Tensor, eps: float) -> Tensor:
    """Mean and deviation of each row, float32 `[2, rows]`."""
    out = x.new_empty(2, len(x), dtype=torch.float32)
    if len(x):
        statistics_kernel[(triton.cdiv(len(x), BLOCK_ROWS),)](
            x, out, *x.shape, eps, BLOCK_M=BLOCK_ROWS, BLOCK_K=BLOCK_COLUMNS
        )
    return out


def norm_sums(
    x: Tensor, down: Tensor, bias_down: Tensor | None, weight: Tensor | None, bias: Tensor | None
) -> Tensor:
    """What the gradient of x needs of `down`, float32 `[2, rank]`; see `norm_sums_kernel`."""
    rank, columns = down.shape
    out = x.new_empty(2, rank, dtype=torch.float32)
    norm_sums_kernel[(rank,)](
        x, down, bias_down, weight, bias, out, columns, BLOCK=BLOCK_COLUMNS
    )  # fmt: skip
    return out
