"""Operands for the tests of qlora."""

import torch

from peftkern import qlora

FORMATS = tuple(qlora.formats)


def quantized(weight, format, block_size=64, nested=False):
    """Block size and nesting where the format has them."""
    if qlora.formats[format].in_blocks:
        return qlora.quantize(weight, format, block_size, nested)
    return qlora.quantize(weight, format)


def sample(
    rows,
    columns,
    inputs,
    rank,
    dtype=torch.float32,
    block_size=64,
    nested=False,
    experts=0,
    format="nf4",
):
    """x, weight, bias, lora_a, lora_b; all experts' in one where there are experts."""
    torch.manual_seed(rows * 31 + columns)
    lead = [experts] if experts else []
    weight = quantized(torch.randn(*lead, rows, columns), format, block_size, nested)
    x = torch.randn(inputs, columns, dtype=dtype)
    bias, lora_a, lora_b = (
        torch.randn(*lead, *shape, dtype=dtype) for shape in ([rows], [rank, columns], [rows, rank])
    )
    return x, weight, bias, lora_a, lora_b
