"""The rules of selection: which entries of a model does each name?"""

import math

import pytest
import torch
from selections import DTYPES, scores, sorted_first

from peftkern.sparse import AbsThreshold, Budget, SmallestFraction, TopGrad, select
from peftkern.sparse.scores import matrices


def test_a_threshold_is_strict_as_published():
    w = torch.tensor([-0.02, 0.0019, -0.002, 0, 0.002, -1e-4])
    for dtype in (torch.float32, torch.float64):
        pattern = AbsThreshold(2e-3).select({"w": w.to(dtype)})["w"]
        assert pattern.shape == (1, 6) and pattern.indices().tolist() == [[0, 0, 0], [1, 3, 5]]


def test_the_smallest_are_ties_by_the_lowest_index():
    w = {"w": torch.tensor([-3, 0.1, -0.1, 0, 2, 0.1])}
    for dtype in DTYPES:
        found = Budget(3).select({"w": w["w"].to(dtype)})["w"]
        assert found.indices()[1].tolist() == [1, 2, 3]
    assert Budget(6).select(w)["w"].nnz == 6
    assert Budget(2).select({"w": torch.ones(5)})["w"].indices()[1].tolist() == [0, 1]
    assert Budget(2, largest=True).select(w)["w"].indices()[1].tolist() == [0, 4]


def model():
    a, b = scores([(12, 50), (4, 9)], [torch.float32], seed=3)
    return {"linear": a, "conv": b.nan_to_num().reshape(4, 1, 3, 3), "bias": torch.zeros(7)}


def test_a_fraction_is_of_the_model_or_of_each_tensor():
    weights = model()
    every = matrices(weights)
    masks = sorted_first(every, round(0.25 * 643), False)
    found = SmallestFraction(0.25).select(weights)
    assert [list(p.shape) for p in found.values()] == [[12, 50], [4, 9], [1, 7]]
    assert all(torch.equal(p.mask(), m) for p, m in zip(found.values(), masks, strict=True))
    found = SmallestFraction(0.25, scope="tensor").select(weights)
    assert [p.nnz for p in found.values()] == [150, 9, 2]
    for pattern, score in zip(found.values(), every, strict=True):
        assert torch.equal(pattern.mask(), sorted_first([score], pattern.nnz, False)[0])


def test_the_largest_gradients_are_those_of_a_backward_or_given():
    weights = {n: w.nan_to_num(posinf=1, neginf=-1).requires_grad_() for n, w in model().items()}
    sum(w.square().sum() for w in weights.values()).backward()
    grads = {name: weight.grad for name, weight in weights.items()}
    found = TopGrad(20).select(weights)
    wanted = sorted_first(matrices(grads), 20, True)
    assert all(torch.equal(p.mask(), m) for p, m in zip(found.values(), wanted, strict=True))
    frozen = {name: weight.detach() for name, weight in weights.items()}
    again = TopGrad(20, grads).select(frozen)
    scored = select.TopScore(20, grads).select(frozen)
    for name, pattern in found.items():
        assert pattern.hash == again[name].hash == scored[name].hash


def test_masks_patterns_and_indices_are_a_rule():
    weights = model()
    mask = weights["conv"] > 0
    places = torch.tensor([3, 1]), torch.tensor([4, 7])
    rule = select.as_rule({"conv": mask, "linear": places})
    found = rule.select(weights)
    assert torch.equal(found["conv"].mask(), mask.view(4, 9)) and found["bias"].nnz == 0
    assert found["linear"].indices().tolist() == [[1, 3], [7, 4]]
    same = select.as_rule({"conv": found["conv"]}).select(weights)
    assert same["conv"].hash == found["conv"].hash
    assert select.as_rule(rule) is rule


def test_a_rule_comes_back_from_its_fields():
    for rule in (AbsThreshold(2e-3, "<="), Budget(7, True), SmallestFraction(0.1, "tensor"),
                 TopGrad(9), select.TopScore(4), select.Given()):  # fmt: skip
        assert select.from_fields(rule.fields()) == rule


@pytest.mark.parametrize(
    ("rule", "error", "words"),
    [
        (lambda: AbsThreshold(-1), ValueError, "threshold must be at least 0, got -1"),
        (lambda: AbsThreshold(math.nan), ValueError, "threshold must be at least 0, got nan"),
        (lambda: AbsThreshold(1, "=<"), ValueError, "side must be <, <=, > or >=, got '=<'"),
        (lambda: Budget(0), ValueError, "count must be at least 1, got 0"),
        (lambda: SmallestFraction(0), ValueError, "fraction must be above 0 and at most 1, got 0"),
        (lambda: SmallestFraction(1, "row"), ValueError, "scope must be global or tensor"),
        (lambda: Budget(644).select(model()), ValueError, "count must be at most 643, all"),
        (lambda: AbsThreshold(0).select(model()), ValueError, "rule must select an entry"),
        (lambda: Budget(1).select({}), ValueError, "weights must hold a tensor at least"),
        (lambda: Budget(1).select({"w": torch.ones(3).int()}), TypeError, "w must be float32 or"),
        (lambda: TopGrad(1).select(model()), ValueError, "gradients must have one for linear"),
        (lambda: TopGrad(1, {n: w[:1] for n, w in model().items()}).select(model()), ValueError,
         r"gradients\['linear'\] must have shape \[12, 50\], got \[1, 50\]"),
        (lambda: select.as_rule({"x": torch.ones(2).bool()}).select(model()), ValueError,
         "entries must name weights, got x"),
        (lambda: select.as_rule({"bias": torch.ones(2).bool()}).select(model()), ValueError,
         r"entries\['bias'\] must have shape \[7\], got \[2\]"),
        (lambda: select.as_rule({"bias": torch.ones(7)}).select(model()), TypeError,
         r"entries\['bias'\] must be bool"),
        (lambda: select.as_rule(0.1), TypeError, "rule must be a Rule or a mapping"),
        (lambda: select.from_fields({"rule": "Other"}), ValueError, "rule must be one of Abs"),
    ],
)  # fmt: skip
def test_what_a_rule_refuses(rule, error, words):
    with pytest.raises(error, match=words):
        rule()
