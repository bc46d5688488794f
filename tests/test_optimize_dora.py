"""DoRA of peft on our kernels: its outputs and gradients, from one pass over the weight."""

import copy

import peft
import pytest
import torch
from close import assert_as_good
from models import tokens, toy
from needs import needs_kernels
from peft_models import (
    BASES,
    adapted,
    dora_truth,
    layer,
    magnitude,
    parts,
    quantised,
    reasons,
    runs_ours,
    swapped,
    with_second_adapter,
)
from saved import Saved
from torch import nn

import peftkern
from peftkern import _conditions, _products, _swapped
from peftkern.qlora import dora

pytestmark = needs_kernels

MERGES = pytest.mark.filterwarnings(
    "ignore:Merge lora:UserWarning", "ignore:Unmerge lora:UserWarning"
)


def with_dora(base, **options):
    """As after training: no magnitude is the norm of its row."""
    model = adapted(base, use_dora=True, **options)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter.mul_(torch.linspace(0.5, 2, len(parameter)))
    return model


def results(one, x, seed=1):
    torch.manual_seed(seed)
    inputs = [x, *(p for p in one.parameters() if p.requires_grad)]
    y = one(x)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), inputs)]


def assert_alike(ours, theirs):
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=2e-5, atol=2e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("base", BASES)
def test_the_output_is_that_of_the_equation(base, dtype):
    model = with_dora(base, dtype=dtype)
    report = peftkern.optimize(model)
    assert report.skipped == [] and len(report.rows) == (6 if base else 4)
    assert {row.vllm for row in report.rows} == {"no: DoRA", *["no: no adapter"] * bool(base)}
    for name in ("layers.0.q_proj", "layers.1.down_proj"):
        one = layer(model, name)
        assert runs_ours(one)
        x = torch.randn(3, one.in_features).to(dtype)
        operands = (*parts(one), magnitude(one).detach())
        assert_as_good(one(x).detach(), dora_truth, x, *operands)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("base", BASES)
def test_outputs_and_gradients_are_those_of_peft(base, dropout):
    """The very elements that peft drops, too: its own dropout is asked."""
    model = with_dora(base, lora_dropout=dropout)
    for name in ("layers.0.q_proj", "layers.1.down_proj"):
        one = layer(model, name)
        x = torch.randn(20, one.in_features, requires_grad=True)
        theirs = results(one, x)
        assert len(theirs) == 5
        peftkern.optimize(model)
        assert runs_ours(one)
        assert_alike(results(one, x), theirs)
        assert not torch.equal(results(one, x, seed=2)[0], theirs[0]) or not dropout
        model.eval()
        ours = results(one, x)
        peftkern.restore(model)
        if base != "int8":  # on a CPU a second call of peft 0.21 fails
            assert_alike(ours, results(one, x))
        model.train()


def test_int8_takes_more_calls_than_one():
    """Where peft 0.21 cannot on a CPU: the first call takes the scales off their weight."""
    model = with_dora("int8")
    peftkern.optimize(model)
    one, x = layer(model), torch.randn(3, 64)
    first = one(x)
    assert torch.equal(one(x), first)


@pytest.mark.parametrize("dropout_of", ["nobody", "the layer alone", "its dropout alone"])
def test_who_is_asked_whether_elements_are_dropped_is_the_layer(dropout_of):
    model = with_dora("nf4", lora_dropout=0.5)
    one, x = layer(model), torch.randn(20, 64, requires_grad=True)
    one.training = dropout_of == "the layer alone"
    one.lora_dropout["default"].training = dropout_of == "its dropout alone"
    theirs = results(one, x)
    peftkern.optimize(model)
    assert_alike(results(one, x), theirs)


@pytest.mark.parametrize("base", BASES[:2])
@pytest.mark.parametrize("order", [["default", "second"], ["second", "default"]])
@pytest.mark.parametrize("both", [False, True])
def test_several_adapters_scale_each_other_in_their_order(base, order, both):
    model = with_second_adapter(with_dora(base), use_dora=both)
    model.base_model.set_adapter(order)
    one, x = layer(model), torch.randn(6, 64, requires_grad=True)
    theirs = results(one, x)
    peftkern.optimize(model)
    assert runs_ours(one) and len(theirs) == 7 + both
    assert_alike(results(one, x), theirs)


def test_several_adapters_with_dropout_are_left_to_peft():
    model = with_second_adapter(with_dora(None, lora_dropout=0.5))
    model.base_model.set_adapter(["default", "second"])
    peftkern.optimize(model)
    one = layer(model)
    assert "several adapters with dropout" in peftkern.explain(one)
    one.lora_dropout["default"].eval()  # peft then starts from the base alone
    assert "one of them DoRA with dropout" in peftkern.explain(one)
    x = torch.randn(3, 64, requires_grad=True)
    ours = one(x)
    peftkern.restore(model)
    assert torch.equal(one(x), ours)


def test_a_mixed_batch_is_refused_by_peft_itself():
    model = with_second_adapter(with_dora(None), use_dora=True)
    one, x = layer(model), torch.randn(2, 64)
    with pytest.raises(ValueError) as theirs:
        one(x, adapter_names=["default", "second"])
    peftkern.optimize(model)
    with pytest.raises(ValueError, match=str(theirs.value)):
        one(x, adapter_names=["default", "second"])
    plain = with_second_adapter(with_dora(None))
    peftkern.optimize(plain)
    names = ["second", "__base__"]
    ours = layer(plain)(x, adapter_names=names)
    peftkern.restore(plain)
    torch.testing.assert_close(ours, layer(plain)(x, adapter_names=names))


@MERGES
@pytest.mark.parametrize("base", [None, "nf4"])
def test_merged_and_disabled_adapters_are_what_they_were(base):
    model = with_dora(base)
    twin = copy.deepcopy(model)
    peftkern.optimize(model)
    one, other, x = layer(model), layer(twin), torch.randn(3, 64, requires_grad=True)
    before = one(x)
    with model.disable_adapter(), twin.disable_adapter():
        torch.testing.assert_close(one(x), other(x))
    for change in ("merge_adapter", "unmerge_adapter"):
        getattr(model.base_model, change)(), getattr(twin.base_model, change)()
        torch.testing.assert_close(one(x), other(x), rtol=1e-4, atol=1e-4)
    if base is None:
        torch.testing.assert_close(one(x), before, rtol=1e-4, atol=1e-4)
    merged, expected = model.merge_and_unload(), twin.merge_and_unload()
    torch.testing.assert_close(merged(tokens()), expected(tokens()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("base", BASES)
def test_no_weight_is_kept_dense_and_no_input_twice(base):
    model = with_dora(base, dtype=torch.bfloat16)
    peftkern.optimize(model)
    one, x = layer(model), torch.randn(20, 64, dtype=torch.bfloat16, requires_grad=True)
    one(x)
    known = [x, *one.parameters(), dora.gain(magnitude(one), torch.ones(64))]
    if base:
        known += _swapped.weight_of(one.base_layer).buffers
    with Saved(known) as saved:
        one(x).sum().backward()
    assert saved.bytes <= 20 * 4 * 4 + 20 * 64 * 2 + 3 * 64 * 4  # x A^T, the product, the rows' n


def test_the_norm_of_the_base_is_computed_once(monkeypatch):
    model, calls, real = with_dora("nf4"), [], dora.squares
    monkeypatch.setattr(dora, "squares", lambda weight: calls.append(1) or real(weight))
    peftkern.optimize(model)
    one, x = layer(model), torch.randn(3, 64)
    first = [one(x), one(x)]
    assert calls == [1] and torch.equal(*first)
    one.base_layer.weight = layer(with_dora("nf4", seed=3)).base_layer.weight
    assert torch.equal(one(x), copy.deepcopy(one)(x)) and len(calls) == 3
    assert not torch.equal(one(x), first[0])
    peftkern.restore(model)
    assert _products.NORMS not in vars(one)


@pytest.mark.parametrize("how", ["the rank", "the magnitude"])
def test_a_step_is_seen_by_the_next_call(how):
    model = with_dora("nf4")
    peftkern.optimize(model)
    one, x = layer(model), torch.randn(3, 64)
    with torch.no_grad():
        before = one(x)
        changed = one.lora_A["default"].weight if how == "the rank" else magnitude(one)
        changed.add_(1)
        after = one(x)
    assert not torch.equal(before, after)
    assert_as_good(after, dora_truth, x, *parts(one), magnitude(one).detach())


@pytest.mark.parametrize("base", [None, "nf4"])
def test_a_layer_with_dora_compiles_whole(base):
    model = with_dora(base)
    peftkern.optimize(model)
    one, x = layer(model), torch.randn(6, 64, requires_grad=True)
    inputs = [x, *(p for p in one.parameters() if p.requires_grad)]
    torch._dynamo.reset()
    found = []
    for run in (one, torch.compile(one, fullgraph=True)):
        y = run(x)
        found.append([y, *torch.autograd.grad(y.square().sum(), inputs)])
    assert_alike(*found)


def hooked(own):
    own.register_forward_hook(print)


def strided(own):
    own.weight = nn.Parameter(torch.ones(128)[::2])


def turned(own):
    own.fan_in_fan_out = True


@pytest.mark.parametrize(
    ("change", "reason"),
    [(hooked, "hooks"), (strided, "not a plain tensor"), (turned, "for transposed")],
)
def test_a_magnitude_that_is_not_read_as_it_lies_is_left_to_peft(change, reason):
    model = with_dora(None)
    peftkern.optimize(model)
    one = layer(model)
    assert runs_ours(one)
    change(one.lora_magnitude_vector["default"])
    assert reason in _conditions.why_not(one)


def test_other_variants_stay_with_peft():
    model = adapted(None, alora_invocation_tokens=[1])
    found = reasons(peftkern.optimize(model))
    assert "aLoRA" in found["layers.0.q_proj"].replace("ALora", "aLoRA")


def test_training_saves_what_peft_loads(tmp_path):
    model = with_dora("nf4")
    peftkern.optimize(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    before = magnitude(layer(model)).clone()
    model(tokens()).square().mean().backward()
    optimizer.step()
    assert not torch.equal(magnitude(layer(model)), before) and len(swapped(model)) == 6
    expected = model(tokens())
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(quantised(toy(width=64)), tmp_path).train()
    torch.testing.assert_close(again(tokens()), expected, rtol=1e-4, atol=1e-4)
