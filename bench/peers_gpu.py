"""Fused LoRA of other packages, on GPUs alone: their kernels for one projection, around the layer
that peft makes of a weight with nested scales, which is what both ask for.
"""

from __future__ import annotations

from importlib import import_module
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from .peers import linear4bit, peft_layer


class Projection(nn.Module):
    """`apply_lora_o` of a package looks for the layer under this name, and takes 3-D inputs."""

    def __init__(self, package: str, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self._apply_lora_o = import_module(package).apply_lora_o

    def forward(self, x: Tensor) -> Tensor:
        return self._apply_lora_o(SimpleNamespace(o_proj=self.layer), x[None])[0]


def _projection(package: str, weight: Tensor, lora_a: Tensor, lora_b: Tensor) -> nn.Module:
    if not torch.cuda.is_available():
        raise ImportError(f"{package} needs a GPU")
    return Projection(package, peft_layer(linear4bit(weight, nested=True), lora_a, lora_b))


def unsloth(weight: Tensor, lora_a: Tensor, lora_b: Tensor) -> nn.Module:
    return _projection("unsloth.kernels", weight, lora_a, lora_b)


def axolotl(weight: Tensor, lora_a: Tensor, lora_b: Tensor) -> nn.Module:
    return _projection("axolotl.kernels.lora", weight, lora_a, lora_b)
