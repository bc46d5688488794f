"""What sparse refuses, before any op is called; so every device refuses alike."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from peftkern import _check
from peftkern.qlora.weight import QuantizedWeight
from peftkern.sparse.pattern import Pattern, matrix_shape

FORMS = ("value", "delta")


def pattern(found: Pattern, like: Tensor, shape: Sequence[int] | None = None) -> None:
    """Of the weight's shape, and on its device."""
    if not isinstance(found, Pattern):
        raise TypeError(f"pattern must be a Pattern, got {type(found).__name__}")
    if shape is not None and found.shape != tuple(shape):
        raise ValueError(f"pattern must have shape {list(shape)}, got {list(found.shape)}")
    if found.device != like.device:
        raise ValueError(f"pattern must be on {like.device}, got {found.device}")


def values(name: str, found: Tensor, of: Pattern) -> None:
    """A value for each entry, in any float dtype."""
    _check.dtype(name, found)
    _check.shape(name, found, [of.nnz])
    if found.device != of.device:
        raise ValueError(f"{name} must be on {of.device}, got {found.device}")


def sddmm(x: Tensor, grad: Tensor, found: Pattern, onto: Tensor | None) -> None:
    _check.dtype("x", x)
    _check.dtype("grad", grad, [x.dtype])
    _check.device("grad", grad, x)
    pattern(found, x)
    rows, columns = found.shape
    for name, tensor, size in (("x", x, columns), ("grad", grad, rows)):
        if tensor.dim() == 0 or tensor.shape[-1] != size:
            raise ValueError(f"{name} must have shape [..., {size}], got {list(tensor.shape)}")
    if grad.shape[:-1] != x.shape[:-1]:
        raise ValueError(f"grad must have shape [{_sizes(x)}{rows}], got {list(grad.shape)}")
    if onto is not None:
        _check.dtype("onto", onto, [torch.promote_types(x.dtype, torch.float32)])
        _check.shape("onto", onto, [found.nnz])
        _check.dense("onto", onto)
        _check.device("onto", onto, x)


def gather(weight: Tensor, found: Pattern) -> None:
    _check.dtype("weight", weight)
    pattern(found, weight, matrix_shape(weight.shape))


def scatter(weight: Tensor, found_values: Tensor, found: Pattern) -> None:
    gather(weight, found)
    values("values", found_values, found)


def linear(
    x: Tensor, weight: Tensor | QuantizedWeight, found_values: Tensor, found: Pattern,
    bias: Tensor | None, form: str, scale: float,
) -> None:  # fmt: skip
    _check.dtype("x", x)
    _form(form, scale, weight)
    if len(weight.shape) != 2:
        raise ValueError(f"weight must have shape [out, in], got {list(weight.shape)}")
    rows, columns = weight.shape
    if x.dim() == 0 or x.shape[-1] != columns:
        raise ValueError(f"x must have shape [..., {columns}], got {list(x.shape)}")
    _rest(x, weight, found_values, found, bias)


def conv2d(
    x: Tensor, weight: Tensor, found_values: Tensor, found: Pattern, bias: Tensor | None,
    window: Sequence[int], form: str, scale: float,
) -> None:  # fmt: skip
    _check.dtype("x", x)
    _form(form, scale, weight)
    if isinstance(weight, QuantizedWeight):
        raise TypeError("weight must be a Tensor, got a QuantizedWeight, which has two axes")
    if weight.dim() != 4:
        raise ValueError(f"weight must have shape [out, in, height, width], got {[*weight.shape]}")
    *_, sh, sw, ph, pw, dh, dw, groups = window
    if min(sh, sw, dh, dw, groups) < 1 or min(ph, pw) < 0:
        raise ValueError(
            "stride, dilation and groups must be at least 1 and padding 0, "
            f"got {[sh, sw]}, {[dh, dw]}, {groups} and {[ph, pw]}"
        )
    channels = weight.shape[1] * groups
    if x.dim() != 4 or x.shape[1] != channels or weight.shape[0] % groups:
        raise ValueError(
            f"x must have shape [batch, {channels}, height, width] and the weight's "
            f"{weight.shape[0]} rows a multiple of {groups} groups, got {list(x.shape)}"
        )
    _rest(x, weight, found_values, found, bias)


def _form(form: str, scale: float, weight: Tensor | QuantizedWeight) -> None:
    if form not in FORMS:
        raise ValueError(f"form must be value or delta, got {form!r}")
    if isinstance(scale, Tensor):
        raise TypeError("scale must be a number, got a Tensor, for which there is no gradient")
    if form == "value" and scale != 1:
        raise ValueError(f"scale must be 1 where the weight holds the values, got {scale}")
    if isinstance(weight, QuantizedWeight):
        if form == "value":
            raise ValueError("form must be delta on a QuantizedWeight, which holds no values")
        return
    if not isinstance(weight, Tensor):
        name = type(weight).__name__
        raise TypeError(f"weight must be a Tensor or a QuantizedWeight, got {name}")
    _check.dtype("weight", weight)
    if weight.requires_grad:
        raise ValueError("weight must be frozen, got one that asks for the dense gradient")


def _rest(
    x: Tensor, weight: Tensor | QuantizedWeight, found_values: Tensor, found: Pattern,
    bias: Tensor | None,
) -> None:  # fmt: skip
    if weight.device != x.device:
        raise ValueError(f"weight must be on {x.device}, got {weight.device}")
    pattern(found, x, matrix_shape(weight.shape))
    values("values", found_values, found)
    if bias is not None:
        _check.parameter("bias", bias, (weight.shape[0],), x)


def _sizes(x: Tensor) -> str:
    return "".join(f"{size}, " for size in x.shape[:-1])
