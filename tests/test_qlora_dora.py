"""DoRA: peft's numbers without peft's dense weight, and rows that have nothing to divide by."""

import pytest
import torch
from close import assert_as_good
from doras import BASES, TRAINED, arguments, detached, expected, make
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from peftkern.qlora import QLoRALinear


@pytest.mark.parametrize("base", BASES)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(16, 130),  # fewer may cancel, of which there are tests below
    inputs=st.integers(0, 5),
    r=st.integers(1, 9),
    bias=st.booleans(),
)
def test_the_output_is_the_equation(isa, base, rows, columns, inputs, r, bias):
    """The sum of squares loses twice the digits that the sum of vectors loses to cancellation."""
    layer = make(rows, columns, base, bias, r=r)
    x = torch.randn(inputs, columns)
    y = layer(x).detach()
    assert_as_good(y, lambda *tensors: expected(layer, *tensors), x, *detached(layer), factor=8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_inputs_are_rounded_once_more_than_the_plain_product(dtype):
    layer = make(dtype=dtype)
    x = torch.randn(5, 64).to(dtype)
    truth = expected(layer, x.double(), *(t.double() for t in detached(layer)))
    y = layer(x)
    assert y.dtype == dtype
    floor = 4 * torch.finfo(dtype).eps * truth.abs().max()  # a handful of roundings
    assert (y.double() - truth).abs().max() <= floor


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("base", BASES)
def test_gradients_are_those_of_the_equation(base, dropout, monkeypatch):
    layer = make(base=base, lora_dropout=dropout, bias=True)
    seed = torch.tensor([7])
    monkeypatch.setattr("peftkern._inputs.seed", lambda *args: seed)
    x = torch.randn(5, 64, requires_grad=True)
    layer.bias.requires_grad_()
    inputs = [x, layer.lora_A, layer.lora_B, layer.lora_magnitude_vector, layer.bias]
    ours = torch.autograd.grad(layer(x).square().sum(), inputs)
    whole = expected(layer, x, *arguments(layer), seed)
    theirs = torch.autograd.grad(whole.square().sum(), inputs)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-4)


def with_peft(peft, linear):
    """peft's layer around the linear and ours beside it, with equal parameters."""
    model = nn.Sequential(linear)
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["0"], use_dora=True)
    model.is_loaded_in_4bit = type(linear).__name__ == "Linear4bit"
    theirs = peft.get_peft_model(model, config).base_model.model[0]
    ours = QLoRALinear.from_linear(linear, r=4, lora_alpha=6, use_dora=True)
    modules = (theirs.lora_A, theirs.lora_B, theirs.lora_magnitude_vector)
    parameters = [module["default"].weight for module in modules]
    torch.testing.assert_close(ours.lora_magnitude_vector, parameters[2])
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in zip(TRAINED, parameters, strict=True):
            values = torch.rand(parameter.shape, generator=generator)
            parameter.copy_(values)
            getattr(ours, name).copy_(values)
    return theirs, parameters, ours, [getattr(ours, name) for name in TRAINED]


def assert_as_in_peft(peft, linear, dtype, tolerance):
    theirs, parameters, ours, own = with_peft(peft, linear)
    results = []
    for layer, trained in ((theirs, parameters), (ours, own)):
        x = torch.linspace(-1, 1, 5 * 64, dtype=dtype).view(5, 64).requires_grad_()
        y = layer(x)
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, *trained])])
    for their, mine in zip(*results, strict=True):
        torch.testing.assert_close(mine, their, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("bias", [False, True])
def test_output_and_gradients_are_those_of_peft(bias, peft):
    assert_as_in_peft(peft, nn.Linear(64, 48, bias, dtype=torch.float64), torch.float64, 1e-12)


def test_on_the_base_of_bitsandbytes_too(peft, bnb):
    linear = bnb.nn.Linear4bit(64, 48, quant_type="nf4").to("cpu")
    assert_as_in_peft(peft, linear, torch.float32, 1e-5)


@pytest.mark.parametrize("size", [1e-12, 1e-4, 1.0, 1e4, 1e12])
def test_norms_are_right_at_any_size_of_b(size):
    layer = make(rows=48)
    with torch.no_grad():
        layer.lora_B.mul_(size)
    whole = detached(layer)[0].double() + layer.scaling * (
        layer.lora_B.double() @ layer.lora_A.double()
    )
    expected = torch.linalg.vector_norm(whole, dim=1).float()
    torch.testing.assert_close(layer.row_norms(), expected, rtol=1e-5, atol=0)


def test_a_row_that_cancels_stays_finite_and_trains():
    layer = make(rows=4, columns=64, r=4)
    with torch.no_grad():  # W + c B A = 0 but for rounding
        layer.lora_A.copy_(torch.randn(4, 64))
        layer.lora_B.copy_(torch.eye(4))
        layer.weight.copy_(-layer.scaling * layer.lora_A)
    norms, size = layer.row_norms(), layer.weight.norm(dim=1)
    assert (norms < 2e-3 * size).all() and (norms > 5e-4 * size).all()
    x = torch.randn(3, 64, requires_grad=True)
    layer(x).square().sum().backward()
    for tensor in (x, layer.lora_A, layer.lora_B, layer.lora_magnitude_vector):
        assert torch.isfinite(tensor.grad).all()


@pytest.mark.parametrize("base", BASES)
def test_a_row_of_zeros_stays_zero(base):
    linear = nn.Linear(64, 24)
    with torch.no_grad():
        linear.weight[3] = 0
    layer = QLoRALinear.from_linear(linear, r=4, base=base, use_dora=True)
    x = torch.randn(3, 64, requires_grad=True)
    y = layer(x)
    assert torch.equal(y[:, 3], linear.bias[3].expand(3))
    y.square().sum().backward()
    for tensor in (x, layer.lora_A, layer.lora_B, layer.lora_magnitude_vector):
        assert torch.isfinite(tensor.grad).all()
    assert layer.lora_magnitude_vector.grad[3] == 0 and not layer.lora_B.grad[3].any()


@pytest.mark.parametrize("base", BASES)
def test_a_new_adapter_changes_nothing(base):
    linear = nn.Linear(64, 24)
    plain = QLoRALinear.from_linear(linear, base=base)
    layer = QLoRALinear.from_linear(linear, base=base, use_dora=True)
    x = torch.randn(3, 64)
    torch.testing.assert_close(layer(x), plain(x))
    assert {n for n, p in layer.named_parameters() if p.requires_grad} == set(TRAINED)
