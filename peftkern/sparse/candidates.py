"""Which entries to select next, found while the gradients go by: no gradient is ever kept whole.

    score[i, j] = |grad_weight[i, j]| / (|weight[i, j]| + eps)^exponent

The best `count` of a model are among the best `count` of each tensor; of those, none below the
worst of the best `count` so far.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.grad import conv2d_weight

from peftkern import _native
from peftkern.sparse.pattern import Pattern
from peftkern.sparse.support import Support

_PANEL = 2**20  # elements of a gradient that are there at a time
_NONE = -1.0  # the score of what cannot be chosen


def score(grad: Tensor, weight: Tensor, exponent: float, eps: float) -> Tensor:
    """In the gradient's dtype."""
    return grad.abs().div_(weight.to(grad.dtype).abs().add_(eps).pow_(exponent))


def _panels(
    x: Tensor | None, grad: Tensor, rows: int, columns: int
) -> Iterator[tuple[int, Tensor]]:
    """The first row and the gradient of so many rows, in float32 or float64."""
    sums = torch.promote_types(grad.dtype, torch.float32)
    height = max(1, _PANEL // max(1, columns))
    for begin in range(0, rows, height):
        here = slice(begin, min(rows, begin + height))
        if x is None:
            yield begin, grad[here].to(sums)
            continue
        if x.dtype == grad.dtype == sums:
            yield begin, grad[:, here].t() @ x
            continue
        # Of 16 bits some tokens at a time, or the copies would be as large as the gradient.
        slope = grad.new_zeros(here.stop - begin, columns, dtype=sums)
        tokens = max(1, _PANEL // max(1, columns))
        for first in range(0, len(x), tokens):
            some = slice(first, first + tokens)
            slope.addmm_(grad[some, here].to(sums).t(), x[some].to(sums))
        yield begin, slope


def _candidates(
    x: Tensor | None, grad: Tensor, weight: Tensor, pattern: Sequence[Tensor],
    layout: Sequence[int], exponent: float, eps: float, threshold: Tensor, count: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    chosen = Pattern.of(pattern, layout)
    rows, columns = chosen.shape
    weight, entries_of = weight.view(rows, columns), _entries_of_rows(chosen)
    best = _none(grad, count)
    for begin, slope in _panels(x, grad, rows, columns):
        scores = score(slope, weight[begin : begin + len(slope)], exponent, eps)
        scores[entries_of(begin, begin + len(slope))] = _NONE
        flat = scores.flatten()
        least = torch.maximum(threshold.to(flat.dtype), best[0][-1]).clamp_(min=0)
        places = (flat >= least).nonzero().flatten()  # of which a NaN is none
        if len(places) > 4 * count:  # the first panels; a stable sort of all would take long
            there = flat[places]
            places = places[there >= there.topk(count).values[-1]]
        found = (flat[places], places + begin * columns, slope.flatten()[places])
        merged = [torch.cat(pair) for pair in zip(best, found, strict=True)]
        order = merged[0].argsort(descending=True, stable=True)[:count]
        best = tuple(t[order] for t in merged)  # type: ignore[assignment]
    return best


def _none(grad: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    sums = torch.promote_types(grad.dtype, torch.float32)
    scores = grad.new_full((count,), _NONE, dtype=sums)
    places = grad.new_full((count,), -1, dtype=torch.int64)
    return scores, places, grad.new_zeros(count, dtype=sums)


def _entries_of_rows(pattern: Pattern) -> Callable[[int, int], tuple[Tensor, Tensor]]:
    """From a range of rows to the places of their entries in it."""
    row_start, columns = pattern.csr().tensors

    def places(begin: int, end: int) -> tuple[Tensor, Tensor]:
        starts = row_start[begin : end + 1]
        first, last = int(starts[0]), int(starts[-1])
        row = torch.arange(end - begin, device=columns.device)
        row = row.repeat_interleave(starts.diff(), output_size=last - first)
        return row, columns[first:last].long()

    return places


# The best `count` entries outside the pattern of the gradient grad^T x, or of the gradient `grad`
# where there is no x; of equal scores the first. threshold [1]: what scores less need not be
# found. Scores, places in the flat matrix and gradients; where there are fewer, the score is -1.
# On every device torch's own product makes the panels, which nobody would outdo.
candidates_op = _native.compose(
    "sparse_candidates(Tensor? x, Tensor grad, Tensor weight, Tensor[] pattern, int[] layout, "
    "float exponent, float eps, Tensor threshold, int count) -> (Tensor, Tensor, Tensor)",
    lambda x, grad, weight, pattern, layout, exponent, eps, threshold, count: _none(grad, count),
    _candidates,
)


class Entries(NamedTuple):
    """Entries of several tensors: `[n]` each, of whom they are by number, and where in the flat
    matrix."""

    scores: Tensor
    owners: Tensor
    places: Tensor
    grads: Tensor

    def of(self, index: Tensor) -> Entries:
        return Entries(*(tensor[index] for tensor in self))


def best(found: Sequence[Entries], count: int) -> Entries:
    """The best of all, ordered by owner and place; of equal scores those of the first owner, and
    there the first."""
    entries = Entries(*(torch.cat(tensors) for tensors in zip(*found, strict=True)))
    entries = entries.of((entries.scores >= 0).nonzero().flatten())
    entries = _in_order(entries.of(entries.scores.argsort(descending=True, stable=True)))
    # A weight that is used twice is looked at twice.
    again = torch.zeros_like(entries.owners, dtype=torch.bool)
    again[1:] = (entries.owners.diff() == 0) & (entries.places.diff() == 0)
    entries = entries.of((~again).nonzero().flatten())
    return _in_order(entries.of(entries.scores.argsort(descending=True, stable=True)[:count]))


def _in_order(entries: Entries) -> Entries:
    entries = entries.of(entries.places.argsort(stable=True))
    return entries.of(entries.owners.argsort(stable=True))


class Collector:
    """Watches the gradients of supports, and keeps the best `count` entries that do not train yet.

    What a new forward pass brings takes the place of what was there: where gradients are
    accumulated, the last part of a batch decides.
    """

    def __init__(self, supports: Sequence[Support], exponent: float, eps: float) -> None:
        self.supports, self.scale = supports, (exponent, eps)
        self.count = 0
        self.clear()

    def begin(self, count: int) -> None:
        """From here on, for a step that will take so many."""
        if bool(count) != bool(self.count):
            for number, support in enumerate(self.supports):
                support.watch(_Watcher(self, number) if count else None)
        self.count = count
        self.clear()

    def clear(self) -> None:
        self.found: Entries | None = None
        self.stale = False

    def threshold(self, grad: Tensor) -> Tensor:
        full = self.found is not None and len(self.found.scores) >= self.count
        sums = torch.promote_types(grad.dtype, torch.float32)
        if not full:
            return grad.new_zeros(1, dtype=sums)
        return self.found.scores.min().view(1).to(grad.device, sums)  # type: ignore[union-attr]

    def look(self, number: int, x: Tensor | None, grad: Tensor) -> None:
        if self.stale:
            self.clear()
        support = self.supports[number]
        scores, places, grads = candidates_op(
            x, grad, support.weight.detach().contiguous(), *support.pattern.operand(),
            *self.scale, self.threshold(grad), self.count,
        )  # fmt: skip
        new = Entries(scores, torch.full_like(places, number), places, grads)
        both = [new]
        if self.found is not None:
            device, dtype = self.found.scores.device, self.found.scores.dtype
            wide = torch.promote_types(dtype, scores.dtype)
            both = [
                Entries(e.scores.to(device, wide), e.owners.to(device), e.places.to(device),
                        e.grads.to(device, wide))
                for e in (self.found, new)
            ]  # fmt: skip
        self.found = best(both, self.count)


class Forward:
    """The hook of a model that tells a collector of each forward pass; a copy tells nobody."""

    def __init__(self, collector: Collector | None = None) -> None:
        self.collector = None if collector is None else weakref.ref(collector)

    def __call__(self, *_: Any) -> None:
        if self.collector is not None and (collector := self.collector()) is not None:
            collector.stale = True

    def __reduce__(self) -> Any:
        return Forward, ()


class _Watcher:
    """Of one support."""

    def __init__(self, collector: Collector, number: int) -> None:
        self.collector, self.number = collector, number

    def product(self, x: Tensor, grad: Tensor) -> None:
        self.collector.look(self.number, x, grad)

    def convolution(self, x: Tensor, grad: Tensor, window: list[int]) -> None:
        kernel, stride, padding, dilation = (window[i : i + 2] for i in (0, 2, 4, 6))
        shape = [grad.shape[1], x.shape[1] // window[8], *kernel]
        # Transient, as a tensor's gradient is in torch's own backward.
        self.dense(
            conv2d_weight(  # type: ignore[no-untyped-call]
                x.to(grad.dtype), shape, grad, stride, padding, dilation, window[8]
            )
        )

    def dense(self, grad: Tensor) -> None:
        rows, columns = self.collector.supports[self.number].pattern.shape
        self.collector.look(self.number, None, grad.reshape(rows, columns))
