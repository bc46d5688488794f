"""SaraAdamW on a whole model: against dense AdamW, and without its published defects."""

import copy

import pytest
import torch
from sparse_models import assert_equal, batches, dense, loss_of, masked_training, train, zoo
from torch import nn

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
