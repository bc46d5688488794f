"""Between a weight and its codes: the ops quantize and dequantize, and what users call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peftkern import _check, _native
from peftkern.qlora import fallback, reference
from peftkern.qlora.format import BLOCK_SIZES, Format, find_format
from peftkern.qlora.weight import QuantizedWeight


def _fake_quantize(
    weight: Tensor, tables: Any, block_size: int, bits: int
) -> tuple[Tensor, Tensor]:
    if bits == 8:
        scales = weight.new_empty(weight.shape[:-1], dtype=torch.float32)
        return weight.new_empty(weight.shape, dtype=torch.int8), scales
    count = weight.numel()
    packed = weight.new_empty((count + 1) // 2, 1, dtype=torch.uint8)
    blocks = (count + block_size - 1) // block_size
    return packed, weight.new_empty(blocks, dtype=torch.float32)


_quantize_op = _native.define(
    "qlora_quantize(Tensor weight, Tensor[] tables, int block_size, int bits) -> (Tensor, Tensor)",
    _fake_quantize,
    fallback.quantize,
)
_dequantize_op = _native.define(
    "qlora_dequantize(Tensor[] weight, int[] layout, Tensor(a!) out) -> ()",
    lambda weight, layout, out: None,
    fallback.dequantize,
)
_native.register_triton("qlora", "dequantize")


def quantize(
    weight: Tensor,
    format: str | Format = "nf4",
    block_size: int | None = None,
    nested: bool = False,
) -> QuantizedWeight:
    """Each block's, or for int8 each row's, values over its largest magnitude, as the nearest code.

    Dettmers et al., QLoRA (2023) and LLM.int8() (2022); byte for byte what bitsandbytes stores. For
    FP4 that is the rule of its CUDA kernel, since its CPU rounds ties below zero the other way; for
    int8 it holds where float16 has the weight's values, to which bitsandbytes rounds first, and
    ours does not. A tie takes NF4's lower code, FP4's smaller magnitude, int8's even code. A block
    that holds a NaN decodes to NaN; one whose largest magnitude is below about 3e-39, for int8
    4e-37, to 0.

    Args:
        weight: float, any shape; usually `[out, in]` or `[experts, out, in]`.
        format: a name in `qlora.formats`, or a `Format`.
        block_size: a power of two from 16 to 4096: elements of the flat weight that share a scale;
            64 where None is given. int8, whose rows have one each, takes None alone.
        nested: quantise the scales too, to 8 bits in blocks of 256; not for int8.

    Returns:
        A `QuantizedWeight` on the weight's device. Not differentiable.

    Raises:
        TypeError: `weight` is not float32, bfloat16, float16 or float64.
        ValueError: an unknown format, a block size out of range, or one, or nested scales, with a
            format that has none.
    """
    _check.dtype("weight", weight)
    found = find_format(format)
    flat = weight.detach().contiguous()
    if not found.in_blocks:
        return _quantize_rows(flat, found, block_size, nested)
    if block_size is None:
        block_size = 64
    if block_size not in BLOCK_SIZES:
        raise ValueError(f"block_size must be one of {BLOCK_SIZES}, got {block_size}")
    codebook = torch.tensor(found.codebook, dtype=torch.float32, device=weight.device)
    packed, absmax = _quantize_op(flat, found.tables(weight.device), block_size, found.bits)
    statistics: dict[str, Tensor] = {}
    if nested:
        nested_map = reference.dynamic_map().to(weight.device)
        absmax, nested_absmax, offset = reference.nest(absmax, nested_map)
        statistics = {
            "nested_absmax": nested_absmax, "nested_map": nested_map, "nested_offset": offset,
        }  # fmt: skip
    return QuantizedWeight(
        packed, absmax, codebook, weight.shape, weight.dtype, found, block_size, **statistics
    )


def _quantize_rows(
    weight: Tensor, form: Format, block_size: int | None, nested: bool
) -> QuantizedWeight:
    if block_size is not None:
        raise ValueError(f"block_size must be None for {form.name}, got {block_size}")
    if nested:
        raise ValueError(f"nested must be False for {form.name}, got {nested}")
    if weight.dim() == 0:
        raise ValueError(f"weight must have shape [..., in] for {form.name}, got []")
    codes, absmax = _quantize_op(weight, [], 0, form.bits)
    return QuantizedWeight(codes, absmax, None, weight.shape, weight.dtype, form, None)


def dequantize(
    weight: QuantizedWeight, dtype: torch.dtype | None = None, out: Tensor | None = None
) -> Tensor:
    """W[i] = codebook[code[i]] * absmax[i // block_size], in float32 and rounded once.

    For int8, W[n, k] = code[n, k] * (absmax[n] / 127), where the scale in brackets is rounded too.

    Args:
        weight: any shape.
        dtype: float32, bfloat16, float16 or float64; the dtype it had where none is given.
        out: written and returned where given; contiguous, of the weight's shape.

    Returns:
        `weight.shape`, in `dtype` or `out`'s dtype. Not differentiable.

    Raises:
        TypeError: not a QuantizedWeight, or a dtype that is not float.
        ValueError: `out` of another shape, device or layout.
    """
    if not isinstance(weight, QuantizedWeight):
        raise TypeError(f"weight must be a QuantizedWeight, got {type(weight).__name__}")
    if out is None:
        out = torch.empty(weight.shape, dtype=dtype or weight.dtype, device=weight.device)
    _check.dtype("out", out)
    _check.shape("out", out, weight.shape)
    _check.dense("out", out)
    _check.device("out", out, weight.packed)
    _dequantize_op(weight.buffers, weight.layout, out)
    return out
