"""down = D(x) A^T in Triton, and how sums that several programs share are added up.

Rows are grouped by expert (`offsets`) and may name their adapter each (`adapter`); both are read on
the device.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftkern.kernels import qlora_paths as paths
from peftkern.kernels.qlora_tiles import (
    convert,
    dot,
    dropout_limit,
    keep_tile,
    narrow,
    row_tiles,
    tile_adapters,
    tile_rows,
    widen,
)

BLOCK_SUM = 1024


@triton.jit
def _down_step(
    x_ptr, lora_a_ptr, seed_ptr, sum, m, chosen, r, group, begin, end, columns, rank, threshold,
    DROPOUT: tl.constexpr, WHOLE_QUADS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """sum += D(x) A[group]^T over columns [begin, end), for the chosen rows m and the ranks r."""
    for column in range(begin, end, BLOCK_K):
        k = column + tl.arange(0, BLOCK_K)
        inside = chosen[:, None] & (k < columns)[None, :]
        x = tl.load(x_ptr + m[:, None] * columns + k[None, :], mask=inside, other=0)
        if DROPOUT:
            keep = keep_tile(seed_ptr, threshold, m, column, columns, WHOLE_QUADS, BLOCK_M, BLOCK_K)
            x = tl.where(keep, x, 0.0)
        place = lora_a_ptr + (group * rank + r)[:, None] * columns + k[None, :]
        a = tl.load(place, mask=(r < rank)[:, None] & (k < columns)[None, :], other=0)
        sum = dot(x, tl.trans(convert(a, x_ptr.dtype.element_ty)), sum)
    return sum


@triton.jit(do_not_specialize=["rows", "experts", "adapters", "threshold"])
def down_kernel(
    x_ptr,  # [rows, columns]
    lora_a_ptr,  # [adapters, rank, columns], of any float dtype
    seed_ptr,  # [1] int64
    offsets_ptr,  # [experts + 1] int64
    adapter_ptr,  # [rows] int32
    out_ptr,  # [splits, rows, rank] float32
    rows,
    columns,
    rank,
    experts,
    adapters,
    part,  # columns that one split adds up, a multiple of BLOCK_K
    factor,  # 1 / (1 - p)
    threshold,
    DROPOUT: tl.constexpr,
    WHOLE_QUADS: tl.constexpr,
    GROUPED: tl.constexpr,
    MIXED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Floor: bytes of x and A read, of down written; 2 rows columns rank operations."""
    expert, first, stop = tile_rows(
        tl.program_id(0), offsets_ptr, experts, rows, GROUPED, BLOCK_M, BLOCK_E
    )
    if first >= stop:
        return
    m = first + tl.arange(0, BLOCK_M)
    inside = m < stop
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    split = tl.program_id(2)
    begin = split * part
    end = tl.minimum(begin + part, columns)
    sum = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    if MIXED:
        adapter, group, last = tile_adapters(adapter_ptr, m, inside, adapters)
        while group < last:
            chosen = inside & (adapter == group)
            if tl.max(chosen.to(tl.int32), 0) > 0:
                more = _down_step(
                    x_ptr, lora_a_ptr, seed_ptr, sum, m, chosen, r, group.to(tl.int64), begin, end,
                    columns, rank, threshold, DROPOUT, WHOLE_QUADS, BLOCK_M, BLOCK_K,
                )  # fmt: skip
                # Zeros in x do not keep out an adapter that is not finite.
                sum = tl.where(chosen[:, None], more, sum)
            group += 1
    else:
        sum = _down_step(
            x_ptr, lora_a_ptr, seed_ptr, sum, m, inside, r, expert.to(tl.int64), begin, end,
            columns, rank, threshold, DROPOUT, WHOLE_QUADS, BLOCK_M, BLOCK_K,
        )  # fmt: skip
    place = out_ptr + (split.to(tl.int64) * rows + m)[:, None] * rank + r[None, :]
    tl.store(place, sum * factor, mask=inside[:, None] & (r < rank)[None, :])


@triton.jit
def sum_kernel(
    parts_ptr,  # [splits, count] float32
    out_ptr,  # [count]
    count,
    SPLITS: tl.constexpr,
    ADD: tl.constexpr,  # to what `out` holds
    BLOCK: tl.constexpr,
):
    """Adds the splits up in their order. Floor: 4 bytes an element and split."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    sum = tl.load(parts_ptr + i, mask=i < count, other=0)
    for split in tl.static_range(1, SPLITS):
        sum += tl.load(parts_ptr + tl.cast(split, tl.int64) * count + i, mask=i < count, other=0)
    if ADD:
        sum += widen(tl.load(out_ptr + i, mask=i < count, other=0))
    tl.store(out_ptr + i, narrow(sum, out_ptr.dtype.element_ty), mask=i < count)


def lora_down(
    x: Tensor,
    lora_a: Tensor,
    dropout: float,
    seed: Tensor | None,
    offsets: Tensor | None,
    adapter: Tensor | None,
) -> Tensor:
    """down = D(x) A^T, without the scale.

    Args:
        x: `[rows, columns]`, float32, bfloat16 or float16.
        lora_a: `[r, columns]` or `[adapters, r, columns]`, any float dtype.
        offsets, adapter: as in `expert_linear`.

    Returns:
        float32 `[rows, r]`.
    """
    (rows, columns), rank = x.shape, lora_a.shape[-2]
    down = x.new_empty(rows, rank, dtype=torch.float32)
    limit = dropout_limit(dropout, seed)
    if columns == 0 or limit is None:
        return down.zero_()
    if down.numel() == 0:
        return down
    experts = 1 if offsets is None else len(offsets) - 1
    tile = paths.tile("down", x.device, x.dtype, triton.cdiv(rows, experts))
    block_r = min(max(triton.next_power_of_2(rank), 16), tile.outputs)
    programs = row_tiles(rows, experts, tile.rows), triton.cdiv(rank, block_r)
    splits = paths.splits(tile, programs[0] * programs[1], columns, x.device)
    parts = down if splits == 1 else x.new_empty(splits, rows, rank, dtype=torch.float32)
    down_kernel[(*programs, splits)](
        x, lora_a, seed, offsets, adapter, parts, rows, columns, rank, experts,
        lora_a.numel() // (rank * columns), triton.cdiv(triton.cdiv(columns, splits), tile.inner)
        * tile.inner, 1 / (1 - dropout) if limit else 1.0, limit,
        DROPOUT=limit != 0,
        WHOLE_QUADS=columns % 4 == 0,
        GROUPED=offsets is not None,
        MIXED=adapter is not None,
        BLOCK_M=tile.rows,
        BLOCK_R=block_r,
        BLOCK_K=tile.inner,
        BLOCK_E=triton.next_power_of_2(experts),
        num_warps=tile.warps,
        num_stages=tile.stages,
    )  # fmt: skip
    return down if splits == 1 else add_up(parts, down)


def add_up(parts: Tensor, out: Tensor, add: bool = False) -> Tensor:
    """The sum of `parts` float32 `[splits, ...]`, in their order, is written or added to `out`."""
    count = out.numel()
    grid = (triton.cdiv(count, BLOCK_SUM),)
    sum_kernel[grid](parts, out, count, SPLITS=len(parts), ADD=add, BLOCK=BLOCK_SUM)
    return out
