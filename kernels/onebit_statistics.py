"""The statistics of onebit's latent weights in Triton: mean and std of many matrices at once.

One launch serves all matrices of a list. How a matrix is cut into parts, and the order in which
these are added up, depends on its own size alone: the same matrix gives the same bits in any list.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftkern.kernels.onebit_levels import ANY_ADDRESS, UNSPECIALIZED, at, counts_of, load, runs
from peftkern.onebit import fallback

# A matrix of an adapter, such as 768 x 32, lies whole in the registers of one program, which reads
# it once for both its passes; 64 of them a thread. A larger one is cut into parts of this size.
BLOCK_PART, PART_WARPS = 32768, 16
# A std of so many times max(1, |mean|) is nothing but rounding.
FLAT = tl.constexpr(8 * torch.finfo(torch.float32).eps)
BLOCK_PARTS = 1024  # parts that are added up at a time


@triton.jit
def _store_statistics(statistics_ptr, matrix, mean, squares, count):
    """squares: the sum of those of the deviations from the mean."""
    std = tl.sqrt_rn(tl.div_rn(squares, tl.maximum(count - 1, 1).to(tl.float32)))
    std = tl.where(std <= FLAT * tl.maximum(tl.abs(mean), 1.0), 0.0, std)
    tl.store(statistics_ptr + 2 * matrix, mean)
    tl.store(statistics_ptr + 2 * matrix + 1, std)


@triton.jit(do_not_specialize=UNSPECIALIZED, do_not_specialize_on_alignment=ANY_ADDRESS)
def moments_kernel(
    weight_ptrs,  # of each matrix, [counts], float32, bfloat16 or float16
    counts,
    statistics_ptr,  # [matrices, 2] float32
    parts_ptr,  # [matrices, parts, 2] float32: mean and squares of a part; None where parts is 1
    parts,  # of the largest matrix
    BLOCK: tl.constexpr,
):
    """Mean and std of a matrix that is no larger than a part, or mean and squares of a part.

    Floor: every weight is read once; the deviations from the mean are taken of what lies in
    registers.
    """
    matrix, part = tl.program_id(0), tl.program_id(1)
    count = at(counts, matrix)
    begin = part.to(tl.int64) * BLOCK
    if begin >= count:
        if part == 0:  # of no weight at all
            tl.store(statistics_ptr + 2 * matrix, 0.0)
            tl.store(statistics_ptr + 2 * matrix + 1, 0.0)
        return
    held = tl.minimum(count - begin, BLOCK).to(tl.int32)
    weight = load(weight_ptrs, matrix, begin, held, BLOCK)
    mean = tl.div_rn(tl.sum(weight, 0), held.to(tl.float32))
    off = tl.where(tl.arange(0, BLOCK) < held, weight - mean, 0.0)
    squares = tl.sum(off * off, 0)
    if count <= BLOCK:
        _store_statistics(statistics_ptr, matrix, mean, squares, count)
    else:
        if parts_ptr is not None:
            to = parts_ptr + 2 * (matrix.to(tl.int64) * parts + part)
            tl.store(to, mean)
            tl.store(to + 1, squares)


@triton.jit(do_not_specialize=UNSPECIALIZED, do_not_specialize_on_alignment=ANY_ADDRESS)
def moments_parts_kernel(
    counts,
    parts_ptr,  # [matrices, parts, 2] float32, as moments_kernel leaves them
    statistics_ptr,  # [matrices, 2] float32
    parts,
    BLOCK: tl.constexpr,  # weights of a part
    BLOCK_PARTS: tl.constexpr,
):
    """Mean and std of a matrix of several parts, in their order, by what each lies off the mean.

        squares = sum over parts of  squares of the part + its count * (its mean - mean)^2

    Floor: 8 bytes for each 32768 weights, which the launch before has just written.
    """
    matrix = tl.program_id(0)
    count = at(counts, matrix)
    if count <= BLOCK:
        return
    parts_ptr += 2 * matrix.to(tl.int64) * parts
    lane = tl.arange(0, BLOCK_PARTS)
    own = (count + BLOCK - 1) // BLOCK
    sum = tl.zeros((BLOCK_PARTS,), tl.float32)
    for start in range(0, own, BLOCK_PARTS):
        part = start + lane
        held = tl.minimum(count - part.to(tl.int64) * BLOCK, BLOCK).to(tl.float32)
        sum += held * tl.load(parts_ptr + 2 * part, mask=part < own, other=0)
    mean = tl.div_rn(tl.sum(sum, 0), count.to(tl.float32))
    sum = tl.zeros((BLOCK_PARTS,), tl.float32)
    for start in range(0, own, BLOCK_PARTS):
        part = start + lane
        held = tl.minimum(count - part.to(tl.int64) * BLOCK, BLOCK).to(tl.float32)
        off = tl.load(parts_ptr + 2 * part, mask=part < own, other=0) - mean
        squares = tl.load(parts_ptr + 2 * part + 1, mask=part < own, other=0)
        sum += tl.where(part < own, squares + held * (off * off), 0.0)
    _store_statistics(statistics_ptr, matrix, mean, tl.sum(sum, 0), count)


def statistics(weights: Sequence[Tensor]) -> Tensor:
    if weights[0].dtype == torch.float64:
        return fallback.statistics(weights)
    out = weights[0].new_empty(len(weights), 2, dtype=torch.float32)
    for cut in runs(weights):
        counts = counts_of(weights[cut])
        parts = max(triton.cdiv(max(counts), BLOCK_PART), 1)
        found = out.new_empty(len(counts), parts, 2) if parts > 1 else None
        moments_kernel[(len(counts), parts)](
            tuple(weights[cut]), counts, out[cut], found, parts,
            BLOCK=BLOCK_PART, num_warps=PART_WARPS, enable_fp_fusion=False,
        )  # fmt: skip
        if found is not None:
            moments_parts_kernel[(len(counts),)](
                counts, found, out[cut], parts,
                BLOCK=BLOCK_PART, BLOCK_PARTS=BLOCK_PARTS, enable_fp_fusion=False,
            )  # fmt: skip
    return out
