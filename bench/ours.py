"""peftkern as a contender, beside the peers; and the math of all, in plain torch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from peftkern import QLoRALinear, qlora
from peftkern.qlora import reference

from .layers import BLOCK_SIZE
from .peers import SCALE


def plain(x: Tensor, weight: Tensor, *adapter: Tensor) -> Tensor:
    return reference.linear(x, weight, None, *adapter, scale=SCALE)


def ours(
    weight: Tensor, *adapter: Tensor, format: str = "nf4", block_size: int | None = BLOCK_SIZE
) -> Callable[[Tensor], Tensor]:
    quantized = qlora.quantize(weight, format, block_size)
    return lambda x: qlora.linear(x, quantized, None, *adapter, scale=SCALE)


def our_layer(weight: Tensor, lora_a: Tensor, lora_b: Tensor, use_dora: bool = False) -> nn.Module:
    rows, columns = weight.shape
    base = nn.Linear(columns, rows, bias=False, device="meta")
    base.weight = nn.Parameter(weight, requires_grad=False)
    r = len(lora_a)
    layer = QLoRALinear.from_linear(
        base, r=r, lora_alpha=SCALE * r, base="nf4", block_size=BLOCK_SIZE, nested=False,
        use_dora=use_dora,
    )  # fmt: skip
    with torch.no_grad():
        layer.lora_A.copy_(lora_a)
        layer.lora_B.copy_(lora_b)
    return layer
