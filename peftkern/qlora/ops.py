"""qlora's index: schema, fake and gradient of its ops, and the functions that users call; quantize
and dequantize stand in codes.py.

A weight reaches an op as its tensors (`QuantizedWeight.buffers`, or the one dense tensor) and its
layout `[experts, rows, columns, block size, bits]` (block size 0: a scale for each row; bits 0:
dense). So a new format needs no new schema.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from peftkern import _check, _inputs, _native
from peftkern.qlora import check, fallback
from peftkern.qlora.weight import QuantizedWeight


def _fake_linear(
    x: Tensor, weight: Any, layout: Any, bias: Any, lora_a: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    rank = 0 if lora_a is None else lora_a.shape[-2]
    rows = math.prod(x.shape[:-1])
    return x.new_empty(*x.shape[:-1], layout[1]), x.new_empty(rows, rank, dtype=dtype)


def _fake_linear_bwd(
    grad: Tensor, x: Any, down: Tensor, weight: list[Tensor], layout: Any, bias: Any,
    lora_a: Any, lora_b: Any, scale: Any, dropout: Any, seed: Any, offsets: Any, adapter: Any,
    needs: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    inputs = (grad.new_empty(*grad.shape[:-1], layout[2]), weight[0], bias, lora_a, lora_b)
    return [torch.empty_like(t) for t, need in zip(inputs, needs, strict=True) if need]


_linear_op = _native.define(
    "qlora_linear(Tensor x, Tensor[] weight, int[] layout, Tensor? bias, Tensor? lora_a, "
    "Tensor? lora_b, float scale, float dropout, Tensor? seed, Tensor? offsets, "
    "Tensor? adapter) -> (Tensor, Tensor)",
    _fake_linear,
    fallback.linear,
)
_native.register_triton("qlora", "linear")
_linear_bwd_op = _native.define(
    "qlora_linear_bwd(Tensor grad, Tensor? x, Tensor down, Tensor[] weight, int[] layout, "
    "Tensor? bias, Tensor? lora_a, Tensor? lora_b, float scale, float dropout, Tensor? seed, "
    "Tensor? offsets, Tensor? adapter, bool[] needs) -> Tensor[]",
    _fake_linear_bwd,
    fallback.linear_bwd,
)
_native.register_triton("qlora", "linear_bwd")
# What linear's launcher calls on a GPU for few rows (at most 16) of one expert: `down` [rows, r] is
# D(x) A^T, in float32 and without the scale; bias, lora_b and x may differ in dtype.
_native.define(
    "qlora_decode(Tensor x, Tensor[] weight, int[] layout, Tensor? bias, Tensor? down, "
    "Tensor? lora_b, float scale) -> Tensor",
    lambda x, weight, layout, *rest: x.new_empty(*x.shape[:-1], layout[1]),
    fallback.decode,
    devices=("cuda",),
)


_Fixed = tuple[list[Tensor], list[int], float, float, Tensor | None, Tensor | None, Tensor | None]


class _Linear(torch.autograd.Function):
    """Keeps references and down = D(x) A^T, and x where a gradient needs it: no mask, no D(x), no
    dense weight.

    What asks for no gradient comes in one tuple, since each argument of a Function costs time.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dense: Tensor | None, bias: Tensor | None, lora_a: Tensor | None,
        lora_b: Tensor | None, fixed: _Fixed,
    ) -> Tensor:  # fmt: skip
        buffers, layout, *rest = fixed
        weight = [dense] if dense is not None else buffers
        y: Tensor
        y, down = _linear_op(x, weight, layout, bias, lora_a, lora_b, *rest)
        _, dense_trains, bias_trains, a_trains, *_ = ctx.needs_input_grad
        x_kept = x if dense_trains or a_trains else None
        ctx.save_for_backward(x_kept, down, dense, bias if bias_trains else None, lora_a, lora_b)
        ctx.fixed = fixed
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, down, dense, bias, lora_a, lora_b = ctx.saved_tensors
        buffers, layout, *rest = ctx.fixed
        weight = [dense] if dense is not None else buffers
        needs = ctx.needs_input_grad[:5]
        others = (x, down, weight, layout, bias, lora_a, lora_b, *rest, needs)
        grads = iter(_linear_bwd_op(grad.contiguous(), *others))
        return *[next(grads) if need else None for need in needs], None


def _apply(
    x: Tensor, weight: Tensor | QuantizedWeight, bias: Tensor | None, lora_a: Tensor | None,
    lora_b: Tensor | None, scale: float, dropout: float, seed: Tensor | int | None,
    offsets: Tensor | None = None, adapter: Tensor | None = None,
) -> Tensor:  # fmt: skip
    x = _inputs.autocast(x)
    if dropout and lora_a is not None:
        seed = _inputs.seed(seed, x.device)
    else:
        dropout, seed = 0.0, None
    x = x.contiguous()
    tensors, layout = operand(weight)
    rest = (scale, dropout, seed, offsets, adapter)
    if torch.is_grad_enabled():
        dense, buffers = (None, tensors) if isinstance(weight, QuantizedWeight) else (weight, [])
        fixed = (buffers, layout, *rest)
        return _Linear.apply(x, dense, bias, lora_a, lora_b, fixed)  # type: ignore[no-any-return, no-untyped-call]
    return _linear_op(x, tensors, layout, bias, lora_a, lora_b, *rest)[0]  # type: ignore[no-any-return]


def operand(weight: Tensor | QuantizedWeight) -> tuple[list[Tensor], list[int]]:
    """A weight as every op takes it: its tensors and its layout."""
    if isinstance(weight, QuantizedWeight):
        return weight.buffers, weight.layout
    return [weight], [*(1,) * (3 - weight.dim()), *weight.shape, 0, 0]


def linear(
    x: Tensor,
    weight: Tensor | QuantizedWeight,
    bias: Tensor | None = None,
    lora_a: Tensor | None = None,
    lora_b: Tensor | None = None,
    scale: float = 1.0,
    dropout: float = 0.0,
    seed: Tensor | int | None = None,
) -> Tensor:
    """y = x W^T + bias + scale * (D(x) A^T) B^T, and W stays quantised.

    Hu et al., LoRA (2021); Dettmers et al., QLoRA (2023). Sums run in float32 (float64 for
    float64); of several rows in bfloat16, on a CPU that multiplies in it, W is rounded to bfloat16,
    and of many so is what stands before the base's product. D drops elements of x in the low-rank
    term alone; which ones depends on the seed and the element's place only, so every device and
    every tiling drops the same. Under autocast x is cast as `torch.nn.functional.linear` casts it.

    Args:
        x: `[..., in]`, float32, bfloat16, float16 or float64.
        weight: `[out, in]`, a QuantizedWeight or a dense float tensor.
        bias: `[out]`, any float dtype.
        lora_a: `[r, in]`, any float dtype; with `lora_b` or not at all.
        lora_b: `[out, r]`, any float dtype.
        scale: of the low-rank term; lora_alpha / r, or lora_alpha / sqrt(r) for rsLoRA.
        dropout: in [0, 1], the share of x that the low-rank term does not see.
        seed: int64 `[1]` on x's device, or an int; drawn from torch's generator where None.

    Returns:
        `[..., out]` in x's dtype. Differentiable once, in x, bias, lora_a, lora_b and a dense
        weight.

    Raises:
        TypeError: a dtype that is not float, a seed that is not int64.
        ValueError: a shape, device or range that does not fit; a weight of three dimensions.
    """
    check.linear(x, weight, 2, bias, lora_a, lora_b, dropout, seed)
    return _apply(x, weight, bias, lora_a, lora_b, scale, dropout, seed)


def expert_linear(
    x: Tensor,
    weight: Tensor | QuantizedWeight,
    offsets: Tensor,
    bias: Tensor | None = None,
    lora_a: Tensor | None = None,
    lora_b: Tensor | None = None,
    scale: float = 1.0,
    dropout: float = 0.0,
    seed: Tensor | int | None = None,
    adapter: Tensor | None = None,
) -> Tensor:
    """y[m] = x[m] W[e]^T + bias[e] + scale * (D(x[m]) A[g]^T) B[g]^T, e the expert of row m.

    As `linear`, for fused experts and for rows that belong to different adapters.

    Args:
        x: `[rows, in]`, rows sorted by expert.
        weight: `[experts, out, in]`, a QuantizedWeight or a dense float tensor.
        offsets: int64 `[experts + 1]`; rows offsets[e] to offsets[e + 1] belong to expert e. From
            0 to rows, never falling; its values are checked on the CPU only.
        bias: `[experts, out]`.
        lora_a: `[adapters, r, in]`; one adapter for each expert where `adapter` is None.
        lora_b: `[adapters, out, r]`.
        scale, dropout, seed: as in `linear`.
        adapter: int32 `[rows]`, the adapter g of each row, -1 for none; values checked on the CPU.

    Returns:
        `[rows, out]` in x's dtype, differentiable as in `linear`.

    Raises:
        TypeError, ValueError: as `linear`.
        IndexError: an adapter that is not there.
    """
    _check.shape("x", x, ["rows", "in"])
    check.linear(x, weight, 3, bias, lora_a, lora_b, dropout, seed)
    check.groups(x, weight.shape[0], offsets, lora_a, adapter)
    return _apply(x, weight, bias, lora_a, lora_b, scale, dropout, seed, offsets, adapter)
