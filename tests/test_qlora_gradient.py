"""Is every gradient of qlora right, on every instruction set that this machine has?"""

import itertools

import pytest
import torch
from close import assert_as_good
from hypothesis import given
from hypothesis import strategies as st
from samples import FORMATS, sample

from peftkern import qlora
from peftkern.qlora import reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SIZES = st.integers(1, 70)


@given(
    rows=st.integers(1, 6),
    columns=st.integers(1, 20),
    inputs=st.integers(1, 5),
    p=st.sampled_from([0.0, 0.4]),
    quantized=st.booleans(),
    format=st.sampled_from(FORMATS),
)
def test_every_gradient(isa, rows, columns, inputs, p, quantized, format):
    x, weight, *parameters = sample(
        rows, columns, inputs, 2, torch.float64, block_size=16, format=format
    )
    leaves = [x, *parameters] if quantized else [x, *parameters, weight.dequantize(torch.float64)]
    for leaf in leaves:
        leaf.requires_grad_()

    def run(x, bias, lora_a, lora_b, dense=None):
        return qlora.linear(x, weight if dense is None else dense, bias, lora_a, lora_b, 1.5, p, 9)

    assert torch.autograd.gradcheck(run, leaves)


@given(
    inputs=st.integers(1, 6),
    experts=st.integers(1, 3),
    mixed=st.booleans(),
    quantized=st.booleans(),
    format=st.sampled_from(FORMATS),
)
def test_every_gradient_of_experts(isa, inputs, experts, mixed, quantized, format):
    x, weight, *parameters = sample(
        3, 10, inputs, 2, torch.float64, 16, experts=experts, format=format
    )
    leaves = [x, *parameters] if quantized else [x, *parameters, weight.dequantize(torch.float64)]
    for leaf in leaves:
        leaf.requires_grad_()
    offsets = torch.tensor([0, *sorted(i * inputs // experts for i in range(1, experts)), inputs])
    adapter = torch.arange(inputs, dtype=torch.int32) % (experts + 1) - 1 if mixed else None

    def run(x, bias, lora_a, lora_b, dense=None):
        w = weight if dense is None else dense
        return qlora.expert_linear(x, w, offsets, bias, lora_a, lora_b, 1.5, 0.3, 9, adapter)

    assert torch.autograd.gradcheck(run, leaves)


@given(
    rows=SIZES,
    columns=SIZES,
    inputs=st.integers(1, 40),
    dtype=st.sampled_from(DTYPES),
    p=st.sampled_from([0.0, 0.4]),
    format=st.sampled_from(FORMATS),
)
def test_gradients_lose_no_more_than_plain_torch(isa, rows, columns, inputs, dtype, p, format):
    x, weight, *parameters = sample(rows, columns, inputs, 5, dtype, format=format)
    grad = torch.randn(inputs, rows, dtype=dtype)
    seed = torch.tensor([11])

    def gradients(fn, which, x, w, bias, lora_a, lora_b, grad):
        leaves = [t.detach().requires_grad_() for t in (x, bias, lora_a, lora_b)]
        y = fn(leaves[0], w, *leaves[1:], 0.5, p, seed)
        return torch.autograd.grad(y, leaves[which], grad)[0]

    for which in range(4):
        found = gradients(qlora.linear, which, x, weight, *parameters, grad)
        assert_as_good(
            found,
            lambda *args, which=which: gradients(reference.linear, which, *args),
            x, weight.dequantize(torch.float32), *parameters, grad,
        )  # fmt: skip


def test_only_what_is_asked_for_is_computed(isa):
    x, weight, bias, lora_a, lora_b = sample(8, 32, 4, 2)
    leaves = [x, bias, lora_a, lora_b]
    for wanted in itertools.product([False, True], repeat=4):
        if not any(wanted):
            continue
        for leaf, want in zip(leaves, wanted, strict=True):
            leaf.requires_grad_(want)
            leaf.grad = None
        qlora.linear(x, weight, bias, lora_a, lora_b).sum().backward()
        assert [leaf.grad is not None for leaf in leaves] == list(wanted)


def test_a_second_derivative_is_refused():
    x, weight, _, lora_a, lora_b = sample(8, 32, 4, 2)
    lora_a.requires_grad_()
    (grad,) = torch.autograd.grad(
        qlora.linear(x, weight, None, lora_a, lora_b).pow(2).sum(), lora_a, create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize(
    ("rows", "columns", "inputs"), [(0, 32, 3), (8, 0, 3), (8, 0, 40), (8, 32, 0)]
)
@pytest.mark.parametrize("format", [*FORMATS, "dense"])
def test_an_empty_side_is_a_product_too(isa, rows, columns, inputs, format):
    quantized = format != "dense"
    x, weight, *parameters = sample(rows, columns, inputs, 2, format=format if quantized else "nf4")
    base = weight if quantized else weight.dequantize()
    leaves = [t.requires_grad_() for t in (x, *parameters)]

    def run(fn, base):
        y = fn(x, base, *parameters, 0.5)
        return [y, *torch.autograd.grad(y.sum(), leaves)]

    for found, wanted in zip(
        run(qlora.linear, base), run(reference.linear, weight.dequantize()), strict=True
    ):
        assert torch.equal(found, wanted)
