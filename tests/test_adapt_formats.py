"""Models in every format: those that bitsandbytes has quantised, and those that `adapt` does."""

import bitsandbytes as bnb
import pytest
import torch
from models import placed, tokens, toy
from samples import FORMATS
from torch import nn
from transformers.pytorch_utils import Conv1D

import peftkern
from peftkern import LoraConfig, QLoRALinear
from peftkern.qlora import reference

WIDTH = 64
STORAGES = [torch.uint8, torch.bfloat16, torch.float16, torch.float32]


def fp4(storage=torch.uint8):
    layer = bnb.nn.Linear4bit(WIDTH, WIDTH, quant_type="fp4", quant_storage=storage)
    return layer.to("cpu")


def int8():
    return bnb.nn.Linear8bitLt(WIDTH, WIDTH, has_fp16_weights=False).to("cpu")


def int8_after_a_forward():
    layer = int8()
    layer(torch.randn(3, WIDTH))
    return layer


@pytest.mark.parametrize("make", [fp4, lambda: fp4(torch.bfloat16), int8, int8_after_a_forward])
@pytest.mark.parametrize("base", [None, "nf4"])
def test_layers_of_bitsandbytes_are_taken_as_they_are(make, base):
    model = toy(width=WIDTH)
    layer = model.layers[0].q_proj = make()
    expected = model.train()(tokens())
    peftkern.adapt(model, LoraConfig(target_modules=["0.q_proj"], base=base))
    ours = model.layers[0].q_proj
    assert ours.weight.data_ptr() == layer.weight.data_ptr()
    assert ours.weight.dtype == layer.weight.dtype
    # int8 there rounds activations on a GPU; on a CPU in training it dequantises, as ours does
    torch.testing.assert_close(model(tokens()), expected)
    row = peftkern.report(model).rows[0]
    assert row.format in ("fp4", "int8") and row.bytes < 4 * WIDTH * WIDTH


@pytest.mark.parametrize("format", FORMATS)
def test_adapt_quantises_to_any_format_and_trains(format, tmp_path):
    model = toy(width=WIDTH)
    before = model(tokens())
    peftkern.adapt(model, LoraConfig(r=4, base=format))
    layers = [m for m in model.modules() if isinstance(m, QLoRALinear)]
    assert layers and {m.quantized_weight.format.name for m in layers} == {format}
    assert {m.weight.dtype for m in layers} == {torch.int8 if format == "int8" else torch.uint8}
    after = model(tokens())
    assert (after - before).abs().max() < 0.5 * before.abs().max()
    optimizer = torch.optim.SGD(peftkern.trainable_parameters(model), lr=0.1)
    losses = []
    for _ in range(4):
        loss = model(tokens()).square().mean()
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    expected = model(tokens())
    peftkern.save_adapter(model, tmp_path)
    for layer in layers:
        nn.init.zeros_(layer.lora_B)
    peftkern.load_adapter(model, tmp_path)
    assert torch.equal(model(tokens()), expected)
    assert f" {format} " in str(peftkern.report(model))


def raw(packed):
    return packed.detach().reshape(-1).view(torch.uint8)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("format", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
def test_packed_bytes_are_stored_as_the_config_says(format, nested, storage):
    linear = nn.Linear(WIDTH, 48)
    options = dict(r=4, base=format, nested=nested)
    plain = QLoRALinear.from_linear(linear, **options)
    layer = QLoRALinear.from_linear(linear, **options, quant_storage=storage)
    assert layer.weight.dtype == storage
    assert torch.equal(raw(layer.weight), raw(plain.weight))
    theirs = bnb.nn.Linear4bit(
        WIDTH, 48, quant_type=format, compress_statistics=nested, quant_storage=storage
    )
    theirs.load_state_dict(linear.state_dict())
    state = theirs.to("cpu").state_dict()
    assert state["weight"].dtype == storage and state["weight"].shape == layer.weight.shape
    assert {k for k in layer.state_dict() if "lora" not in k} == set(state)
    # FP4's ties below zero and the mean of nested scales apart, the bytes are the same too.
    layer.load_state_dict(state | {k: v for k, v in layer.state_dict().items() if "lora" in k})
    assert torch.equal(raw(layer.weight), raw(state["weight"]))
    model = peftkern.adapt(nn.Sequential(linear), LoraConfig(**options, quant_storage=storage))
    assert model.to(torch.bfloat16)[0].weight.dtype == storage
    assert torch.equal(raw(model[0].weight), raw(plain.weight))


@pytest.mark.parametrize("start", ["loftq_2", "pissa"])
def test_every_start_keeps_the_storage(start):
    options = dict(r=4, base="nf4", init_lora_weights=start)
    layers = []
    for storage in (torch.uint8, torch.bfloat16):
        torch.manual_seed(0)
        linear = nn.Linear(WIDTH, 48)
        layers.append(QLoRALinear.from_linear(linear, **options, quant_storage=storage))
    x = torch.randn(3, WIDTH)
    assert layers[1].weight.dtype == torch.bfloat16
    assert torch.equal(layers[0](x), layers[1](x))


def test_bytes_that_fill_no_last_float_are_left_out_before_anything_changes():
    model = nn.Sequential(nn.Linear(6, 11), nn.Linear(11, 8))  # 33 bytes, and 44
    with pytest.raises(ValueError, match="33 packed bytes are no whole number of bfloat16"):
        QLoRALinear.from_linear(model[0], base="nf4", quant_storage=torch.bfloat16)
    peftkern.adapt(model, LoraConfig(r=2, base="nf4", quant_storage=torch.bfloat16))
    assert placed(model) == ["1"]
    (skipped,) = peftkern.report(model).skipped
    assert skipped.reason == "its 33 packed bytes are no whole number of bfloat16"


@pytest.mark.parametrize("format", FORMATS)
def test_a_transposed_linear_is_quantised_to_any_format(format):
    model = toy()
    convolution = model.layers[0].q_proj = Conv1D(32, 32)
    peftkern.adapt(model, LoraConfig(target_modules=["0.q_proj"], base=format))
    layer, x = model.layers[0].q_proj, torch.randn(3, 32)
    weight = layer.quantized_weight.dequantize()
    assert (weight - convolution.weight.t()).abs().max() < 0.3 * convolution.weight.abs().max()
    torch.testing.assert_close(layer(x), reference.linear(x, weight, convolution.bias))


def test_a_model_of_mixed_formats_is_one_state_dict():
    def build():
        torch.manual_seed(3)
        model = nn.Sequential(*[nn.Linear(WIDTH, WIDTH) for _ in FORMATS])
        for place, format in enumerate(FORMATS):
            config = LoraConfig(r=2, base=format, target_modules=[str(place)])
            peftkern.adapt(model, config)
        return model

    model, other = build(), build()
    for layer in model:
        nn.init.normal_(layer.lora_B)
    state = model.state_dict()
    assert "0.weight.absmax" in state and "2.SCB" in state
    other.load_state_dict(state, strict=True)
    x = torch.randn(5, WIDTH)
    assert torch.equal(model(x), other(x))
    assert len(placed(model)) == len(FORMATS)
