"""Checkpoints as SaRA was published, read back."""

import copy

import pytest
import torch
from sparse_models import BATCHES, assert_equal, dense, loss_of, masked_training, zoo
from torch import nn

from peftkern.sparse import import_sara
from peftkern.sparse.support import supports

THRESHOLD = 0.1


def published(base, trained, threshold=THRESHOLD):
    """As `save_params` writes it, by the masks of the base."""
    values = {
        i: p.detach()[base_p.detach().abs() < threshold]
        for i, (p, base_p) in enumerate(zip(trained.parameters(), base.parameters(), strict=True))
    }
    return {"threshold": threshold, **values}


def example(dtype=torch.float32, **options):
    base = zoo(dtype, **options)
    masks = {name: p.detach().abs() < THRESHOLD for name, p in base.named_parameters()}
    # Half precision has no eps of 1e-8.
    return base, masked_training(base, masks, lr=1e-2, eps=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
@pytest.mark.parametrize("tied", [False, True])
def test_a_published_checkpoint_is_the_trained_model(dtype, tied, tmp_path):
    base, trained = example(dtype, tied=tied)
    torch.save(published(base, trained), tmp_path / "sara.pt")
    model = import_sara(copy.deepcopy(base), tmp_path / "sara.pt")
    assert_equal(dense(model), dense(trained))
    loss_of(model, BATCHES[0]).backward()
    assert all(support.values.grad is not None for support in supports(model))


def test_what_was_learned_can_be_scaled():
    base, trained = example(torch.float64)
    model = import_sara(copy.deepcopy(base), published(base, trained), scale=0.5)
    for name, tensor in dense(model).items():
        wanted = (dense(base)[name] + dense(trained)[name]) / 2
        torch.testing.assert_close(tensor, wanted, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="scale must be finite, got nan"):
        import_sara(base, published(base, trained), scale=float("nan"))
    assert not supports(base)


def test_channels_may_come_last():
    base = nn.Conv2d(4, 8, 3).to(memory_format=torch.channels_last)
    trained = copy.deepcopy(base)
    with torch.no_grad():
        trained.weight[base.weight.abs() < THRESHOLD] *= 2
    model = import_sara(copy.deepcopy(base), published(base, trained))
    assert torch.equal(model.weight, trained.weight)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda c: c | {0: c[0][:-1]}, ValueError, "values for loose, got .* is the base another"),
        (lambda c: {k: v for k, v in c.items() if k != 3}, ValueError, r"got \[0\]"),
        (lambda c: c | {99: c[0]}, ValueError, "path must hold values by number, .* got 99"),
        (lambda c: c | {"step": 3}, ValueError, "got 'step'"),
        (lambda c: c | {0: c[0].int()}, TypeError, "path must hold float tensors"),
        (lambda c: {k: v for k, v in c.items() if k != "threshold"}, ValueError, "its threshold"),
        (lambda c: c | {"threshold": 1e-12}, ValueError, "path must hold 0 values|got none"),
    ],
)
def test_it_refuses_a_checkpoint_of_something_else(change, error, message):
    base, trained = example()
    content = published(base, trained)
    before = copy.deepcopy(base.state_dict())
    with pytest.raises(error, match=message):
        import_sara(base, change(content))
    assert_equal(base.state_dict(), before)
    assert not supports(base)


def test_it_refuses_another_file(tmp_path):
    torch.save({0: torch.ones(3)}, tmp_path / "other.pt")
    with pytest.raises(
        ValueError, match="path must hold a published checkpoint with its threshold"
    ):
        import_sara(zoo(), tmp_path / "other.pt")
