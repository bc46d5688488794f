"""Layers with DoRA, and their equation in full, for the tests of it."""

import torch
from torch import nn

from peftkern.qlora import QLoRALinear, reference

BASES = (None, "nf4")
TRAINED = ("lora_A", "lora_B", "lora_magnitude_vector")


def make(rows=24, columns=64, base=None, bias=True, dtype=torch.float32, **options):
    """As after some training."""
    torch.manual_seed(0)
    linear = nn.Linear(columns, rows, bias=bias, dtype=dtype)
    options = {"r": 4, "base": base, "use_dora": True} | options
    return disturb(QLoRALinear.from_linear(linear, **options))


def disturb(layer):
    nn.init.normal_(layer.lora_B, std=0.1)
    with torch.no_grad():
        layer.lora_magnitude_vector.mul_(torch.linspace(0.5, 2, layer.out_features))
    return layer


def dense(layer):
    weight = layer.quantized_weight
    return layer.weight.detach() if weight is None else weight.dequantize(torch.float32)


def expected(layer, x, weight, a, b, magnitude, bias=None, seed=None):
    """The equation, with W + c B A in full."""
    low_rank = reference.dropout(x, layer.lora_dropout * layer.training, seed) @ a.t() @ b.t()
    norm = torch.linalg.vector_norm(weight + layer.scaling * (b @ a), dim=1).detach()
    y = magnitude / norm * (x @ weight.t() + layer.scaling * low_rank)
    return y if bias is None else y + bias


def arguments(layer):
    return (dense(layer), layer.lora_A, layer.lora_B, layer.lora_magnitude_vector, layer.bias)


def detached(layer):
    return [None if t is None else t.detach() for t in arguments(layer)]


def trained(layer):
    return [getattr(layer, name) for name in TRAINED]
