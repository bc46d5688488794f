"""How qlora's gradients sum over rows: in strips, and what is left to add up after them.

Rows belong to groups: to experts, or to adapters. Those of a group are cut into strips, which are
summed apart from each other, and a second launch adds up the strips of each group in their order:
no atomics, and the same bits for the same input. Which rows are whose is read on the device.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftkern.kernels.common import narrow
from peftkern.kernels.qlora_tiles import row_tiles, tile_rows

# They change from step to step, and no address hangs on their being a multiple of 16.
SIZES = ["tiles", "rows", "groups", "t_blocks", "blocks", "bias_blocks"]
STRIPS = 16  # of rows of one group: with the tiles of the other axis, they fill a GPU
# A program of the second launch adds so many numbers, and so many parts of each at a time: they
# wait for memory together.
BLOCK_ITEMS, BLOCK_PARTS = 256, 8


class Groups(NamedTuple):
    """Whose rows are whose: group i has positions offsets[i] to offsets[i + 1].

    Args:
        count: how many groups there are.
        offsets: `[count + 1]`; None where all rows are one group's.
        order: `[rows]`, the row at each position; None where it is the position itself.
    """

    count: int = 1
    offsets: Tensor | None = None
    order: Tensor | None = None


def by_adapter(adapter: Tensor, count: int) -> Groups:
    """Rows in the order of their adapters; those of none come first and are no group's."""
    ranked, order = adapter.sort(stable=True)
    names = torch.arange(count + 1, dtype=adapter.dtype, device=adapter.device)
    return Groups(count, torch.searchsorted(ranked, names), order)


class Strips(NamedTuple):
    """How rows are cut: into `count` strips at most, of `rows` rows at most, none of two groups."""

    rows: int
    count: int


def strips_of(rows: int, groups: Groups, block: int) -> Strips:
    """Of whole blocks, and no longer than makes STRIPS of all rows."""
    length = triton.cdiv(max(rows, 1), STRIPS * block) * block
    return Strips(length, row_tiles(rows, groups.count, length))


@triton.jit
def strip_of(
    strip, offsets_ptr, groups, rows, strip_rows, GROUPED: tl.constexpr, BLOCK_G: tl.constexpr
):
    """-> the group of a strip and its positions, from begin to end: none, of a strip left over."""
    group, begin, end = tile_rows(strip, offsets_ptr, groups, rows, GROUPED, strip_rows, BLOCK_G)
    return group, begin, tl.minimum(begin + strip_rows, end)


@triton.jit
def rows_at(start, end, order_ptr, BLOCK_M: tl.constexpr):
    """-> the rows at a block of positions, int64, and which positions lie before the end."""
    position = start + tl.arange(0, BLOCK_M)
    inside = position < end
    if order_ptr is None:
        return position.to(tl.int64), inside
    else:
        return tl.load(order_ptr + position, mask=inside, other=0), inside


@triton.jit
def _add_parts(
    parts_ptr,  # [.., items] float32
    out_ptr,  # rows of `stride` elements, of which `width` are written, from `first` on
    item,
    items,
    part,  # the first
    parts,
    width,
    stride,
    first,
    BLOCK_PARTS: tl.constexpr,
):
    """out[item // width, first + item % width] = sum of parts[.., item], in their order."""
    lane = tl.arange(0, BLOCK_PARTS)
    inside = item < items
    total = tl.zeros(item.shape, tl.float32)
    for start in range(0, parts, BLOCK_PARTS):
        terms = tl.load(
            parts_ptr + (part + start + lane).to(tl.int64)[:, None] * items + item[None, :],
            mask=(start + lane < parts)[:, None] & inside[None, :],
            other=0,
        )
        total += tl.sum(terms, 0)
    to = out_ptr + item // width * stride + first + item % width
    tl.store(to, narrow(total, out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _strips_of(group, offsets_ptr, groups, rows, strip_rows, BLOCK_G: tl.constexpr):
    """-> the first strip of a group, and how many it has."""
    if offsets_ptr is None:
        return 0, (rows + strip_rows - 1) // strip_rows
    else:
        g = tl.arange(0, BLOCK_G)
        begin = tl.load(offsets_ptr + g, mask=g < groups, other=0)
        end = tl.load(offsets_ptr + g + 1, mask=g < groups, other=0)
        strips = (end - begin + strip_rows - 1) // strip_rows
        return tl.sum(tl.where(g < group, strips, 0), 0), tl.sum(tl.where(g == group, strips, 0), 0)


@triton.jit(do_not_specialize=SIZES)
def finish_kernel(
    t_parts_ptr,  # [tiles, rows, width] float32, or None
    t_ptr,  # [rows, rank] float32
    parts_ptr,  # [strips, outputs, width] float32, or None
    out_ptr,  # [groups, outputs, rank]
    bias_parts_ptr,  # [strips, outputs] float32, or None
    bias_ptr,  # [groups, outputs]
    offsets_ptr,  # [groups + 1], or None
    tiles,
    rows,
    outputs,
    rank,
    first,
    width,
    groups,
    strip_rows,
    t_blocks,  # of BLOCK items each, as the next two: those of t, of a group, of a group's bias
    blocks,
    bias_blocks,
    BLOCK: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """Adds up what was left in parts: a block of t, or of a group's gradient, or of its bias'.

    Floor: 4 bytes for each number of each part, which the launch before has just written.
    """
    program = tl.program_id(0)
    lane = tl.arange(0, BLOCK).to(tl.int64)
    if program < t_blocks:
        if t_parts_ptr is not None:
            item, items = program.to(tl.int64) * BLOCK + lane, tl.cast(rows, tl.int64) * width
            _add_parts(t_parts_ptr, t_ptr, item, items, 0, tiles, width, rank, first, BLOCK_PARTS)
    else:
        group = (program - t_blocks) // (blocks + bias_blocks)
        block = (program - t_blocks) % (blocks + bias_blocks)
        part, parts = _strips_of(group, offsets_ptr, groups, rows, strip_rows, BLOCK_G)
        if block < blocks:
            if parts_ptr is not None:
                item, items = block.to(tl.int64) * BLOCK + lane, tl.cast(outputs, tl.int64) * width
                out_ptr += group.to(tl.int64) * outputs * rank
                _add_parts(
                    parts_ptr, out_ptr, item, items,
                    part, parts, width, rank, first, BLOCK_PARTS,
                )  # fmt: skip
        else:
            if bias_parts_ptr is not None:
                item = (block - blocks).to(tl.int64) * BLOCK + lane
                bias_ptr += group.to(tl.int64) * outputs
                _add_parts(
                    bias_parts_ptr, bias_ptr, item, outputs,
                    part, parts, 1, 1, 0, BLOCK_PARTS,
                )  # fmt: skip


_Part = tuple[Tensor | None, Tensor | None]  # and their sum


def finish(
    groups: Groups, sizes: tuple[int, ...], tiles: int, t: _Part, out: _Part, bias: _Part
) -> None:
    """Launches `finish_kernel` for those that are given; sizes are its, from rows to strip_rows."""
    rows, outputs, _, _, width, *_ = sizes
    t_blocks = 0 if t[0] is None else triton.cdiv(rows * width, BLOCK_ITEMS)
    blocks = 0 if out[0] is None else triton.cdiv(outputs * width, BLOCK_ITEMS)
    bias_blocks = 0 if bias[0] is None else triton.cdiv(outputs, BLOCK_ITEMS)
    programs = t_blocks + groups.count * (blocks + bias_blocks)
    if programs:
        finish_kernel[(programs,)](
            *t, *out, *bias, groups.offsets, tiles, *sizes,
            t_blocks, blocks, bias_blocks, BLOCK=BLOCK_ITEMS, BLOCK_PARTS=BLOCK_PARTS,
            BLOCK_G=triton.next_power_of_2(groups.count),
        )  # fmt: skip
