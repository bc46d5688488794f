"""SaraAdamW in a training loop: checkpoints, dtypes, layouts, resumed runs, and what it refuses."""

import copy
import math

import pytest
import torch
from sparse_models import assert_equal, batches, dense, loss_of, train, zoo
from torch import nn
from torch.utils.checkpoint import checkpoint

import peftkern
from peftkern.sparse import SaraAdamW

THRESHOLD = 0.1


def test_the_scale_of_a_loss_is_taken_out_again():
    model, other = zoo(torch.float64), zoo(torch.float64)
    train(model, SaraAdamW(model, THRESHOLD, lr=1e-2))
    optimizer = SaraAdamW(other, THRESHOLD, lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for batch in batches():
        scaler.scale(loss_of(other, batch)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert_equal(dense(other), dense(model))


def test_a_closure_is_called_with_gradients_on():
    model, other = zoo(), zoo()
    train(model, SaraAdamW(model, THRESHOLD, lr=1e-2), batches(1))
    optimizer = SaraAdamW(other, THRESHOLD, lr=1e-2)

    def closure():
        optimizer.zero_grad()
        loss = loss_of(other, batches(1)[0])
        loss.backward()
        return loss

    before = loss_of(other, batches(1)[0])
    assert torch.equal(optimizer.step(closure), before)
    assert_equal(dense(other), dense(model))


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


@pytest.mark.parametrize("stages", [1, 2])
def test_an_adapter_holds_all_that_was_learned(stages, tmp_path):
    """That of entries which train no longer, too."""
    model, base = zoo(), zoo()
    optimizer = SaraAdamW(model, THRESHOLD, lr=1e-2, progressive_iter=2 if stages == 2 else None)
    train(model, optimizer)
    peftkern.save_adapter(model, tmp_path / "adapter")
    peftkern.load_adapter(base, tmp_path / "adapter")
    assert_equal(dense(base), dense(model))


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


def test_a_state_from_before_the_reselection_lets_all_entries_train_again(monkeypatch):
    """As processes reselect, which leave the others in their places without a gradient."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    model = zoo()
    optimizer = SaraAdamW(model, THRESHOLD, lr=1e-2, progressive_iter=1)
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))

    def still():
        loss_of(model, batches()[0]).backward()
        return sum(int((s.values.grad == 0).sum()) for s in optimizer.supports)

    always = still()
    optimizer.step()
    optimizer.zero_grad()
    assert still() > always
    model.load_state_dict(before[0])
    optimizer.load_state_dict(before[1])
    optimizer.zero_grad()
    assert still() == always


def test_a_step_on_other_entries_than_its_moments_is_refused():
    model, other = zoo(), zoo()
    optimizer = SaraAdamW(model, THRESHOLD)
    train(model, optimizer)
    SaraAdamW(other, 2 * THRESHOLD)
    model.load_state_dict(other.state_dict())
    loss_of(model, batches()[0]).backward()
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    with pytest.raises(RuntimeError, match="loose must train the entries .* as well, or make a ne"):
        optimizer.step()
    assert_equal(model.state_dict(), before[0])
    assert optimizer.state_dict()["state"][0]["step"] == before[1]["state"][0]["step"]
    assert optimizer.steps == before[1]["sparse"]["steps"]


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
