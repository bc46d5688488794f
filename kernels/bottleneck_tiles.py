"""What bottleneck's kernels in Triton share: activations, a tile of h, sizes of blocks."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftkern.kernels import qlora_paths as paths
from peftkern.kernels.common import dropout_limit, keep_tile, widen

WIDEST = 128  # of a rank that a program holds whole
# By their places in reference.ACTIVATIONS; what is none of these is the identity.
RELU, GELU, GELU_TANH, QUICKGELU, SILU, TANH = (tl.constexpr(i) for i in range(1, 7))


@triton.jit
def tanh(h):
    """By its series near 0, where a difference of exponentials has few digits left."""
    square = h * h
    near = 62 / 2835 - square * (1382 / 155925)
    near = 1 - square * (1 / 3 - square * (2 / 15 - square * (17 / 315 - square * near)))
    power = tl.exp(-2 * tl.abs(h))
    far = (1 - power) / (1 + power)
    return tl.where(square < 1 / 16, h * near, tl.where(h < 0, -far, far))


@triton.jit
def activate(h, ACTIVATION: tl.constexpr):
    """act(h), float32."""
    if ACTIVATION == RELU:
        return tl.where(h < 0, 0.0, h)  # a NaN stays one
    elif ACTIVATION == GELU:
        return 0.5 * h * (1 + tl.erf(h * 0.7071067811865476))
    elif ACTIVATION == GELU_TANH:
        return 0.5 * h * (1 + tanh(0.7978845608028654 * (h + 0.044715 * h * h * h)))
    elif ACTIVATION == QUICKGELU:
        return h * tl.sigmoid(1.702 * h)
    elif ACTIVATION == SILU:
        return h * tl.sigmoid(h)
    elif ACTIVATION == TANH:
        return tanh(h)
    else:
        return h


@triton.jit
def slope(h, ACTIVATION: tl.constexpr):
    """act'(h), float32."""
    if ACTIVATION == RELU:
        return tl.where(h > 0, 1.0, 0.0)
    elif ACTIVATION == GELU:
        density = 0.3989422804014327 * tl.exp(-0.5 * h * h)
        return 0.5 * (1 + tl.erf(h * 0.7071067811865476)) + h * density
    elif ACTIVATION == GELU_TANH:
        bent = tanh(0.7978845608028654 * (h + 0.044715 * h * h * h))
        inner = 0.7978845608028654 * (1 + 0.134145 * h * h)
        return 0.5 * (1 + bent) * (1 + h * (1 - bent) * inner)
    elif ACTIVATION == QUICKGELU:
        share = tl.sigmoid(1.702 * h)
        return share * (1 + 1.702 * h * (1 - share))
    elif ACTIVATION == SILU:
        share = tl.sigmoid(h)
        return share * (1 + h * (1 - share))
    elif ACTIVATION == TANH:
        power = tl.exp(-2 * tl.abs(h))  # of 1 - tanh(h)^2 little would be left
        return 4 * power / ((1 + power) * (1 + power))
    else:
        return tl.zeros_like(h) + 1


@triton.jit
def dropped(
    value,  # of h's shape, [BLOCK_M, BLOCK_R]
    seed_ptr,  # [1] int64, or None: nothing is dropped
    threshold,  # see keep_tile
    factor,  # 1 / (1 - p); 0 where everything is dropped, for which no threshold is high enough
    m,
    first,  # the tile's first rank
    rank,
    WHOLE_QUADS: tl.constexpr,  # rank % 4 == 0
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """D(value)."""
    if seed_ptr is None:
        return value
    else:
        keep = keep_tile(seed_ptr, threshold, m, first, rank, WHOLE_QUADS, BLOCK_M, BLOCK_R)
        return tl.where(keep & (factor > 0), value * factor, 0.0)


@triton.jit
def whole_scale(scale, gate_ptr):
    if gate_ptr is None:
        return scale
    else:
        return scale * widen(tl.load(gate_ptr))


@triton.jit
def add_bias(sum, bias_ptr, r, rank):
    if bias_ptr is not None:
        sum += widen(tl.load(bias_ptr + r, mask=r < rank, other=0))[None, :]
    return sum


@triton.jit
def load_hidden(
    hidden_ptr,  # [splits, rows, rank] float32
    m,
    inside,
    r,
    rows,
    rank,
    SPLITS: tl.constexpr,
):
    """A tile of h, or of another matrix of its shape, whose splits are added up in their order."""
    place = hidden_ptr + m[:, None] * rank + r[None, :]
    mask = inside[:, None] & (r < rank)[None, :]
    sum = tl.load(place, mask=mask, other=0)
    for split in tl.static_range(1, SPLITS):
        sum += tl.load(place + tl.cast(split, tl.int64) * rows * rank, mask=mask, other=0)
    return sum


@triton.jit
def store_hidden(hidden_ptr, value, m, inside, r, rank):
    place = hidden_ptr + m[:, None] * rank + r[None, :]
    tl.store(place, value, mask=inside[:, None] & (r < rank)[None, :])


def dropout_arguments(p: float, seed: Tensor | None, rank: int) -> dict[str, Any]:
    """What `dropped` takes, by the names that it has in every kernel."""
    limit = dropout_limit(p, seed)
    return {
        "seed_ptr": None if limit == 0 else seed,
        "threshold": limit or 0,
        "factor": 1 / (1 - p) if limit else float(limit == 0),
        "WHOLE_QUADS": rank % 4 == 0,
    }


def is_one_kernel_s(rows: int, rank: int, tile: paths.Tile, device: torch.device) -> bool:
    """Whether a program holds the whole rank, and there are programs enough to fill a GPU."""
    programs = triton.cdiv(rows, tile.rows)
    return rank <= WIDEST and programs >= paths.multiprocessors(device)


def whole_blocks(tile: paths.Tile, rank: int) -> dict[str, int]:
    """What a kernel of both products asks for."""
    blocks = product_blocks(tile, rank, WIDEST, BLOCK_N=tile.outputs, BLOCK_K=tile.inner)
    if blocks["BLOCK_R"] > WIDEST // 2:
        blocks["num_warps"] *= 2  # a tile of h, its mask and its slope have to lie in registers
    return blocks


def product_blocks(tile: paths.Tile, rank: int, widest: int, **others: int) -> dict[str, int]:
    """What a product asks for, in chunks of the rank; none of its sides is shorter than 16."""
    return {
        "BLOCK_M": tile.rows,
        "BLOCK_R": min(widest, max(triton.next_power_of_2(rank), 16)),
        "num_warps": tile.warps,
        "num_stages": tile.stages,
        **others,
    }


# Of a kernel that takes h element by element.
HIDDEN_BLOCKS = {"BLOCK_M": 16, "BLOCK_R": 64}
