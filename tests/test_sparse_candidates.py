"""ID3's candidates: their scores, and the best of a gradient that is never whole."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peftkern.sparse import Pattern, candidates

WEIGHT, GRAD = [0.1, -0.5, 2, 0, -1], [0.2, -1, 3, 0.05, -0.5]


@pytest.mark.parametrize(
    ("exponent", "wanted"),
    [
        (0, [0.2, 1, 3, 0.05, 0.5]),
        (1, [1, 1.6667, 1.4286, 0.5, 0.4545]),
        (2, [5, 2.7778, 0.6803, 5, 0.4132]),
    ],
)
def test_a_score_is_gradient_by_magnitude(exponent, wanted):
    found = candidates.score(torch.tensor(GRAD), torch.tensor(WEIGHT), exponent, 0.1)
    torch.testing.assert_close(found, torch.tensor(wanted), rtol=1e-4, atol=0)


def by_sorting(slope, weight, mask, count, exponent=1.0, eps=0.1):
    """The places of the best, of the whole gradient at once."""
    scores = candidates.score(slope, weight, exponent, eps)
    scores = torch.where(mask | scores.isnan(), -1.0, scores).flatten()
    order = scores.argsort(descending=True, stable=True)[:count]
    return order[scores[order] >= 0]


@given(
    rows=st.integers(1, 30), columns=st.integers(1, 40), tokens=st.integers(0, 6),
    density=st.sampled_from([0.0, 0.4, 1.0]), count=st.integers(1, 50),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    panel=st.sampled_from([1, 64, 2**20]),
)  # fmt: skip
def test_candidates_are_the_best_of_the_whole_gradient(
    rows, columns, tokens, density, count, dtype, panel, monkeypatch
):
    monkeypatch.setattr(candidates, "_PANEL", panel)
    generator = torch.Generator().manual_seed(rows * columns)
    # Small integers: every sum is exact, and many scores are equal.
    x, grad = (
        torch.randint(-2, 3, (tokens, n), generator=generator).to(dtype) for n in (columns, rows)
    )
    weight = torch.randint(-2, 3, (rows, columns), generator=generator).to(dtype)
    mask = torch.rand(rows, columns, generator=generator) < density
    pattern = Pattern.from_mask(mask)
    sums = torch.promote_types(dtype, torch.float32)
    slope = grad.to(sums).t() @ x.to(sums)
    none = torch.zeros(1, dtype=sums)
    wanted = by_sorting(slope, weight.to(sums), mask, count)
    for operands in ((x, grad), (None, slope)):
        scores, places, grads = candidates.candidates_op(
            *operands, weight, *pattern.operand(), 1.0, 0.1, none, count
        )
        assert len(scores) == len(places) == len(grads) == count
        there = scores >= 0
        assert torch.equal(places[there], wanted)
        assert torch.equal(grads[there], slope.flatten()[wanted])
        if len(wanted):  # what scores less than the threshold need not come, all else does
            least = scores[there][len(wanted) // 2].view(1)
            some = candidates.candidates_op(
                *operands, weight, *pattern.operand(), 1.0, 0.1, least, count
            )
            above = scores >= least
            assert torch.equal(some[1][: int(above.sum())], places[above])


def test_what_is_no_number_is_no_candidate():
    slope = torch.tensor([[torch.nan, 1.0], [-2.0, torch.nan]])
    pattern = Pattern.from_mask(torch.zeros(2, 2, dtype=torch.bool))
    scores, places, grads = candidates.candidates_op(
        None, slope, torch.ones(2, 2), *pattern.operand(), 0.0, 0.1, torch.zeros(1), 3
    )
    assert places.tolist() == [2, 1, -1] and grads.tolist() == [-2, 1, 0] and scores[2] == -1


def test_the_op_is_well_registered():
    pattern = Pattern.from_mask(torch.eye(4, dtype=torch.bool))
    args = (
        torch.randn(3, 4), torch.randn(3, 4), torch.randn(4, 4), *pattern.operand(), 1.0, 0.1,
        torch.zeros(1), 5,
    )  # fmt: skip
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(candidates.candidates_op, args, test_utils=tests)
