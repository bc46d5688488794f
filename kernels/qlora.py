"""qlora's kernels in Triton. Launchers have the ops' own signatures."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftkern.kernels.qlora_backward import linear_bwd as linear_bwd
from peftkern.kernels.qlora_forward import lora_down
from peftkern.kernels.qlora_product import product
from peftkern.kernels.qlora_siblings import siblings as siblings
from peftkern.kernels.qlora_siblings import siblings_bwd as siblings_bwd
from peftkern.kernels.qlora_tiles import decode_scales, narrow
from peftkern.qlora import fallback

# Elements a program decodes. One byte in, up to 16 out: any size that fills a GPU will do.
BLOCK_ELEMENTS = 2048


@triton.jit
def _dequantize_kernel(
    packed_ptr,  # [ceil(count / 2)] uint8, the first code of a pair in the high bits
    absmax_ptr,  # [ceil(count / block_size)] float32, or uint8 codes where the scales are nested
    codebook_ptr,  # [16] float32
    nested_absmax_ptr,  # [ceil(blocks / 256)] float32
    nested_map_ptr,  # [256] float32
    nested_offset_ptr,  # [] float32
    out_ptr,  # [count]
    count,
    block_size,
    NESTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = element < count
    byte = tl.load(packed_ptr + element // 2, mask=mask, other=0).to(tl.int32)
    code = tl.where(element % 2 == 0, byte >> 4, byte & 15)
    block = element // block_size
    scale = decode_scales(
        block, mask, absmax_ptr, nested_absmax_ptr, nested_map_ptr, nested_offset_ptr, NESTED, False
    )
    value = tl.load(codebook_ptr + code) * scale
    tl.store(out_ptr + element, narrow(value, out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _dequantize_rows_kernel(
    codes_ptr,  # [rows, columns] int8
    absmax_ptr,  # [rows] float32
    out_ptr,  # [rows, columns]
    count,
    columns,
    BLOCK: tl.constexpr,
):
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = element < count
    code = tl.load(codes_ptr + element, mask=mask, other=0).to(tl.float32)
    # A division that rounds to nearest, as everywhere else; `/` is off by an ulp on a GPU.
    scale = tl.div_rn(tl.load(absmax_ptr + element // columns, mask=mask, other=0), 127.0)
    tl.store(out_ptr + element, narrow(code * scale, out_ptr.dtype.element_ty), mask=mask)


def dequantize(weight: Sequence[Tensor], layout: Sequence[int], out: Tensor) -> None:
    count = out.numel()
    if count == 0:
        return
    grid = (triton.cdiv(count, BLOCK_ELEMENTS),)
    _, _, columns, block_size, bits = layout
    if bits == 8:
        codes, absmax = weight
        _dequantize_rows_kernel[grid](codes, absmax, out, count, columns, BLOCK=BLOCK_ELEMENTS)
        return
    packed, absmax, codebook, *nested = weight
    _dequantize_kernel[grid](
        packed,
        absmax,
        codebook,
        *(nested or [None] * 3),
        out,
        count,
        block_size,
        NESTED=bool(nested),
        BLOCK=BLOCK_ELEMENTS,
        # A nested scale is a product and a sum, rounded twice as everywhere else.
        enable_fp_fusion=False,
    )


def linear(
    x: Tensor, weight: Sequence[Tensor], layout: Sequence[int], bias: Tensor | None,
    lora_a: Tensor | None, lora_b: Tensor | None, scale: float, dropout: float,
    seed: Tensor | None, offsets: Tensor | None, adapter: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if x.dtype == torch.float64:
        return fallback.linear(
            x, weight, layout, bias, lora_a, lora_b, scale, dropout, seed, offsets, adapter
        )
    flat = x.flatten(0, -2) if x.dim() > 1 else x[None]
    if lora_a is None:
        low, down = None, flat.new_empty(len(flat), 0, dtype=torch.float32)
    else:
        low = down = lora_down(flat, lora_a, dropout, seed, offsets, adapter)
    y = product(flat, weight, layout, bias, low, lora_b, scale, offsets, adapter)
    return y.view(*x.shape[:-1], layout[1]), down
