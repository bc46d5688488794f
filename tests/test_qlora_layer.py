"""QLoRALinear as a drop-in: the base layer plus the reference, through all of torch's machinery."""

import copy
import pickle

import pytest
import torch
from close import assert_as_good
from hypothesis import given
from hypothesis import strategies as st
from saved import Saved
from torch import nn
from torch.utils._pytree import tree_flatten
from torch.utils.checkpoint import checkpoint

from peftkern.qlora import LoraConfig, QLoRALinear, quantize, reference

BASES = (None, "nf4", "fp4", "int8")


def make(rows=24, columns=64, base="nf4", bias=True, seed=0, dtype=torch.float32, **options):
    """As after some training: neither A nor B is zero."""
    torch.manual_seed(seed)
    linear = nn.Linear(columns, rows, bias=bias, dtype=dtype)
    layer = QLoRALinear.from_linear(linear, r=options.pop("r", 4), base=base, **options)
    nn.init.normal_(layer.lora_B, std=0.1)
    return linear, layer


def dense(layer):
    weight = layer.quantized_weight
    return layer.weight if weight is None else weight.dequantize(torch.float32)


def expected(layer, x, seed=None):
    """The base layer plus the reference of the low-rank term."""
    dropout = layer.lora_dropout if layer.training else 0.0
    return reference.linear(
        x, dense(layer), layer.bias, layer.lora_A, layer.lora_B, layer.scaling, dropout, seed
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("base", BASES)
@given(
    shape=st.lists(st.integers(0, 4), max_size=2),
    rows=st.integers(1, 40),
    columns=st.integers(1, 130),
    r=st.integers(1, 9),
    bias=st.booleans(),
)
def test_the_output_is_the_base_plus_the_reference(isa, base, dtype, shape, rows, columns, r, bias):
    _, layer = make(rows, columns, base, bias, r=r, dtype=dtype)
    x = torch.randn(*shape, columns).to(dtype)
    y = layer(x)
    tensors = [layer.lora_A, layer.lora_B, dense(layer)] + ([layer.bias] if bias else [])
    assert_as_good(y.detach(), lambda x, a, b, w, bias=None: reference.linear(
        x, w, bias, a, b, layer.scaling), x, *(t.detach() for t in tensors))  # fmt: skip


@pytest.mark.parametrize("base", BASES)
def test_gradients_are_those_of_the_reference(isa, base):
    _, layer = make(base=base)
    x = torch.randn(5, 64, requires_grad=True)
    inputs = [x, layer.lora_A, layer.lora_B]
    ours = torch.autograd.grad(layer(x).square().sum(), inputs)
    theirs = torch.autograd.grad(expected(layer, x).square().sum(), inputs)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-4)


def test_a_new_adapter_changes_nothing():
    linear = nn.Linear(64, 24)
    layer = QLoRALinear.from_linear(linear, r=4)
    x = torch.randn(3, 64)
    torch.testing.assert_close(layer(x), linear(x))
    assert layer.weight is linear.weight and layer.bias is linear.bias


@pytest.mark.parametrize("how", [True, False, "gaussian"])
def test_the_initial_adapter_follows_its_config(how):
    torch.manual_seed(0)
    layer = QLoRALinear.from_linear(nn.Linear(4096, 1024), r=8, init_lora_weights=how)
    bound = 1 / 4096**0.5
    if how == "gaussian":
        assert layer.lora_A.std().item() == pytest.approx(1 / 8, rel=0.05)
    else:
        assert bound * 0.99 < layer.lora_A.abs().max() <= bound
    assert bool(layer.lora_B.any()) == (how is False)


@pytest.mark.parametrize(("rslora", "scale"), [(False, 4.0), (True, 8.0)])
def test_the_scale_is_alpha_over_r_or_its_root(rslora, scale):
    linear = nn.Linear(8, 8)
    layer = QLoRALinear.from_linear(linear, r=4, lora_alpha=16, use_rslora=rslora)
    assert layer.scaling == scale


def test_only_the_adapter_trains():
    _, layer = make()
    assert {n for n, p in layer.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
    layer(torch.randn(2, 64)).sum().backward()
    assert layer.weight.grad is None and layer.bias.grad is None
    assert layer.lora_A.grad is not None and layer.lora_B.grad is not None
    of_tensors = QLoRALinear(torch.ones(2, 3), torch.ones(2), LoraConfig(r=1))
    assert not of_tensors.weight.requires_grad and not of_tensors.bias.requires_grad


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("base", BASES)
def test_a_strict_load_gives_the_same_layer(base, nested):
    _, layer = make(base=base, nested=nested)
    _, other = make(base=base, nested=not nested, seed=1)
    x = torch.randn(3, 64)
    result = other.load_state_dict(layer.state_dict(), strict=True)
    assert not result.missing_keys and not result.unexpected_keys
    assert torch.equal(other(x), layer(x))
    _, assigned = make(base=base, seed=2)
    assigned.load_state_dict(layer.state_dict(), strict=True, assign=True)
    assert torch.equal(assigned(x), layer(x))


def of_another_shape():
    return make(12, 128)[1].state_dict()


def without(name):
    return {k: v for k, v in make(seed=1)[1].state_dict().items() if name not in k}


def with_scales(change):
    state = make(seed=1, nested=False)[1].state_dict()
    return state | {"weight.absmax": change(state["weight.absmax"])}


def with_facts(text):
    state = make(seed=1)[1].state_dict()
    return state | {
        "weight.quant_state.bitsandbytes__nf4": torch.tensor(list(text), dtype=torch.uint8)
    }


@pytest.mark.parametrize(
    "state",
    [
        of_another_shape,
        lambda: without("absmax"),
        lambda: without("quant_state"),
        lambda: without("nested_quant_map"),
        lambda: with_scales(lambda t: t[:-1]),
        lambda: with_scales(lambda t: t.double()),
        lambda: with_facts(b"{"),
        lambda: with_facts(b"{}"),
        lambda: with_facts(b'{"dtype": "float32", "shape": [24, 64], "blocksize": 63}'),
        lambda: without("weight") | {"weight": torch.zeros(24, 64)},
    ],
)
def test_a_state_dict_that_does_not_fit_leaves_the_weight_alone(state):
    _, layer = make()
    before = layer.quantized_weight.dequantize()
    with pytest.raises(RuntimeError, match="weight: .* must"):
        layer.load_state_dict(state())
    assert torch.equal(layer.quantized_weight.dequantize(), before)


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))],
    ids=["deepcopy", "pickle"],
)
@pytest.mark.parametrize("base", BASES)
def test_copies_compute_the_same_and_live_apart(base, copied):
    _, layer = make(base=base)
    twin, x = copied(layer), torch.randn(3, 64)
    assert torch.equal(twin(x), layer(x))
    if base:
        assert twin.quantized_weight.packed is twin.weight
    with torch.no_grad():
        twin.weight.zero_()
        twin.lora_B.zero_()
    assert not torch.equal(twin(x), layer(x))
    assert layer.weight.any() and layer.lora_B.any()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_dropout_repeats_itself(reentrant):
    _, layer = make(lora_dropout=0.5)

    def step(run, seed):
        torch.manual_seed(seed)
        x = torch.linspace(-1, 1, 20 * 64).view(20, 64).requires_grad_()
        layer.zero_grad()
        loss = run(x).square().sum()
        loss.backward()
        return loss, x.grad, layer.lora_A.grad, layer.lora_B.grad

    plain = step(layer, 7)
    replayed = step(lambda x: checkpoint(layer, x, use_reentrant=reentrant), 7)
    assert all(map(torch.equal, replayed, plain))
    assert not any(map(torch.equal, step(layer, 8), plain))


def test_dropout_is_off_in_eval():
    _, layer = make(lora_dropout=0.5)
    x = torch.randn(3, 64)
    layer.eval()
    torch.testing.assert_close(layer(x), expected(layer, x))
    assert torch.equal(layer(x), layer(x))


def test_dropout_drops_what_the_reference_drops(monkeypatch):
    _, layer = make(lora_dropout=0.25)
    seed, x = torch.tensor([12345]), torch.randn(7, 64)
    with monkeypatch.context() as patch:
        patch.setattr("peftkern._inputs.seed", lambda *args: seed)
        y = layer(x)
    torch.testing.assert_close(y, expected(layer, x, seed))


@pytest.mark.parametrize("base", BASES)
def test_autocast_computes_in_its_dtype(base):
    _, layer = make(base=base)
    x = torch.randn(3, 64, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16 and torch.equal(y, layer(x.bfloat16()))
    y.float().square().sum().backward()
    assert x.grad.dtype == layer.lora_A.grad.dtype == torch.float32


def test_a_casted_model_still_runs():
    _, layer = make()
    layer.bfloat16()
    x = torch.randn(3, 64, dtype=torch.bfloat16)
    assert layer(x).dtype == torch.bfloat16
    torch.testing.assert_close(layer(x), expected(layer, x), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_saved_for_backward_are_x_down_the_seed_and_references(base, dropout):
    _, layer = make(base=base, lora_dropout=dropout)
    x = torch.randn(2, 10, 64, requires_grad=True)
    kept = [x, *layer.parameters()]
    if base:
        kept += layer.quantized_weight.buffers
    with Saved(kept) as saved:
        y = layer(x)
    on_context, _ = tree_flatten(vars(y.grad_fn))  # what no hook sees
    for tensor in filter(torch.is_tensor, on_context):
        saved.count(tensor)
    assert saved.bytes == 2 * 10 * layer.r * 4 + (8 if dropout else 0)  # down and seed
    y.sum().backward()


@pytest.mark.parametrize("backend", ["inductor", "aot_eager"])
@pytest.mark.parametrize("base", BASES)
def test_the_layer_compiles_whole(base, backend):
    dropout = 0.5 if backend == "aot_eager" else 0.0
    _, layer = make(base=base, lora_dropout=dropout)
    x = torch.randn(6, 64, requires_grad=True)
    inputs = [x, layer.lora_A, layer.lora_B]
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    results = []
    for run in (layer, compiled):
        torch.manual_seed(3)
        y = run(x)
        results.append([y, *torch.autograd.grad(y.square().sum(), inputs)])
    for eager, whole in zip(*results, strict=True):
        torch.testing.assert_close(whole, eager)


def test_the_text_says_what_the_layer_is():
    _, layer = make(lora_dropout=0.25)
    assert repr(layer) == (
        "QLoRALinear(in_features=64, out_features=24, base=nf4, block_size=64, bias=True, r=4, "
        "lora_alpha=32, lora_dropout=0.25)"
    )
    assert "base=dense, bias=False, r=4" in repr(make(base=None, bias=False)[1])


def test_moving_takes_the_scales_along(device):
    layer = QLoRALinear(quantize(torch.randn(8, 64), nested=True), None, LoraConfig(r=2))
    x = torch.randn(2, 64)
    y = layer(x)
    layer.to(device)
    assert {t.device.type for t in layer.quantized_weight.buffers} == {device.type}
    torch.testing.assert_close(layer(x.to(device)).cpu(), y)
    layer.to("meta")
    assert {t.device.type for t in layer.quantized_weight.buffers} == {"meta"}
