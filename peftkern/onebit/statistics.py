"""The statistics of all latent weights of a model, in one pass a step."""

from __future__ import annotations

import weakref
from typing import Protocol

import torch
from torch import Tensor, nn

from peftkern._seen import Seen
from peftkern.onebit import codes

_backwards = 0  # of adapters, since the program began


def count_backward() -> None:
    """To be called by the backward of each adapter: what comes next may be an optimiser's step."""
    global _backwards
    _backwards += 1


def _moment() -> tuple[int, int]:
    """Changes wherever latents may: between backwards, of which each counts as one, however many
    adapters it passes and computes again."""
    backward: int = torch._C._current_graph_task_id()
    return (backward, 0) if backward >= 0 else (backward, _backwards)


class Member(Protocol):
    """A layer with two latent weights."""

    down: nn.Parameter
    up: nn.Parameter


class Statistics:
    """What the first of its layers to be called computes for all: one op a step, not one a layer.

    Each layer is given its rows once. Asked again, as in the next step, all are computed anew: an
    optimiser that writes past torch's counters is noticed so. Nor does a backward leave any rows,
    be they of layers that its step has left out, or of those that it has not computed again.

    Copies and pickles have no members: a layer that is copied joins the copy of its statistics.
    """

    def __init__(self) -> None:
        # Not held: a layer keeps its statistics, and must be free to go when its model does.
        self._members: dict[int, weakref.ref[Member]] = {}
        self._made: dict[int, tuple[Seen, Tensor]] = {}
        self._moment = _moment()

    def __reduce__(self) -> tuple[type[Statistics], tuple[()]]:
        return Statistics, ()

    def join(self, layer: Member) -> None:
        self._members[id(layer)] = weakref.ref(layer)

    def of(self, layer: Member) -> Tensor | None:
        """`[2, 2]`: mean and std of the layer's two latents; None where its op takes its own."""
        # A graph of torch.compile keeps nothing between layers. A replica of DataParallel, or a
        # layer that has left its model, is no member.
        if torch.compiler.is_compiling() or self._member(id(layer)) is not layer:
            return None
        seen, rows = self._made.pop(id(layer), (None, None))
        now = _moment()
        if seen is None or now != self._moment or not seen.is_of([layer.down, layer.up]):
            self._made, self._moment = self._compute(layer.down.device), now
            _, rows = self._made.pop(id(layer), (None, None))
        return rows

    def _member(self, key: int) -> Member | None:
        return found() if (found := self._members.get(key)) is not None else None

    def _compute(self, device: torch.device) -> dict[int, tuple[Seen, Tensor]]:
        """For all members that lie here as a whole."""
        there = [layer for key in self._members if (layer := self._member(key)) is not None]
        pairs = [(layer, (layer.down, layer.up)) for layer in there]
        pairs = [(layer, pair) for layer, pair in pairs if all(_is_here(t, device) for t in pair)]
        if not pairs:
            return {}
        with torch.inference_mode(False):  # whose tensors no later gradient could pass
            found = codes.statistics([tensor for _, pair in pairs for tensor in pair])
        rows = found.view(len(pairs), 2, 2).unbind()
        return {id(m): (Seen(pair), r) for (m, pair), r in zip(pairs, rows, strict=True)}


def _is_here(latent: Tensor, device: torch.device) -> bool:
    """Not elsewhere, nor in shards, as those of units of `fully_shard` are between their calls."""
    return latent.device == device and not hasattr(latent, "device_mesh")
