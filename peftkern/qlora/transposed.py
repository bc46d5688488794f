"""`linear` where a dense weight may be stored `[in, out]`, as transformers' Conv1D has it.

Our kernels read rows. Copying such a weight into rows at every call would cost more than they save,
so the base's product is torch's own there, and ours is the low-rank term.
"""

from __future__ import annotations

import torch
from torch import Tensor

from peftkern import _inputs
from peftkern.qlora import ops
from peftkern.qlora.weight import QuantizedWeight


def linear(
    x: Tensor, weight: Tensor | QuantizedWeight, bias: Tensor | None = None,
    lora_a: Tensor | None = None, lora_b: Tensor | None = None, scale: float = 1.0,
    dropout: float = 0.0,
) -> Tensor:  # fmt: skip
    """As `qlora.linear`, whatever the strides of a dense weight `[out, in]` are."""
    if isinstance(weight, QuantizedWeight) or weight.is_contiguous():
        return ops.linear(x, weight, bias, lora_a, lora_b, scale, dropout)
    x = _inputs.autocast(x)
    y = torch.nn.functional.linear(x, weight, bias)
    if lora_a is None or lora_b is None:
        return y
    return add_low_rank(y, x, lora_a, lora_b, scale, dropout)


def add_low_rank(
    y: Tensor, x: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float, dropout: float
) -> Tensor:
    """y + scale * (D(x) A^T) B^T, in y's dtype; keeps x and D(x) A^T, and no D(x)."""
    rank, columns = lora_a.shape
    # The term is that of a linear; with r outputs and no base its cost is that of A alone.
    nothing = lora_a.new_zeros(rank, columns, dtype=x.dtype)
    identity = torch.eye(rank, dtype=x.dtype, device=x.device)
    down = ops.linear(x, nothing, None, lora_a, identity, 1.0, dropout).flatten(0, -2)
    added = torch.addmm(y.reshape(len(down), -1), down, lora_b.to(y.dtype).t(), alpha=scale)
    return added.view(y.shape)
