"""Is every gradient of qlora right, on every instruction set that this machine has?"""

import itertools

import pytest
import torch
from close import assert_as_good
from hypothesis import given
from hypothesis import strategies as st
from samples import FORMATS, sample

from peftkern import _native, qlora
from peftkern.qlora import fallback, reference

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


def backward_arguments(experts, mixed, dense):
    """Operands of the raw backward op, all but `needs`."""
    inputs, rank = 7, 2
    x, weight, *parameters = sample(3, 10, inputs, rank, torch.float64, 16, experts=experts)
    base, layout = weight.buffers, weight.layout
    if dense:
        base, layout = [weight.dequantize(torch.float64)], [experts or 1, 3, 10, 0, 0]
    offsets = torch.tensor([i * inputs // experts for i in range(experts + 1)]) if experts else None
    adapter = torch.arange(inputs, dtype=torch.int32) % (experts + 1) - 1 if mixed else None
    rest = [base, layout, *parameters, 1.5, 0.3, torch.tensor([9]), offsets, adapter]
    _, down = torch.ops.peftkern.qlora_linear(x, *rest)
    return [torch.randn(inputs, 3, dtype=torch.float64), x, down, *rest]


CASES = [(0, False), (2, False), (2, True)]


@pytest.mark.parametrize("backward", [torch.ops.peftkern.qlora_linear_bwd, fallback.linear_bwd])
def test_only_what_is_asked_for_is_computed(backward):
    grad, x, *rest = backward_arguments(0, False, dense=True)
    full = backward(grad, x, *rest, [True] * 5)
    for needs in itertools.product([False, True], repeat=5):
        read = x if needs[1] or needs[3] else None  # by the gradients of weight and lora_a alone
        found = backward(grad, read, *rest, list(needs))
        wanted = [grad for grad, need in zip(full, needs, strict=True) if need]
        assert len(found) == len(wanted)
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize(("experts", "mixed"), CASES)
def test_the_fallback_computes_the_same_gradients(experts, mixed, dense):
    arguments = backward_arguments(experts, mixed, dense)
    needs = [True, dense, True, True, True]
    found = fallback.linear_bwd(*arguments, needs)
    wanted = torch.ops.peftkern.qlora_linear_bwd(*arguments, needs)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_a_frozen_linear_keeps_no_activations():
    x, weight, bias, lora_a, lora_b = sample(8, 32, 4, 2)
    x.requires_grad_()
    y = qlora.linear(x, weight)  # torch 2.11 frees what is saved along with y
    assert all(t is None or t is not x for t in y.grad_fn.saved_tensors)
    lora_a.requires_grad_()
    y = qlora.linear(x, weight, bias, lora_a, lora_b)
    kept = y.grad_fn.saved_tensors
    assert any(t is x for t in kept)


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
@pytest.mark.parametrize("functions", [{}, _native.references], ids=["kernel", "reference"])
def test_an_empty_side_is_a_product_too(isa, functions, rows, columns, inputs, format):
    quantized = format != "dense"
    x, weight, *parameters = sample(rows, columns, inputs, 2, format=format if quantized else "nf4")
    base = weight if quantized else weight.dequantize()
    leaves = [t.requires_grad_() for t in (x, *parameters)]

    def run(fn, base):
        y = fn(x, base, *parameters, 0.5)
        return [y, *torch.autograd.grad(y.sum(), leaves)]

    with _native.Instead(functions):
        results = run(qlora.linear, base)
    for found, wanted in zip(results, run(reference.linear, weight.dequantize()), strict=True):
        assert torch.equal(found, wanted)
