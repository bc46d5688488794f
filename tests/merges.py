"""Layers whose low-rank term is exact in float32, and the ways to merge them."""

import copy

import torch
from torch import nn

from peftkern import LoraConfig, QLoRALinear

WAYS = {
    "float": (None, {}),
    "float to bfloat16": (None, {"dtype": torch.bfloat16}),
    "nf4 to float32": ("nf4", {"dtype": torch.float32}),
    "nf4 to nf4": ("nf4", {"requantize": True}),
}
WARNS = "ignore:requantize=True"
MIXED = (LoraConfig(target_modules=["q_proj"]), LoraConfig(base="nf4"))


def make(rows=24, columns=64, base=None, dtype=torch.float32, seed=0, **options):
    """A layer as after training: A and B are not zero, and products of theirs are exact."""
    torch.manual_seed(seed)
    linear = nn.Linear(columns, rows, dtype=dtype)
    layer = QLoRALinear.from_linear(linear, r=options.pop("r", 4), base=base, **options)
    with torch.no_grad():
        for parameter in (layer.lora_A, layer.lora_B):
            parameter.copy_(torch.randint(-8, 9, parameter.shape) / 64)
    return layer.eval()


def dense(layer):
    weight = layer.quantized_weight
    return layer.weight if weight is None else weight.dequantize(torch.float32)


def truth(layer):
    """W + scaling * B A in float64."""
    term = layer.lora_B.double() @ layer.lora_A.double()
    return (dense(layer).double() + layer.scaling * term).detach()


def aware(rows=24, columns=64, seed=0, **options):
    """A merge-aware layer as after training, far enough for codes to move."""
    torch.manual_seed(seed)
    options = {"r": 4, "base": "nf4", "merge_aware": True} | options
    layer = QLoRALinear.from_linear(nn.Linear(columns, rows), **options)
    nn.init.normal_(layer.lora_B, std=0.01)
    return layer


def requantized(layer):
    """The weight that merging stores."""
    twin = copy.deepcopy(layer)
    twin.merge(requantize=True)
    return twin.quantized_weight
