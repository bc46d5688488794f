"""bottleneck's kernels in Triton. Launchers have the ops' own signatures."""

from __future__ import annotations

import torch
from torch import Tensor

from peftkern.bottleneck import fallback
from peftkern.kernels import bottleneck_forward as forward
from peftkern.kernels.bottleneck_backward import linear_bwd as linear_bwd
from peftkern.kernels.common import rows_of


def linear(
    x: Tensor, down: Tensor, up: Tensor, bias_down: Tensor | None, bias_up: Tensor | None,
    gate: Tensor | None, scale: float, activation: int, residual: Tensor | None, onto_x: bool,
    norm_weight: Tensor | None, norm_bias: Tensor | None, eps: float | None, dropout: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if x.dtype == torch.float64:
        return fallback.linear(
            x, down, up, bias_down, bias_up, gate, scale, activation, residual, onto_x,
            norm_weight, norm_bias, eps, dropout, seed,
        )  # fmt: skip
    flat = rows_of(x)
    y = x.new_empty(*x.shape[:-1], len(up))
    hidden = x.new_empty(len(flat), len(down), dtype=torch.float32)
    forward.linear(
        flat, down, up, bias_down, bias_up, gate, scale, activation,
        flat if onto_x else rows_of(residual), norm_weight, norm_bias, eps, dropout, seed,
        rows_of(y), hidden,
    )  # fmt: skip
    return y, hidden
