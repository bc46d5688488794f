"""The harness: it lets no cheat through, and what it says about time is what was planted."""

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from toy import honest, race, reference, sets, slightly_wrong

from peftkern import bench
from peftkern.bench import (
    Contender,
    Inputs,
    check,
    harness,
    table,
    timing,
)
from peftkern.bench.statistics import Ratio, paired_ratio


def remembers_where(weight: Tensor) -> Callable[[Tensor], Tensor]:
    """Right the first time; from then on the answer depends on where the input lies."""
    known: dict[int, Tensor] = {}

    def call(x: Tensor) -> Tensor:
        if x.data_ptr() not in known:
            known[x.data_ptr()] = reference(weight, x)
        return known[x.data_ptr()]

    return call


def one_answer(weight: Tensor) -> Callable[[Tensor], Tensor]:
    known: list[Tensor] = []

    def call(x: Tensor) -> Tensor:
        known.append(known[0] if known else reference(weight, x))
        return known[-1]

    return call


def works_until_timed(weight: Tensor) -> Callable[[Tensor], Tensor]:
    calls: list[Tensor] = []

    def call(x: Tensor) -> Tensor:
        calls.append(reference(weight, x) if len(calls) < 12 else calls[0])
        return calls[-1]

    return call


def one_element_unwritten(weight: Tensor) -> Callable[[Tensor], Tensor]:
    def call(x: Tensor) -> Tensor:
        y = reference(weight, x)
        y[-1, -1] = float("nan")
        return y

    return call


def half_precision(weight: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: reference(weight.bfloat16(), x.bfloat16()).float()


def other_dtype(weight: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: reference(weight, x).double()


def changes_its_input(weight: Tensor) -> Callable[[Tensor], Tensor]:
    def call(x: Tensor) -> Tensor:
        y = reference(weight, x)
        x.neg_()
        return y

    return call


CHEATS = [
    remembers_where, one_answer, works_until_timed, slightly_wrong, one_element_unwritten,
    half_precision, other_dtype, changes_its_input,
]  # fmt: skip


@pytest.mark.parametrize("cheat", CHEATS, ids=lambda cheat: cheat.__name__)
def test_a_cheat_gets_no_time(
    cheat: Callable[..., Callable[..., object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    raced: set[str] = set()

    def watched(contenders: Mapping[str, timing.Calls], *rest: Any) -> timing.Times:
        raced.update(contenders)
        return timing.interleave(contenders, *rest)

    monkeypatch.setattr(harness, "interleave", watched)
    rows = {row.contender: row for row in race({"cheat": cheat, "late": honest})}
    assert rows["cheat"].status == "wrong" and rows["cheat"].note
    assert not rows["cheat"].seconds and rows["cheat"].ratio is None and rows["cheat"].rate is None
    assert rows["honest"].status == rows["late"].status == "ok", "the others are not to suffer"
    assert ("cheat" in raced) == (cheat is works_until_timed), "checked first, then timed"


def test_every_set_of_inputs_is_checked() -> None:
    def wrong_for_one(weight: Tensor) -> Callable[[Tensor], Tensor]:
        bad = torch.equal(weight, sets()[1].frozen[0])
        return lambda x: reference(weight, x) + bad

    rows = {row.contender: row for row in race({"cheat": wrong_for_one}, seed=0)}
    assert rows["cheat"].status == "wrong"


def test_many_small_errors_count_as_one_large_one_does() -> None:
    truth = torch.ones(10_000, dtype=torch.float64)
    plain = truth.float()
    plain[0] += 1e-3
    assert not check.objection((plain,), (truth,), (plain,), 2.0, 0.0)
    spread = plain + 5e-4
    assert "mean error" in check.objection((spread,), (truth,), (plain,), 2.0, 0.0)


def test_rounds_give_all_the_same_inputs_in_an_order_of_their_own() -> None:
    log: list[tuple[str, int]] = []
    names = ("a", "b", "c", "d")

    def calls(name: str) -> list[Callable[[], None]]:
        # Slow enough to be called once a round, and not to be woken first.
        def call(i: int) -> None:
            time.sleep(timing.SLEEPY)
            log.append((name, i))

        return [partial(call, i) for i in range(3)]

    plan = timing.Plan(rounds=4, min_rounds=4, seconds=0.0, round_seconds=1e-3)

    def rounds(seed: int) -> list[list[tuple[str, int]]]:
        log.clear()
        contenders = {name: calls(name) for name in names}
        timing.interleave(contenders, timing.Clock(torch.device("cpu")), plan, seed)
        timed = log[len(names) :]
        return [timed[i : i + len(names)] for i in range(0, len(timed), len(names))]

    first = rounds(seed=7)
    assert [{i for _, i in one} for one in first] == [{0}, {1}, {2}, {0}]
    orders = [tuple(name for name, _ in one) for one in first]
    assert all(sorted(order) == sorted(names) for order in orders) and len(set(orders)) > 1
    assert first == rounds(seed=7) and first != rounds(seed=8)


def test_weights_that_a_contender_changes_spoil_the_case() -> None:
    def changes_weights(weight: Tensor) -> Callable[[Tensor], Tensor]:
        def call(x: Tensor) -> Tensor:
            y = reference(weight, x)
            weight[0, 0] += 1
            return y

        return call

    with pytest.raises(RuntimeError, match="changed weights"):
        race({"cheat": changes_weights})


def test_a_missing_or_broken_peer_is_a_row() -> None:
    def missing(weight: Tensor) -> Callable[[Tensor], Tensor]:
        raise ImportError("no module named peer")

    def broken(weight: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda x: weight @ x

    rows = {row.contender: row for row in race({"missing": missing, "broken": broken})}
    assert (rows["missing"].status, rows["missing"].note) == ("missing", "no module named peer")
    assert rows["broken"].status == "failed" and "RuntimeError" in rows["broken"].note
    assert rows["honest"].seconds


def test_inexact_needs_a_reason_and_keeps_its_tolerance() -> None:
    with pytest.raises(ValueError, match="tolerance must"):
        Contender(honest, tolerance=0.1)
    contenders = {
        "honest": Contender(honest),
        "bf16": Contender(half_precision, "bf16 throughout", 1e-2),
        "too bad": Contender(half_precision, "bf16 throughout", 1e-4),
    }
    rows = bench.measure(
        "toy", "product", "48 x 32", contenders, sets(), reference, baseline="honest", quick=True
    )
    found = {row.contender: row for row in rows}
    assert found["bf16"].status == "ok" and found["bf16"].note == "bf16 throughout"
    assert found["bf16"].error is not None and 1e-4 < found["bf16"].error < 1e-2
    assert "(inexact)" in table.cells(found["bf16"])[0]
    assert found["too bad"].status == "wrong"


def test_gradients_are_checked_too() -> None:
    def plain(weight: Tensor, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        x = x.detach().requires_grad_()
        y = x @ weight.t()
        return y, *torch.autograd.grad(y, x, g)

    def no_gradient(weight: Tensor) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
        return lambda x, g: (x @ weight.t(), torch.zeros_like(x))

    inputs = [Inputs(s.frozen, (*s.live, torch.randn(4, 48))) for s in sets()]
    contenders = {
        "reference": Contender(lambda w: lambda x, g: plain(w, x, g)),
        "cheat": Contender(no_gradient),
    }
    rows = bench.measure(
        "toy", "product", "48 x 32", contenders, inputs, plain,
        baseline="reference", direction="forward+backward", quick=True,
    )  # fmt: skip
    found = {row.contender: row for row in rows}
    assert found["reference"].status == "ok" and found["reference"].direction == "forward+backward"
    assert found["cheat"].status == "wrong" and "output 1" in found["cheat"].note


def test_a_planted_ratio_is_found_and_a_twin_is_the_same() -> None:
    def sleeps(seconds: float) -> Callable[..., Callable[..., Tensor]]:
        def build(weight: Tensor) -> Callable[[Tensor], Tensor]:
            def call(x: Tensor) -> Tensor:
                time.sleep(seconds)
                return reference(weight, x)

            return call

        return build

    rows = race(
        {"slow": sleeps(0.012), "slow twin": sleeps(0.012), "quick": sleeps(0.004)}, baseline="slow"
    )
    found = {row.contender: row for row in rows}
    ratios = {name: row.ratio for name, row in found.items() if row.ratio is not None}
    assert 0.2 < ratios["quick"].median < 0.55 and ratios["quick"].low <= ratios["quick"].median
    assert ratios["quick"].verdict(found["quick"].noise) == "faster"
    assert ratios["slow twin"].verdict(found["slow twin"].noise) == "same"
    assert all(row.seed == 1 for row in rows)


def test_ratios_are_paired_by_round() -> None:
    baseline = [1.0, 2.0, 4.0, 8.0] * 5  # the machine slows down; the contender always takes half
    ratio = paired_ratio([b / 2 for b in baseline], baseline)
    assert (ratio.median, ratio.low, ratio.high) == (0.5, 0.5, 0.5)
    assert Ratio(0.9, 0.8, 1.1).verdict() == "same"
    assert Ratio(1.2, 1.1, 1.3).verdict() == "slower"
    assert Ratio(1.2, 1.1, 1.3).verdict(noise=Ratio(1.0, 0.9, 1.15)) == "same"


def test_measure_refuses() -> None:
    with pytest.raises(ValueError, match="baseline must be one of honest"):
        race({}, baseline="nobody")
    one = {"honest": Contender(honest)}
    with pytest.raises(ValueError, match="inputs must hold at least 2 sets, got 1"):
        list(bench.measure("toy", "p", "c", one, sets(1), reference, baseline="honest"))
