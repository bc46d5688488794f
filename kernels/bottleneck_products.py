"""Both products of bottleneck in Triton, into h's columns and out of them.

A factor is [rank, columns], as `down` is, or ALONG_RANK [columns, rank], as `up` is: the backward
takes the same products with the other one of them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftkern.kernels import bottleneck_tiles as tiles
from peftkern.kernels import qlora_paths as paths
from peftkern.kernels.bottleneck_norm import centre, statistics, weigh
from peftkern.kernels.bottleneck_tiles import add_bias, store_hidden
from peftkern.kernels.common import convert, dot, narrow


@triton.jit
def load_factor(factor_ptr, r, k, rank, columns, dtype: tl.constexpr, ALONG_RANK: tl.constexpr):
    """factor[r, k] in this dtype, read the way that it lies."""
    if ALONG_RANK:
        place = factor_ptr + k.to(tl.int64)[:, None] * rank + r[None, :]
        factor = tl.load(place, mask=(k < columns)[:, None] & (r < rank)[None, :], other=0)
        return tl.trans(convert(factor, dtype))
    else:
        place = factor_ptr + r.to(tl.int64)[:, None] * columns + k[None, :]
        factor = tl.load(place, mask=(r < rank)[:, None] & (k < columns)[None, :], other=0)
        return convert(factor, dtype)


@triton.jit
def project(
    x_ptr, factor_ptr, norm_weight_ptr, norm_bias_ptr, mean, deviation, m, inside, r, begin, end,
    columns, rank, NORM: tl.constexpr, ALONG_RANK: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The sum over columns [begin, end) of N(x) times factor, for rows m and ranks r."""
    sum = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for column in range(begin, end, BLOCK_K):
        k = column + tl.arange(0, BLOCK_K)
        place = x_ptr + m[:, None] * columns + k[None, :]
        x = tl.load(place, mask=inside[:, None] & (k < columns)[None, :], other=0)
        if NORM:
            normed = weigh(centre(x, mean, deviation), norm_weight_ptr, norm_bias_ptr, k, columns)
            x = narrow(normed, x.dtype)
        factor = load_factor(factor_ptr, r, k, rank, columns, x.dtype, ALONG_RANK)
        sum = dot(x, tl.trans(factor), sum)
    return sum


@triton.jit
def expand(
    low_ptr, factor_ptr, m, inside, k, rank, columns, ALONG_RANK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """low [rows, rank] times factor, for rows m and columns k."""
    sum = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, rank, BLOCK_R):
        r = first + tl.arange(0, BLOCK_R)
        place = low_ptr + m[:, None] * rank + r[None, :]
        low = tl.load(place, mask=inside[:, None] & (r < rank)[None, :], other=0)
        sum = dot(low, load_factor(factor_ptr, r, k, rank, columns, low.dtype, ALONG_RANK), sum)
    return sum


@triton.jit(do_not_specialize=["rows"])
def project_kernel(
    x_ptr,  # [rows, columns]
    factor_ptr,  # [rank, columns], or ALONG_RANK [columns, rank]
    bias_ptr,  # [rank], or None
    norm_weight_ptr,  # [columns], or None
    norm_bias_ptr,  # [columns], or None
    out_ptr,  # [splits, rows, rank] float32
    rows,
    columns,
    rank,
    part,  # columns that one split adds up, a multiple of BLOCK_K
    eps,
    NORM: tl.constexpr,
    ALONG_RANK: tl.constexpr,
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
        tl.minimum(begin + part, columns), columns, rank, NORM, ALONG_RANK,
        BLOCK_M, BLOCK_R, BLOCK_K,
    )  # fmt: skip
    if split == 0:
        sum = add_bias(sum, bias_ptr, r, rank)
    store_hidden(out_ptr + split.to(tl.int64) * rows * rank, sum, m, inside, r, rank)


def projected(
    x: Tensor, factor: Tensor, out: Tensor | None, tile: paths.Tile, bias: Tensor | None = None,
    norm_weight: Tensor | None = None, norm_bias: Tensor | None = None, eps: float | None = None,
    along_rank: bool = False,
) -> Tensor:  # fmt: skip
    """N(x) factor^T + bias, float32 `[splits, rows, rank]`; one that is not split is put in `out`.

    along_rank: factor is `[columns, rank]`.
    """
    (rows, columns), rank = x.shape, factor.shape[along_rank]
    blocks = tiles.product_blocks(tile, rank, tile.outputs, BLOCK_K=tile.inner)
    programs = triton.cdiv(rows, tile.rows), triton.cdiv(rank, blocks["BLOCK_R"])
    splits = paths.splits(tile, programs[0] * programs[1], columns, x.device)
    if splits == 1 and out is not None:
        parts = out[None]
    else:
        parts = x.new_empty(splits, rows, rank, dtype=torch.float32)
    project_kernel[(*programs, splits)](
        x, factor, bias, norm_weight, norm_bias, parts, rows, columns, rank,
        triton.cdiv(triton.cdiv(columns, splits), tile.inner) * tile.inner, eps or 0.0,
        NORM=eps is not None, ALONG_RANK=along_rank, **blocks,
    )  # fmt: skip
    return parts
