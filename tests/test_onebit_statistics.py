"""The statistics of a model's 1-bit adapters: one op a step, and never those of other latents."""

import copy
import io

import pytest
import torch
from distributed import in_processes
from onebits import Ops, adapted, blocks, config, latents, pairs, trained, trained_in_shards, x_of
from torch.utils.checkpoint import checkpoint

import peftkern
from peftkern import onebit


def written_past_torch(model):
    """As 8-bit optimisers write, through a pointer: no counter moves."""
    for latent in latents(model):
        latent.data.add_(torch.linspace(-1, 1, latent.numel()).view_as(latent))


@torch.no_grad()
def negated(model):
    for latent in latents(model):
        latent.neg_()


def test_statistics_are_one_op_a_step(placement):
    model, _ = adapted(placement)
    assert len(pairs(model)) > 1
    for _ in range(2):  # steps
        with Ops() as ops:
            model(x_of()).sum().backward()
        assert ops.count["onebit_statistics"] == 1
        assert ops.count["onebit_adapter"] == ops.count["onebit_adapter_bwd"] == len(pairs(model))


def test_both_placements_share_one_op():
    model = blocks()
    peftkern.adapt(model, config("lora"))
    peftkern.adapt(model, config("adaptformer"))
    with Ops() as ops:
        model(x_of())
    assert ops.count["onebit_statistics"] == 1
    assert ops.count["onebit_adapter"] == len(pairs(model)) == 9


def test_writes_that_torch_does_not_count_are_seen_in_the_next_step(placement):
    model, _ = adapted(placement)
    model(x_of())
    written_past_torch(model)
    y = model(x_of())
    for layer in pairs(model):
        layer.statistics = None
    assert torch.equal(model(x_of()), y)


@pytest.mark.parametrize("write", [written_past_torch, negated], ids=["past torch", "in place"])
def test_a_layer_that_is_left_out_of_a_step_is_not_late(write):
    model, _ = adapted("adaptformer")
    model[0](x_of()).sum().backward()  # makes the rows of the second block as well
    write(model)
    y = model[1](x_of())
    model[1].adapter.statistics = None
    assert torch.equal(model[1](x_of()), y)


def test_what_a_backward_computes_again_is_not_of_the_next_step():
    model, _ = adapted("adaptformer")
    y = checkpoint(model[1], model[0](x_of()), use_reentrant=False)
    y.sum().backward()  # makes the rows of the first block as well, which it does not need
    written_past_torch(model)
    y = model(x_of())
    for layer in pairs(model):
        layer.statistics = None
    assert torch.equal(model(x_of()), y)


def test_what_inference_left_does_not_stop_training():
    model, _ = adapted("adaptformer")
    with torch.inference_mode():
        model[0](x_of())  # makes the rows of the second block as well
    model[1](x_of()).sum().backward()
    assert model[1].adapter.up.grad.any()


def test_checkpointing_and_statistics_agree(placement):
    model, _ = adapted(placement)
    model(x_of()).square().sum().backward()
    plain = [p.grad.clone() for p in latents(model)]
    model.zero_grad()
    x = x_of().requires_grad_()
    for block in model:
        x = checkpoint(block, x, use_reentrant=False)
    with Ops() as ops:
        x.square().sum().backward()
    assert ops.count["onebit_statistics"] == 1
    assert all(torch.equal(p.grad, g) for p, g in zip(latents(model), plain, strict=True))


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_has_statistics_of_its_own(placement, how):
    model, _ = adapted(placement)
    y = model(x_of())
    if how == "deepcopy":
        twin = copy.deepcopy(model)
    else:
        file = io.BytesIO()
        torch.save(model, file)
        twin = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    ours = {layer.statistics for layer in pairs(twin)}
    assert len(ours) == 1 and ours.isdisjoint({layer.statistics for layer in pairs(model)})
    negated(model)
    with Ops() as ops:
        assert torch.equal(twin(x_of()), y)
    assert ops.count["onebit_statistics"] == 1


def test_shards_are_refused_with_the_reason():
    layer = onebit.OneBitAdapter(16)
    layer.down.device_mesh = object()  # what tells a DTensor from a whole one
    with pytest.raises(ValueError, match="must be whole, for their bits hang on the mean and the"):
        layer(x_of())


@pytest.mark.parametrize("units", [False, True], ids=["one unit", "a unit a block"])
def test_shards_train_and_are_saved_as_what_is_whole(placement, units, tmp_path):
    wanted = trained(placement, tmp_path / "alone")
    found = in_processes(
        2, trained_in_shards, tmp_path / "runs", placement, units, tmp_path / "two"
    )
    for y in found:
        torch.testing.assert_close(y, wanted, rtol=1e-5, atol=1e-5)
    both = [peftkern.load_adapter(blocks(), tmp_path / name) for name in ("alone", "two")]
    torch.testing.assert_close(*(m.eval()(x_of()) for m in both), rtol=1e-5, atol=1e-5)
    sizes = {(tmp_path / f"{name}.bin").stat().st_size for name in ("alone", "two")}
    assert len(sizes) == 1
