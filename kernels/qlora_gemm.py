"""The product that decodes the weight inside, in Triton: y, and the gradient of x.

    y      = x W^T + bias + scale * down B^T
    grad_x = g W + scale * mask * (t A)

Rows are grouped by expert (`offsets`) and may name their adapter each (`adapter`); both are read on
the device. Sums that several programs share are added up in a fixed order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftkern.kernels import qlora_paths as paths
from peftkern.kernels.qlora_forward import add_up
from peftkern.kernels.qlora_tiles import (
    convert,
    decode_arguments,
    decode_tile,
    dot,
    dropout_limit,
    keep_tile,
    load,
    narrow,
    row_tiles,
    tile_adapters,
    tile_rows,
    widen,
)


@triton.jit
def _low_rank(
    low_ptr, factor_ptr, sum, m, chosen, o, group, outputs, rank,
    OVER_ROWS: tl.constexpr, BLOCK_R: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """sum += low times the group's factor: B [outputs, rank], or A [rank, outputs] OVER_ROWS."""
    for start in range(0, rank, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        inside = chosen[:, None] & (r < rank)[None, :]
        low = tl.load(low_ptr + m[:, None] * rank + r[None, :], mask=inside, other=0)
        low = narrow(low, dtype)
        if OVER_ROWS:
            place = factor_ptr + (group * rank + r)[:, None] * outputs + o[None, :]
            factor = tl.load(place, mask=(r < rank)[:, None] & (o < outputs)[None, :], other=0)
            sum = dot(low, convert(factor, dtype), sum)
        else:
            place = factor_ptr + (group * outputs + o)[:, None] * rank + r[None, :]
            factor = tl.load(place, mask=(o < outputs)[:, None] & (r < rank)[None, :], other=0)
            sum = dot(convert(factor, dtype), tl.trans(low), sum)
    return sum


@triton.jit
def _first_sum(
    sum, bias_ptr, low_ptr, factor_ptr, seed_ptr, adapter_ptr, expert, m, inside, start, o, outputs,
    rank, adapters, scale, threshold, dtype: tl.constexpr, OVER_ROWS: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_LOW_RANK: tl.constexpr, DROPOUT: tl.constexpr,
    WHOLE_QUADS: tl.constexpr, MIXED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    """The low-rank term and the bias; `sum` comes as zeros."""
    if HAS_LOW_RANK:
        if MIXED:
            adapter, group, last = tile_adapters(adapter_ptr, m, inside, adapters)
            while group < last:
                chosen = inside & (adapter == group)
                if tl.max(chosen.to(tl.int32), 0) > 0:
                    more = _low_rank(
                        low_ptr, factor_ptr, sum, m, chosen, o, group.to(tl.int64), outputs, rank,
                        OVER_ROWS, BLOCK_R, dtype,
                    )  # fmt: skip
                    # Zeros in `low` do not keep out an adapter that is not finite.
                    sum = tl.where(chosen[:, None] if OVER_ROWS else chosen[None, :], more, sum)
                group += 1
        else:
            sum = _low_rank(
                low_ptr, factor_ptr, sum, m, inside, o, expert.to(tl.int64), outputs, rank,
                OVER_ROWS, BLOCK_R, dtype,
            )  # fmt: skip
        sum *= scale
        if DROPOUT:
            keep = keep_tile(seed_ptr, threshold, m, start, outputs, WHOLE_QUADS, BLOCK_M, BLOCK_N)
            sum = tl.where(keep, sum, 0.0)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + expert.to(tl.int64) * outputs + o, mask=o < outputs, other=0)
        sum += widen(bias)[:, None]
    return sum


@triton.jit(do_not_specialize=["inputs", "experts", "adapters", "threshold"])
def gemm_kernel(
    x_ptr,  # [inputs, terms]: x, or OVER_ROWS the gradient of y
    weight_ptr,  # and its parts, as decode_tile takes them: [experts, rows, columns]
    absmax_ptr,
    codebook_ptr,
    nested_absmax_ptr,
    nested_map_ptr,
    nested_offset_ptr,
    bias_ptr,  # [experts, outputs], of any float dtype
    low_ptr,  # [inputs, rank] float32: D(x) A^T, or OVER_ROWS g B
    factor_ptr,  # lora_b [adapters, outputs, rank], or OVER_ROWS lora_a [adapters, rank, outputs]
    seed_ptr,  # [1] int64
    offsets_ptr,  # [experts + 1] int64
    adapter_ptr,  # [inputs] int32
    out_ptr,  # [splits, inputs, outputs]
    inputs,
    rows,
    columns,
    rank,
    experts,
    adapters,
    part,  # terms that one split adds up, a multiple of BLOCK_K
    scale,  # of the low-rank term
    threshold,
    OVER_ROWS: tl.constexpr,  # the sum runs over W's rows, for the gradient of x, not its columns
    HAS_BASE: tl.constexpr,  # False: the low-rank term and the bias alone
    ADD: tl.constexpr,  # to what `out` holds
    HAS_BIAS: tl.constexpr,
    HAS_LOW_RANK: tl.constexpr,
    DROPOUT: tl.constexpr,  # of the low-rank term of the gradient
    WHOLE_QUADS: tl.constexpr,
    GROUPED: tl.constexpr,
    MIXED: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    NESTED: tl.constexpr,
    ALIGNED: tl.constexpr,
    EVEN: tl.constexpr,  # both terms and columns are multiples of their blocks
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """out = x W^T + bias + scale * down B^T, or OVER_ROWS out = x W + mask * scale * (t A).

    Floor: bytes of the packed weight once for each tile of rows (L2 holds it between them), of x
    and out; 2 inputs rows columns operations. The low-rank term comes first, so that one set of
    sums holds all three; of y the transposed tile is made, whose decoded factor stays in registers.
    """
    dtype = x_ptr.dtype.element_ty
    expert, first, stop = tile_rows(
        tl.program_id(0), offsets_ptr, experts, inputs, GROUPED, BLOCK_M, BLOCK_E
    )
    if first >= stop:
        return
    m = first + tl.arange(0, BLOCK_M)
    inside = m < stop
    start = tl.program_id(1) * BLOCK_N
    o = start + tl.arange(0, BLOCK_N)
    split = tl.program_id(2)
    if OVER_ROWS:
        outputs, terms = columns, rows
        sum = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    else:
        outputs, terms = rows, columns
        sum = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    if split == 0:
        sum = _first_sum(
            sum, bias_ptr, low_ptr, factor_ptr, seed_ptr, adapter_ptr, expert, m, inside, start, o,
            outputs, rank, adapters, scale, threshold, dtype, OVER_ROWS, HAS_BIAS, HAS_LOW_RANK,
            DROPOUT, WHOLE_QUADS, MIXED, BLOCK_M, BLOCK_N, BLOCK_R,
        )  # fmt: skip
    if HAS_BASE:
        begin = split * part
        for term in range(begin, tl.minimum(begin + part, terms), BLOCK_K):
            k = term + tl.arange(0, BLOCK_K)
            place = x_ptr + tl.minimum(m, stop - 1)[:, None] * terms + k[None, :]
            x = load(place, k[None, :] < terms, EVEN)
            if OVER_ROWS:
                w = decode_tile(
                    weight_ptr, absmax_ptr, codebook_ptr, nested_absmax_ptr, nested_map_ptr,
                    nested_offset_ptr, expert, term, start, rows, columns, dtype,
                    BITS, BLOCK_SIZE, NESTED, ALIGNED, EVEN, BLOCK_K, BLOCK_N,
                )  # fmt: skip
                sum = dot(x, w, sum)
            else:
                w = decode_tile(
                    weight_ptr, absmax_ptr, codebook_ptr, nested_absmax_ptr, nested_map_ptr,
                    nested_offset_ptr, expert, start, term, rows, columns, dtype,
                    BITS, BLOCK_SIZE, NESTED, ALIGNED, EVEN, BLOCK_N, BLOCK_K,
                )  # fmt: skip
                sum = dot(w, tl.trans(x), sum)
    if not OVER_ROWS:
        sum = tl.trans(sum)
    place = out_ptr + (split.to(tl.int64) * inputs + m)[:, None] * outputs + o[None, :]
    mask = inside[:, None] & (o < outputs)[None, :]
    if ADD:
        sum += widen(tl.load(place, mask=mask, other=0))
    tl.store(place, narrow(sum, out_ptr.dtype.element_ty), mask=mask)


def gemm(
    x: Tensor,
    weight: Sequence[Tensor],
    layout: Sequence[int],
    out: Tensor,
    bias: Tensor | None = None,
    low: Tensor | None = None,
    factor: Tensor | None = None,
    scale: float = 1.0,
    offsets: Tensor | None = None,
    adapter: Tensor | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    over_rows: bool = False,
    has_base: bool = True,
    add: bool = False,
) -> None:
    """out = x W^T + bias + scale * low factor^T; over_rows: out = x W + scale * D'(low factor).

    D' drops by the mask of dropout that the forward had, over 1 - p. No part of x is read without
    the base, but its dtype is that of the products.

    Args:
        x: `[inputs, columns]`, over_rows `[inputs, rows]`; float32, bfloat16 or float16.
        weight, layout: as every op takes them.
        out: `[inputs, rows]`, over_rows `[inputs, columns]`; dense.
        bias: `[experts, rows]` or `[rows]`, any float dtype; not over_rows.
        low: float32 `[inputs, r]`.
        factor: lora_b, over_rows lora_a; any float dtype.
        offsets, adapter: as in `expert_linear`.
        dropout, seed: over_rows alone.
        add: to what `out` holds.
    """
    experts, rows, columns, block_size, bits = layout
    inputs, outputs = out.shape
    terms = rows if over_rows else columns
    if out.numel() == 0:
        return
    limit = dropout_limit(dropout, seed)
    rank = 0 if low is None or limit is None else low.shape[-1]
    aligned = block_size == 0 or columns % block_size == 0
    each = triton.cdiv(inputs, experts)  # rows of an expert, if all have as many
    tile = paths.tile("grad_x" if over_rows else "gemm", x.device, x.dtype, each)
    if not aligned:
        tile = tile._replace(**paths.STRADDLING)
    programs = row_tiles(inputs, experts, tile.rows), triton.cdiv(outputs, tile.outputs)
    splits = paths.splits(tile, programs[0] * programs[1], terms, x.device) if has_base else 1
    parts = out if splits == 1 else out.new_empty(splits, *out.shape, dtype=torch.float32)
    part = triton.cdiv(triton.cdiv(terms, splits), tile.inner) * tile.inner
    gemm_kernel[(*programs, splits)](
        x, *decode_arguments(weight), bias, low, factor, seed, offsets, adapter, parts, inputs,
        rows, columns, rank, experts, factor.numel() // (rank * outputs) if rank else 0, part,
        scale / (1 - dropout) if limit else scale, limit or 0,
        OVER_ROWS=over_rows,
        HAS_BASE=has_base,
        ADD=add and splits == 1,
        HAS_BIAS=bias is not None,
        HAS_LOW_RANK=rank > 0,
        DROPOUT=bool(limit),
        WHOLE_QUADS=outputs % 4 == 0,
        GROUPED=offsets is not None,
        MIXED=adapter is not None,
        BITS=bits,
        BLOCK_SIZE=block_size,
        NESTED=len(weight) > 3,
        ALIGNED=aligned,
        EVEN=terms % tile.inner == 0 and (not over_rows or columns % tile.outputs == 0),
        BLOCK_M=tile.rows,
        BLOCK_N=tile.outputs,
        BLOCK_K=tile.inner,
        BLOCK_R=min(max(triton.next_power_of_2(rank), 16), 64),
        BLOCK_E=triton.next_power_of_2(experts),
        num_warps=tile.warps,
        num_stages=tile.stages,
        # A nested scale is a product and a sum, rounded twice as everywhere else.
        enable_fp_fusion=False,
    )  # fmt: skip
    if splits > 1:
        add_up(parts, out, add)
