"""1-bit adapters in models: what the published ones compute, on any base; and merging."""

import math

import pytest
import torch
from onebits import Branch, adapted, blocks, config, latents, pairs, x_of
from torch import nn

import peftkern
from peftkern import OneBitConfig, onebit, qlora
from peftkern.onebit import reference


@pytest.mark.parametrize("bits", reference.BITS)
def test_a_model_computes_what_the_published_one_does(placement, bits):
    model, theirs = adapted(placement, bits=bits)
    x = x_of()
    y, wanted = model(x), theirs(x)
    torch.testing.assert_close(y, wanted, rtol=1e-5, atol=1e-6)
    for output in (y, wanted):
        output.square().sum().backward()
    ours, published = latents(model), latents(theirs)
    assert len(ours) == len(published) == 2 * len(pairs(model)) > 0
    for one, other in zip(ours, published, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-6)


def test_fifty_steps_are_those_of_the_published_module(placement):
    model, theirs = adapted(placement)
    curves = []
    for one in (model, theirs):
        optimizer = torch.optim.AdamW(latents(one), lr=1e-2)
        curves.append([])
        for _ in range(50):
            loss = (one(x_of()) - 1).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            curves[-1].append(loss.item())
    assert curves[0][-1] < 0.7 * curves[0][0]
    assert max(abs(a - b) for a, b in zip(*curves, strict=True)) < 1e-3


def test_the_start_is_the_published_one_and_not_the_identity():
    torch.manual_seed(0)
    layer = onebit.OneBitAdapter(768, r=64)
    edge = 1 / math.sqrt(768)
    down, up = layer.down.detach(), layer.up.detach()
    assert down.abs().max() <= edge and down.std() == pytest.approx(0.0208, rel=0.02)
    assert up.abs().max() <= 2e-3 and up.std() == pytest.approx(8.8e-4, rel=0.02)
    y = layer(x_of(768))
    assert 0 < y.abs().max() < 0.1
    _, up = layer.dense()
    assert up.unique().numel() == 2 and up.abs().mean() == pytest.approx(5.9e-4, rel=0.03)


def test_dropout_is_drawn_between_the_two_and_in_training_alone():
    layer = onebit.OneBitAdapter(16, r=32, dropout=0.5)
    x = x_of()
    torch.manual_seed(0)
    dropped = layer(x, x)
    torch.manual_seed(0)
    assert torch.equal(layer(x, x), dropped)
    assert not torch.equal(layer(x, x), dropped)
    plain = layer.eval()(x, x)
    torch.testing.assert_close(plain, x + Branch(layer)(x))
    layer.train().dropout = 1.0
    assert torch.equal(layer(x, x), x)


@pytest.mark.parametrize("residual", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_and_eval_give_the_same_dtype(dtype, residual):
    layer, x = onebit.OneBitAdapter(16), x_of(dtype=dtype)
    y = layer(x, x_of().to(residual))
    assert y.dtype == torch.promote_types(dtype, residual)
    with torch.no_grad():
        assert layer.eval()(x, x_of().to(residual)).dtype == y.dtype


def test_it_compiles_whole(placement):
    model, _ = adapted(placement)
    y = model(x_of())
    y.square().sum().backward()
    wanted = [p.grad.clone() for p in latents(model)]
    model.zero_grad()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    found = compiled(x_of())
    found.square().sum().backward()
    torch.testing.assert_close(found, y)
    for latent, grad in zip(latents(model), wanted, strict=True):
        torch.testing.assert_close(latent.grad, grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_16_bit_model_keeps_float32_latents(placement, dtype):
    model = blocks().to(dtype)
    peftkern.adapt(model, config(placement))
    assert {p.dtype for p in latents(model)} == {torch.float32}
    y = model(x_of(dtype=dtype))
    assert y.dtype == dtype
    with torch.no_grad():
        found = model.eval()(x_of(dtype=dtype))
    assert found.dtype == dtype
    torch.testing.assert_close(found, y, rtol=2e-2, atol=2e-2)
    model.to(dtype)
    with pytest.raises(TypeError, match="down must be float32, in which small steps add up"):
        model(x_of(dtype=dtype))


def test_autocast_casts_x_alone(placement):
    model, _ = adapted(placement)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x_of())
        with torch.no_grad():
            found = model.eval()(x_of())
    assert y.dtype == found.dtype
    torch.testing.assert_close(found, y, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(y.float(), model(x_of()), rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("base", ["nf4", "int8"])
def test_a_quantised_base_stays_in_its_bits(base):
    torch.manual_seed(0)
    linear = nn.Linear(64, 32)
    layer = onebit.OneBitLinear.from_linear(linear, r=4, base=base)
    assert layer.quantized_weight.format.name == base
    x = x_of(64)
    wanted = qlora.linear(x, layer.quantized_weight, layer.bias) + Branch(layer)(x)
    torch.testing.assert_close(layer(x), wanted, rtol=1e-5, atol=1e-6)
    assert [n for n, p in layer.named_parameters() if p.requires_grad] == ["down", "up"]


@pytest.mark.parametrize("bits", reference.BITS)
def test_what_is_merged_is_what_the_kernels_use(bits):
    model, _ = adapted("lora", bits=bits, scale=100.0)
    layer, before = model[0].mix, model[0].mix.weight
    y = model(x_of())
    down, up = (
        onebit.dequantize(onebit.quantize(w.detach(), bits)) for w in (layer.down, layer.up)
    )
    peftkern.merge(model)
    torch.testing.assert_close(layer.weight, before + 100 * (up @ down), rtol=0, atol=1e-6)
    assert not torch.equal(layer.weight, before)
    torch.testing.assert_close(model.eval()(x_of()), y.detach(), rtol=1e-4, atol=1e-5)
    assert model.state_dict().keys() == blocks().state_dict().keys()
    peftkern.unmerge(model)
    assert layer.weight is before
    torch.testing.assert_close(model.train()(x_of()), y)


def test_a_quantised_base_is_merged_where_one_says_into_what():
    model = nn.Sequential(nn.Linear(64, 64))
    peftkern.adapt(model, OneBitConfig(r=4, scale=100.0, base="nf4"))
    y, packed = model(x_of(64)), model[0].weight
    with pytest.raises(ValueError, match="0 must have a float base to merge into, got nf4"):
        peftkern.merge(model)
    peftkern.merge(model.eval(), dtype=torch.float32)
    torch.testing.assert_close(model(x_of(64)), y.detach(), rtol=1e-4, atol=1e-4)
    peftkern.unmerge(model)
    assert model[0].weight is packed


def test_an_adaptformer_is_not_merged_and_says_why():
    model, _ = adapted("adaptformer")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    reason = "its relu is not linear, and it reads what no weight of the model reads"
    with pytest.raises(ValueError, match=f"0.adapter must .*: {reason}"):
        peftkern.merge(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert {row.mergeable for row in peftkern.report(model).rows} == {f"no: {reason}"}


def test_a_merged_layer_refuses_to_train():
    model, _ = adapted("lora")
    peftkern.merge(model)
    with pytest.raises(RuntimeError, match="must be unmerged to train"):
        model.train()(x_of())


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"r": 0}, ValueError, "r must be at least 1, got 0"),
        ({"bits": 3}, ValueError, "bits must be 1, 2 or 4, got 3"),
        ({"scale": math.nan}, ValueError, "scale must be a finite number, got nan"),
        ({"dropout": 1.5}, ValueError, "dropout must be between 0 and 1, got 1.5"),
        ({"placement": "prefix"}, ValueError, "placement must be 'lora' or 'adaptformer', got"),
        ({"blocks": {"Block": "norm"}}, ValueError, "blocks must be left out for 'lora', got"),
        ({"base": "nf5"}, ValueError, "nf5"),
        ({"base": "nf4", "block_size": 3}, ValueError, "block_size must be one of"),
        ({"target_modules": "("}, ValueError, "must be a regular expression"),
        (
            {"placement": "adaptformer", "base": "nf4"},
            ValueError,
            "base must be None for 'adaptformer', which touches no linear, got 'nf4'",
        ),
    ],
)
def test_a_config_refuses(options, error, message):
    with pytest.raises(error, match=message):
        OneBitConfig(**options)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"in_features": 0}, "in_features must be at least 1, got 0"),
        ({"out_features": -3}, "out_features must be at least 1, got -3"),
        ({"activation": "elu"}, "activation must be one of identity, relu, .* got 'elu'"),
        ({"bits": 3}, "bits must be 1, 2 or 4, got 3"),
        ({"r": 0}, "r must be at least 1, got 0"),
    ],
)
def test_a_layer_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        onebit.OneBitAdapter(**({"in_features": 16} | options))


def test_a_report_and_explain_know_them(placement):
    model, _ = adapted(placement)
    row = peftkern.report(model).rows[0]
    assert row.vllm == "no: onebit" and row.layer in ("OneBitLinear", "OneBitAdapter")
    text = peftkern.explain(pairs(model)[0])
    assert "16 to 4 to 16 in 1 bit on cpu" in text and "onebit_adapter_bwd" in text
