"""What qlora's gradients sum over rows, in Triton. g is the gradient of y.

    t      = scale * g B             grad_a    = t^T D(x)
    grad_b = scale * g^T down        grad_bias = sum of g

One read of g serves all three that are made of it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftkern.kernels import qlora_paths as paths
from peftkern.kernels.qlora_strips import Groups, finish, rows_at, strip_of, strips_of
from peftkern.kernels.qlora_tiles import convert, dot, dropout_limit, keep_tile, narrow


@triton.jit(do_not_specialize=["rows", "groups"])
def lora_bwd_kernel(
    grad_ptr,  # [rows, outputs]
    down_ptr,  # [rows, rank] float32
    lora_b_ptr,  # [groups, outputs, rank]
    t_parts_ptr,  # [tiles, rows, width] float32, or None: tiles of BLOCK_N outputs
    b_parts_ptr,  # [strips, outputs, width] float32, or None
    bias_parts_ptr,  # [strips, outputs] float32, or None
    offsets_ptr,  # [groups + 1], or None
    order_ptr,  # [rows], the row at each position; None: the position itself
    scale,
    rows,
    outputs,
    rank,
    first,  # of the `width` columns of down and lora_b that this launch is about
    width,
    groups,
    strip_rows,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """A tile of outputs of a strip of rows.

    Floor: g is read once for all three, 2 * rows * outputs bytes in 16 bits, beside 4 * width *
    (tiles * rows + strips * outputs) bytes of parts, which the second launch finds in the L2 cache;
    4 * rows * outputs * width operations.
    """
    tile, strip = tl.program_id(0), tl.program_id(1)
    GROUPED: tl.constexpr = offsets_ptr is not None
    group, begin, end = strip_of(strip, offsets_ptr, groups, rows, strip_rows, GROUPED, BLOCK_G)
    if begin >= end:
        return
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    j = tl.arange(0, BLOCK_R)
    is_n, is_j = n < outputs, j < width
    sum_b = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    # A product with ones, since a sum over rows would pass numbers from lane to lane at each step.
    # Triton 3.6's interpreter makes no constants in bfloat16.
    sixteenths = tl.full((BLOCK_M, 16), 1 / 16, tl.float32).to(grad_ptr.dtype.element_ty)
    sum_bias = tl.zeros((BLOCK_N, 16), tl.float32)
    if t_parts_ptr is not None:
        from_b = lora_b_ptr + (group.to(tl.int64) * outputs + n)[:, None] * rank + first
        lora_b = tl.load(from_b + j[None, :], mask=is_n[:, None] & is_j[None, :], other=0)
        lora_b = convert(lora_b, grad_ptr.dtype.element_ty)
    for start in range(begin, end, BLOCK_M):
        row, inside = rows_at(start, end, order_ptr, BLOCK_M)
        is_low_rank = inside[:, None] & is_j[None, :]
        from_grad = grad_ptr + row[:, None] * outputs + n[None, :]
        grad = tl.load(from_grad, mask=inside[:, None] & is_n[None, :], other=0)
        if t_parts_ptr is not None:
            t = dot(grad, lora_b, tl.zeros((BLOCK_M, BLOCK_R), tl.float32))
            to_t = t_parts_ptr + (tile.to(tl.int64) * rows + row)[:, None] * width + j[None, :]
            tl.store(to_t, scale * t, mask=is_low_rank)
        if b_parts_ptr is not None:
            from_down = down_ptr + row[:, None] * rank + first + j[None, :]
            down = tl.load(from_down, mask=is_low_rank, other=0)
            sum_b = dot(tl.trans(grad), narrow(down, grad.dtype), sum_b)
        if bias_parts_ptr is not None:
            sum_bias = dot(tl.trans(grad), sixteenths, sum_bias)
    part = strip.to(tl.int64) * outputs + n
    if b_parts_ptr is not None:
        to_b = b_parts_ptr + part[:, None] * width + j[None, :]
        tl.store(to_b, scale * sum_b, mask=is_n[:, None] & is_j[None, :])
    if bias_parts_ptr is not None:
        tl.store(bias_parts_ptr + part, tl.sum(sum_bias, 1), mask=is_n)


@triton.jit(do_not_specialize=["rows", "groups", "threshold"])
def grad_a_kernel(
    t_ptr,  # [rows, rank] float32
    x_ptr,  # [rows, columns]
    seed_ptr,  # [1] int64, or None: nothing is dropped
    parts_ptr,  # [strips, width, columns] float32
    offsets_ptr,  # [groups + 1], or None
    order_ptr,  # [rows], or None
    threshold,  # see keep_tile
    factor,  # 1 / (1 - dropout)
    rows,
    columns,
    rank,
    first,  # of the `width` columns of t that this launch is about
    width,
    groups,
    strip_rows,
    WHOLE_QUADS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """A tile of columns of a strip of rows.

    Floor: x is read once, 2 * rows * columns bytes in 16 bits; 2 * rows * columns * width
    operations, and with dropout about 50 instructions for each four elements of the mask.
    """
    tile, strip = tl.program_id(0), tl.program_id(1)
    GROUPED: tl.constexpr = offsets_ptr is not None
    _, begin, end = strip_of(strip, offsets_ptr, groups, rows, strip_rows, GROUPED, BLOCK_G)
    if begin >= end:
        return
    k = tile * BLOCK_K + tl.arange(0, BLOCK_K)
    j = tl.arange(0, BLOCK_R)
    is_k, is_j = k < columns, j < width
    sums = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
    for start in range(begin, end, BLOCK_M):
        row, inside = rows_at(start, end, order_ptr, BLOCK_M)
        from_x = x_ptr + row[:, None] * columns + k[None, :]
        x = tl.load(from_x, mask=inside[:, None] & is_k[None, :], other=0)
        if seed_ptr is not None:
            keep = keep_tile(
                seed_ptr, threshold, row, tile * BLOCK_K, columns, WHOLE_QUADS, BLOCK_M, BLOCK_K
            )
            x = tl.where(keep, x, 0.0).to(x.dtype)
        from_t = t_ptr + row[:, None] * rank + first + j[None, :]
        t = tl.load(from_t, mask=inside[:, None] & is_j[None, :], other=0)
        sums = dot(tl.trans(narrow(t, x.dtype)), x, sums)
    to = parts_ptr + (strip.to(tl.int64) * width + j)[:, None] * columns + k[None, :]
    tl.store(to, factor * sums, mask=is_j[:, None] & is_k[None, :])


def _sides(x: Tensor, tile: paths.Tile, rank: int, groups: Groups) -> dict[str, int]:
    """What all kernels here ask for; no side of a product is shorter than 16."""
    rows, columns = x.shape
    # A row that starts anywhere is read one number at a time: few rows, or registers run out.
    most = tile.rows if columns % 8 == 0 else 16
    return {
        "BLOCK_M": min(most, max(triton.next_power_of_2(rows), 16)),
        "BLOCK_R": min(tile.inner, max(triton.next_power_of_2(rank), 16)),
        "BLOCK_G": triton.next_power_of_2(groups.count),
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }


def lora_bwd(
    grad: Tensor, down: Tensor, lora_b: Tensor | None, scale: float, groups: Groups,
    t: Tensor | None, grad_b: Tensor | None, grad_bias: Tensor | None,
) -> None:  # fmt: skip
    """Fills t `[rows, rank]` float32, grad_b and grad_bias: those that are given.

    A row that is no group's has no t: what stands there is not to be read.
    """
    rows, outputs = grad.shape
    rank = 0 if t is None and grad_b is None else down.shape[1]
    if t is None and grad_b is None and grad_bias is None:
        return
    tile = paths.tile("lora_bwd", grad.device, grad.dtype, rows)
    sides = _sides(grad, tile, rank, groups)
    strips = strips_of(rows, groups, sides["BLOCK_M"])
    tiles = triton.cdiv(outputs, tile.outputs)
    # What one launch serves is tile.inner wide; a wider rank reads g once more for each.
    for first in range(0, max(rank, 1), tile.inner):
        width = min(rank - first, tile.inner)
        bias = grad_bias if first == 0 else None
        t_parts = None if t is None else _float(grad, tiles, rows, width)
        b_parts = None if grad_b is None else _float(grad, strips.count, outputs, width)
        bias_parts = None if bias is None else _float(grad, strips.count, outputs)
        sizes = (rows, outputs, rank, first, width, groups.count, strips.rows)
        if tiles and strips.count:
            lora_bwd_kernel[(tiles, strips.count)](
                grad, down, lora_b, t_parts, b_parts, bias_parts,
                groups.offsets, groups.order, scale, *sizes, BLOCK_N=tile.outputs, **sides,
            )  # fmt: skip
        finish(groups, sizes, tiles, (t_parts, t), (b_parts, grad_b), (bias_parts, bias))


def grad_a(
    t: Tensor, x: Tensor, dropout: float, seed: Tensor | None, groups: Groups, out: Tensor
) -> Tensor:
    """Fills out `[groups, rank, columns]`, and returns it."""
    (rows, columns), rank = x.shape, t.shape[1]
    limit = dropout_limit(dropout, seed)
    if limit is None:
        return out.zero_()
    tile = paths.tile("grad_a", x.device, x.dtype, rows)
    sides = _sides(x, tile, rank, groups)
    strips = strips_of(rows, groups, sides["BLOCK_M"])
    tiles = triton.cdiv(columns, tile.outputs)
    for first in range(0, rank, tile.inner):
        width = min(rank - first, tile.inner)
        parts = _float(x, strips.count, width, columns)
        if tiles and strips.count:
            grad_a_kernel[(tiles, strips.count)](
                t, x, seed if limit else None, parts, groups.offsets, groups.order, limit,
                1 / (1 - dropout) if limit else 1.0, rows, columns, rank, first, width,
                groups.count, strips.rows, WHOLE_QUADS=columns % 4 == 0, BLOCK_K=tile.outputs,
                **sides,
            )  # fmt: skip
        # A group's part is one row, of which this launch has filled a stretch.
        sizes = (rows, 1, *(n * columns for n in (rank, first, width)), groups.count, strips.rows)
        finish(groups, sizes, 0, (None, None), (parts, out), (None, None))
    return out


def _float(like: Tensor, *shape: int) -> Tensor:
    return like.new_empty(shape, dtype=torch.float32)
