"""Swapped layers in the hands of torch and peft: they do all that they did."""

import copy
import io
import pickle

import peft
import pytest
import torch
from models import disturb, tokens, toy
from needs import needs_kernels
from peft_models import BASES, adapted, layer, quantised, swapped
from saved import Saved
from torch import nn
from torch.utils.checkpoint import checkpoint

import peftkern
from peftkern import _swapped

pytestmark = needs_kernels


def saved(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("base", BASES)
def test_parameters_names_and_keys_stay_what_they_were(base):
    model = adapted(base)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)

    def facts():
        named = list(model.named_parameters())
        parameters = [(n, id(p), p.data_ptr(), p.requires_grad) for n, p in named]
        names = [(n, id(m)) for n, m in model.named_modules()]
        state = {k: v.clone() for k, v in model.state_dict().items()}
        return parameters, names, state, peft.get_peft_model_state_dict(model)

    before = facts()
    peftkern.optimize(model)
    model(tokens()).square().mean().backward()
    after = facts()
    assert before[:2] == after[:2]
    for old, new in zip(before[2:], after[2:], strict=True):
        assert list(old) == list(new) and all(torch.equal(old[k], new[k]) for k in old)
    one = layer(model)
    old = one.lora_A["default"].weight.clone()
    optimizer.step()
    assert not torch.equal(one.lora_A["default"].weight, old)


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), saved],
    ids=["deepcopy", "pickle", "save"],
)
@pytest.mark.parametrize("base", BASES)
def test_copies_compute_the_same_and_live_apart(base, copied):
    model = adapted(base)
    peftkern.optimize(model)
    expected = model(tokens())
    twin = copied(model)
    caches = [c for m in twin.modules() if (c := vars(m).get(_swapped.CACHE)) is not None]
    assert bool(caches) == bool(base) and all(cache.pointer is None for cache in caches)
    assert swapped(twin) == swapped(model)
    assert torch.equal(twin(tokens()), expected)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert not torch.equal(twin(tokens()), expected)
    assert torch.equal(model(tokens()), expected)


def other_weight(base, other):
    base.weight = other.weight


def other_data(base, other):
    base.weight.data = other.weight.data.clone()


def other_state(base, other):
    base.weight.quant_state = copy.copy(base.weight.quant_state)
    base.weight.quant_state.offset = other.weight.quant_state.offset


def other_scales(base, other):
    base.weight.quant_state.absmax = other.weight.quant_state.absmax.clone()


def data_in_place(base, other):
    base.weight.data.copy_(other.weight.data)


@pytest.mark.parametrize(
    "change", [other_weight, other_data, other_state, other_scales, data_in_place]
)
def test_the_weight_is_read_anew_where_it_has_changed(change, monkeypatch):
    model, read, times = adapted("nf4"), _swapped.weight_of, []
    peftkern.optimize(model)
    monkeypatch.setattr(_swapped, "weight_of", lambda base: times.append(1) or read(base))
    one, x = layer(model), torch.randn(3, 64)
    before = one(x)
    assert torch.equal(one(x), before) and len(times) == 1
    change(one.base_layer, layer(adapted("nf4", seed=3)).base_layer)
    after = one(x)
    assert len(times) == 1 + (change is not data_in_place)  # whose storage is shared
    assert torch.equal(after, copy.deepcopy(one)(x)) and not torch.equal(after, before)


def test_nothing_holds_a_weight_that_another_forward_runs():
    """So that weights which are sharded, or moved away, are freed."""
    model = adapted("nf4")
    peftkern.optimize(model)
    one, x = layer(model), torch.randn(3, 64)
    assert _swapped.CACHE not in vars(one)
    one(x)
    assert _swapped.CACHE in vars(one)
    one.base_layer.register_forward_hook(lambda *args: None)
    one(x)
    assert _swapped.CACHE not in vars(one)


@pytest.mark.parametrize("base", BASES)
def test_no_copy_of_the_input_is_kept_for_the_adapter(base):
    """peft keeps one in float32, since its adapters are."""
    model = adapted(base, dtype=torch.bfloat16)
    peftkern.optimize(model)
    one, x = layer(model), torch.randn(20, 64, dtype=torch.bfloat16, requires_grad=True)
    assert one.lora_A["default"].weight.dtype == torch.float32
    one(x)  # from here on its weight has been read
    known = [x, *one.parameters()]
    if base:
        known += _swapped.weight_of(one.base_layer).buffers
    with Saved(known) as saved:
        one(x).sum().backward()
    assert saved.bytes == 20 * 4 * 4  # the product of rank 4


def test_a_moved_model_still_runs(device):
    model = adapted("nf4")
    peftkern.optimize(model)
    expected = model(tokens())
    model.to(device)
    torch.testing.assert_close(model(tokens().to(device)).cpu(), expected)
    assert "cpu" in peftkern.explain(layer(model)) or device.type != "cpu"


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_dropout_repeats_itself(reentrant):
    model = adapted("nf4", lora_dropout=0.5)
    peftkern.optimize(model)
    one = layer(model)

    def step(run, seed):
        torch.manual_seed(seed)
        x = torch.linspace(-1, 1, 20 * 64).view(20, 64).requires_grad_()
        model.zero_grad()
        loss = run(x).square().sum()
        loss.backward()
        return loss, x.grad, *(p.grad for p in one.parameters() if p.requires_grad)

    plain = step(one, 7)
    replayed = step(lambda x: checkpoint(one, x, use_reentrant=reentrant), 7)
    assert len(plain) == 4 and all(map(torch.equal, replayed, plain))
    assert not any(map(torch.equal, step(one, 8), plain))


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        ("layers.0.q_proj", "inductor"),
        ("layers.0.q_proj", "aot_eager"),
        ("layers.0.gate_proj", "aot_eager"),
        ("several", "aot_eager"),
    ],
)
@pytest.mark.parametrize("base", BASES)
def test_a_swapped_layer_compiles_whole(base, name, backend):
    model = adapted(base)
    if name == "several":
        model.add_adapter("second", peft.LoraConfig(r=3, target_modules=["q_proj"]))
        disturb(model)
    peftkern.optimize(model)
    if name == "several":
        model.base_model.set_adapter(["default", "second"])
    one = layer(model, "layers.0.q_proj" if name == "several" else name)
    x = torch.randn(6, 64, requires_grad=True)
    inputs = [x, *(p for p in one.parameters() if p.requires_grad)]
    torch._dynamo.reset()
    results = []
    for run in (one, torch.compile(one, fullgraph=True, backend=backend)):
        y = run(x)
        results.append([y, *torch.autograd.grad(y.square().sum(), inputs)])
    for eager, whole in zip(*results, strict=True):
        torch.testing.assert_close(whole, eager)


@pytest.mark.filterwarnings("ignore:Merge lora:UserWarning")
@pytest.mark.parametrize("base", BASES)
def test_merging_and_unloading_is_that_of_peft(base):
    model = adapted(base)
    twin = copy.deepcopy(model)
    peftkern.optimize(model)
    model(tokens())
    merged, expected = model.merge_and_unload(), twin.merge_and_unload()
    states = merged.state_dict(), expected.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    x = torch.randn(2, 64, requires_grad=True)
    name = "layers.0.q_proj"
    assert torch.equal(merged.get_submodule(name)(x), expected.get_submodule(name)(x))


@pytest.mark.parametrize("base", BASES)
def test_an_adapter_saved_by_peft_loads_with_and_without_us(base, tmp_path):
    model = adapted(base)
    peftkern.optimize(model)
    expected = model(tokens())
    model.save_pretrained(tmp_path)
    model = toy(width=64)
    if base:
        quantised(model, base)
    again = peft.PeftModel.from_pretrained(model, tmp_path).train()
    torch.testing.assert_close(again(tokens()), expected)
    assert not swapped(again)
    peftkern.optimize(again)
    assert torch.equal(again(tokens()), expected)


def test_a_second_derivative_is_refused():
    model = adapted(None)
    peftkern.optimize(model)
    x = torch.randn(2, 64, requires_grad=True)
    (grad,) = torch.autograd.grad(layer(model)(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_functions_of_torch_func_run_the_forward_that_was_there():
    model = adapted(None)
    one, x = layer(model), torch.randn(5, 64)
    expected = torch.func.vmap(one)(x)
    peftkern.optimize(model)
    assert torch.equal(torch.func.vmap(one)(x), expected)


@pytest.mark.parametrize("base", BASES)
def test_a_layer_in_two_places_is_swapped_once(base):
    model = adapted(base)
    inner = model.base_model.model
    inner.layers[1].q_proj = inner.layers[0].q_proj
    expected = model(tokens())
    peftkern.optimize(model)
    assert inner.layers[1].q_proj is inner.layers[0].q_proj
    torch.testing.assert_close(model(tokens()), expected)


def test_an_empty_batch_keeps_its_shape():
    model = adapted("nf4")
    peftkern.optimize(model)
    x = torch.randn(0, 3, 64, requires_grad=True)
    y = layer(model)(x)
    y.sum().backward()
    assert y.shape == (0, 3, 64) and x.grad.shape == x.shape
    one = nn.Sequential(layer(model))
    assert one(torch.randn(64)).shape == (64,)
