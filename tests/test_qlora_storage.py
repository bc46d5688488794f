"""Packed bytes may be stored as floats, for FSDP: no bit of them ever changes, NaNs included."""

import copy
import io
import pickle
from dataclasses import replace

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from peftkern import qlora
from peftkern.qlora import LoraConfig, QLoRALinear, QuantizedWeight

STORAGES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
CASTS = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
ROWS, COLUMNS = 64, 96


def nan_bytes(count):
    """Bytes that are NaNs in every storage dtype, quiet and signalling, and any others."""
    nans = [b"\x01\x7f\x81\x7f", b"\x01\xfc\x81\xff", b"\x01\x7c\x01\x7c", b"\x01\x00\x80\x7f"]
    nans += [b"\x01\x00\x00\x00\x00\x00\xf0\x7f"]
    random = torch.randint(256, (count,), dtype=torch.uint8)
    start = torch.tensor(list(b"".join(nans)), dtype=torch.uint8)
    return torch.cat([start, random])[:count].view(-1, 1)


def stored(storage, format="nf4"):
    """As bitsandbytes makes it: bytes seen as a dtype."""
    torch.manual_seed(0)
    weight = qlora.quantize(torch.randn(ROWS, COLUMNS), format, nested=True)
    packed = nan_bytes(ROWS * COLUMNS // 2).view(-1).view(storage).view(-1, 1)
    assert packed.isnan().any()
    return replace(weight, packed=packed)


def layer_of(weight):
    torch.manual_seed(1)
    layer = QLoRALinear(weight, torch.randn(ROWS), LoraConfig(r=4))
    nn.init.normal_(layer.lora_B, std=0.1)
    return layer


def raw(tensor):
    return tensor.detach().reshape(-1).view(torch.uint8)


def same(weight, other):
    assert weight.packed.dtype == other.packed.dtype and weight.packed.shape == other.packed.shape
    return torch.equal(raw(weight.packed), raw(other.packed)) and torch.equal(
        weight.dequantize(), other.dequantize()
    )


def through_a_file(weight):
    data = safetensors.torch.save(layer_of(weight).state_dict())
    layer = layer_of(replace(weight, packed=torch.zeros_like(weight.packed)))
    layer.load_state_dict(safetensors.torch.load(data), strict=True)
    return layer.quantized_weight


def through_torch_save(weight):
    file = io.BytesIO()
    torch.save(layer_of(weight), file)
    file.seek(0)
    return torch.load(file, weights_only=False).quantized_weight


WAYS = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda w: pickle.loads(pickle.dumps(w)),
    "to": lambda w: w.to("cpu"),
    "layer": lambda w: layer_of(w).quantized_weight,
    "layer, copied": lambda w: copy.deepcopy(layer_of(w)).quantized_weight,
    "torch.save": through_torch_save,
    "safetensors": through_a_file,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("storage", STORAGES)
def test_bit_patterns_survive(storage, way):
    weight = stored(storage)
    before = raw(weight.packed).clone()
    again = WAYS[way](weight)
    assert same(weight, again) and torch.equal(raw(again.packed), before)


@pytest.mark.parametrize("copied", [lambda params: params, copy.deepcopy], ids=["as is", "copied"])
@pytest.mark.parametrize("storage", STORAGES)
def test_bit_patterns_survive_bitsandbytes(storage, copied, bnb):
    weight = stored(storage)
    before = raw(weight.packed).clone()
    again = QuantizedWeight.from_bnb(copied(weight.to_bnb()))
    assert same(weight, again) and torch.equal(raw(again.packed), before)


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("storage", [torch.uint8, *STORAGES])
def test_casting_a_model_leaves_stored_bytes_alone(storage, cast, swap):
    """`nn.Module.to` converts every parameter of a float dtype: these look like some."""
    weight = stored(torch.float32) if storage == torch.uint8 else stored(storage)
    if storage == torch.uint8:
        weight = replace(weight, packed=weight.buffers[0])
    model = nn.Sequential(layer_of(weight))
    before, wanted = raw(weight.packed).clone(), weight.dequantize()
    torch.__future__.set_swap_module_params_on_conversion(swap)
    try:
        for change in (lambda m: m.to(cast), lambda m: m.to("cpu", cast), lambda m: m.half()):
            model = change(model)
            layer = model[0]
            assert layer.weight.dtype == storage and isinstance(layer.weight, nn.Parameter)
            assert torch.equal(raw(layer.weight), before)
            assert torch.equal(layer.quantized_weight.dequantize(), wanted)
            assert layer.bias.dtype == layer.lora_A.dtype
        assert layer.bias.dtype == torch.float16
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


@pytest.mark.parametrize("cast", CASTS)
def test_casting_a_model_leaves_int8_alone(cast):
    layer = QLoRALinear.from_linear(nn.Linear(COLUMNS, ROWS), r=2, base="int8")
    before, wanted = layer.weight.clone(), layer.quantized_weight.dequantize()
    layer.to(cast)
    assert layer.lora_A.dtype == layer.bias.dtype == cast
    assert layer.weight.shape == before.shape and torch.equal(layer.weight, before)
    assert torch.equal(layer.quantized_weight.dequantize(), wanted)
    x = torch.randn(3, COLUMNS).to(cast)
    assert layer(x).dtype == cast


@pytest.mark.parametrize("storage", STORAGES)
def test_moving_keeps_shape_and_storage(storage, device):
    layer = layer_of(stored(storage))
    shape, before = layer.weight.shape, raw(layer.weight).clone()
    layer.to(device, torch.bfloat16)
    assert (layer.weight.shape, layer.weight.dtype) == (shape, storage)
    assert torch.equal(raw(layer.weight).cpu(), before)
    layer.to("meta")
    assert (layer.weight.shape, layer.weight.dtype) == (shape, storage)
    assert layer.weight.is_meta


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("format", ["nf4", "fp4"])
def test_a_layer_computes_the_same_from_any_storage(isa, storage, format):
    floats = layer_of(stored(storage, format))
    weight = floats.quantized_weight
    plain = layer_of(replace(weight, packed=weight.buffers[0].clone()))
    results = []
    for layer in (floats, plain):
        x = torch.linspace(-1, 1, 20 * COLUMNS).view(20, COLUMNS).requires_grad_()
        y = layer(x)
        results.append([y, *torch.autograd.grad(y.sum(), [x, layer.lora_A, layer.lora_B])])
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float32])
def test_a_layer_of_any_storage_compiles_whole(storage):
    layer = layer_of(stored(storage))
    x = torch.randn(6, COLUMNS)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True)
    assert torch.equal(compiled(x), layer(x))


@pytest.mark.parametrize("mine", [torch.uint8, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("file", [torch.uint8, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("assign", [False, True])
def test_a_layer_keeps_its_storage_when_it_loads(mine, file, assign):
    """So a file of one dtype fills a model that was sharded in another."""
    source = layer_of(stored(torch.float32))
    state = source.state_dict()
    state["weight"] = raw(state["weight"]).view(file).view(-1, 1)
    fresh = qlora.quantize(torch.zeros(ROWS, COLUMNS), nested=True)
    packed = fresh.packed.view(-1).view(mine).view(-1, 1)
    target = layer_of(replace(fresh, packed=packed))
    target.load_state_dict(state, strict=True, assign=assign)
    assert target.weight.dtype == mine
    assert torch.equal(raw(target.weight), raw(source.weight))
    x = torch.randn(3, COLUMNS)
    assert torch.equal(target(x), source(x))


@given(offset=st.integers(1, 7))
def test_bytes_that_lie_between_two_floats_load_too(offset):
    """As in a mapped file: a view as floats needs an aligned address."""
    layer, source = layer_of(stored(torch.float32)), layer_of(stored(torch.float32))
    state = source.state_dict()
    memory = torch.zeros(ROWS * COLUMNS // 2 + 8, dtype=torch.uint8)
    memory[offset : offset + ROWS * COLUMNS // 2] = raw(state["weight"])
    state["weight"] = memory[offset : offset + ROWS * COLUMNS // 2].view(-1, 1)
    nn.init.zeros_(layer.weight)
    layer.load_state_dict(state, strict=True)
    assert torch.equal(raw(layer.weight), raw(source.weight))


@pytest.mark.ops("qlora_linear", "qlora_decode")
@pytest.mark.parametrize("format", ["nf4", "int8"])
@pytest.mark.parametrize("offset", [1, 2, 3])
def test_codes_may_lie_at_any_address(isa, format, offset):
    """A shard or a mapped file puts them where it will."""
    weight = qlora.quantize(torch.randn(16, COLUMNS), format)
    memory = torch.zeros(weight.packed.nbytes + 4, dtype=torch.uint8)
    there = memory[offset : offset + weight.packed.nbytes].view(weight.packed.dtype)
    there = there.view(weight.packed.shape).copy_(weight.packed)
    moved = replace(weight, packed=there)
    for rows in (1, 40):
        x = torch.randn(rows, COLUMNS)
        # On a GPU another kernel takes such codes, and adds in another order.
        exact = {} if isa in ("triton", "emulated") else {"rtol": 0, "atol": 0}
        torch.testing.assert_close(qlora.linear(x, moved), qlora.linear(x, weight), **exact)
    assert torch.equal(moved.dequantize(), weight.dequantize())


@pytest.mark.parametrize("cast", [torch.float32, torch.float16])
def test_codes_that_somebody_has_converted_are_refused(cast):
    """As peft's prepare_model_for_kbit_training does to every 16-bit parameter it knows not."""
    layer = layer_of(stored(torch.bfloat16))
    layer.weight.data = layer.weight.data.to(cast)
    with pytest.raises(TypeError, match=f"^weight must be torch.bfloat16, got {cast}"):
        layer(torch.randn(3, COLUMNS))


def test_bitsandbytes_reads_the_storage_that_it_wrote(bnb):
    weight = stored(torch.bfloat16)
    params = weight.to_bnb()
    assert isinstance(params, bnb.nn.Params4bit) and params.quant_storage == torch.bfloat16
    assert params.data.data_ptr() == weight.packed.data_ptr()
