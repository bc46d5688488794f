"""When a result is good: one rule for the tests, the benchmarks and the self-check.

A result may be off the float64 truth by a small multiple of what plain torch loses in its dtype:

    error(result, truth) <= FACTOR * error(plain, truth) + eps * size(truth)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

FACTOR = 2.0


@dataclass(frozen=True)
class Verdict:
    """How far a result is off, and how far it may be; 0 and 0 where it must be exact."""

    error: float
    allowed: float

    @property
    def passed(self) -> bool:
        return self.error <= self.allowed  # written so that NaN does not pass

    def __str__(self) -> str:
        if self.error == self.allowed == 0:
            return "exact"
        return f"error {self.error:.2g}, allowed {self.allowed:.2g}"


@dataclass(frozen=True)
class Case:
    """A line of the self-check.

    Args:
        name: what it asks of which op.
        ops: the registered ops that it calls.
        verdicts: runs them; whatever it raises counts as a failure.
    """

    name: str
    ops: tuple[str, ...]
    verdicts: Callable[[], Iterator[Verdict]]


def bound(plain_error: float, size: float, dtype: torch.dtype, factor: float = FACTOR) -> float:
    """The largest error that passes; `size` is the magnitude that one rounding is of."""
    return factor * plain_error + torch.finfo(dtype).eps * size


def judge(
    results: Sequence[Tensor],
    plain: Callable[..., Sequence[Tensor]],
    *args: Any,
    factor: float = FACTOR,
) -> Iterator[Verdict]:
    """A verdict on the largest error of each result.

    Args:
        results: on any device.
        plain: the math in plain torch; called with `args`, and with their float64 images.
        factor: a larger one stands beside its reason.

    Raises:
        ValueError: a result of another shape or dtype than plain torch's.
    """
    exact = [a.double() if _is_float(a) else a for a in args]
    sizes = [a.abs() if _is_float(a) else a for a in exact]
    outputs = (results, plain(*exact), plain(*args), plain(*sizes))
    for i, (result, truth, usual, terms) in enumerate(zip(*outputs, strict=True)):
        if result.shape != usual.shape or result.dtype != usual.dtype:
            wanted, got = (f"{t.dtype} {list(t.shape)}" for t in (usual, result))
            raise ValueError(f"output {i} must be {wanted}, got {got}")
        if result.numel() == 0:
            yield Verdict(0.0, 0.0)
            continue
        error, plain_error = (
            float((t.detach().to(truth.device).double() - truth).abs().max())
            for t in (result, usual)
        )
        # Of a few sums, plain torch may hit the truth by luck, and their terms may cancel: one
        # rounding of the terms' magnitudes is always allowed.
        size = float(torch.maximum(truth.abs(), terms.abs()).max())
        if result.dtype == torch.float64:  # then the truth is itself rounded, in another order
            size *= 16
        yield Verdict(error, bound(plain_error, size, result.dtype, factor))


def compare(result: Tensor, wanted: Tensor) -> Verdict:
    """On a result that must be exact."""
    if result.shape != wanted.shape or result.dtype != wanted.dtype:
        wish, got = (f"{t.dtype} {list(t.shape)}" for t in (wanted, result))
        raise ValueError(f"output must be {wish}, got {got}")
    result = result.to(wanted.device)
    if torch.equal(result, wanted):
        return Verdict(0.0, 0.0)
    return Verdict(float((result.double() - wanted.double()).abs().max()), 0.0)


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()
