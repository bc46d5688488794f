"""SaraAdamW on a whole model: against dense AdamW, and without its published defects."""

import copy
import math

import pytest
import torch
from sparse_models import assert_equal, batches, dense, loss_of, masked_training, train, zoo
from torch import nn
from torch.utils.checkpoint import checkpoint

from peftkern.sparse import SaraAdamW

THRESHOLD = 0.1
W = [-0.02, 0.0019, -0.002, 0, 0.002, -1e-4]


def masks(model, threshold=THRESHOLD):
    return {name: p.detach().abs() < threshold for name, p in model.named_parameters()}


def one_row(values=W, dtype=torch.float32):
    model = nn.Linear(len(values), 1, bias=False)
    model.weight.data = torch.tensor([values], dtype=dtype)
    return model


def step_with(optimizer, *grads):
    for support, grad in zip(optimizer.supports, grads, strict=True):
        support.values.grad = torch.as_tensor(grad, dtype=support.values.dtype)
    optimizer.step()
    optimizer.zero_grad()


def test_twenty_steps_are_dense_adamw_with_masked_gradients():
    model = zoo(torch.float64)
    steps = batches(20)
    wanted = dense(masked_training(model, masks(model), steps, lr=1e-2))
    before = copy.deepcopy(dense(model))
    optimizer = SaraAdamW(model, THRESHOLD, lr=1e-2, weight_decay=0.0)
    train(model, optimizer, steps)
    for name, tensor in dense(model).items():
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-12, atol=1e-12)
        off = before[name].abs() >= THRESHOLD
        assert torch.equal(tensor[off], before[name][off])
    assert sum(s.pattern.nnz for s in optimizer.supports) > 300


def test_the_threshold_is_strict_and_signs_stay():
    """Published, every selected weight lost its sign before the first step."""
    model = one_row()
    before = model.weight.detach().clone()
    optimizer = SaraAdamW(model, 2e-3)
    (support,) = optimizer.supports
    assert support.pattern.indices().tolist() == [[0, 0, 0], [1, 3, 5]]
    assert torch.equal(model.weight, before)
    assert torch.equal(support.values.detach(), before[0, [1, 3, 5]])
    assert optimizer.param_groups[0]["lr"] == pytest.approx(4.9659e-4, rel=1e-4)


def test_the_advertised_line_trains():
    """Published, the default of progressive_iter crashed in the first step."""
    model = one_row()
    optimizer = SaraAdamW(model, threshold=2e-3)
    model(torch.ones(2, 6)).sum().backward()
    optimizer.step()
    assert optimizer.steps == 1 and (model.weight[0, 1] < W[1]).item()


@pytest.mark.parametrize("compat", [False, True])
def test_reselection_keeps_moments_and_loses_no_step(compat):
    """Of {1, 3, 5}, 1 grows to 0.0029 and freezes there; published, that step moved nothing."""
    model = one_row()
    optimizer = SaraAdamW(model, 2e-3, lr=1e-3, weight_decay=0.0, progressive_iter=2, compat=compat)
    (support,) = optimizer.supports
    grads = [[-1.0, -1e-9, 1e-9]] * 2
    wide = torch.tensor([W[1], W[3], W[5]], requires_grad=True)
    plain = torch.optim.AdamW([wide], lr=1e-3, weight_decay=0.0)
    for grad in grads[: 1 if compat else 2]:
        wide.grad = torch.tensor(grad)
        plain.step()
    for grad in grads:
        step_with(optimizer, grad)
    assert support.pattern.indices().tolist() == [[0, 0], [3, 5]]
    assert torch.allclose(model.weight[0, [1, 3, 5]], wide)
    state = optimizer.state[support.values]
    if compat:
        assert not state
    else:
        assert state["step"] == 2
        for name in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(state[name], plain.state[wide][name][1:])
    grown = model.weight[0, 1].item()
    step_with(optimizer, [1.0, 1.0])
    assert model.weight[0, 1].item() == grown and model.weight[0, 3] < wide[1]


def test_reselection_may_forget_and_may_leave_nothing():
    model = one_row()
    optimizer = SaraAdamW(model, 2e-3, lr=1e-2, progressive_iter=1, reset_on_reselect=True)
    step_with(optimizer, [-1.0, -1.0, 1.0])
    (support,) = optimizer.supports
    assert support.pattern.nnz == 0 and not optimizer.state[support.values]
    before = model.weight.detach().clone()
    model(torch.ones(2, 6)).sum().backward()
    optimizer.step()
    assert torch.equal(model.weight, before)


def test_a_graph_that_outlives_the_reselection_does_no_harm():
    """As that of `loss` does in a training loop, until the next forward pass is through."""
    found = []
    for kept in ([], None):
        model = zoo()
        optimizer = SaraAdamW(model, THRESHOLD, lr=1e-2, progressive_iter=1)
        for batch in batches(3):
            loss = loss_of(model, batch)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if kept is not None:
                kept.append(loss)
            del loss
        found.append(dense(model))
    assert_equal(*found)


def test_the_rank_loss_moves_the_values():
    """Published, it ran on parameters that nobody trained. Weighted much, its gradient decides."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(80, 70, bias=False), nn.Linear(70, 20, bias=False))
    before = model[0].weight.detach().double()
    mask = before.abs() < 0.05
    left, _, right = torch.linalg.svd(before * mask, full_matrices=False)
    slope = (left @ right)[mask]
    optimizer = SaraAdamW(model, 0.05, lr=1e-4, weight_decay=0.0, lambda_rank=1e6)
    model(torch.randn(3, 80)).sum().backward()
    optimizer.step()
    moved = (model[0].weight.detach().double() - before)[mask]
    clear = slope.abs() > 1e-4
    torch.testing.assert_close(moved[clear], -1e-4 * slope[clear].sign(), rtol=0.02, atol=0)


def test_a_small_matrix_has_no_rank_loss():
    model, other = one_row(), one_row()
    for each, weight in ((model, 0.0), (other, 1e6)):
        optimizer = SaraAdamW(each, 2e-3, lambda_rank=weight)
        each(torch.ones(2, 6)).sum().backward()
        optimizer.step()
    assert torch.equal(model.weight, other.weight)


def test_two_halves_of_a_batch_are_the_batch():
    """Published, a second backward before the step failed."""
    found = []
    for parts in (1, 2):
        model = zoo(torch.float64)
        train(model, SaraAdamW(model, THRESHOLD, lr=1e-2), parts=parts)
        found.append(dense(model))
    for name, tensor in found[0].items():
        torch.testing.assert_close(tensor, found[1][name], rtol=1e-9, atol=1e-9)


def test_clipping_sees_the_packed_gradient():
    model = zoo(torch.float64)
    wanted = dense(masked_training(model, masks(model), clip=0.01, lr=1e-2))
    optimizer = SaraAdamW(model, THRESHOLD, lr=1e-2, weight_decay=0.0)
    train(model, optimizer, clip=0.01)
    for name, tensor in dense(model).items():
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-10, atol=1e-10)


def test_tied_weights_sum_both_gradients():
    """Published, one of the two got a copy of its own whose gradient went nowhere."""
    model = zoo(torch.float64, tied=True)
    wanted = dense(masked_training(model, masks(model), lr=1e-2))
    train(model, SaraAdamW(model, THRESHOLD, lr=1e-2, weight_decay=0.0))
    assert model.head._parameters["weight"] is model.embed._parameters["weight"]
    for name, tensor in dense(model).items():
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_no_bit(reentrant):
    found = []
    for checked in (False, True):
        model = zoo()
        optimizer = SaraAdamW(model, THRESHOLD, lr=1e-2)
        if checked:
            inner = model.up.forward
            model.up.forward = lambda x, f=inner: checkpoint(f, x, use_reentrant=reentrant)
        train(model, optimizer)
        found.append(dense(model))
    assert_equal(*found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_16_bit_model_holds_the_rounded_values(dtype):
    model = zoo(dtype)
    optimizer = SaraAdamW(model, THRESHOLD, lr=1e-5)
    train(model, optimizer)
    moved = 0
    for support in optimizer.supports:
        rows, columns = support.pattern.indices().long()
        held = support.weight.detach().view(support.pattern.shape)[rows, columns]
        values = support.values.detach()
        assert values.dtype == torch.float32 and torch.equal(held, values.to(dtype))
        moved += int((values != held).sum())  # what 16 bits would have lost
    assert moved > 100


def test_channels_last_is_written_too():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Conv2d(6, 3, 1))
    found = []
    for model in (copy.deepcopy(plain), copy.deepcopy(plain).to(memory_format=torch.channels_last)):
        optimizer = SaraAdamW(model, 0.1, lr=1e-2)
        for _ in range(2):
            model(torch.ones(2, 4, 5, 5)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append(model[0].weight.detach())
    assert not found[1].is_contiguous()
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("model_first", [False, True])
@pytest.mark.parametrize("trained", [2, 5])
def test_a_resumed_run_has_the_same_bits(trained, model_first, tmp_path):
    """Saved before and behind the reselection, which the third step makes."""

    def begin():
        model = zoo()
        options = {"lr": 1e-2, "lambda_rank": 1e-3, "progressive_iter": 3}
        optimizer = SaraAdamW(model, THRESHOLD, **options)
        return model, optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 8)

    model, optimizer, schedule = begin()
    steps, path = batches(8), tmp_path / "checkpoint.pt"
    for i, batch in enumerate(steps):
        if i == trained:
            parts = (model, optimizer, schedule)
            torch.save([part.state_dict() for part in parts], path)
        train(model, optimizer, batch[None])
        schedule.step()
    other, resumed, its_schedule = begin()
    its_model, own, rates = torch.load(path)
    loads = [(resumed, own), (other, its_model)]
    for part, state in reversed(loads) if model_first else loads:
        part.load_state_dict(state)
    its_schedule.load_state_dict(rates)
    for batch in steps[trained:]:
        train(other, resumed, batch[None])
        its_schedule.step()
    assert_equal(other.state_dict(), model.state_dict())
    assert resumed.steps == optimizer.steps == 8
    for mine, its in zip(optimizer.supports, resumed.supports, strict=True):
        assert mine.pattern.hash == its.pattern.hash
        assert_states(optimizer.state[mine.values], resumed.state[its.values])


def assert_states(mine, its):
    assert mine.keys() == its.keys()
    for key, value in mine.items():
        equal = torch.equal(value, its[key]) if torch.is_tensor(value) else value == its[key]
        assert equal, key


def test_a_graph_from_before_the_step_refuses_to_go_backward():
    model = zoo()
    optimizer = SaraAdamW(model, THRESHOLD, lr=1e-2)
    loss = loss_of(model, batches()[0])
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_forward_behind_the_step_writes_nothing_again(monkeypatch):
    from peftkern.sparse import state

    model = zoo()
    optimizer = SaraAdamW(model, THRESHOLD, lr=1e-2)
    train(model, optimizer)
    monkeypatch.setattr(state, "put", None)
    loss_of(model, batches()[0])


def test_frozen_parameters_are_not_selected():
    model = zoo()
    model.embed.requires_grad_(False)
    before = model.embed.weight.detach().clone()
    optimizer = SaraAdamW(model, THRESHOLD, lr=1e-2)
    train(model, optimizer)
    assert "embed.weight" not in {s.name for s in optimizer.supports}
    assert torch.equal(model.embed.weight, before)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        f"{s.name}_sparse" for s in optimizer.supports
    }


def test_the_state_is_that_of_the_selection_alone():
    model = zoo()
    optimizer = SaraAdamW(model, THRESHOLD, lr=1e-2)
    train(model, optimizer)
    selected = sum(s.pattern.nnz for s in optimizer.supports)
    held = [t for state in optimizer.state.values() for t in state.values() if torch.is_tensor(t)]
    assert sum(t.numel() for t in held) == 2 * selected
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == selected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 0.0}, "threshold must be positive, got 0.0"),
        ({"threshold": math.nan}, "threshold must be positive, got nan"),
        ({"threshold": 1e-9}, "rule must select an entry of the weights"),
        ({"lr": -1.0}, "lr must not be negative, got -1.0"),
        ({"eps": -1.0}, "eps must not be negative, got -1.0"),
        ({"weight_decay": -1.0}, "weight_decay must not be negative, got -1.0"),
        ({"betas": (0.9, 1.0)}, r"betas must be two numbers in \[0, 1\), got \(0.9, 1.0\)"),
        ({"lambda_rank": -1.0}, "lambda_rank must not be negative, got -1.0"),
        ({"progressive_iter": 0}, "progressive_iter must be None or positive, got 0"),
    ],
)
def test_it_refuses(options, message):
    model = zoo()
    for parameter in model.parameters():
        parameter.data += 1e-6 * (parameter.data == 0)
    before = {name: (id(p), p.requires_grad) for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=message):
        SaraAdamW(model, **{"threshold": THRESHOLD, **options})
    assert {n: (id(p), p.requires_grad) for n, p in model.named_parameters()} == before


def test_it_refuses_a_model_that_does_not_train_and_other_parameters():
    model = zoo()
    with pytest.raises(ValueError, match="model must have parameters that require a gradient"):
        SaraAdamW(zoo().requires_grad_(False), THRESHOLD)
    optimizer = SaraAdamW(model, THRESHOLD)
    with pytest.raises(ValueError, match="param_group must be another optimizer's"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})


def test_it_refuses_the_state_of_something_else():
    model = zoo()
    optimizer = SaraAdamW(model, THRESHOLD)
    plain = torch.optim.AdamW(zoo().parameters())
    with pytest.raises(ValueError, match="state_dict must be one of SaraAdamW, got the keys"):
        optimizer.load_state_dict(plain.state_dict())
    other = SaraAdamW(zoo(width=10), THRESHOLD)
    with pytest.raises(ValueError, match="state_dict must have the model's tensors, got others"):
        optimizer.load_state_dict(other.state_dict())
    spoiled = optimizer.state_dict()
    name, (tensors, layout, _) = next(iter(spoiled["sparse"]["patterns"].items()))
    spoiled["sparse"]["patterns"][name] = (tensors, layout, "0" * 16)
    with pytest.raises(ValueError, match="must have the pattern that was saved for"):
        optimizer.load_state_dict(spoiled)
