"""What bottleneck refuses, before any op is called; so every device refuses alike."""

from __future__ import annotations

import torch
from torch import Tensor

from peftkern import _check
from peftkern.bottleneck.reference import ACTIVATIONS, Norm


def linear(
    x: Tensor, down: Tensor, up: Tensor, bias_down: Tensor | None, bias_up: Tensor | None,
    scale: Tensor | float, activation: str, residual: Tensor | None, norm: Norm | None,
    dropout: float, seed: Tensor | int | None,
) -> None:  # fmt: skip
    _check.dtype("x", x)
    _check.shape("down", down, ["r", "in"])
    rank, columns = down.shape
    if rank < 1:
        raise ValueError(f"down must have a rank of at least 1, got {rank}")
    if x.dim() == 0 or x.shape[-1] != columns:
        raise ValueError(f"x must have shape [..., {columns}], got {list(x.shape)}")
    _check.shape("up", up, ["out", rank])
    _check.parameter("down", down, (rank, columns), x)
    _check.parameter("up", up, (up.shape[0], rank), x)
    if bias_down is not None:
        _check.parameter("bias_down", bias_down, (rank,), x)
    if bias_up is not None:
        _check.parameter("bias_up", bias_up, (up.shape[0],), x)
    _scale(scale, x)
    if activation not in ACTIVATIONS:
        names = ", ".join(ACTIVATIONS)
        raise ValueError(f"activation must be one of {names}, got {activation!r}")
    if residual is not None:
        _check.dtype("residual", residual)
        _check.shape("residual", residual, [*x.shape[:-1], up.shape[0]])
        _check.device("residual", residual, x)
    if norm is not None:
        _norm(norm, columns, x)
    _check.dropout(dropout, seed, x)


def _scale(scale: Tensor | float, x: Tensor) -> None:
    if isinstance(scale, Tensor):
        _check.dtype("scale", scale)
        _check.device("scale", scale, x)
        if scale.numel() != 1:
            raise ValueError(f"scale must have one element, got shape {list(scale.shape)}")
    elif not isinstance(scale, (int, float, torch.SymFloat)):
        raise TypeError(f"scale must be a number or a Tensor, got {type(scale).__name__}")


def _norm(norm: Norm, columns: int, x: Tensor) -> None:
    if not isinstance(norm, Norm):
        raise TypeError(f"norm must be a Norm, got {type(norm).__name__}")
    if norm.weight is not None:
        _check.parameter("norm.weight", norm.weight, (columns,), x)
    if norm.bias is not None:
        _check.parameter("norm.bias", norm.bias, (columns,), x)
    if not norm.eps >= 0:
        raise ValueError(f"norm.eps must be at least 0, got {norm.eps}")
