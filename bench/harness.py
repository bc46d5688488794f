"""Checks contenders, then times them against each other.

A case is one op on one set of shapes; its contenders do the same work on the same inputs. The order
of things is the guarantee: a contender is checked (check.py), the baseline is timed against itself,
then all who passed are timed round by round in random order (timing.py), together with the
machine's floors (floors.py), and checked once more on inputs they have not seen in that place.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from . import gpu
from .check import FACTOR, Inputs, Oracle, objection, relative_error, tensors
from .floors import Floors, Work
from .footprint import footprint
from .machine import this_run
from .row import Row
from .statistics import Ratio, paired_ratio
from .timing import FULL, GPU, QUICK, Calls, Clock, Plan, Times, interleave


@dataclass(frozen=True)
class Contender:
    """`build(*frozen)` prepares a contender for one set of inputs, untimed, and returns what is
    timed: a call of `live`. ImportError in `build` makes a row that says the peer is missing.

    `inexact` says why the result cannot have plain torch's accuracy; `tolerance` is then the
    relative error that passes. `view` turns a result into the tensors to compare, untimed.
    """

    build: Callable[..., Callable[..., Any]]
    inexact: str = ""
    tolerance: float = 0.0
    view: Callable[[Any], Any] = tensors

    def __post_init__(self) -> None:
        if bool(self.inexact) != bool(self.tolerance):
            raise ValueError(
                "tolerance must come with the reason it is needed, "
                f"got {self.tolerance} and {self.inexact!r}"
            )


def _first_line(error: Exception) -> str:
    text = str(error).strip() or "no message"
    return f"{type(error).__name__}: {text.splitlines()[0][:160]}"


class _Entrant:
    """A contender in a case, with what has become of it so far."""

    def __init__(self, name: str, contender: Contender, oracle: Oracle, row: Row) -> None:
        self.name = name
        self.contender = contender
        self.oracle = oracle
        self.blank = replace(row, contender=name)
        self.row = replace(self.blank, note=contender.inexact)
        self.calls: Calls = ()

    def fail(self, status: str, note: str) -> None:
        self.row = replace(self.blank, status=status, note=note)
        self.calls = ()

    def build(self) -> None:
        try:
            self.calls = [
                partial(self.contender.build(*s.frozen), *s.live) for s in self.oracle.sets
            ]
        except ImportError as error:
            self.fail("missing", str(error))
        except Exception as error:  # a peer that breaks is a finding, and the others go on
            self.fail("failed", _first_line(error))

    def check(self, sets: Sequence[int]) -> None:
        for i in sets:
            if not self.calls:
                return
            truth, plain = self.oracle.expected(i)
            try:
                result = tensors(self.contender.view(self.calls[i]()))
            except Exception as error:
                self.fail("failed", _first_line(error))
                return
            found = self.oracle.objection_to_inputs(i)
            found = found or objection(
                result, truth, plain, self.oracle.factor, self.contender.tolerance
            )
            if found:
                self.fail("wrong", found)
                return
            errors = [relative_error(*pair) for pair in zip(result, truth, strict=True)]
            self.row = replace(self.row, error=max([self.row.error or 0.0, *errors]))

    def check_shifted(self, sets: Sequence[int]) -> None:
        self.oracle.shift()
        self.check(sets)
        self.oracle.shift()


def _timed(
    entrant: _Entrant, times: Times, floors: Floors, baseline: str, noise: Ratio | None
) -> Row:
    seconds = times.seconds[entrant.name]
    work = floors.work
    binding, share = floors.share({n: times.seconds[n] for n in floors.calls}, seconds)
    amount, unit = (
        (work.flops, "GFLOP/s") if binding == "gemm" else (work.read + work.written, "GB/s")
    )
    row = replace(
        entrant.row,
        seconds=seconds,
        iterations=times.iterations[entrant.name],
        floor=binding,
        share=share,
        baseline=baseline,
        noise=noise,
        ratio=paired_ratio(seconds, times.seconds[baseline]) if baseline in times.seconds else None,
    )
    median = row.milliseconds[1] / 1e3 if row.milliseconds else 0.0
    return replace(row, rate=amount / median / 1e9, unit=unit) if binding else row


def _add_launches(entrant: _Entrant, clock: Clock, load: dict[str, Any]) -> None:
    """What the launches of a call cost, and what is left of it without them."""
    if entrant.calls:
        facts = gpu.launch_facts(entrant.calls[0], lambda call: clock([call], 0, 1))
        entrant.row = replace(entrant.row, facts=load | facts)


def _floor_rows(blank: Row, times: Times, floors: Floors) -> Iterator[Row]:
    for name in floors.calls:
        yield replace(
            blank,
            contender=f"floor: {name}",
            seconds=times.seconds[name],
            iterations=times.iterations[name],
            rate=floors.rate(name, times.seconds[name]) / 1e9,
            unit="GFLOP/s" if name == "gemm" else "GB/s",
        )


def _race(
    entrants: Sequence[_Entrant], baseline: str, floors: Floors, clock: Clock, plan: Plan, seed: int
) -> tuple[Times, Ratio | None]:
    """Noise first: what the baseline shows against itself is what no contender can be told from."""
    calls = {e.name: e.calls for e in entrants}
    noise = None
    if baseline in calls:
        alone = replace(plan, seconds=plan.seconds / 4, min_rounds=max(3, plan.min_rounds // 2))
        twice = interleave({"one": calls[baseline], "other": calls[baseline]}, clock, alone, seed)
        noise = paired_ratio(twice.seconds["one"], twice.seconds["other"])
    return interleave({**calls, **floors.calls}, clock, plan, seed), noise


def measure(
    family: str,
    op: str,
    case: str,
    contenders: Mapping[str, Contender],
    inputs: Sequence[Inputs],
    reference: Callable[..., Any],
    *,
    baseline: str,
    truth: Callable[..., Any] | None = None,
    work: Work | None = None,
    direction: str = "forward",
    factor: float = FACTOR,
    device: str = "cpu",
    quick: bool = False,
    seed: int | None = None,
) -> Iterator[Row]:
    """Rows of one case: every contender, whatever became of it, then the floors.

    Args:
        contenders: by name, in the order of the rows.
        inputs: at least 2 sets, which the calls take in turn: enough of them that together they
            exceed the last-level cache, where the case is one of memory traffic.
        reference: plain torch on `(*frozen, *live)`: a tensor or a tuple of them.
        baseline: the contender that the ratios are of.
        truth: where it is not the reference in float64.
        work: the traffic and operations of one call, for the floors.
        direction: "forward", "backward" or "forward+backward"; all but the first record gradients.
        factor: how many times plain torch's error passes.
        seed: of the order within the rounds; drawn and kept in the rows if not given.
    """
    if baseline not in contenders:
        raise ValueError(f"baseline must be one of {', '.join(contenders)}, got {baseline}")
    where = torch.device(device)
    seed = random.randrange(2**31) if seed is None else seed
    blank = Row(family, op, case, direction, "", this_run(device), seed=seed)
    with torch.set_grad_enabled(direction != "forward"):
        oracle = Oracle(inputs, reference, truth, factor)
        entrants = [_Entrant(name, c, oracle, blank) for name, c in contenders.items()]
        every = range(len(inputs))
        for entrant in entrants:
            entrant.build()
            entrant.check(every)
            entrant.check_shifted([0, len(inputs) - 1])
        racing = [e for e in entrants if e.calls]
        for entrant in racing:
            f = footprint(entrant.calls[0], where)
            entrant.row = replace(
                entrant.row,
                peak_mib=f.peak_mib, allocations=f.allocations, dispatched=f.dispatched,
            )  # fmt: skip
        floors = Floors(work or Work(), len(inputs), where)
        clock = Clock(where)
        plan = QUICK if quick else GPU if where.type == "cuda" else FULL
        times, noise = _race(racing, baseline, floors, clock, plan, seed)
        for entrant in racing:
            entrant.row = _timed(entrant, times, floors, baseline, noise)
            entrant.check_shifted([seed % len(inputs)])
        if where.type == "cuda":  # last, since a capture that fails may leave something behind
            load = {"clock": gpu.state().get("clocks.sm", "")}  # while the device is still warm
            for entrant in racing:
                _add_launches(entrant, clock, load)
    yield from (e.row for e in entrants)
    yield from _floor_rows(blank, times, floors)
