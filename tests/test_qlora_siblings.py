"""Linears that read one x: are they what each is alone, at the cost of one?"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peftkern import qlora
from peftkern.qlora import siblings as module
from peftkern.qlora.siblings import Sibling, siblings

OUTPUTS = (5, 3, 8)


def sample(inputs, columns, dtype, quantized=True, bias=True):
    """x, and three siblings of ranks 1, 2 and 3."""
    torch.manual_seed(columns)
    x, parts = torch.randn(inputs, columns, dtype=dtype), []
    for rank, outputs in enumerate(OUTPUTS, 1):
        weight = torch.randn(outputs, columns, dtype=dtype)
        parts.append(
            Sibling(
                qlora.quantize(weight, ["nf4", "fp4", "int8"][rank - 1]) if quantized else weight,
                torch.randn(outputs, dtype=dtype) if bias and rank != 2 else None,
                torch.randn(rank, columns, dtype=dtype),
                torch.randn(outputs, rank, dtype=dtype),
                0.5 * rank,
            )
        )
    return x, parts


def alone(x, parts, dropout=0.0):
    return tuple(
        qlora.linear(x, p.weight, p.bias, p.lora_a, p.lora_b, p.scale, dropout) for p in parts
    )


def run(fn, x, parts, dropout=0.0):
    """Outputs, what each gives to the gradient of x, and all gradients."""
    torch.manual_seed(1)
    leaves = [x.requires_grad_()]
    for part in parts:
        leaves += [p.requires_grad_() for p in part[1:4] if p is not None]
    ys = fn(x, parts, dropout)
    grads = [torch.ones_like(y).cumsum(-1) for y in ys]
    pairs = zip(ys, grads, strict=True)
    each = [torch.autograd.grad(y, x, g, retain_graph=True)[0] for y, g in pairs]
    return ys, each, torch.autograd.grad(ys, leaves, grads)


@given(
    inputs=st.sampled_from([0, 1, 3, 40, 70]),
    columns=st.integers(1, 140),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    quantized=st.booleans(),
    dropout=st.sampled_from([0.0, 0.5]),
)
def test_each_is_what_it_is_alone(isa, inputs, columns, dtype, quantized, dropout):
    x, parts = sample(inputs, columns, dtype, quantized)
    together, _, (grad_x, *grads) = run(siblings, x, parts, dropout)
    apart, each, (wanted_x, *wanted) = run(alone, x, parts, dropout)
    for found, alike in zip((*together, *grads), (*apart, *wanted), strict=True):
        assert torch.equal(found, alike)
    # One sum where three were added up: it may round otherwise.
    terms = sum(part.abs() for part in each)
    assert (
        (grad_x - wanted_x).abs() <= 8 * torch.finfo(dtype).eps * terms.max(-1, True).values
    ).all()


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_every_gradient(isa, dropout):
    x, parts = sample(4, 20, torch.float64)
    leaves = [x, *(p for part in parts for p in part[1:4] if p is not None)]
    for leaf in leaves:
        leaf.requires_grad_()

    def run(*_):
        torch.manual_seed(0)  # the same elements are dropped each time
        return siblings(x, parts, dropout)

    assert torch.autograd.gradcheck(run, leaves)


def test_the_ops_are_well_registered_and_their_fallback_computes_the_same():
    x, parts = sample(6, 40, torch.float32)
    weights = [t for p in parts for t in p.weight.buffers]
    layouts = [n for p in parts for n in (len(p.weight.buffers), *p.weight.layout)]
    seeds = [torch.tensor([i]) for i in range(3)]
    rest = [[p[i] for p in parts] for i in (1, 2, 3, 4)]
    arguments = [weights, layouts, *rest, 0.25, seeds]
    op = torch.ops.peftkern
    found = op.qlora_siblings(x, *arguments)
    for a, b in zip(found, module._fallback(x, *arguments), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    grads, downs = [torch.randn_like(y) for y in found[:3]], found[3:]
    needs = [True, True, True, True, False, True, False, True, False, True]
    backward = [grads, x, downs, *arguments, needs]
    for a, b in zip(op.qlora_siblings_bwd(*backward), module._fallback_bwd(*backward), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(op.qlora_siblings.default, (x, *arguments), test_utils=tests)
    torch.library.opcheck(op.qlora_siblings_bwd.default, backward, test_utils=tests)


def test_they_compile_to_one_graph():
    x, parts = sample(5, 32, torch.float32)

    def run(x):
        return [y.square() for y in siblings(x, parts)]

    for a, b in zip(torch.compile(run, fullgraph=True)(x), run(x), strict=True):
        assert torch.equal(a, b)


def test_one_that_is_not_used_gets_no_gradient():
    x, parts = sample(4, 32, torch.float32)
    for part in parts:
        part.lora_a.requires_grad_()
    first, *_ = siblings(x, parts)
    first.sum().backward()
    assert parts[0].lora_a.grad.abs().max() > 0
    assert all(p.lora_a.grad is None or not p.lora_a.grad.any() for p in parts[1:])


def test_each_operand_is_checked():
    x, parts = sample(4, 32, torch.float32)
    with pytest.raises(ValueError, match=r"lora_b must have shape \[8, 3\], got \[3, 8\]"):
        siblings(x, [*parts[:2], parts[2]._replace(lora_b=parts[2].lora_b.t().contiguous())])
    with pytest.raises(ValueError, match=r"x must have shape \[..., 16\], got \[4, 32\]"):
        siblings(x, [*parts[:2], parts[2]._replace(weight=torch.randn(8, 16))])
