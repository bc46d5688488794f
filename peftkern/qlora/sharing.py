"""Layers that read one and the same input: called one by one, computed together."""

from __future__ import annotations

import weakref
from typing import Protocol

import torch
from torch import Tensor

from peftkern.qlora.siblings import Sibling, siblings


class Member(Protocol):
    """A layer that can be computed together with others."""

    def operands(self, x: Tensor) -> tuple[Sibling, float] | None:
        """What it multiplies x by, and its dropout; None where its forward is another one."""


class SharedInput:
    """What the first of its layers computes of an input for all of them, until they ask for it.

    In training: one pass over the input, and one gradient of it instead of a sum of several.
    Only the very same tensor, unchanged since, is taken for the same input. A layer that is called
    with another gets its own numbers, as if it were alone; so a wrong group costs time and nothing
    else, without dropout.

    With dropout, the first to be called draws a seed for each, in the order of the calls. So where
    nothing between their calls draws from torch's generator, each drops what it drops alone, and
    leaves the generator as it does alone. Where something does, or where one is not called after
    all, seeds are other ones: independent all the same, and drawn again in a checkpoint's replay.

    Copies and pickles have no members: a layer that is copied joins the copy of its group.
    """

    def __init__(self) -> None:
        # Not held: a layer keeps its group, and must be free to go when its model does.
        self._members: tuple[weakref.ref[Member], ...] = ()
        self._made: _Made | None = None

    def __reduce__(self) -> tuple[type[SharedInput], tuple[()]]:
        return SharedInput, ()

    @property
    def members(self) -> list[Member]:
        return [layer for member in self._members if (layer := member()) is not None]

    def join(self, layer: Member) -> None:
        """In the order of the calls, which is that in which seeds are drawn."""
        self._members += (weakref.ref(layer),)

    def forward(self, layer: Member, x: Tensor) -> Tensor | None:
        """The layer's output; None where it must be computed alone."""
        # A graph of torch.compile keeps nothing between layers; of an inference tensor no change
        # would be seen. Without a gradient there is little to save: of one row, less than it costs
        # to keep what was made (a decoding step of SmolLM2-135M took 25 ms so, and 23 ms alone).
        if not torch.is_grad_enabled() or torch.compiler.is_compiling() or x.is_inference():
            return None
        made = self._made
        if made is None or not made.is_of(x) or id(layer) not in made.ys:
            if (made := self._make(x)) is None or id(layer) not in made.ys:
                return None
        y = made.ys.pop(id(layer))
        self._made = made if made.ys else None
        return y

    def _make(self, x: Tensor) -> _Made | None:
        members, parts, dropouts = self.members, [], set()
        for member in members:
            if (operands := member.operands(x)) is None:
                return None
            parts.append(operands[0])
            dropouts.add(operands[1])
        if len(parts) < 2 or len(dropouts) > 1:
            return None
        return _Made(x, members, siblings(x, parts, *dropouts))


class _Made:
    """Outputs that have been computed of x, by layer, and have not been asked for yet."""

    def __init__(self, x: Tensor, members: list[Member], ys: tuple[Tensor, ...]) -> None:
        self.ys = {id(member): y for member, y in zip(members, ys, strict=True)}
        self._x, self._state = x, _state(x)

    def is_of(self, x: Tensor) -> bool:
        return x is self._x and self._state == _state(x)


def _state(x: Tensor) -> tuple[int, bool]:
    return x._version, torch._C._is_any_autocast_enabled()
