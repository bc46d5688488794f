"""Selection against torch.kthvalue and boolean indexing, and the rank loss against torch's SVD.

Traffic of selection: every weight is read twice, to be counted and to be picked, and a bit of each
is written. What kthvalue gives is the limit alone: no peer's time holds what makes a mask of it.
Compaction reads a bit an entry, and reads and writes what stays. The rank loss has no traffic worth
a floor; its operations are those of a few products of its matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from peftkern.sparse import AbsThreshold, Pattern, SmallestFraction, bits, picking, rank

from .check import Inputs
from .floors import Work
from .harness import Contender, measure
from .row import Row

SHAPE, QUICK_SHAPE = (10000, 10000), (2500, 4000)
SHARE, THRESHOLD, KEPT = 0.05, 0.0627, 0.2
RANKED, RANKED_DENSITY = (640, 1280), 0.06
PRODUCTS = "by products, to 5e-6"


def shape_of(quick: bool) -> tuple[int, int]:
    return QUICK_SHAPE if quick else SHAPE


def draw(shape: tuple[int, int], sets: int = 2) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(0)
    for _ in range(sets):
        yield torch.randn(shape, generator=generator)


def picked(magnitude: Tensor, limit: Tensor) -> Tensor:
    """The bits of all below a limit, and of the first that equal it: as many as are asked for."""
    count = round(SHARE * magnitude.numel())
    mask, equal = magnitude < limit, magnitude == limit
    first = equal.flatten().cumsum(0).view(equal.shape) <= count - mask.sum()
    return bits.pack(mask | equal & first)


def kthvalue(weight: Tensor) -> tuple[Tensor, Tensor]:
    magnitude = weight.abs()
    return magnitude, magnitude.view(-1).kthvalue(round(SHARE * weight.numel())).values


def bits_of(pattern: Pattern) -> Tensor:
    return pattern.bitmap().tensors[0]


def smallest(quick: bool) -> Iterator[Row]:
    def ours(kind: str | None) -> Callable[[Tensor], Pattern]:
        def call(weight: Tensor) -> Pattern:
            count = round(SHARE * weight.numel())
            (found,) = picking.patterns([weight], picking.first([weight], count), kind)
            return found

        return call

    shape = shape_of(quick)
    count = shape[0] * shape[1]
    yield from measure(
        "sparse_select", "pick", f"{SHARE:.0%} smallest of {count // 10**6} M",
        {
            "peftkern": Contender(lambda: ours("bitmap"), view=bits_of),
            "peftkern, to CSR": Contender(lambda: ours("csr"), view=bits_of),
            "peftkern, by rule": Contender(
                lambda: lambda w: SmallestFraction(SHARE).select({"w": w})["w"], view=bits_of
            ),
            "torch.kthvalue": Contender(lambda: kthvalue, view=lambda found: picked(*found)),
        },
        [Inputs((), (weight,)) for weight in draw(shape)],
        lambda weight: picked(*kthvalue(weight)), baseline="peftkern",
        work=Work(8 * count, count // 8), quick=quick,
    )  # fmt: skip


def below(quick: bool) -> Iterator[Row]:
    def masked(weight: Tensor) -> Tensor:
        return bits.pack(weight.abs() < THRESHOLD)

    shape = shape_of(quick)
    count = shape[0] * shape[1]
    yield from measure(
        "sparse_select", "threshold", f"|w| < {THRESHOLD} of {count // 10**6} M",
        {
            "peftkern": Contender(
                lambda: lambda w: AbsThreshold(THRESHOLD).select({"w": w})["w"], view=bits_of
            ),
            "torch, a mask": Contender(
                lambda: lambda w: w.abs() < THRESHOLD, view=lambda mask: bits.pack(mask)
            ),
        },
        [Inputs((), (weight,)) for weight in draw(shape)], masked, baseline="peftkern",
        work=Work(4 * count, count // 8), quick=quick,
    )  # fmt: skip


def reselection(quick: bool) -> Iterator[Row]:
    """What is still small of the values stays, and so do its moments."""

    def ours(pattern: Pattern) -> Callable[..., Any]:
        limit = KEPT * THRESHOLD

        def call(values: Tensor, *moments: Tensor) -> tuple[Tensor, ...]:
            (kept,), counts = picking.below([values[None]], limit, "<")
            return tuple(picking.subset(pattern, kept[0], int(counts), [values, *moments])[1])

        return call

    def indexed(values: Tensor, *moments: Tensor) -> tuple[Tensor, ...]:
        mask = values.abs() < KEPT * THRESHOLD
        return tuple(packed[mask] for packed in (values, *moments))

    inputs, shape = [], shape_of(quick)
    for weight in draw(shape):
        pattern = SmallestFraction(SHARE).select({"w": weight})["w"]
        values = weight[pattern.mask()]
        inputs.append(Inputs((pattern,), (values, values + 1, values + 2)))
    entries = round(SHARE * shape[0] * shape[1])
    yield from measure(
        "sparse_select", "compact", f"{KEPT:.0%} of {entries // 10**4 / 100:g} M entries stay",
        {
            "peftkern, pattern too": Contender(ours),
            "torch, boolean indexing": Contender(lambda pattern: indexed),
        },
        inputs, lambda pattern, *packed: indexed(*packed), baseline="peftkern, pattern too",
        work=Work(int(12 * KEPT * entries) + 4 * entries, int(12 * KEPT * entries)), quick=quick,
    )  # fmt: skip


def rank_loss(quick: bool) -> Iterator[Row]:
    def decomposed(pattern: Pattern, values: Tensor) -> tuple[Tensor, Tensor]:
        mask = pattern.mask()
        dense = values.new_zeros(pattern.shape)
        dense[mask] = values
        u, s, vh = torch.linalg.svd(dense, full_matrices=False)
        return s.sum(), (u @ vh)[mask]

    inputs = []
    for dense in draw(RANKED):
        pattern = SmallestFraction(RANKED_DENSITY).select({"w": dense})["w"]
        inputs.append(Inputs((pattern,), (dense[pattern.mask()],)))
    rows, columns = RANKED
    yield from measure(
        "sparse_select", "nuclear", f"{rows} x {columns}, {RANKED_DENSITY:.0%}",
        {
            "peftkern": Contender(
                lambda pattern: lambda values: rank.nuclear(values, pattern), PRODUCTS, 1e-5
            ),
            "torch SVD": Contender(lambda pattern: partial(decomposed, pattern)),
        },
        inputs, decomposed, baseline="peftkern", quick=quick,
        work=Work(flops=4 * 4 * rows * rows * columns),
    )  # fmt: skip


def rows(device: str = "cpu", quick: bool = False) -> Iterator[Row]:
    if torch.device(device).type != "cpu":
        raise ValueError(f"device must be cpu for sparse_select, got {device}")
    for part in (smallest, below, reselection, rank_loss):
        yield from part(quick)
