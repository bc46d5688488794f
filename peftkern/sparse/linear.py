"""Products with a weight some of whose entries train, in two forms.

"value": the weight holds the values already, and its product is the library's. "delta": the weight
stays what it is, and S = scale * values is multiplied beside it; a QuantizedWeight has no other
form. In both, the gradient of the values is `sddmm`, and no dense one exists.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from peftkern import _inputs
from peftkern.qlora.weight import QuantizedWeight
from peftkern.sparse import check
from peftkern.sparse.ops import (
    conv2d_sddmm_op,
    gather_op,
    matmul_op,
    matmul_t_op,
    scatter_op,
    sddmm_op,
)
from peftkern.sparse.pattern import Pattern

# The tensors and the layout of a QuantizedWeight, or None; those of the pattern; form and scale.
_Fixed = tuple[tuple[list[Tensor], list[int]] | None, list[Tensor], list[int], bool, float]


class _Linear(torch.autograd.Function):
    """Keeps x where values train, the weight by reference, and values where they stand beside it.

    Kept by autograd, the weight makes a backward fail that comes behind a step which wrote it.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, values: Tensor, bias: Tensor | None, dense: Tensor | None,
        fixed: _Fixed,
    ) -> Tensor:  # fmt: skip
        x_trains, values_train, bias_trains, *_ = ctx.needs_input_grad
        kept = values if x_trains and fixed[3] else None
        ctx.save_for_backward(x if values_train else None, kept, dense if x_trains else None)
        ctx.fixed, ctx.values_dtype = fixed, values.dtype
        ctx.bias_dtype = bias.dtype if bias is not None and bias_trains else None
        return _forward(x, values, bias, dense, fixed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, values, dense = ctx.saved_tensors
        quantized, pattern, layout, is_delta, scale = ctx.fixed
        grad_x = grad_values = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = _grad_x(grad, dense, quantized)
            if is_delta:
                wide = values.to(torch.promote_types(grad.dtype, torch.float32))
                whole = grad.contiguous()
                grad_x = matmul_t_op(whole, wide, pattern, layout, grad_x.contiguous(), scale)
        if ctx.needs_input_grad[1]:
            flat = (t.flatten(0, -2) if t.dim() > 1 else t[None] for t in (x, grad))
            grad_values = sddmm_op(*flat, pattern, layout, scale).to(ctx.values_dtype)
        if ctx.needs_input_grad[2]:
            sums = torch.promote_types(grad.dtype, torch.float32)
            grad_bias = (
                (grad.flatten(0, -2) if grad.dim() > 1 else grad[None])
                .sum(0, dtype=sums)
                .to(ctx.bias_dtype)
            )
        return grad_x, grad_values, grad_bias, None, None


def _forward(
    x: Tensor, values: Tensor, bias: Tensor | None, dense: Tensor | None, fixed: _Fixed
) -> Tensor:
    quantized, pattern, layout, is_delta, scale = fixed
    y: Tensor
    if dense is not None:
        own_bias = None if bias is None else bias.to(x.dtype)
        y = torch.nn.functional.linear(x, dense.to(x.dtype), own_bias)
    elif quantized is not None:
        rest = (None, None, 1.0, 0.0, None, None, None)
        y = torch.ops.peftkern.qlora_linear(x.contiguous(), *quantized, bias, *rest)[0]
    if not is_delta:
        _seen(x, layout)
        return y
    wide = values.to(torch.promote_types(x.dtype, torch.float32))
    return matmul_op(x.contiguous(), wide, pattern, layout, y, scale)  # type: ignore[no-any-return]


def _seen(x: Tensor, sizes: list[int]) -> None:
    """Sizes that a backward alone takes are none that torch.compile hands to it, if they are free:
    a forward has to use them."""
    if torch.compiler.is_compiling():
        for size in sizes:
            x.new_empty(0, size)


def _grad_x(
    grad: Tensor, dense: Tensor | None, quantized: tuple[list[Tensor], list[int]] | None
) -> Tensor:
    if dense is not None:
        with exact(grad.device):
            return grad @ dense.to(grad.dtype)
    assert quantized is not None  # one of the two is what the weight was
    rows = grad.numel() // max(1, grad.shape[-1])
    none = grad.new_empty(rows, 0, dtype=torch.promote_types(grad.dtype, torch.float32))
    rest = (None, None, None, 1.0, 0.0, None, None, None, [True, False, False, False, False])
    grads = torch.ops.peftkern.qlora_linear_bwd(grad.contiguous(), None, none, *quantized, *rest)
    return grads[0]  # type: ignore[no-any-return]


def exact(device: torch.device) -> AbstractContextManager[Any]:
    """A backward that is called under autocast multiplies in the dtype of its forward."""
    if not torch._C._is_any_autocast_enabled():
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def linear(
    x: Tensor,
    weight: Tensor | QuantizedWeight,
    values: Tensor,
    pattern: Pattern,
    bias: Tensor | None = None,
    form: str = "value",
    scale: float = 1.0,
) -> Tensor:
    """y = x W'^T + bias; W' = W, which holds the values ("value"), or W + scale * S ("delta").

    The gradient of the values is `sddmm`: no dense gradient of the weight exists. Under autocast x
    is cast as `torch.nn.functional.linear` casts it; values and their gradient are not.

    Args:
        x: `[..., in]`, float32, bfloat16, float16 or float64.
        weight: `[out, in]`, frozen: a dense float tensor, or a QuantizedWeight, by "delta".
        values: `[nnz]`, any float dtype. In the form "value" they are not read: whoever moves them
            writes them into the weight (`scatter_`) before the next call.
        pattern: `[out, in]`, the places of the values.
        bias: `[out]`, any float dtype.
        form: "value" or "delta".
        scale: of S; in the form "value" there is none.

    Returns:
        `[..., out]` in x's dtype. Differentiable once, in x, values and bias.

    Raises:
        TypeError: a dtype that is not float.
        ValueError: a shape or device that does not fit, a weight that asks for a gradient, a form
            that there is not.
    """
    check.linear(x, weight, values, pattern, bias, form, scale)
    x = _inputs.autocast(x)
    quantized = (weight.buffers, weight.layout) if isinstance(weight, QuantizedWeight) else None
    dense = None if isinstance(weight, QuantizedWeight) else weight
    fixed: _Fixed = (quantized, *pattern.operand(), form == "delta", scale)
    if torch.is_grad_enabled():
        return _Linear.apply(x, values, bias, dense, fixed)  # type: ignore[no-any-return, no-untyped-call]
    return _forward(x, values, bias, dense, fixed)


# The pattern's tensors and layout, the window, form and scale.
_ConvFixed = tuple[list[Tensor], list[int], list[int], bool, float]


class _Conv2d(torch.autograd.Function):
    """Keeps what `_Linear` keeps. A delta is added to a copy of the weight, made anew for the
    backward: convolutions of the library take whole weights."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, values: Tensor, bias: Tensor | None, weight: Tensor,
        fixed: _ConvFixed,
    ) -> Tensor:  # fmt: skip
        x_trains, values_train, bias_trains, *_ = ctx.needs_input_grad
        kept = values if x_trains and fixed[3] else None
        ctx.save_for_backward(x if values_train or x_trains else None, kept, weight)
        ctx.fixed, ctx.values_dtype = fixed, values.dtype
        ctx.bias_dtype = bias.dtype if bias is not None and bias_trains else None
        return _convolved(x, values, bias, weight, fixed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, values, weight = ctx.saved_tensors
        pattern, layout, window, _, scale = ctx.fixed
        *_, sh, sw, ph, pw, dh, dw, groups = window
        x_trains, values_train, bias_trains, *_ = ctx.needs_input_grad
        grad_x = grad_values = grad_bias = None
        if x_trains:
            whole = _whole(weight, values, ctx.fixed).to(grad.dtype)
            rest = (None, [sh, sw], [ph, pw], [dh, dw], False, [0, 0], groups, [True, False, False])
            grad_x = torch.ops.aten.convolution_backward(grad, x, whole, *rest)[0]
        if values_train:
            grad_values = conv2d_sddmm_op(x, grad, pattern, layout, window, scale)
            grad_values = grad_values.to(ctx.values_dtype)
        if bias_trains:
            sums = torch.promote_types(grad.dtype, torch.float32)
            grad_bias = grad.sum((0, 2, 3), dtype=sums).to(ctx.bias_dtype)
        return grad_x, grad_values, grad_bias, None, None


def _convolved(
    x: Tensor, values: Tensor, bias: Tensor | None, weight: Tensor, fixed: _ConvFixed
) -> Tensor:
    *_, sh, sw, ph, pw, dh, dw, groups = fixed[2]
    _seen(x, [*fixed[1], *fixed[2]])
    whole = _whole(weight, values, fixed).to(x.dtype)
    own_bias = None if bias is None else bias.to(x.dtype)
    return torch.nn.functional.conv2d(x, whole, own_bias, (sh, sw), (ph, pw), (dh, dw), groups)


def _whole(weight: Tensor, values: Tensor | None, fixed: _ConvFixed) -> Tensor:
    pattern, layout, _, is_delta, scale = fixed
    if not is_delta or values is None:
        return weight
    merged = weight.contiguous().clone()
    moved = gather_op(merged, pattern, layout)
    moved = moved + scale * values.detach().to(moved.dtype)
    scatter_op(merged, moved, pattern, layout)
    return merged


def conv2d(
    x: Tensor,
    weight: Tensor,
    values: Tensor,
    pattern: Pattern,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    form: str = "value",
    scale: float = 1.0,
) -> Tensor:
    """`torch.nn.functional.conv2d` with a weight as in `linear`.

    Args:
        x: `[batch, channels, height, width]`, as in `linear`, dense or channels last.
        weight: `[out, channels / groups, height, width]`, frozen and float.
        values: `[nnz]`, as in `linear`.
        pattern: `[out, channels / groups * height * width]`, the places of the values.
        bias: `[out]`, any float dtype.
        stride, padding, dilation, groups: as torch has them; padding in numbers.
        form, scale: as in `linear`; a "delta" is added to a copy of the weight, for each call.

    Returns:
        `[batch, out, ...]` in x's dtype. Differentiable once, in x, values and bias.

    Raises:
        TypeError, ValueError: as `linear`.
    """
    kernel = tuple(weight.shape[2:]) if isinstance(weight, Tensor) else ()
    steps = (_pair("stride", stride), _pair("padding", padding), _pair("dilation", dilation))
    window = [*kernel, *(size for pair in steps for size in pair), groups]
    check.conv2d(x, weight, values, pattern, bias, window, form, scale)
    x = _inputs.autocast(x)
    fixed: _ConvFixed = (*pattern.operand(), window, form == "delta", scale)
    if torch.is_grad_enabled():
        return _Conv2d.apply(x, values, bias, weight, fixed)  # type: ignore[no-any-return, no-untyped-call]
    return _convolved(x, values, bias, weight, fixed)


def _pair(name: str, value: int | Sequence[int]) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    if isinstance(value, str) or len(value) != 2:
        raise ValueError(f"{name} must be a number or two of them, got {value!r}")
    return value[0], value[1]
