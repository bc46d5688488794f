"""The latent weights of onebit in Triton: W and its gradient, of many matrices at once.

    W         = mean + std * level[code]
    grad_w    = r * G + (1 - r) * S1 / n + (w - mean) / ((n - 1) * std) * S2
    S1        = sum of G,  S2 = sum of G * (level[code] - r * (w - mean) / (std + 1e-5))

One launch serves all matrices of a list, whose mean and std onebit_statistics.py finds. How a
matrix is cut into parts, and the order in which these are added up, depends on its own size alone:
the same matrix gives the same bits in any list.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftkern.kernels.common import narrow
from peftkern.kernels.onebit_levels import (
    ANY_ADDRESS,
    EPS,
    UNSPECIALIZED,
    at,
    code_of,
    counts_of,
    load,
    load_statistics,
    runs,
    value_of,
)
from peftkern.onebit import fallback, reference

BLOCK_SUMS, SUMS_WARPS = 8192, 8  # weights and gradients that one program sums up
BLOCK_SUM_PARTS = 128
BLOCK_WRITE = 4096  # weights that one program writes


@triton.jit
def _store(ptrs, matrix, begin, held, value, BLOCK: tl.constexpr):
    """Rounded once, as `load` reads it."""
    to, lane = at(ptrs, matrix), tl.arange(0, BLOCK)
    tl.store(to + begin + lane, narrow(value, to.dtype.element_ty), mask=lane < held)


@triton.jit(do_not_specialize=["counts"])
def quantize_kernel(
    weight_ptrs,  # of each matrix, [counts], float32, bfloat16 or float16
    out_ptrs,  # of each, [counts], float32, bfloat16 or float16
    counts,
    statistics_ptr,  # [matrices, 2] float32
    THRESHOLDS: tl.constexpr,
    LEVELS: tl.constexpr,
    ALIGNED: tl.constexpr,  # every count is a multiple of 4
    BLOCK: tl.constexpr,
):
    """W, rounded once. Floor: the bytes of the weights read, of W written."""
    matrix = tl.program_id(0)
    count = at(counts, matrix)
    begin = tl.program_id(1).to(tl.int64) * BLOCK
    if begin >= count:
        return
    held = tl.minimum(count - begin, BLOCK).to(tl.int32)
    if ALIGNED:
        held = tl.multiple_of(held, 4)
    weight = load(weight_ptrs, matrix, begin, held, BLOCK)
    mean, std = load_statistics(statistics_ptr, matrix)
    value = value_of(code_of(weight, mean, std, THRESHOLDS), mean, std, LEVELS)
    _store(out_ptrs, matrix, begin, held, value, BLOCK)


@triton.jit(do_not_specialize=UNSPECIALIZED, do_not_specialize_on_alignment=ANY_ADDRESS)
def quantize_sums_kernel(
    grad_ptrs,  # of each matrix, [counts]: the gradient of W, float32, bfloat16 or float16
    weight_ptrs,  # of each, [counts]
    counts,
    statistics_ptr,  # [matrices, 2] float32
    sums_ptr,  # [matrices, parts, 2] float32: S1 and S2 of a part
    parts,
    THRESHOLDS: tl.constexpr,
    LEVELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Floor: the bytes of the gradients and of the weights, each read once."""
    matrix, part = tl.program_id(0), tl.program_id(1)
    count = at(counts, matrix)
    begin = part.to(tl.int64) * BLOCK
    if begin >= count:
        return
    held = tl.minimum(count - begin, BLOCK).to(tl.int32)
    weight = load(weight_ptrs, matrix, begin, held, BLOCK)
    grad = load(grad_ptrs, matrix, begin, held, BLOCK)
    mean, std = load_statistics(statistics_ptr, matrix)
    level = value_of(code_of(weight, mean, std, THRESHOLDS), 0.0, 1.0, LEVELS)
    ratio = tl.div_rn(std, std + EPS)
    along = grad * (level - ratio * ((weight - mean) / (std + EPS)))
    to = sums_ptr + 2 * (matrix.to(tl.int64) * parts + part)
    tl.store(to, tl.sum(grad, 0))
    tl.store(to + 1, tl.sum(along, 0))  # beyond the end its gradients are 0


@triton.jit(do_not_specialize=UNSPECIALIZED)
def quantize_bwd_kernel(
    grad_ptrs,  # of each matrix, [counts]
    weight_ptrs,  # of each, [counts]
    out_ptrs,  # of each, [counts]
    counts,
    statistics_ptr,  # [matrices, 2] float32
    sums_ptr,  # [matrices, parts, 2] float32, as quantize_sums_kernel leaves them
    parts,
    BLOCK_PART: tl.constexpr,  # weights that one part sums up
    BLOCK_PARTS: tl.constexpr,
    ALIGNED: tl.constexpr,  # every count is a multiple of 4
    BLOCK: tl.constexpr,
):
    """The gradient of the weights; every program adds up the parts of its matrix in their order.

    Floor: the bytes of the gradients and the weights, which lie in the L2 cache if the list is
    small, and of what is written; 1 KB of sums for each million weights.
    """
    matrix = tl.program_id(0)
    count = at(counts, matrix)
    begin = tl.program_id(1).to(tl.int64) * BLOCK
    if begin >= count:
        return
    sums_ptr += 2 * matrix.to(tl.int64) * parts
    lane = tl.arange(0, BLOCK_PARTS)
    own = (count + BLOCK_PART - 1) // BLOCK_PART
    plain = tl.zeros((BLOCK_PARTS,), tl.float32)
    along = tl.zeros((BLOCK_PARTS,), tl.float32)
    for start in range(0, own, BLOCK_PARTS):
        part = start + lane
        plain += tl.load(sums_ptr + 2 * part, mask=part < own, other=0)
        along += tl.load(sums_ptr + 2 * part + 1, mask=part < own, other=0)
    mean, std = load_statistics(statistics_ptr, matrix)
    ratio = tl.div_rn(std, std + EPS)
    others = tl.maximum(count - 1, 1).to(tl.float32)
    # Where std is 0 so is W's slope; the division is one by 1 then.
    flat = std == 0
    slope = tl.where(flat, 0.0, tl.div_rn(tl.sum(along, 0), tl.where(flat, 1.0, others * std)))
    shift = (1 - ratio) * tl.sum(plain, 0) / count.to(tl.float32)
    held = tl.minimum(count - begin, BLOCK).to(tl.int32)
    if ALIGNED:
        held = tl.multiple_of(held, 4)
    weight = load(weight_ptrs, matrix, begin, held, BLOCK)
    grad = load(grad_ptrs, matrix, begin, held, BLOCK)
    _store(out_ptrs, matrix, begin, held, ratio * grad + shift + slope * (weight - mean), BLOCK)


def quantize(
    weights: Sequence[Tensor],
    statistics: Tensor,
    bits: int,
    dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """W of each weight: in its own dtype, or in `dtype`, to which it is rounded at once."""
    if weights[0].dtype == torch.float64:
        return fallback.quantize(weights, statistics, bits)
    outs = [torch.empty_like(w, dtype=dtype) for w in weights]
    for cut in runs(weights):
        counts = counts_of(weights[cut])
        if max(counts):
            quantize_kernel[(len(counts), triton.cdiv(max(counts), BLOCK_WRITE))](
                tuple(weights[cut]), tuple(outs[cut]), counts, statistics[cut],
                THRESHOLDS=reference.thresholds(bits), LEVELS=reference.levels(bits),
                ALIGNED=_aligned(counts), BLOCK=BLOCK_WRITE, enable_fp_fusion=False,
            )  # fmt: skip
    return outs


def quantize_bwd(
    grads: Sequence[Tensor], weights: Sequence[Tensor], statistics: Tensor, bits: int
) -> list[Tensor]:
    if weights[0].dtype == torch.float64:
        return fallback.quantize_bwd(grads, weights, statistics, bits)
    outs = [torch.empty_like(w) for w in weights]
    for cut in runs(grads, weights):
        counts = counts_of(weights[cut])
        parts = triton.cdiv(max(counts), BLOCK_SUMS)
        if not parts:
            continue
        sums = statistics.new_empty(len(counts), parts, 2)
        given = (tuple(grads[cut]), tuple(weights[cut]))
        quantize_sums_kernel[(len(counts), parts)](
            *given, counts, statistics[cut], sums, parts,
            THRESHOLDS=reference.thresholds(bits), LEVELS=reference.levels(bits),
            BLOCK=BLOCK_SUMS, num_warps=SUMS_WARPS,
        )  # fmt: skip
        quantize_bwd_kernel[(len(counts), triton.cdiv(max(counts), BLOCK_WRITE))](
            *given, tuple(outs[cut]), counts, statistics[cut], sums, parts,
            BLOCK_PART=BLOCK_SUMS, BLOCK_PARTS=BLOCK_SUM_PARTS, ALIGNED=_aligned(counts),
            BLOCK=BLOCK_WRITE,
        )  # fmt: skip
    return outs


def _aligned(counts: tuple[int, ...]) -> bool:
    return all(count % 4 == 0 for count in counts)
