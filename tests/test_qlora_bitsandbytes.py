"""Weights and state dicts go to bitsandbytes and back, in the same storage, with the same bytes."""

import json

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes.functional import QuantState, dequantize_4bit

from peftkern.qlora import LoraConfig, QLoRALinear, QuantizedWeight, quantize


def normal(shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype)


def linear4bit(rows=96, columns=64, nested=True, storage=torch.uint8, bias=True):
    torch.manual_seed(0)
    layer = bnb.nn.Linear4bit(
        columns, rows, bias=bias, quant_type="nf4", compress_statistics=nested,
        quant_storage=storage,
    )  # fmt: skip
    return layer.to("cpu")  # quantises


def same_storage(first, second):
    return first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("nested", [False, True])
def test_bitsandbytes_weights_are_shared_both_ways(nested, storage):
    params = linear4bit(nested=nested, storage=storage).weight
    weight = QuantizedWeight.from_bnb(params)
    assert torch.equal(weight.dequantize(), dequantize_4bit(params.data, params.quant_state))
    back = weight.to_bnb()
    state, again = params.quant_state, back.quant_state
    pairs = [(params, back), (state.absmax, again.absmax), (state.code, again.code)]
    if nested:
        second, also = state.state2, again.state2
        pairs += [(second.absmax, also.absmax), (second.code, also.code)]
        pairs += [(state.offset, again.offset)]
    for mine, theirs in pairs:
        assert same_storage(mine, theirs)
    assert weight.packed.dtype == torch.uint8
    dense = dequantize_4bit(back.data, again)
    assert torch.equal(dense, weight.dequantize()) and back.bnb_quantized


@pytest.mark.parametrize("nested", [False, True])
def test_a_weight_of_ours_serves_a_layer_of_bitsandbytes(nested):
    weight = quantize(normal((96, 64)), "nf4", 64, nested)
    layer = bnb.nn.Linear4bit(64, 96, bias=False, quant_type="nf4")
    layer.weight = weight.to_bnb()
    x = normal((3, 64), seed=1)
    torch.testing.assert_close(layer(x.requires_grad_()), x @ weight.dequantize().t())


def test_what_bitsandbytes_cannot_hold_is_refused():
    weight = quantize(normal((4, 16)), "nf4", 16)
    with pytest.raises(ValueError, match="^block_size must be one of .* for bitsandbytes, got 16"):
        weight.to_bnb()


def test_what_is_no_weight_of_bitsandbytes_is_refused():
    for params in (torch.ones(2), bnb.nn.Linear4bit(4, 4).weight):
        with pytest.raises(TypeError, match="^params must be a quantised Params4bit"):
            QuantizedWeight.from_bnb(params)
    fp4 = bnb.nn.Linear4bit(64, 64, quant_type="fp4").to("cpu")
    with pytest.raises(ValueError, match="^format must be one of nf4, got 'fp4'"):
        QuantizedWeight.from_bnb(fp4.weight)


def test_a_weight_that_bitsandbytes_has_repacked_is_refused():
    params = linear4bit().weight
    params.quant_state.packing_format_for_cpu = True  # as its first eval forward leaves it
    with pytest.raises(ValueError, match="^params must be as they were quantised"):
        QuantizedWeight.from_bnb(params)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("nested", [False, True])
def test_the_state_dict_is_the_one_that_bitsandbytes_writes(nested, bias):
    theirs = linear4bit(nested=nested, bias=bias)
    ours = QLoRALinear.from_linear(theirs, r=2)
    expected = theirs.state_dict()
    for _ in range(2):
        state = ours.state_dict()
        names = [name for name in state if not name.startswith("lora_")]
        assert names == list(expected)
        for name in names:
            assert state[name].dtype == expected[name].dtype, name
            assert torch.equal(state[name], expected[name]), name
        text = bytes(state["weight.quant_state.bitsandbytes__nf4"].tolist())
        keys = ["quant_type", "blocksize", "dtype", "shape"]
        keys += ["nested_blocksize", "nested_dtype", "nested_offset"] if nested else []
        assert list(json.loads(text)) == keys
        ours.eval()(normal((1, 64)))  # of which bitsandbytes' own layers would come out repacked


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
@pytest.mark.parametrize("nested", [False, True])
def test_state_dicts_load_both_ways(nested, storage):
    theirs = linear4bit(nested=nested, storage=storage)
    dense = dequantize_4bit(theirs.weight.data, theirs.weight.quant_state)

    ours = QLoRALinear(quantize(normal((96, 64), seed=9)), torch.zeros(96), LoraConfig(r=2))
    result = ours.load_state_dict(theirs.state_dict(), strict=False)
    assert (sorted(result.missing_keys), result.unexpected_keys) == (["lora_A", "lora_B"], [])
    assert torch.equal(ours.quantized_weight.dequantize(), dense)
    assert torch.equal(ours.bias, theirs.bias)

    ours.eval()(normal((1, 64)))
    state = ours.state_dict()
    statistics = {k: v for k, v in state.items() if k.startswith("weight.")}
    params = bnb.nn.Params4bit.from_prequantized(state["weight"], statistics, device="cpu")
    assert torch.equal(dequantize_4bit(params.data, params.quant_state), dense)
    assert isinstance(params.quant_state, QuantState) and params.quant_state.nested == nested
