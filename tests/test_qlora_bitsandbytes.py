"""Weights and state dicts go to bitsandbytes and back, in the same storage, with the same bytes."""

import copy
import json

import pytest
import torch

from peftkern.qlora import LoraConfig, QLoRALinear, QuantizedWeight, quantize

bnb = pytest.importorskip("bitsandbytes", reason="compares with bitsandbytes")

STORAGES = [torch.uint8, torch.bfloat16, torch.float16, torch.float32]
FORMATS_4BIT = ["nf4", "fp4"]


def normal(shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype)


def linear4bit(rows=96, columns=64, nested=True, storage=torch.uint8, bias=True, format="nf4"):
    torch.manual_seed(0)
    layer = bnb.nn.Linear4bit(
        columns, rows, bias=bias, quant_type=format, compress_statistics=nested,
        quant_storage=storage,
    )  # fmt: skip
    return layer.to("cpu")  # quantises


def linear8bit(rows=96, columns=64, bias=True, after_a_forward=False, threshold=0.0):
    torch.manual_seed(0)
    layer = bnb.nn.Linear8bitLt(
        columns, rows, bias=bias, has_fp16_weights=False, threshold=threshold
    ).to("cpu")
    if after_a_forward:
        layer(normal((3, columns)))
        assert layer.weight.SCB is None  # on the layer's state now
    return layer


def same_storage(first, second):
    return first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()


@pytest.mark.parametrize("format", FORMATS_4BIT)
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("nested", [False, True])
def test_bitsandbytes_weights_are_shared_both_ways(nested, storage, format):
    params = linear4bit(nested=nested, storage=storage, format=format).weight
    weight = QuantizedWeight.from_bnb(params)
    assert torch.equal(
        weight.dequantize(), bnb.functional.dequantize_4bit(params.data, params.quant_state)
    )
    back = weight.to_bnb()
    state, again = params.quant_state, back.quant_state
    pairs = [(params, back), (state.absmax, again.absmax), (state.code, again.code)]
    if nested:
        second, also = state.state2, again.state2
        pairs += [(second.absmax, also.absmax), (second.code, also.code)]
        pairs += [(state.offset, again.offset)]
    for mine, theirs in pairs:
        assert same_storage(mine, theirs)
    assert weight.packed.dtype == back.dtype == back.quant_storage == storage
    assert weight.buffers[0].dtype == torch.uint8 and same_storage(weight.buffers[0], params)
    assert (back.shape, back.quant_type) == (params.shape, format)
    dense = bnb.functional.dequantize_4bit(back.data, again)
    assert torch.equal(dense, weight.dequantize()) and back.bnb_quantized


def test_the_old_transposed_spelling_is_the_same_weight():
    params = linear4bit().weight
    dense = QuantizedWeight.from_bnb(params).dequantize()
    params.data = params.data.t()
    weight = QuantizedWeight.from_bnb(params)
    assert weight.packed.shape == (96 * 64 // 2, 1) and same_storage(weight.packed, params)
    assert torch.equal(weight.dequantize(), dense)


@pytest.mark.parametrize("after_a_forward", [False, True])
def test_int8_weights_are_shared_both_ways(after_a_forward):
    theirs = linear8bit(after_a_forward=after_a_forward)
    weight = QuantizedWeight.from_bnb(theirs)
    assert same_storage(weight.packed, theirs.weight) and weight.dtype == torch.float16
    assert (weight.block_size, weight.nested, weight.shape) == (None, False, (96, 64))
    dense = bnb.functional.int8_vectorwise_dequant(weight.packed, weight.absmax)
    torch.testing.assert_close(weight.dequantize(torch.float32), dense, rtol=2**-21, atol=0)

    back = weight.to_bnb()
    assert same_storage(back, theirs.weight) and same_storage(back.SCB, weight.absmax)
    layer = bnb.nn.Linear8bitLt(64, 96, has_fp16_weights=False)
    layer.weight, layer.bias, x = back, theirs.bias, normal((3, 64))
    assert torch.equal(layer(x), theirs(x))


def test_an_int8_weight_alone_serves_until_the_first_forward():
    theirs = linear8bit()
    assert torch.equal(QuantizedWeight.from_bnb(theirs.weight).packed, theirs.weight.data)
    theirs(normal((3, 64)))
    with pytest.raises(TypeError, match="^params must be a quantised Params4bit or Int8Params"):
        QuantizedWeight.from_bnb(theirs.weight)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("format", FORMATS_4BIT)
def test_a_weight_of_ours_serves_a_layer_of_bitsandbytes(nested, format):
    weight = quantize(normal((96, 64)), format, 64, nested)
    layer = bnb.nn.Linear4bit(64, 96, bias=False, quant_type=format)
    layer.weight = weight.to_bnb()
    x = normal((3, 64), seed=1)
    torch.testing.assert_close(layer(x.requires_grad_()), x @ weight.dequantize().t())


def test_what_bitsandbytes_cannot_hold_is_refused():
    weight = quantize(normal((4, 16)), "nf4", 16)
    with pytest.raises(ValueError, match="^block_size must be one of .* for bitsandbytes, got 16"):
        weight.to_bnb()
    with pytest.raises(ValueError, match=r"^weight must have shape \[out, in\] for bitsandbytes"):
        quantize(normal((2, 4, 16)), "int8").to_bnb()


def test_what_is_no_weight_of_bitsandbytes_is_refused():
    unquantized = bnb.nn.Linear4bit(4, 4), bnb.nn.Linear8bitLt(4, 4, has_fp16_weights=False)
    in_float = bnb.nn.Linear8bitLt(4, 4).to("cpu")
    in_float(normal((2, 4)).half())
    for params in (torch.ones(2), *unquantized, *(u.weight for u in unquantized), in_float):
        with pytest.raises(TypeError, match="^params must be a quantised Params4bit or Int8Params"):
            QuantizedWeight.from_bnb(params)
    foreign = linear4bit().weight
    foreign.quant_state.quant_type = "int3"
    with pytest.raises(ValueError, match="^format must be one of nf4, fp4, int8, got 'int3'"):
        QuantizedWeight.from_bnb(foreign)
    cut = linear4bit(nested=False).weight
    cut.quant_state.absmax = cut.quant_state.absmax[:-1]
    with pytest.raises(ValueError, match=r"^absmax must be \[96\] torch.float32, got \[95\]"):
        QuantizedWeight.from_bnb(cut)
    other = linear4bit().weight
    other.quant_state.state2.blocksize = 128
    with pytest.raises(ValueError, match="^nested_blocksize must be 256, got 128"):
        QuantizedWeight.from_bnb(other)


def test_a_weight_that_bitsandbytes_has_repacked_is_refused():
    params = linear4bit().weight
    params.quant_state.packing_format_for_cpu = True  # as its first eval forward leaves it
    with pytest.raises(ValueError, match="^params must be as they were quantised"):
        QuantizedWeight.from_bnb(params)


def agree(ours, theirs, key):
    """The state dicts, but for the adapter's keys: same names, order, dtypes and bytes."""
    expected = copy.deepcopy(theirs.state_dict())
    for _ in range(2):
        state = ours.state_dict()
        names = [name for name in state if not name.startswith("lora_")]
        assert names == list(expected)
        for name in names:
            assert state[name].dtype == expected[name].dtype, name
            assert state[name].shape == expected[name].shape, name
            assert torch.equal(state[name], expected[name]), name
        assert key in names
        ours.eval()(normal((1, 64)))  # of which bitsandbytes' own layers would come out changed


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("format", FORMATS_4BIT)
def test_the_state_dict_is_the_one_that_bitsandbytes_writes(nested, bias, format):
    theirs = linear4bit(nested=nested, bias=bias, format=format)
    ours = QLoRALinear.from_linear(theirs, r=2)
    agree(ours, theirs, f"weight.quant_state.bitsandbytes__{format}")
    text = bytes(ours.state_dict()[f"weight.quant_state.bitsandbytes__{format}"].tolist())
    keys = ["quant_type", "blocksize", "dtype", "shape"]
    keys += ["nested_blocksize", "nested_dtype", "nested_offset"] if nested else []
    assert list(json.loads(text)) == keys


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("after_a_forward", [False, True])
def test_the_int8_state_dict_is_the_one_that_bitsandbytes_writes(bias, after_a_forward):
    theirs = linear8bit(bias=bias, after_a_forward=after_a_forward)
    agree(QLoRALinear.from_linear(theirs, r=2), theirs, "SCB")


def load_strictly(ours, theirs):
    """A state dict of bitsandbytes and an adapter fill a layer: no key too many, none missing."""
    adapter = {k: v for k, v in ours.state_dict().items() if k.startswith("lora_")}
    result = ours.load_state_dict(theirs.state_dict() | adapter, strict=True)
    assert not result.missing_keys and not result.unexpected_keys


@pytest.mark.parametrize("format", FORMATS_4BIT)
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("after_a_forward", [False, True])
def test_state_dicts_load_both_ways(nested, storage, format, after_a_forward):
    theirs = linear4bit(nested=nested, storage=storage, format=format)
    dense = bnb.functional.dequantize_4bit(theirs.weight.data, theirs.weight.quant_state)
    if after_a_forward:
        theirs(normal((3, 64)))

    ours = QLoRALinear(quantize(normal((96, 64), seed=9), format), torch.zeros(96), LoraConfig(r=2))
    load_strictly(ours, theirs)
    assert torch.equal(ours.quantized_weight.dequantize(), dense)
    assert torch.equal(ours.bias, theirs.bias) and ours.weight.dtype == torch.uint8

    ours.eval()(normal((1, 64)))
    state = ours.state_dict()
    statistics = {k: v for k, v in state.items() if k.startswith("weight.")}
    params = bnb.nn.Params4bit.from_prequantized(state["weight"], statistics, device="cpu")
    assert torch.equal(bnb.functional.dequantize_4bit(params.data, params.quant_state), dense)
    assert (
        isinstance(params.quant_state, bnb.functional.QuantState)
        and params.quant_state.nested == nested
    )


@pytest.mark.parametrize("after_a_forward", [False, True])
def test_int8_state_dicts_load_both_ways(after_a_forward):
    theirs = linear8bit(after_a_forward=after_a_forward)
    ours = QLoRALinear(quantize(normal((96, 64), seed=9), "int8"), torch.zeros(96), LoraConfig(r=2))
    load_strictly(ours, theirs)
    wanted = QuantizedWeight.from_bnb(theirs).dequantize(torch.float32)
    assert torch.equal(ours.quantized_weight.dequantize(), wanted)

    ours.eval()(normal((1, 64)))
    state = {k: v for k, v in ours.state_dict().items() if not k.startswith("lora_")}
    again = linear8bit()
    torch.nn.init.zeros_(again.weight.data)
    again.load_state_dict(state, strict=True)
    x = normal((3, 64))
    assert torch.equal(again(x), theirs(x))


@pytest.mark.parametrize(
    ("base", "change", "match"),
    [
        ("int8", {"SCB": None}, "state_dict must have SCB"),
        ("int8", {"SCB": torch.ones(95)}, r"SCB must be \[96\] torch.float32, got \[95\]"),
        ("int8", {"SCB": torch.ones(96).half()}, "SCB must be .* got .*float16"),
        ("int8", {"weight": torch.ones(96, 64)}, "weight must be .*int8, got .*float32"),
        (
            "int8",
            {"weight": torch.ones(64, 96).to(torch.int8)},
            r"SCB must be \[64\]",
        ),
        ("int8", {"weight_format": torch.tensor(1)}, "weight_format must be 0, .* got 1"),
        ("nf4", {}, "state_dict must have weight.absmax"),
        ("fp4", {}, "state_dict must have weight.absmax"),
    ],
)
def test_an_int8_state_dict_that_does_not_fit_leaves_the_weight_alone(base, change, match):
    state = linear8bit().state_dict() | change
    state = {k: v for k, v in state.items() if v is not None}
    ours = QLoRALinear.from_linear(torch.nn.Linear(64, 96), r=2, base=base)
    before = ours.quantized_weight.dequantize()
    with pytest.raises(RuntimeError, match=match):
        ours.load_state_dict(state)
    assert torch.equal(ours.quantized_weight.dequantize(), before)


def test_a_file_of_another_format_is_refused():
    for mine, other in (("nf4", "fp4"), ("fp4", "nf4"), ("int8", "nf4")):
        ours = QLoRALinear.from_linear(torch.nn.Linear(64, 96), r=2, base=mine)
        with pytest.raises(RuntimeError, match="weight: state_dict must have"):
            ours.load_state_dict(linear4bit(format=other).state_dict())
