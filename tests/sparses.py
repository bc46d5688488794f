"""Patterns and operands for the tests of sparse."""

import torch
from hypothesis import strategies as st

from peftkern.sparse import Pattern

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
KINDS = ["csr", "bitmap"]
SIZES = st.integers(1, 70)
TOKENS = st.sampled_from([0, 1, 15, 16, 17, 130, 300])
DENSITIES = st.sampled_from([0.0, 1e-2, 0.2, 1.0])


def masked(rows, columns, density, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(rows, columns, generator=generator) < density


def pattern(rows, columns, density, kind=None, seed=0):
    return Pattern.from_mask(masked(rows, columns, density, seed), kind)


def normal(seed, *shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def sums(dtype):
    return torch.promote_types(dtype, torch.float32)
