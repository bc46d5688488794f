"""What qlora's kernels in Triton share: a tile of the weight, a tile's rows, dropout's mask.

Forward and backward decode by the same function, so that both see the same weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

NESTED_BLOCK = tl.constexpr(256)  # scales that share a scale
NESTED_VALUES = tl.constexpr(256)  # of a scale's code
# The interpreter multiplies bfloat16 as if its bits were integers, cuts off where a GPU rounds, and
# reads subnormal numbers wrongly: `dot`, `narrow` and `widen` make up for that, and are plain
# operations when compiled.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def narrow(value, dtype: tl.constexpr):
    """float32, rounded to the nearest number of this dtype."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        rounded = tl.where(value == value, bits + 0x7FFF + ((bits >> 16) & 1), bits | 0x400000)
        return (rounded >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return value.to(dtype)


@triton.jit
def widen(value):
    """The float32 of a stored number."""
    if INTERPRETED and value.dtype == tl.bfloat16:
        bits = value.to(tl.uint16, bitcast=True).to(tl.uint32)
        return (bits << 16).to(tl.float32, bitcast=True)
    return value.to(tl.float32)


@triton.jit
def convert(value, dtype: tl.constexpr):
    """A stored number in this dtype: in its own as it is, in another one rounded once."""
    if value.dtype == dtype:
        return value
    else:
        return narrow(widen(value), dtype)


@triton.jit
def dot(left, right, sum):
    """left [m, k] times right [k, n], onto sum [m, n] float32; exact products, float32 included."""
    if INTERPRETED:
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, sum, input_precision="ieee")


@triton.jit
def load(place, inside, EVEN: tl.constexpr):
    """What lies there, or 0 where it is not inside; EVEN: all of it is."""
    if EVEN:
        return tl.load(place)
    else:
        return tl.load(place, mask=inside, other=0)


@triton.jit
def gather(table_ptr, COUNT: tl.constexpr, index):
    """table[index] of a table of COUNT numbers, out of shared memory and not by a load for each."""
    table = tl.load(table_ptr + tl.arange(0, COUNT))
    return tl.reshape(tl.gather(table, tl.ravel(index).to(tl.int32), 0), index.shape)


@triton.jit
def decode_scales(
    block,  # numbers of blocks, any shape, int64
    inside,  # which of them there are
    absmax_ptr,  # [blocks] float32, or uint8 codes where the scales are nested
    nested_absmax_ptr,  # [ceil(blocks / 256)] float32
    nested_map_ptr,  # [256] float32
    nested_offset_ptr,  # [] float32
    NESTED: tl.constexpr,
    EVEN: tl.constexpr,  # all of them are inside
):
    """absmax[block] in float32; a nested one is a product and a sum, each rounded."""
    scale = load(absmax_ptr + block, inside, EVEN)
    if NESTED:
        # A load by these codes would pass for the weight's own and shape the product for 8 bits.
        scale = gather(nested_map_ptr, NESTED_VALUES, scale)
        scale *= load(nested_absmax_ptr + block // NESTED_BLOCK, inside, EVEN)
        scale += tl.load(nested_offset_ptr)
    return scale


@triton.jit
def decode_tile(
    weight_ptr,  # [experts, rows, columns]; 4 bits: two codes a byte; 8: int8; 0: a dense weight
    absmax_ptr,  # scales, see decode_scales; 8 bits: [experts, rows] float32
    codebook_ptr,  # [16] float32
    nested_absmax_ptr,
    nested_map_ptr,
    nested_offset_ptr,
    expert,
    row,  # the tile's first row, and its first column: a multiple of BLOCK_K
    column,
    rows,  # of one expert
    columns,
    dtype: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,  # weights that share a scale; 0: those of a row
    NESTED: tl.constexpr,
    ALIGNED: tl.constexpr,  # columns % BLOCK_SIZE == 0: no block, so no byte, belongs to two rows
    EVEN: tl.constexpr,  # columns % BLOCK_K == 0: no tile reaches beyond the last column
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """W[expert, row : row + BLOCK_N, column : column + BLOCK_K] in this dtype, rounded once.

    Beyond the last column stand finite numbers, which the other factor's zeros have to take out;
    beyond the last row that row again, since a load without a mask costs fewer instructions.
    """
    n = tl.minimum(row + tl.arange(0, BLOCK_N), rows - 1)
    k = column + tl.arange(0, BLOCK_K)[None, :]
    first = (expert.to(tl.int64) * rows + n)[:, None]  # counted over all experts
    if BITS == 0:
        value = convert(load(weight_ptr + first * columns + k, k < columns, EVEN), dtype)
    elif BITS == 8:
        code = load(weight_ptr + first * columns + k, k < columns, EVEN)
        # A division that rounds to nearest, as everywhere else; `/` is off by an ulp on a GPU.
        value = code.to(tl.float32) * tl.div_rn(tl.load(absmax_ptr + first), 127.0)
    else:
        if ALIGNED:
            pair = column // 2 + tl.arange(0, BLOCK_K // 2)[None, :]
            byte = load(weight_ptr + first * (columns // 2) + pair, pair < columns // 2, EVEN)
            code = tl.reshape(tl.join(byte >> 4, byte & 15), (BLOCK_N, BLOCK_K))
            # One load for as many weights as share a scale.
            SCALES: tl.constexpr = BLOCK_K // BLOCK_SIZE if BLOCK_K > BLOCK_SIZE else 1
            block = column // BLOCK_SIZE + tl.arange(0, SCALES)[None, :]
            per_row = columns // BLOCK_SIZE
            scale = decode_scales(
                first * per_row + block, block < per_row, absmax_ptr, nested_absmax_ptr,
                nested_map_ptr, nested_offset_ptr, NESTED, EVEN,
            )  # fmt: skip
            if SCALES > 1:
                wide = tl.broadcast_to(scale[:, :, None], (BLOCK_N, SCALES, BLOCK_K // SCALES))
                scale = tl.reshape(wide, (BLOCK_N, BLOCK_K))
        else:
            element = first * columns + k
            byte = load(weight_ptr + element // 2, k < columns, EVEN)
            code = tl.where(element % 2 == 0, byte >> 4, byte & 15)
            scale = decode_scales(
                element // BLOCK_SIZE, k < columns, absmax_ptr, nested_absmax_ptr, nested_map_ptr,
                nested_offset_ptr, NESTED, EVEN,
            )  # fmt: skip
        # A pipelined loop would copy what is loaded here by an instruction for each weight.
        value = gather(codebook_ptr, 16, code) * scale
    return value if BITS == 0 else narrow(value, dtype)


@triton.jit
def philox(seed, counter):
    """The four words of Philox 4x32-10 for these counters (uint64), as in reference.philox.

    A round takes both halves of each product, so that it is one wide multiplication; Triton's own
    asks for them one by one, in twice the instructions.
    """
    a, b = counter.to(tl.uint32), (counter >> 32).to(tl.uint32)
    c = tl.zeros_like(a)
    d = tl.zeros_like(a)
    first, second = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        left, right = a.to(tl.uint64) * 0xD2511F53, c.to(tl.uint64) * 0xCD9E8D57
        a = (right >> 32).to(tl.uint32) ^ b ^ first
        c = (left >> 32).to(tl.uint32) ^ d ^ second
        b, d = right.to(tl.uint32), left.to(tl.uint32)
        first = tl.add(first, 0x9E3779B9, sanitize_overflow=False)
        second = tl.add(second, 0xBB67AE85, sanitize_overflow=False)
    return a, b, c, d


@triton.jit
def keep_tile(
    seed_ptr,  # [1] int64
    threshold,  # round(p * 2^32), below 2^32: as the int32 of the same bits
    row,  # the tile's rows [BLOCK_M], and its first column: a multiple of 4
    column,
    columns,
    WHOLE_QUADS: tl.constexpr,  # columns % 4 == 0: four elements in a row share one Philox call
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Which elements of x [rows, columns] dropout keeps: reference.dropout's, bit for bit."""
    seed = tl.load(seed_ptr).to(tl.uint64)
    limit = threshold.to(tl.uint32, bitcast=True)
    first = row.to(tl.uint64)[:, None] * columns + column
    if WHOLE_QUADS:
        a, b, c, d = philox(seed, first // 4 + tl.arange(0, BLOCK_K // 4)[None, :])
        # As bits of one number, since its way to where the elements lie is the dear part.
        bits = (a >= limit).to(tl.int32) | ((b >= limit).to(tl.int32) << 1)
        bits |= ((c >= limit).to(tl.int32) << 2) | ((d >= limit).to(tl.int32) << 3)
        each = (bits[:, :, None] >> tl.arange(0, 4)[None, None, :]) & 1
        return tl.reshape(each, (BLOCK_M, BLOCK_K)) != 0
    else:
        element = first + tl.arange(0, BLOCK_K)[None, :]
        a, b, c, d = philox(seed, element // 4)
        lane = element % 4
        word = tl.where(lane == 0, a, tl.where(lane == 1, b, tl.where(lane == 2, c, d)))
        return word >= limit


@triton.jit
def tile_rows(
    tile,
    offsets_ptr,  # [experts + 1] int64
    experts,
    rows,
    GROUPED: tl.constexpr,  # whether there are offsets
    height,  # rows of a tile
    BLOCK_E: tl.constexpr,  # a power of two, at least `experts`
):
    """Of this tile, which holds rows of one expert alone: the expert, its first row, its end.

    Each expert has tiles of its own, all of them `row_tiles` at most; those left over are empty.
    """
    if GROUPED:
        e = tl.arange(0, BLOCK_E)
        begin = tl.load(offsets_ptr + e, mask=e < experts, other=0)
        end = tl.load(offsets_ptr + e + 1, mask=e < experts, other=0)
        end = tl.minimum(end, rows)
        tiles = (tl.maximum(end - begin, 0) + height - 1) // height
        last = tl.cumsum(tiles, 0)
        expert = tl.sum((last <= tile).to(tl.int32), 0)
        mine = e == expert  # nowhere, of a tile that is left over: then first and end are 0
        first = tl.sum(tl.where(mine, begin + (tile - last + tiles) * height, 0), 0)
        return tl.minimum(expert, experts - 1), first, tl.sum(tl.where(mine, end, 0), 0)
    else:
        return tile * 0, tile.to(tl.int64) * height, rows


@triton.jit
def tile_adapters(
    adapter_ptr,  # [rows] int32, -1: none
    row,  # [BLOCK_M]
    inside,  # which of them are rows of this tile
    adapters,
):
    """The adapter of each row, and the first and the end of those that this tile may have."""
    adapter = tl.load(adapter_ptr + row, mask=inside, other=-1)
    first = tl.min(tl.where(adapter < 0, adapters, adapter), 0)
    return adapter, first, tl.minimum(tl.max(adapter, 0) + 1, adapters)


def rows_of(x: Any) -> Any:
    """`[rows, columns]`, of an activation of any number of dimensions; None of none."""
    if x is None or x.dim() == 2:
        return x
    return x.flatten(0, -2) if x.dim() > 2 else x[None]


def row_tiles(rows: int, experts: int, block: int) -> int:
    """How many tiles of so many rows there may be; where they lie is known on the device alone."""
    filled = min(experts, rows)  # each with one row at least
    return (rows - filled) // block + filled


def decode_arguments(weight: Sequence[Tensor]) -> list[Tensor | None]:
    """A weight's tensors as `decode_tile` takes them: six, None for what the format lacks."""
    return [*weight, *[None] * (6 - len(weight))]


def dropout_limit(p: float, seed: Tensor | None) -> int | None:
    """What `keep_tile` takes as its threshold; 0 where nothing is dropped, as without a seed, and
    None where everything is."""
    limit = 0 if seed is None else round(p * 2**32)
    if limit == 2**32:
        return None
    return limit - 2**32 if limit >= 2**31 else limit
