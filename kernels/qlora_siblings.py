"""Linears that read one x, in Triton: down of all of them in one read, grad_x in one buffer.

    down_i = D_i(x) A_i^T
    grad_x = sum of g_i W_i + D_i(t_i A_i)

The base of each has a product of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftkern import _native
from peftkern.kernels import qlora_paths as paths
from peftkern.kernels.qlora_backward import gradients
from peftkern.kernels.qlora_forward import BLOCK_SUM
from peftkern.kernels.qlora_product import product
from peftkern.kernels.qlora_tiles import (
    convert,
    dot,
    dropout_limit,
    keep_tile,
    row_tiles,
    rows_of,
)
from peftkern.qlora.siblings import split_weights


@triton.jit(do_not_specialize=["rows", "threshold"])
def siblings_down_kernel(
    x_ptr,  # [rows, columns]
    lora_a_ptrs,  # of each sibling, [rank, columns], of any float dtype
    seed_ptrs,  # of each, [1] int64, or None: nothing is dropped
    out_ptrs,  # of each, [splits, rows, rank] float32, `stride` from split to split
    ranks,
    stride,
    rows,
    columns,
    part,  # columns that one split adds up, a multiple of BLOCK_K
    factor,  # 1 / (1 - dropout)
    threshold,  # see keep_tile
    WHOLE_QUADS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """down of every sibling, for a tile of rows and of ranks.

    Floor: x is read once for all of them, 2 * rows * columns bytes in 16 bits; 2 * rows * columns
    operations for each rank of each, and as many masks as siblings.
    """
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    split = tl.program_id(2)
    inside = m < rows
    row = tl.minimum(m, rows - 1).to(tl.int64)
    begin = split * part
    sums = ()
    for _ in tl.static_range(len(out_ptrs)):
        sums = sums + (tl.zeros((BLOCK_M, BLOCK_R), tl.float32),)
    for column in range(begin, tl.minimum(begin + part, columns), BLOCK_K):
        k = column + tl.arange(0, BLOCK_K)
        is_k = (k < columns)[None, :]
        x = tl.load(x_ptr + row[:, None] * columns + k[None, :], mask=is_k, other=0)
        more = ()
        for i in tl.static_range(len(out_ptrs)):
            from_a = lora_a_ptrs[i] + r.to(tl.int64)[:, None] * columns + k[None, :]
            a = tl.load(from_a, mask=(r < ranks[i])[:, None] & is_k, other=0)
            a = tl.trans(convert(a, x.dtype))
            if seed_ptrs is None:
                kept = x
            else:
                keep = keep_tile(
                    seed_ptrs[i], threshold, row, column, columns, WHOLE_QUADS, BLOCK_M, BLOCK_K
                )
                kept = tl.where(keep, x, 0.0).to(x.dtype)
            more = more + (dot(kept, a, sums[i]),)
        sums = more
    for i in tl.static_range(len(out_ptrs)):
        to = out_ptrs[i] + split.to(tl.int64) * stride + row[:, None] * ranks[i] + r[None, :]
        tl.store(to, factor * sums[i], mask=inside[:, None] & (r < ranks[i])[None, :])


@triton.jit
def siblings_sum_kernel(
    part_ptrs,  # of each sibling, [splits, count] float32, `stride` from split to split
    out_ptrs,  # of each, [count]
    counts,
    stride,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Adds the splits up in their order. Floor: 4 bytes an element and split."""
    item = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    for i in tl.static_range(len(out_ptrs)):
        mask = item < counts[i]
        sum = tl.load(part_ptrs[i] + item, mask=mask, other=0)
        for split in tl.static_range(1, SPLITS):
            place = part_ptrs[i] + tl.cast(split, tl.int64) * stride + item
            sum += tl.load(place, mask=mask, other=0)
        tl.store(out_ptrs[i] + item, sum, mask=mask)


def siblings_down(
    x: Tensor, lora_a: Sequence[Tensor], dropout: float, seeds: Sequence[Tensor]
) -> list[Tensor]:
    """D_i(x) A_i^T, float32 `[rows, rank_i]`; a seed for each sibling, or none at all."""
    (rows, columns), ranks = x.shape, tuple(a.shape[0] for a in lora_a)
    downs = [x.new_empty(rows, rank, dtype=torch.float32) for rank in ranks]
    limit = dropout_limit(dropout, seeds[0] if seeds else None)
    if columns == 0 or limit is None:
        return [down.zero_() for down in downs]
    if rows == 0:
        return downs
    tile = paths.tile("siblings_down", x.device, x.dtype, rows)
    block_r = min(max(triton.next_power_of_2(max(ranks)), 16), tile.outputs)
    programs = row_tiles(rows, 1, tile.rows), triton.cdiv(max(ranks), block_r)
    splits = paths.splits(tile, programs[0] * programs[1], columns, x.device)
    counts = tuple(rows * rank for rank in ranks)
    parts = downs
    if splits > 1:
        buffer = x.new_empty(splits, sum(counts), dtype=torch.float32)
        parts = buffer.split(counts, 1)
    siblings_down_kernel[(*programs, splits)](
        x, tuple(lora_a), tuple(seeds) if limit else None, tuple(parts), ranks, sum(counts), rows,
        columns, triton.cdiv(triton.cdiv(columns, splits), tile.inner) * tile.inner,
        1 / (1 - dropout) if limit else 1.0, limit, WHOLE_QUADS=columns % 4 == 0,
        BLOCK_M=tile.rows, BLOCK_R=block_r, BLOCK_K=tile.inner, num_warps=tile.warps,
        num_stages=tile.stages,
    )  # fmt: skip
    if splits > 1:
        siblings_sum_kernel[(triton.cdiv(max(counts), BLOCK_SUM),)](
            tuple(parts), tuple(downs), counts, sum(counts), SPLITS=splits, BLOCK=BLOCK_SUM
        )
    return downs


def siblings(
    x: Tensor, weights: Sequence[Tensor], layouts: Sequence[int], biases: Sequence[Tensor | None],
    lora_a: Sequence[Tensor], lora_b: Sequence[Tensor], scales: Sequence[float], dropout: float,
    seeds: Sequence[Tensor],
) -> list[Tensor]:  # fmt: skip
    if x.dtype == torch.float64:
        found: list[Tensor] = _native.references["qlora_siblings"](
            x, weights, layouts, biases, lora_a, lora_b, scales, dropout, seeds
        )
        return found
    flat = rows_of(x)
    downs = siblings_down(flat, lora_a, dropout, seeds)
    bases = zip(split_weights(weights, layouts), biases, downs, lora_b, scales, strict=True)
    ys = [product(flat, *base, bias, down, b, scale) for base, bias, down, b, scale in bases]
    return [y.view(*x.shape[:-1], y.shape[1]) for y in ys] + downs


def siblings_bwd(
    grads: Sequence[Tensor], x: Tensor | None, downs: Sequence[Tensor], weights: Sequence[Tensor],
    layouts: Sequence[int], biases: Sequence[Tensor | None], lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor], scales: Sequence[float], dropout: float, seeds: Sequence[Tensor],
    needs: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    first = grads[0]
    if first.dtype == torch.float64:
        found: list[Tensor] = _native.references["qlora_siblings_bwd"](
            grads, x, downs, weights, layouts, biases, lora_a, lora_b, scales, dropout, seeds, needs
        )
        return found
    need_x, *others = needs
    grad_x = first.new_empty(*first.shape[:-1], layouts[3]) if need_x else None
    flat, found = rows_of(x), [] if grad_x is None else [grad_x]
    for i, (weight, layout) in enumerate(split_weights(weights, layouts)):
        need_bias, need_a, need_b = others[3 * i : 3 * i + 3]
        found += gradients(
            rows_of(grads[i]), flat, downs[i], weight, layout, biases[i], lora_a[i], lora_b[i],
            scales[i], dropout, seeds[i] if seeds else None, None, None,
            [need_x, False, need_bias, need_a, need_b], rows_of(grad_x), add=i > 0,
        )  # fmt: skip
    return found
