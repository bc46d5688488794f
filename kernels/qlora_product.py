"""The forward of qlora past `down`, by whichever path the table names."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from peftkern import _native
from peftkern.kernels import qlora_panels as panels
from peftkern.kernels import qlora_paths as paths
from peftkern.kernels.qlora_gemm import gemm


def product(
    x: Tensor, weight: Sequence[Tensor], layout: Sequence[int], bias: Tensor | None,
    low: Tensor | None, lora_b: Tensor | None, scale: float, offsets: Tensor | None = None,
    adapter: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """x W^T + bias + scale * low B^T, `[rows, outputs]`; low is what `lora_down` gives."""
    experts, outputs, _, _, bits = layout
    # The kernel for few rows knows one adapter alone.
    decodes = adapter is None and _native.serves("qlora_decode", x.device.type)
    path = paths.choose(x.device, x.dtype, len(x), experts, bits, decodes)
    if path == "decode":
        y: Tensor = torch.ops.peftkern.qlora_decode(x, weight, layout, bias, low, lora_b, scale)
        return y
    y = x.new_empty(len(x), outputs)
    way = gemm if path == "gemm" else panels.linear
    way(x, weight, layout, y, bias, low, lora_b, scale, offsets, adapter)
    return y
