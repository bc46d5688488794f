"""`optimize`: the same outputs and gradients as before, on our kernels where they serve."""

import bitsandbytes as bnb
import peft
import pytest
import torch
from close import assert_as_good
from models import disturb, tokens, toy
from needs import needs_kernels
from peft_models import (
    BASES,
    adapted,
    layer,
    linear4bit,
    parts,
    reasons,
    runs_ours,
    swapped,
    truth,
)
from torch import nn

import peftkern

pytestmark = needs_kernels


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("base", "options"),
    [
        (None, dict()),
        (None, dict(adapters="as the base")),
        ("nf4", dict()),
        ("nf4", dict(adapters="as the base")),
        ("nf4", dict(quantising=dict(compress_statistics=False))),
        ("nf4", dict(quantising=dict(quant_storage=torch.bfloat16))),
        ("nf4", dict(use_rslora=True)),
        ("nf4", dict(rank_pattern={"q_proj": 7}, alpha_pattern={"q_proj": 3})),
    ],
)
def test_the_output_is_the_base_plus_the_adapter(base, options, dtype):
    options = dict(options)
    cast = options.pop("adapters", None)
    model = adapted(base, dtype=dtype, **options)
    if cast:
        model.to(dtype)
    report, x = peftkern.optimize(model), torch.randn(3, 5, 64).to(dtype)
    assert report.skipped == [] and len(report.rows) == (6 if base else 4)
    for name in ("layers.0.q_proj", "layers.1.down_proj"):
        one = layer(model, name)
        assert runs_ours(one)
        y = torch.randn(2, one.in_features).to(dtype) if one.in_features != 64 else x
        assert_as_good(one(y).detach(), truth, y, *parts(one))


@pytest.mark.parametrize("base", BASES)
def test_gradients_are_those_of_peft(base):
    model = adapted(base, bias="lora_only" if base is None else "none")
    one, x = layer(model), torch.randn(3, 5, 64, requires_grad=True)
    trained = [p for p in one.parameters() if p.requires_grad]
    inputs = [x, *trained]
    assert len(trained) == (3 if base is None else 2)
    theirs = [one(x).square().sum()]
    theirs += torch.autograd.grad(theirs[0], inputs)
    peftkern.optimize(model)
    ours = [one(x).square().sum()]
    ours += torch.autograd.grad(ours[0], inputs)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-4)


def test_a_linear_of_bitsandbytes_alone_is_served():
    for cls, options in ((bnb.nn.Linear4bit, {}), (bnb.nn.LinearNF4, {})):
        for bias in (False, True):
            model = nn.Sequential(linear4bit(nn.Linear(64, 96, bias=bias), cls=cls, **options))
            x = torch.randn(3, 64, requires_grad=True)
            theirs = model(x)
            (grad,) = torch.autograd.grad(theirs.square().sum(), x)
            (row,) = peftkern.optimize(model).rows
            assert (row.layer, row.format) == (f"bitsandbytes.{cls.__name__}", "nf4")
            ours = model(x)
            torch.testing.assert_close(ours, theirs)
            torch.testing.assert_close(torch.autograd.grad(ours.square().sum(), x)[0], grad)
            peftkern.restore(model)
            assert type(model[0]) is cls


@pytest.mark.parametrize(
    ("base", "options", "reason"),
    [
        *((base, dict(lora_bias=True), "lora_bias") for base in BASES),
        (None, dict(alora_invocation_tokens=[1]), "ALora"),
    ],
)
def test_what_our_kernels_do_not_serve_is_bit_for_bit_what_it_was(base, options, reason):
    model = adapted(base, **options)
    expected = model(tokens())
    report = peftkern.optimize(model)
    rows = {row.layer for row in report.rows}
    kind = "Linear8bitLt" if base == "int8" else "Linear4bit"
    assert rows == ({f"bitsandbytes.{kind}"} if base else set())
    assert reason in reasons(report)["layers.0.q_proj"] and len(report.skipped) == 4
    assert reason in peftkern.explain(layer(model))
    if base is None:  # in a quantised model the layers without an adapter run on our kernels
        assert torch.equal(model(tokens()), expected)
    x = torch.randn(3, 64, requires_grad=True)
    ours = layer(model)(x)
    peftkern.restore(model)
    assert torch.equal(layer(model)(x), ours)


def test_modules_to_save_are_left_to_peft():
    model = adapted("nf4", modules_to_save=["lm_head"])
    head = layer(model, "lm_head")
    expected = model(tokens())
    peftkern.optimize(model)
    assert type(head) is type(layer(model, "lm_head"))
    torch.testing.assert_close(model(tokens()), expected)
    model(tokens()).sum().backward()
    assert head.modules_to_save["default"].weight.grad is not None


def test_embeddings_are_left_to_peft():
    config = peft.LoraConfig(r=4, target_modules=["0.q_proj", "embed"])
    model = disturb(peft.get_peft_model(toy(width=64), config))
    expected = model(tokens())
    found = reasons(peftkern.optimize(model))
    assert swapped(model) == ["layers.0.q_proj"]
    assert found["embed"] == "peftkern has no kernel for lora.Embedding"
    torch.testing.assert_close(model(tokens()), expected)


@pytest.mark.parametrize("base", BASES)
def test_dropout_drops_at_its_rate_and_not_in_eval(base):
    model = adapted(base, lora_dropout=0.25)
    peftkern.optimize(model)
    one = layer(model)
    with torch.no_grad():
        one.lora_A["default"].weight.fill_(1)
        one.lora_B["default"].weight.fill_(1)
    x = torch.full((400, 64), 1 / 64)
    low_rank = one(x) - truth(x, *parts(one, []))
    shares = low_rank[:, 0] / (4 * one.scaling["default"])  # of the input that is kept, over 0.75
    assert shares.mean().item() == pytest.approx(1, abs=0.02) and shares.std() > 0.05
    model.eval()
    assert_as_good(one(x).detach(), truth, x, *parts(one))


@pytest.mark.parametrize("compute", [None, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_the_output_has_the_dtype_that_it_had(dtype, compute, autocast):
    # What int8 of bitsandbytes gives under autocast depends on device and mode; ours is x's dtype.
    for base in (base for base in BASES if base != "int8" or not autocast):
        model = adapted(base, dtype=dtype, quantising=dict(compute_dtype=compute))
        one, bias = layer(model), layer(model).base_layer.bias
        alone = layer(model, "layers.0.gate_proj") if base else None
        x = torch.randn(3, 64).to(dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            theirs = [m(x).dtype for m in (one, alone) if m is not None]
            bias.data = bias.data.to(dtype)  # which bitsandbytes has cast in place
            peftkern.optimize(model)
            ours = [m(x).dtype for m in (one, alone) if m is not None]
        assert ours == theirs and bias.dtype == dtype


def test_a_narrower_compute_dtype_is_computed_in():
    model = adapted("nf4", quantising=dict(compute_dtype=torch.bfloat16))
    peftkern.optimize(model)
    one, x = layer(model), torch.randn(3, 64)
    assert torch.equal(one(x), one(x.bfloat16()).float())
    mixed = one(x, adapter_names=["default", "__base__", "default"])
    # Of one row, as there: a kernel for more of them may round W to bfloat16.
    assert mixed.dtype == torch.float32 and torch.equal(mixed[0], one(x[:1])[0])
    assert not torch.equal(one(x), one(x.double()).float())
