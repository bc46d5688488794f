"""What kernels of every family share: numbers of any float dtype, products, dropout's mask."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

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


def dropout_limit(p: float, seed: Tensor | None) -> int | None:
    """What `keep_tile` takes as its threshold; 0 where nothing is dropped, as without a seed, and
    None where everything is."""
    limit = 0 if seed is None else round(p * 2**32)
    if limit == 2**32:
        return None
    return limit - 2**32 if limit >= 2**31 else limit


def rows_of(x: Any) -> Any:
    """`[rows, columns]`, of an activation of any number of dimensions; None of none."""
    if x is None or x.dim() == 2:
        return x
    return x.flatten(0, -2) if x.dim() > 2 else x[None]
