"""Layers to measure, and their inputs: weights that a format holds exactly, in several copies."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from math import ceil

import torch
from torch import Tensor

from peftkern import qlora

from .check import Inputs
from .floors import Work
from .machine import last_level_cache

BLOCK_SIZE = 64


@dataclass(frozen=True)
class Case:
    """A layer and how many rows of activations it gets."""

    name: str
    outputs: int
    inputs: int
    rows: int
    rank: int = 0
    beyond_cache: bool = False  # so many copies of the weight that no cache holds them all
    format: str = "nf4"
    dtype: torch.dtype = torch.float32  # of activations and adapter
    dropout: float = 0.0

    @property
    def packed_bytes(self) -> int:
        count = self.outputs * self.inputs
        if qlora.formats[self.format].in_blocks:
            return count // 2 + 4 * count // BLOCK_SIZE
        return count + 4 * self.outputs

    def work(self, products: int = 1) -> Work:
        ends, size = self.inputs + self.outputs, self.dtype.itemsize
        read = self.packed_bytes + size * (self.rank * ends + self.rows * self.inputs)
        base = 2 * self.rows * self.inputs * self.outputs
        adapter = 2 * self.rows * self.rank * ends * (1 if products == 1 else 3)  # with gradients
        written = size * self.rows * self.outputs
        return Work(products * read, products * written, products * base + adapter, self.dtype)


PREFILL = (Case("attention 4096 x 4096, 512 rows", 4096, 4096, 512),)


def weights(case: Case, copies: int, device: str = "cpu") -> list[tuple[Tensor, ...]]:
    """Weights that the format holds exactly, and an adapter that matters. Copies are one matrix,
    rolled by what shares a scale: other values in every place, without drawing and rounding them
    all.
    """
    generator = torch.Generator(device).manual_seed(0)
    draw = partial(torch.randn, generator=generator, device=device)
    dense = draw(case.outputs, case.inputs) / case.inputs**0.5
    if qlora.formats[case.format].in_blocks:
        dense = qlora.dequantize(qlora.quantize(dense, case.format, BLOCK_SIZE))
        step = BLOCK_SIZE
    else:
        dense, step = _in_powers_of_two(dense), case.inputs
    rolled = [dense.view(-1).roll(i * step).view_as(dense) for i in range(copies)]
    frozen: list[tuple[Tensor, ...]] = [(w,) for w in rolled]
    if not case.rank:
        return frozen
    adapters = [
        (draw(case.rank, case.inputs) / case.inputs**0.5, draw(case.outputs, case.rank) / 8)
        for _ in range(copies)
    ]
    return [(*w, *(t.to(case.dtype) for t in ab)) for w, ab in zip(frozen, adapters, strict=True)]


def _in_powers_of_two(dense: Tensor) -> Tensor:
    """Codes of 8 bits times a power of two for each row: what float16 holds too, to which
    bitsandbytes rounds first.
    """
    step = torch.exp2((dense.abs().amax(1, keepdim=True) / 127).log2().ceil())
    codes = (dense / step).round()
    codes[:, 0] = 127
    return codes * step


def sets(case: Case, quick: bool, *live: tuple[int, ...], device: str = "cpu") -> list[Inputs]:
    """Inputs of a case, with live tensors of these shapes in its dtype."""
    copies = 2
    if case.beyond_cache and not quick:
        copies = max(copies, ceil(1.25 * last_level_cache() / case.packed_bytes))
    generator = torch.Generator(device).manual_seed(1)
    draw = partial(torch.randn, generator=generator, device=device)
    return [
        Inputs(frozen, tuple(draw(shape).to(case.dtype) for shape in live))
        for frozen in weights(case, copies, device)
    ]
