"""What qlora refuses, before any op is called; so every device refuses alike."""

from __future__ import annotations

import torch
from torch import Tensor

from peftkern import _check
from peftkern.qlora.weight import QuantizedWeight


def linear(
    x: Tensor, weight: Tensor | QuantizedWeight, dim: int, bias: Tensor | None,
    lora_a: Tensor | None, lora_b: Tensor | None, dropout: float, seed: Tensor | int | None,
) -> None:  # fmt: skip
    _check.dtype("x", x)
    if not isinstance(weight, QuantizedWeight):
        if not isinstance(weight, Tensor):
            name = type(weight).__name__
            raise TypeError(f"weight must be a Tensor or a QuantizedWeight, got {name}")
        _check.dtype("weight", weight)
        _check.dense("weight", weight)
    shape = weight.shape
    if len(shape) != dim:
        wanted = "[out, in]; expert_linear takes experts" if dim == 2 else "[experts, out, in]"
        raise ValueError(f"weight must have shape {wanted}, got {list(shape)}")
    rows, columns = shape[-2:]
    if x.dim() == 0 or x.shape[-1] != columns:
        raise ValueError(f"x must have shape [..., {columns}], got {list(x.shape)}")
    if weight.device != x.device:
        raise ValueError(f"weight must be on {x.device}, got {weight.device}")
    if bias is not None:
        _check.parameter("bias", bias, shape[:-1], x)
    if lora_a is not None and lora_b is not None:
        leading = lora_a.shape[: dim - 2]
        rank = lora_a.shape[-2] if lora_a.dim() == dim else 1
        _check.parameter("lora_a", lora_a, (*leading, rank, columns), x)
        if rank < 1:
            raise ValueError(f"lora_a must have a rank of at least 1, got {rank}")
        _check.parameter("lora_b", lora_b, (*leading, rows, rank), x)
    elif lora_a is not None or lora_b is not None:
        given = "lora_a" if lora_b is None else "lora_b"
        raise ValueError(f"lora_a and lora_b must come together, got only {given}")
    _check.dropout(dropout, seed, x)


def groups(
    x: Tensor, experts: int, offsets: Tensor, lora_a: Tensor | None, adapter: Tensor | None
) -> None:
    rows = x.shape[0]
    _check.dtype("offsets", offsets, [torch.int64])
    _check.shape("offsets", offsets, [experts + 1])
    _check.dense("offsets", offsets)
    _check.device("offsets", offsets, x)
    if adapter is not None:
        _check.dtype("adapter", adapter, [torch.int32])
        _check.shape("adapter", adapter, [rows])
        _check.dense("adapter", adapter)
        _check.device("adapter", adapter, x)
    elif lora_a is not None and lora_a.shape[0] != experts:
        raise ValueError(
            f"lora_a must have one adapter for each of {experts} experts, got {lora_a.shape[0]}"
        )
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return
    bounds = offsets.tolist()
    if bounds[0] != 0 or bounds[-1] != rows or sorted(bounds) != bounds:
        raise ValueError(f"offsets must rise from 0 to {rows}, got {bounds}")
    if adapter is not None and lora_a is not None and rows:
        low, high = (int(v) for v in adapter.aminmax())
        if low < -1 or high >= lora_a.shape[0]:
            raise IndexError(f"adapter must lie in [-1, {lora_a.shape[0]}), got {low} to {high}")
