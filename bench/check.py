"""Nothing is timed before its result has passed here.

A result passes if it is as good as plain torch in the same dtype, by the rule of `_verdict`, for
the largest error and for the root mean square; the truth is the reference in float64. A contender
labelled inexact passes below a relative error of its own, which the row shows. Results that hold no
floats are compared bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peftkern._verdict import FACTOR, bound

Tensors = tuple[Tensor, ...]


@dataclass(frozen=True)
class Inputs:
    """One set of inputs. `frozen` is what a contender may prepare once (weights); `live` is what
    every call reads anew (activations, gradients), of the same shapes in every set of a case.
    """

    frozen: tuple[Any, ...] = ()
    live: Tensors = ()


def tensors(result: Any) -> Tensors:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def detached(result: Tensors) -> Tensors:
    return tuple(t.detach() for t in result)


def to_double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def sizes(x: Tensor) -> tuple[float, float]:
    """The largest magnitude and the root mean square."""
    x = x.detach().double()
    return (float(x.abs().max()), float(x.square().mean().sqrt())) if x.numel() else (0.0, 0.0)


def relative_error(result: Tensor, truth: Tensor) -> float:
    size = sizes(truth)[1]
    return sizes(result.detach().double() - truth)[1] / size if size else 0.0


def objection(
    result: Tensors, truth: Tensors, plain: Tensors, factor: float, tolerance: float
) -> str:
    """Why `result` does not pass, or nothing. `tolerance` 0 asks for plain torch's accuracy."""
    if len(result) != len(plain):
        return f"result must have {len(plain)} tensors, got {len(result)}"
    for i, (actual, exact, usual) in enumerate(zip(result, truth, plain, strict=True)):
        if actual.shape != usual.shape or actual.dtype != usual.dtype:
            wanted, got = (f"{t.dtype} {list(t.shape)}" for t in (usual, actual))
            return f"output {i} must be {wanted}, got {got}"
        if not actual.is_floating_point():
            if not torch.equal(actual, usual):
                return f"output {i} must equal the reference"
            continue
        if tolerance:
            error = relative_error(actual, exact)
            if not error <= tolerance:  # written so that NaN does not pass
                return (
                    f"relative error of output {i} must be at most {tolerance:g}, got {error:.3g}"
                )
            continue
        errors, usual_errors = (sizes(t.detach().double() - exact) for t in (actual, usual))
        for kind, error, usual_error, size in zip(
            ("largest", "mean"), errors, usual_errors, sizes(exact), strict=True
        ):
            allowed = bound(usual_error, size, actual.dtype, factor)
            if not error <= allowed:
                return f"{kind} error of output {i} must be at most {allowed:.3g}, got {error:.3g}"
    return ""


class Oracle:
    """The inputs of a case and what must come out, computed when asked for and kept.

    `shift()` puts into each set the live values of the next one, in place: whoever remembers an
    answer by where its input lies is then wrong.
    """

    def __init__(
        self,
        sets: Sequence[Inputs],
        plain: Callable[..., Any],
        truth: Callable[..., Any] | None = None,
        factor: float = FACTOR,
    ) -> None:
        if len(sets) < 2:
            raise ValueError(f"inputs must hold at least 2 sets, got {len(sets)}")
        self.sets = sets
        self.factor = factor
        self.shifted = False
        self._plain = plain
        self._truth = truth
        self._live = [tuple(t.detach().clone() for t in s.live) for s in sets]
        self._weights = [self._digest(s) for s in sets]
        self._expected: dict[tuple[int | None, int], tuple[Tensors, Tensors]] = {}

    @staticmethod
    def _digest(inputs: Inputs) -> list[int]:
        weights = [t for t in inputs.frozen if isinstance(t, Tensor)]
        return [int(torch.hash_tensor(t).view(torch.int64)) for t in weights]

    def _source(self, i: int) -> int:
        """The set whose live values lie in set `i` now."""
        return (i + 1) % len(self.sets) if self.shifted else i

    def _values(self, i: int) -> Tensors:
        return self._live[self._source(i)]

    def shift(self) -> None:
        self.shifted = not self.shifted
        self.restore()

    def restore(self) -> None:
        for i, inputs in enumerate(self.sets):
            for t, value in zip(inputs.live, self._values(i), strict=True):
                t.detach().copy_(value)

    def objection_to_inputs(self, i: int) -> str:
        """Whether a call changed what it was only to read. Live inputs are put right again."""
        inputs = self.sets[i]
        if self._digest(inputs) != self._weights[i]:
            raise RuntimeError(
                "a contender changed weights that the others share: the case is spoilt"
            )
        if all(map(torch.equal, inputs.live, self._values(i))):
            return ""
        self.restore()
        return "it changed its input"

    def expected(self, i: int) -> tuple[Tensors, Tensors]:
        """Truth and plain torch's result for set `i` as it stands."""
        key = (i if self.sets[i].frozen else None, self._source(i))
        if key not in self._expected:
            s = self.sets[i]
            plain = tensors(self._plain(*s.frozen, *s.live))
            if self._truth is not None:
                truth = tensors(self._truth(*s.frozen, *s.live))
            else:
                truth = tensors(self._plain(*map(to_double, s.frozen), *map(to_double, s.live)))
            self._expected[key] = detached(truth), detached(plain)
        return self._expected[key]
