"""What onebit refuses, before any op is called; so every device refuses alike."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from peftkern import _check
from peftkern.bottleneck import check as bottleneck
from peftkern.bottleneck.reference import ACTIVATIONS
from peftkern.onebit.reference import BITS
from peftkern.onebit.weight import OneBitWeight


def bits(value: int) -> None:
    if value not in BITS:
        raise ValueError(f"bits must be 1, 2 or 4, got {value}")


def latent(name: str, weight: Tensor) -> None:
    """A matrix whose mean and std are to be taken."""
    if (
        isinstance(weight, Tensor) and weight.dtype in _check.FLOATS and weight.dim() == 2
        and weight.is_contiguous() and weight.numel()
    ):  # fmt: skip
        return
    if not isinstance(weight, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(weight).__name__}")
    _check.dtype(name, weight)
    _check.shape(name, weight, ["out", "in"])
    _check.dense(name, weight)
    if weight.numel() == 0:
        raise ValueError(f"{name} must have an element to take a mean of, got {list(weight.shape)}")


def statistics(found: Tensor | None, weights: Sequence[Tensor]) -> None:
    """Those of several weights, in their order; a row each."""
    first = weights[0]
    if any((w.dtype == torch.float64) != (first.dtype == torch.float64) for w in weights):
        dtypes = ", ".join(str(w.dtype) for w in weights)
        raise TypeError(f"weights must all be float64 or none of them, got {dtypes}")
    if found is not None:
        _check.dtype("statistics", found, [torch.promote_types(first.dtype, torch.float32)])
        _check.shape("statistics", found, [len(weights), 2])
        _check.dense("statistics", found)
        _check.device("statistics", found, first)


def finite(found: Tensor) -> None:
    """A mean or a std that is no number would be lost in codes that all mean something."""
    if found.device.type != "cpu" or torch.compiler.is_compiling():
        return
    mean, std = found.view(2).tolist()
    if not found.isfinite().all():
        raise ValueError(f"weight must be finite, got a mean of {mean} and a std of {std}")


def linear(
    x: Tensor, weight: Tensor | OneBitWeight, bias: Tensor | None, statistics_: Tensor | None,
    bits_: int,
) -> None:  # fmt: skip
    _check.dtype("x", x)
    if isinstance(weight, OneBitWeight):
        if statistics_ is not None:
            raise ValueError("statistics must be None beside a OneBitWeight, which has its own")
    else:
        if not isinstance(weight, Tensor):
            name = type(weight).__name__
            raise TypeError(f"weight must be a Tensor or a OneBitWeight, got {name}")
        latent("weight", weight)
        bits(bits_)
        statistics(statistics_, [weight])
    rows, columns = weight.shape
    if x.dim() == 0 or x.shape[-1] != columns:
        raise ValueError(f"x must have shape [..., {columns}], got {list(x.shape)}")
    if weight.device != x.device:
        raise ValueError(f"weight must be on {x.device}, got {weight.device}")
    if bias is not None:
        _check.parameter("bias", bias, (rows,), x)


def adapter(
    x: Tensor, down: Tensor, up: Tensor, scale: float, residual: Tensor | None, activation: str,
    dropout: float, seed: Tensor | int | None, bits_: int, statistics_: Tensor | None,
) -> None:  # fmt: skip
    if isinstance(scale, Tensor):
        raise TypeError("scale must be a number, got a Tensor, for which there is no gradient")
    latent("down", down)
    latent("up", up)
    bits(bits_)
    bottleneck.linear(
        x, down, up, None, None, scale, activation, residual, None, dropout, seed
    )  # fmt: skip
    statistics(statistics_, [down, up])


def branch(in_features: int, out_features: int, activation: str) -> None:
    """What a layer is made of."""
    for name, width in (("in_features", in_features), ("out_features", out_features)):
        if width < 1:
            raise ValueError(f"{name} must be at least 1, got {width}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")


def codes(name: str, tensor: Tensor) -> None:
    _check.dtype(name, tensor, [torch.uint8])
    if tensor.dim() == 0:
        raise ValueError(f"{name} must have shape [..., width], got []")
