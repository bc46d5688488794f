"""Several adapters, mixed, merged, switched, disabled and deleted after `optimize`."""

import copy

import pytest
import torch
from close import assert_as_good
from models import tokens
from needs import needs_kernels
from peft_models import (
    BASES,
    adapted,
    layer,
    parts,
    runs_ours,
    swapped,
    truth,
    with_second_adapter,
)
from torch import nn

import peftkern
from peftkern import _products

pytestmark = needs_kernels


@pytest.mark.parametrize("base", BASES)
def test_several_adapters_run_in_one_pass(base):
    model = with_second_adapter(adapted(base))
    peftkern.optimize(model)
    model.base_model.set_adapter(["default", "second"])
    one, x = layer(model), torch.randn(6, 64)
    assert runs_ours(one) and "adapters default of rank 4, second of rank 4" in peftkern.explain(
        one
    )
    assert_as_good(one(x).detach(), truth, x, *parts(one, ["default", "second"]))
    gradients = [p for p in one.parameters() if p.requires_grad]
    assert len(gradients) == 4
    ours = torch.autograd.grad(one(x).square().sum(), gradients)
    peftkern.restore(model)
    theirs = torch.autograd.grad(one(x).square().sum(), gradients)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-4)


def test_several_adapters_with_dropout_are_left_to_peft():
    model = with_second_adapter(adapted("nf4", lora_dropout=0.5))
    peftkern.optimize(model)
    model.base_model.set_adapter(["default", "second"])
    assert "several adapters with dropout" in peftkern.explain(layer(model))
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    assert runs_ours(layer(model))


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_batch_may_mix_adapters(base, dtype):
    model = with_second_adapter(adapted(base, dtype=dtype))
    report = peftkern.optimize(model)
    assert report.skipped == []
    one, x = layer(model), torch.randn(4, 3, 64).to(dtype)
    names = ["second", "__base__", "default", "second"]
    y = one(x, adapter_names=names).detach()
    for i, name in enumerate(names):
        mine = [] if name == "__base__" else [name]
        assert_as_good(y[i], truth, x[i], *parts(one, mine))
    model.eval()
    whole = model(tokens(shape=(4, 5)), adapter_names=names)
    for i, name in enumerate(names):
        alone = model(tokens(shape=(4, 5))[i : i + 1], adapter_names=[name])
        torch.testing.assert_close(whole[i], alone[0], rtol=2e-2, atol=2e-2)


def test_an_adapter_of_several_samples_is_taken_once(monkeypatch):
    model, real, taken = with_second_adapter(adapted("nf4")), _products.expert_linear, []
    peftkern.optimize(model)
    monkeypatch.setattr(
        _products,
        "expert_linear",
        lambda *args, **kw: taken.append(len(args[4])) or real(*args, **kw),
    )
    layer(model)(torch.randn(4, 64), adapter_names=["second", "default", "second", "second"])
    assert taken == [2]


def test_a_mixed_batch_of_several_ranks_is_left_to_peft():
    model = with_second_adapter(adapted("nf4"), rank_pattern={"q_proj": 3})
    one, x = layer(model), torch.randn(2, 64, requires_grad=True)
    names = ["second", "default"]
    theirs = one(x, adapter_names=names)
    peftkern.optimize(model)
    assert torch.equal(one(x, adapter_names=names), theirs)


def test_the_refusals_of_peft_are_still_its_own():
    model = with_second_adapter(adapted("nf4"))
    peftkern.optimize(model)
    with pytest.raises(ValueError, match="Length of `adapter_names`"):
        layer(model)(torch.randn(2, 64), adapter_names=["second"])


@pytest.mark.parametrize("base", BASES)
def test_disabled_adapters_leave_the_base_alone(base):
    model = adapted(base)
    peftkern.optimize(model)
    one, x = layer(model), torch.randn(3, 64)
    with_adapter = one(x)
    with model.disable_adapter():
        assert runs_ours(one) == (base is not None)
        assert_as_good(one(x).detach(), truth, x, *parts(one, []))
    assert torch.equal(one(x), with_adapter)


@pytest.mark.filterwarnings("ignore:Merge lora:UserWarning", "ignore:Unmerge lora:UserWarning")
@pytest.mark.parametrize("base", BASES)
def test_merged_adapters_are_in_the_base_until_they_are_taken_out(base):
    model = adapted(base)
    twin = copy.deepcopy(model)
    peftkern.optimize(model)
    one, other, x = layer(model), layer(twin), torch.randn(3, 64, requires_grad=True)
    before = one(x)
    for change in ("merge_adapter", "unmerge_adapter"):
        getattr(model.base_model, change)(), getattr(twin.base_model, change)()
        torch.testing.assert_close(one(x), other(x))
        assert runs_ours(one) == (base is not None or change == "unmerge_adapter")
    assert swapped(model)
    if base is None:
        torch.testing.assert_close(one(x), before)
    model.base_model.merge_adapter(), twin.base_model.merge_adapter()
    with model.disable_adapter(), twin.disable_adapter():  # for which peft takes them out
        torch.testing.assert_close(one(x), other(x))
    assert not one.merged


def test_a_switch_of_adapters_switches_the_path():
    model = with_second_adapter(adapted("nf4", lora_bias=True))
    peftkern.optimize(model)
    one, x = layer(model), torch.randn(3, 64, requires_grad=True)
    assert not runs_ours(one)
    model.set_adapter("second")
    assert runs_ours(one)
    assert_as_good(one(x).detach(), truth, x.detach(), *parts(one, ["second"]))
    model.delete_adapter("default")
    assert runs_ours(one)
    model.delete_adapter("second")
    assert "base alone" in peftkern.explain(one)
    assert_as_good(one(x).detach(), truth, x.detach(), *parts(one, []))


def test_an_adapter_added_later_runs_too():
    model = adapted("nf4")
    peftkern.optimize(model)
    before = swapped(model)
    with_second_adapter(model).set_adapter("second")
    one, x = layer(model), torch.randn(3, 64)
    assert swapped(model) == before and runs_ours(one)
    assert_as_good(one(x).detach(), truth, x, *parts(one, ["second"]))
