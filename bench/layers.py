"""Layers to measure, and their inputs: weights that NF4 represents exactly, in several copies."""

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

    @property
    def packed_bytes(self) -> int:
        return self.outputs * self.inputs // 2 + 4 * self.outputs * self.inputs // BLOCK_SIZE

    def work(self, products: int = 1) -> Work:
        ends = self.inputs + self.outputs
        read = self.packed_bytes + 4 * self.rank * ends + 4 * self.rows * self.inputs
        base = 2 * self.rows * self.inputs * self.outputs
        adapter = 6 * self.rows * self.rank * ends
        written = 4 * self.rows * self.outputs
        return Work(products * read, products * written, products * base + adapter)


def weights(case: Case, copies: int) -> list[tuple[Tensor, ...]]:
    """Weights that NF4 represents exactly, and an adapter that matters. Copies are one matrix,
    rolled by blocks: other values in every place, without the time to draw and round them all.
    """
    generator = torch.Generator().manual_seed(0)
    draw = partial(torch.randn, generator=generator)
    dense = draw(case.outputs, case.inputs) / case.inputs**0.5
    dense = qlora.dequantize(qlora.quantize(dense, "nf4", BLOCK_SIZE))
    rolled = [dense.view(-1).roll(i * BLOCK_SIZE).view_as(dense) for i in range(copies)]
    frozen: list[tuple[Tensor, ...]] = [(w,) for w in rolled]
    if not case.rank:
        return frozen
    adapters = [
        (draw(case.rank, case.inputs) / case.inputs**0.5, draw(case.outputs, case.rank) / 8)
        for _ in range(copies)
    ]
    return [(*w, *ab) for w, ab in zip(frozen, adapters, strict=True)]


def sets(case: Case, quick: bool, *live: tuple[int, ...]) -> list[Inputs]:
    """Inputs of a case, with live tensors of these shapes."""
    copies = 2
    if case.beyond_cache and not quick:
        copies = max(copies, ceil(1.25 * last_level_cache() / case.packed_bytes))
    generator = torch.Generator().manual_seed(1)
    draw = partial(torch.randn, generator=generator)
    return [Inputs(frozen, tuple(draw(s) for s in live)) for frozen in weights(case, copies)]
