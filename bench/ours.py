"""peftkern as a contender, beside the peers; and the math of all, in plain torch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from peftkern import QLoRALinear, qlora
from peftkern.qlora import reference

from .layers import BLOCK_SIZE
from .peers import SCALE

SEED = 1  # of the elements that dropout drops, where the contender can be told


def plain(x: Tensor, weight: Tensor, *adapter: Tensor, dropout: float = 0.0) -> Tensor:
    seed = torch.tensor([SEED], device=x.device)
    return reference.linear(x, weight, None, *adapter, scale=SCALE, p=dropout, seed=seed)


def ours(
    weight: Tensor, *adapter: Tensor, format: str = "nf4", block_size: int | None = BLOCK_SIZE,
    dropout: float = 0.0,
) -> Callable[[Tensor], Tensor]:  # fmt: skip
    quantized = qlora.quantize(weight, format, block_size)
    drawn = {"dropout": dropout, "seed": torch.tensor([SEED], device=weight.device)}
    return lambda x: qlora.linear(x, quantized, None, *adapter, scale=SCALE, **drawn)


def our_layer(
    weight: Tensor, lora_a: Tensor, lora_b: Tensor, use_dora: bool = False, dropout: float = 0.0
) -> nn.Module:
    rows, columns = weight.shape
    base = nn.Linear(columns, rows, bias=False, device="meta")
    base.weight = nn.Parameter(weight, requires_grad=False)
    r = len(lora_a)
    layer = QLoRALinear.from_linear(
        base, r=r, lora_alpha=SCALE * r, base="nf4", block_size=BLOCK_SIZE, nested=False,
        use_dora=use_dora, lora_dropout=dropout,
    )  # fmt: skip
    layer.lora_A.data, layer.lora_B.data = lora_a.clone(), lora_b.clone()
    return layer
