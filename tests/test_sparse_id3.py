"""Id3AdamW on whole models: against whole gradients, its budget, and runs that are resumed."""

import copy

import pytest
import torch
from sparse_models import assert_equal, batches, dense, loss_of, train, zoo
from test_sparse_candidates import by_sorting
from torch import nn
from torch.utils.checkpoint import checkpoint

from peftkern.sparse import Id3AdamW, candidates
from peftkern.sparse.id3 import admitted


def test_the_schedule_spends_the_budget_and_no_more():
    """Published, a remainder was spent in every step: 321,000 of a budget of 320,001."""
    assert [admitted(t, 103, 10) for t in range(1, 13)] == [11] * 3 + [10] * 7 + [0, 0]
    assert [admitted(t, 3, 5) for t in range(1, 7)] == [1, 1, 1, 0, 0, 0]
    assert sum(admitted(t, 320_001, 1000) for t in range(1, 1001)) == 320_001
    live = [sum(admitted(s, 100, 10) for s in range(1, t + 1)) for t in range(1, 11)]
    assert sum(live) == 100 * 11 / 2


def plain(model, budget, max_steps, steps, cohorts=True, lr=1e-2, exponent=1.0, eps=0.1):
    """The method with whole gradients and masks; -> trained weights, and how many train by step."""
    model = copy.deepcopy(model)
    names = [name for name, _ in model.named_parameters()]
    weights = [p for _, p in model.named_parameters()]
    born = [torch.full(p.shape, -1) for p in weights]
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in weights]
    sizes = []
    for t, batch in enumerate(steps, 1):
        grads = torch.autograd.grad(loss_of(model, batch), weights)
        scores = torch.cat([
            torch.where(b < 0, candidates.score(g, w.detach(), exponent, eps), -1.0).flatten()
            for g, w, b in zip(grads, weights, born, strict=True)
        ])  # fmt: skip
        count = admitted(t, budget, max_steps)
        chosen = torch.zeros_like(scores, dtype=torch.bool)
        chosen[scores.argsort(descending=True, stable=True)[:count]] = True
        parts = chosen.split([p.numel() for p in weights])
        for w, g, b, (m, s), part in zip(weights, grads, born, moments, parts, strict=True):
            b[part.view_as(b)] = t - 1
            live = b >= 0
            age = ((t - b) if cohorts else torch.full_like(b, t)).double()
            m.copy_(torch.where(live, 0.9 * m + 0.1 * g, m))
            s.copy_(torch.where(live, 0.999 * s + 0.001 * g * g, s))
            step = m / (1 - 0.9**age) / ((s / (1 - 0.999**age)).sqrt() + 1e-8)
            w.data.copy_(torch.where(live, w - lr * step, w))
        sizes.append(int(sum((b >= 0).sum() for b in born)))
    return dict(zip(names, weights, strict=True)), sizes


@pytest.mark.parametrize("cohorts", [True, False])
@pytest.mark.parametrize("tied", [False, True])
def test_streamed_selection_trains_as_whole_gradients_would(cohorts, tied):
    model = zoo(torch.float64, seed=3)
    steps = batches(7)
    if tied:  # two modules with one weight, one of which alone computes with it
        model.also = model.up
    wanted, sizes = plain(model, 103, 5, steps, cohorts)
    optimizer = Id3AdamW(model, 103, 5, lr=1e-2, cohort_steps=cohorts)
    found = []
    for batch in steps:
        train(model, optimizer, batch[None])
        found.append(optimizer.selected)
    assert found == sizes == [21, 42, 63, 83, 103, 103, 103]
    weights = dense(model)
    for name, tensor in wanted.items():
        torch.testing.assert_close(weights[name], tensor.detach(), rtol=1e-11, atol=1e-12)


def test_no_gradient_is_kept_whole():
    model = zoo()
    optimizer = Id3AdamW(model, 60, 3)
    for batch in batches(2):
        loss_of(model, batch).backward()
        kept = [p.grad.numel() for p in model.parameters() if p.grad is not None]
        kept += [t.numel() for t in optimizer._collector.found]
        assert sum(kept) <= optimizer.selected + 4 * 20
        optimizer.step()


def test_under_autocast_the_products_dtype_decides():
    model, plain = zoo(), zoo()
    optimizer = Id3AdamW(model, 25, 1, exponent=0.0)
    with torch.autocast("cpu", torch.bfloat16):
        loss_of(model, batches()[0]).backward()
        loss_of(plain, batches()[0]).backward()
    found = optimizer._collector.found
    weights = list(plain.parameters())
    wanted = torch.cat([p.grad.flatten() for p in weights]).abs().topk(25).values
    # 16-bit gradients of the plain model, sums in float32 of ours: the same up to their rounding.
    torch.testing.assert_close(
        found.grads.abs().sort(descending=True)[0], wanted, rtol=2e-2, atol=0
    )


def test_convolutions_are_candidates_too():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2, bias=False), nn.Flatten()
    ).double()
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    slope = torch.autograd.grad(model(x).square().sum(), model[0].weight)[0]
    weight = model[0].weight.detach().clone()
    wanted = by_sorting(slope, weight, torch.zeros_like(weight, dtype=torch.bool), 9)
    optimizer = Id3AdamW(model, 9, 1)
    model(x).square().sum().backward()
    optimizer.step()
    (support,) = optimizer.supports
    assert torch.equal(support.pattern.mask().flatten().nonzero()[:, 0], wanted.sort()[0])


def test_fresh_heads_train_whole_at_the_budgets_cost():
    model = zoo()
    head = model.head.weight.numel()
    optimizer = Id3AdamW(model, head + 7, 2, lr=1e-2, choose_all=["head"])
    assert optimizer.selected == head
    before = model.head.weight.detach().clone()
    train(model, optimizer)
    assert optimizer.selected == head + 7
    assert (model.head.weight != before).all()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("budget", [1, 3, 1000])
def test_the_budget_is_met_and_never_exceeded(budget, tied):
    """And who is in stays in."""
    model = zoo(tied=tied)
    optimizer = Id3AdamW(model, budget, 4)
    before = [s.pattern.mask() for s in optimizer.supports]
    for batch in batches(6):
        train(model, optimizer, batch[None])
        assert optimizer.selected <= budget
        masks = [s.pattern.mask() for s in optimizer.supports]
        assert all((old <= new).all() for old, new in zip(before, masks, strict=True))
        before = masks
    assert optimizer.selected == budget
    assert not any(s.state.watcher for s in optimizer.supports)


def test_the_last_forward_pass_decides_where_gradients_are_accumulated():
    model, other = zoo(torch.float64), zoo(torch.float64)
    first, last = batches(2)
    optimizer = Id3AdamW(model, 40, 1)
    for batch in (first, last):
        loss_of(model, batch).backward()
    optimizer.step()
    alone = Id3AdamW(other, 40, 1)
    loss_of(other, last).backward()
    alone.step()
    assert [s.pattern.hash for s in optimizer.supports] == [s.pattern.hash for s in alone.supports]


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_no_bit(reentrant):
    found = []
    for checked in (False, True):
        model = zoo()
        optimizer = Id3AdamW(model, 60, 2, lr=1e-2)
        if checked:
            inner = model.up.forward
            model.up.forward = lambda x, f=inner: checkpoint(f, x, use_reentrant=reentrant)
        train(model, optimizer)
        found.append(dense(model))
    assert_equal(*found)


@pytest.mark.parametrize("model_first", [False, True])
@pytest.mark.parametrize("saved", [2, 5])
def test_a_resumed_run_has_the_same_bits(saved, model_first, tmp_path):
    model = zoo()
    optimizer = Id3AdamW(model, 101, 4, lr=1e-2)
    for i, batch in enumerate(batches(7)):
        if i == saved:
            torch.save([model.state_dict(), optimizer.state_dict()], tmp_path / "checkpoint.pt")
        train(model, optimizer, batch[None])
    other = zoo()
    resumed = Id3AdamW(other, 101, 4, lr=1e-2)
    its_model, own = torch.load(tmp_path / "checkpoint.pt")
    loads = [(resumed, own), (other, its_model)]
    for part, state in reversed(loads) if model_first else loads:
        part.load_state_dict(state)
    for batch in batches(7)[saved:]:
        train(other, resumed, batch[None])
    assert_equal(other.state_dict(), model.state_dict())
    for mine, its in zip(optimizer.supports, resumed.supports, strict=True):
        state, found = optimizer.state[mine.values], resumed.state[its.values]
        assert state.keys() == found.keys()
        assert not state or state["born"].dtype == found["born"].dtype == torch.int32
        for key, value in state.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(found[key])), key


def test_a_smaller_budget_takes_a_larger_state_and_lets_nobody_in():
    model = zoo()
    optimizer = Id3AdamW(model, 100, 2)
    train(model, optimizer)
    other = zoo()
    resumed = Id3AdamW(other, 60, 9)
    resumed.load_state_dict(optimizer.state_dict())
    other.load_state_dict(model.state_dict())
    train(other, resumed)
    assert resumed.selected == 100


def test_a_copy_of_the_model_tells_nobody(tmp_path):
    model = zoo()
    optimizer = Id3AdamW(model, 40, 2)
    torch.save(copy.deepcopy(model), tmp_path / "model.pt")
    other = torch.load(tmp_path / "model.pt", weights_only=False)
    loss_of(other, batches()[0]).backward()
    assert optimizer._collector.found is None
    loss_of(model, batches()[0]).backward()
    assert len(optimizer._collector.found.scores) == 20


@pytest.mark.parametrize("clips", [False, True])
def test_scaled_gradients_are_refused_before_anything_changes(clips):
    """Those of the entries that come in would keep the scale."""
    model = zoo()
    optimizer = Id3AdamW(model, 40, 2)
    before = copy.deepcopy(model.state_dict())
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(loss_of(model, batches()[0])).backward()
    if clips:
        scaler.unscale_(optimizer)
    with pytest.raises(RuntimeError, match="gradients must not be scaled, got them from a GradSc"):
        scaler.step(optimizer)
    assert_equal(model.state_dict(), before)
    assert optimizer.steps == optimizer.selected == 0
    optimizer.zero_grad()
    train(model, optimizer)
    assert optimizer.selected == 40


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 0}, "budget must be at least 1, which choose_all takes, and at most"),
        ({"budget": 10**6}, "budget must be at least 1, .* got 1000000"),
        ({"choose_all": ["head"]}, "budget must be at least 120"),
        ({"choose_all": ["heads"]}, "choose_all must name parameters that train, .* got 'heads'"),
        ({"max_steps": 0}, "max_steps must be positive, got 0"),
        ({"magnitude_eps": -1.0}, "magnitude_eps must not be negative, got -1.0"),
        ({"lr": -1.0}, "lr must not be negative, got -1.0"),
    ],
)
def test_it_refuses(options, message):
    model = zoo()
    with pytest.raises(ValueError, match=message):
        Id3AdamW(model, **{"budget": 50, "max_steps": 3, **options})
    assert all(p.requires_grad for p in model.parameters())
