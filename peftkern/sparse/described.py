"""Modules with supports as files, reports, `merge` and `explain` see them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peftkern import _family
from peftkern._family import Explained, Parts, Wanted
from peftkern._seen import Seen
from peftkern.sparse import stored
from peftkern.sparse.state import SUFFIX, State, put, restart, states, take


class Described(_family.InPlace):
    """What every module with a support answers to the questions of `_family.Adapter`.

    A weight that several modules share is told of by the first of them alone, its `home`.
    """

    method = "sparse"

    def held(self) -> list[tuple[str, State, nn.Parameter, nn.Parameter]]:
        """Name, state, weight and values of every parameter whose home it is."""
        guests = vars(self).get("_sparse_guests", ())
        inside = self._parameters
        return [
            (name, state, inside[name], inside[name + SUFFIX])  # type: ignore[misc]
            for name, state in states(self).items()
            if name not in guests
        ]

    @property
    def merged(self) -> bool:
        return any(state.merged for state in states(self).values())

    def trained(self) -> list[nn.Parameter]:
        return [self._parameters[name + SUFFIX] for name in states(self)]  # type: ignore[misc]

    def parts(self) -> Parts:
        found: Parts = {}
        for name, state, weight, values in self.held():
            state.write(weight, values)
            found |= stored.parts(name, state, weight, values)
        return found

    def fill(self, parts: Parts) -> None:
        for name, state, weight, values in self.held():
            pattern, start = stored.unpacked(name, parts, self.shape_of(name))
            restart(state, weight, values, pattern, start)

    def wanted(self) -> Wanted:
        found: Wanted = {}
        for name, *_ in self.held():
            found |= stored.wanted(name, self.shape_of(name))
        return found

    def shape_of(self, name: str) -> Sequence[int]:
        """Of the weight that a pattern is one of."""
        return self._parameters[name].shape  # type: ignore[union-attr]

    def fields(self) -> dict[str, Any]:
        held = states(self)
        first = next(iter(held.values()))
        names = [name for name in self._parameters if name in held]
        return {"form": first.form, "parameters": names, "rule": first.rule}

    def base_hash(self) -> dict[str, str] | None:
        return {n: stored.base_hash(weight, state) for n, state, weight, _ in self.held()} or None

    def check(self, name: str, parts: Parts, base_hash: Any) -> None:
        shapes = {own: self.shape_of(own) for own, *_ in self.held()}
        stored.check(name, parts, base_hash, shapes, self.base_hash() or {})

    def misfit(self, config: _family.Config) -> str | None:
        want, have = config.fields(), self.fields()
        same = {"form": str, "parameters": set}  # whatever the order of the latter
        other = [n for n, kind in same.items() if kind(want[n]) != kind(have[n])]
        return ", ".join(f"{n} {want[n]!r}, not {have[n]!r}" for n in other) or None

    def take(self, config: _family.Config) -> None:
        for state in states(self).values():
            state.rule = config.fields()["rule"]

    def format(self) -> str:
        dtypes = {str(weight.dtype).removeprefix("torch.") for _, _, weight, _ in self.held()}
        return " and ".join(sorted(dtypes)) or "tied"

    def nbytes(self) -> int:
        """Of what it holds itself, patterns and what its weights were among it."""
        total = sum(
            t.nbytes for t in (*self._parameters.values(), *self._buffers.values()) if t is not None
        )
        for _, state, *_ in self.held():
            total += state.pattern.nbytes + (0 if state.base is None else state.base.nbytes)
            total += 0 if state.origin is state.pattern else state.origin.nbytes
        return total

    def mergeable(self) -> str:
        return "merged" if self.merged else "exact"

    def merge_obstacle(self) -> str | None:
        return None

    def refuse_merge(self, name: str, dtype: torch.dtype | None, requantize: bool) -> None:
        for parameter, state, weight, values in self.held():
            if state.merged:
                raise ValueError(f"{name} must not be merged yet, got a merged layer")
            if dtype not in (None, weight.dtype):
                raise ValueError(
                    f"dtype must be None or {weight.dtype} for {name}, whose weight takes the "
                    f"values in place, got {dtype}"
                )
            if not _summed(state, weight, values).isfinite().all():
                raise ValueError(
                    f"{name} must have a finite {parameter} once merged, got NaN or infinity"
                )

    @torch.no_grad()
    def merge_in_place(self) -> None:
        for _, state, weight, values in self.held():
            state.write(weight, values)
            if state.form == "delta":
                merged = _summed(state, weight, values)
                state.base = take(weight, state.pattern)
                put(weight, state.pattern, merged)
            state.merged = True

    @torch.no_grad()
    def unmerge_in_place(self) -> None:
        """The weight gets its very bits back; in the value form the next forward writes again."""
        for _, state, weight, _ in self.held():
            if state.origin is not state.pattern:
                state.learned = take(weight, state.origin)
            assert state.base is not None
            put(weight, state.origin, state.base)
            if state.form == "delta":
                state.base = None
            state.merged, state.seen = False, Seen()

    def explained(self) -> Explained:
        held = [(n, s, self.shape_of(n)) for n, s in states(self).items()]
        shapes = (
            f"{n} {' x '.join(map(str, shape))}, {100 * s.pattern.density:.3g} % of it trained"
            for n, s, shape in held
        )
        dtype = next(iter(self._parameters[n].dtype for n, *_ in held))  # type: ignore[union-attr]
        values = next(iter(states(self).values()))
        form = "the values in the weight" if values.form == "value" else "S beside the weight"
        return Explained(
            holds=f"{'; '.join(shapes)}, in {str(dtype).removeprefix('torch.')}",
            device=next(iter(self._parameters[n].device.type for n, *_ in held)),  # type: ignore[union-attr]
            runs=f"{self.way()}, {form}",
            ops=self.ops(values.form),
        )

    def way(self) -> str:
        return "its own forward, whose dense gradient is gathered at once"

    def ops(self, form: str) -> dict[str, str]:
        return {"backward": "sparse_gather"}


def _summed(state: State, weight: Tensor, values: Tensor) -> Tensor:
    """What merging puts into the weight, in its dtype."""
    if state.form == "delta":
        values = take(weight, state.pattern).to(values.dtype) + values
    return values.detach().to(weight.dtype)
