"""qlora's kernels in Triton. Launchers have the ops' own signatures."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from peftkern.kernels.qlora_backward import linear_bwd as linear_bwd
from peftkern.kernels.qlora_forward import lora_down
from peftkern.kernels.qlora_panels import decode
from peftkern.kernels.qlora_product import product
from peftkern.kernels.qlora_siblings import siblings as siblings
from peftkern.kernels.qlora_siblings import siblings_bwd as siblings_bwd
from peftkern.kernels.qlora_tiles import rows_of
from peftkern.qlora import fallback


def dequantize(weight: Sequence[Tensor], layout: Sequence[int], out: Tensor) -> None:
    experts, rows, columns, *rest = layout
    if out.numel():
        decode(out.view(-1, columns), weight, [1, experts * rows, columns, *rest])


def linear(
    x: Tensor, weight: Sequence[Tensor], layout: Sequence[int], bias: Tensor | None,
    lora_a: Tensor | None, lora_b: Tensor | None, scale: float, dropout: float,
    seed: Tensor | None, offsets: Tensor | None, adapter: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if x.dtype == torch.float64:
        return fallback.linear(
            x, weight, layout, bias, lora_a, lora_b, scale, dropout, seed, offsets, adapter
        )
    flat = rows_of(x)
    if lora_a is None:
        low, down = None, flat.new_empty(len(flat), 0, dtype=torch.float32)
    else:
        low = down = lora_down(flat, lora_a, dropout, seed, offsets, adapter)
    y = product(flat, weight, layout, bias, low, lora_b, scale, offsets, adapter)
    return y.view(*x.shape[:-1], layout[1]), down
