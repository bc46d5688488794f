"""The adapter of onebit in Triton: one launch quantises both latents, the rest is bottleneck's.

W goes through a scratch of x's dtype and is not made in bottleneck's own kernels. There each
program would read 4 bytes a latent weight from the L2 cache and not 2, and quantise it again: for
12,608 tokens and 768 x 32 weights 197 times. The scratch costs a launch of about 2 microseconds,
and holds the very numbers to which those kernels would round W.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from peftkern.kernels import bottleneck
from peftkern.kernels.onebit_latents import quantize, quantize_bwd
from peftkern.onebit import fallback


def adapter(
    x: Tensor, down: Tensor, up: Tensor, statistics: Tensor, bits: int, scale: float,
    activation: int, residual: Tensor | None, onto_x: bool, dropout: float, seed: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if torch.float64 in (x.dtype, down.dtype):
        return fallback.adapter(
            x, down, up, statistics, bits, scale, activation, residual, onto_x, dropout, seed
        )
    dense_down, dense_up = quantize([down, up], statistics, bits, x.dtype)
    return bottleneck.linear(
        x, dense_down, dense_up, None, None, None, scale, activation, residual, onto_x,
        None, None, None, dropout, seed,
    )  # fmt: skip


def adapter_bwd(
    grad: Tensor, x: Tensor, hidden: Tensor, down: Tensor, up: Tensor, statistics: Tensor,
    bits: int, scale: float, activation: int, onto_x: bool, dropout: float, seed: Tensor | None,
    needs: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    if torch.float64 in (x.dtype, down.dtype):
        return fallback.adapter_bwd(
            grad, x, hidden, down, up, statistics, bits, scale, activation, onto_x, dropout, seed,
            needs,
        )  # fmt: skip
    # A gradient comes in the dtype of its weight, and sums are not to be rounded in between.
    dense_down, dense_up = quantize([down, up], statistics, bits, torch.float32)
    found = bottleneck.linear_bwd(
        grad, x, hidden, dense_down, dense_up, None, None, None, scale, activation, onto_x,
        None, None, None, dropout, seed, [*needs, *[False] * 5],
    )  # fmt: skip
    train = slice(1 - needs[1], 1 + needs[2])  # which of the two
    weights = [down, up][train]
    if not weights:
        return found
    grads = quantize_bwd(found[needs[0] :], weights, statistics[train], bits)
    return [*found[: needs[0]], *grads]
