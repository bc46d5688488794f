"""Operands for the tests of qlora."""

import torch

from peftkern import qlora


def sample(
    rows, columns, inputs, rank, dtype=torch.float32, block_size=64, nested=False, experts=0
):
    """x, weight, bias, lora_a, lora_b; all experts' in one where there are experts."""
    torch.manual_seed(rows * 31 + columns)
    lead = [experts] if experts else []
    weight = qlora.quantize(torch.randn(*lead, rows, columns), "nf4", block_size, nested)
    x = torch.randn(inputs, columns, dtype=dtype)
    bias, lora_a, lora_b = (
        torch.randn(*lead, *shape, dtype=dtype) for shape in ([rows], [rank, columns], [rows, rank])
    )
    return x, weight, bias, lora_a, lora_b
