"""Supports come, go and change, and travel with their model; what cannot have one is refused."""

import copy
import io
import pickle

import pytest
import torch
from sparse_models import BATCHES, chosen, loss_of, trained, zoo
from torch import nn

from peftkern.sparse import Pattern
from peftkern.sparse.state import take
from peftkern.sparse.support import attach, detach, supports


def test_casting_a_model_leaves_its_values_wide():
    model = zoo()
    attach(model, chosen(model))
    loss_of(model, BATCHES[0]).backward()
    values = [s.values.detach().clone() for s in supports(model)]
    model.bfloat16()
    for support, before in zip(supports(model), values, strict=True):
        assert support.weight.dtype == support.state.base.dtype == torch.bfloat16
        assert torch.equal(support.values, before)
        assert support.values.grad.dtype == torch.float32


def test_copies_and_pickles_train_on_for_themselves():
    model = zoo(tied=True)
    attach(model, chosen(model))
    twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    wanted = trained(copy.deepcopy(model), lr=1e-2).state_dict()
    before = copy.deepcopy(model.state_dict())
    for twin in twins:
        found = trained(twin, lr=1e-2).state_dict()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in before)


def kept_half(pattern):
    rows, columns = pattern.indices()[:, ::2]
    return Pattern.from_indices(rows, columns, pattern.shape)


def test_a_state_dict_brings_its_entries_along():
    model = zoo(tied=True)
    attach(model, chosen(model))
    for support in supports(model):  # some entries have stopped training
        support.replace(kept_half(support.pattern))
    trained(model, lr=1e-2)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    other = zoo(seed=3, tied=True)
    attach(other, chosen(other, density=0.1, seed=8))
    state = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    other.load_state_dict(state)
    for support, wanted in zip(supports(other), supports(model), strict=True):
        assert support.pattern.hash == wanted.pattern.hash
        assert support.state.origin.hash == wanted.state.origin.hash
        assert torch.equal(support.state.base, wanted.state.base)
    first, second = (trained(m, lr=1e-2).state_dict() for m in (model, other))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("part", ["columns", "row_start", "base"])
def test_a_state_dict_without_its_entries_is_refused(part):
    model = nn.Sequential(nn.Linear(8, 8))
    attach(model, chosen(model))
    state = model.state_dict()
    del state[f"0.weight_sparse.{part}"]
    with pytest.raises(RuntimeError, match="state_dict must have columns, row_start, base, got"):
        model.load_state_dict(state)


def test_taken_away_a_support_leaves_the_module_that_was_there():
    model = zoo()
    kinds = [type(m) for m in model.modules()]
    attach(model, chosen(model))
    trained(model, lr=1e-2)
    wanted = model(BATCHES[0, 0])
    for support in supports(model):
        detach(support, model)
    assert [type(m) for m in model.modules()] == kinds
    assert not supports(model) and torch.equal(model(BATCHES[0, 0]), wanted)


def test_a_recurrent_module_is_whole_again_once_its_support_is_gone():
    lstm = nn.LSTM(4, 3)
    wanted = lstm(torch.ones(2, 4))[0]
    for support in attach(lstm, chosen(lstm)):
        detach(support, lstm)
    torch.testing.assert_close(lstm(torch.ones(2, 4))[0], wanted)


def test_replaced_entries_keep_what_they_have_learned():
    linear = nn.Linear(8, 6)
    (support,) = attach(linear, {"weight": Pattern.from_mask(torch.eye(6, 8).bool())})
    start, parameter = support.weight.detach().clone(), support.values
    with torch.no_grad():
        support.values.add_(1.0)
    mask = torch.zeros(6, 8, dtype=torch.bool)
    mask[0] = True
    support.replace(Pattern.from_mask(mask))
    assert support.values is parameter and support.values.shape == (8,)
    held = support.weight.detach()
    assert torch.equal(held[mask], support.values.detach())
    changed = held != start
    assert torch.equal(changed, torch.eye(6, 8).bool())
    assert support.state.origin.nnz == 13  # the diagonal and the row, which share an entry
    assert torch.equal(support.state.base, take(start, support.state.origin))


def test_replaced_entries_of_sixteen_bits_keep_what_their_weight_rounds_away():
    linear = nn.Linear(8, 6).bfloat16()
    (support,) = attach(linear, {"weight": Pattern.from_mask(torch.eye(6, 8).bool())})
    with torch.no_grad():
        support.values.mul_(1.0001)
    kept = support.values.detach()[:2].clone()
    mask = torch.zeros(6, 8, dtype=torch.bool)
    mask[:2] = True
    support.replace(Pattern.from_mask(mask))
    assert torch.equal(support.values.detach()[[0, 9]], kept)
    assert not torch.equal(kept, kept.bfloat16().float())


def refusals():
    full = Pattern.from_mask(torch.ones(6, 8, dtype=torch.bool))
    adapted = nn.Linear(8, 6)
    attach(adapted, {"weight": full})
    quantised = nn.Linear(8, 6)
    quantised.weight = nn.Parameter(torch.ones(6, 8, dtype=torch.uint8), requires_grad=False)
    twins = nn.Sequential(nn.Linear(8, 6), nn.Linear(8, 6))
    twins[1].weight = nn.Parameter(twins[0].weight.data)
    tied = nn.Sequential(nn.Linear(8, 6), nn.Linear(8, 6))
    tied[1].weight = tied[0].weight
    both = {"0.weight": full, "1.weight": full}
    return {
        "no such name": (nn.Linear(8, 6), {"wight": full}, "value", "must name parameters"),
        "another shape": (nn.Linear(6, 8), {"weight": full}, "value", "must have the shape"),
        "another form": (nn.Linear(8, 6), {"weight": full}, "sum", "form must be 'value' or"),
        "twice": (adapted, {"weight": full}, "value", "has a support already"),
        "delta of a bias": (
            nn.Linear(8, 6), {"bias": Pattern.from_mask(torch.ones(1, 6, dtype=torch.bool))},
            "delta", "no weight of a linear",
        ),
        "no float": (quantised, {"weight": full}, "value", "weight must be float32"),
        "the same memory": (twins, both, "value", "separate memory"),
        "by two names": (tied, both, "value", "by two names"),
        "meta": (nn.Linear(8, 6, device="meta"), {"weight": full}, "value", "meta device"),
    }  # fmt: skip


@pytest.mark.parametrize("model, selection, form, words", refusals().values(), ids=refusals())
def test_attaching_refuses(model, selection, form, words):
    before = [(name, id(m), type(m)) for name, m in model.named_modules()]
    names = [name for name, _ in model.named_parameters()]
    with pytest.raises((ValueError, TypeError), match=words):
        attach(model, selection, form)
    assert [(name, id(m), type(m)) for name, m in model.named_modules()] == before
    assert [name for name, _ in model.named_parameters()] == names
