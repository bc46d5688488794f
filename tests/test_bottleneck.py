"""Is every kernel of bottleneck the reference, on every instruction set that this machine has?"""

import torch
from bottlenecks import sample
from close import assert_as_good
from hypothesis import given
from hypothesis import strategies as st

from peftkern import _native, bottleneck
from peftkern.bottleneck import ACTIVATIONS, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SIZES = st.integers(1, 70)


@given(
    inputs=st.integers(0, 40),
    columns=SIZES,
    rank=st.integers(1, 40),
    outputs=SIZES,
    dtype=st.sampled_from(DTYPES),
    activation=st.sampled_from(list(ACTIVATIONS)),
    parts=st.sets(st.sampled_from(["bias_down", "bias_up", "scale", "norm", "residual"])),
    p=st.sampled_from([0.0, 0.25, 1.0]),
)
def test_the_fallback_is_the_reference(inputs, columns, rank, outputs, dtype, activation, parts, p):
    x, down, up, options = sample(inputs, columns, rank, outputs, dtype, parts)
    with _native.Instead(_native.references):
        y = bottleneck.linear(x, down, up, activation=activation, dropout=p, seed=5, **options)
    rest = dict(activation=activation, p=p, seed=torch.tensor([5]))
    assert_as_good(y, *as_reference(x, down, up, options | rest))


def as_reference(x, down, up, options):
    """The reference as a function of tensors alone, and those tensors."""
    norm = options.get("norm")
    tensors = {k: v for k, v in options.items() if isinstance(v, torch.Tensor)}
    others = {k: v for k, v in options.items() if k not in tensors}

    def run(x, down, up, weight, bias, *values):
        given = others | dict(zip(tensors, values, strict=True))
        if norm is not None:
            given["norm"] = norm._replace(weight=weight, bias=bias)
        return reference.linear(x, down, up, **given)

    weight, bias = (None, None) if norm is None else norm[:2]
    return run, x, down, up, weight, bias, *tensors.values()


def test_the_worked_example():
    """Catalogue 2.0's, by hand."""
    x = torch.tensor([[1.0, -2.0]], requires_grad=True)
    down = torch.eye(2, requires_grad=True)
    up = torch.tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True)
    scale = torch.tensor(2.0, requires_grad=True)
    with _native.Instead(_native.references):
        y = bottleneck.linear(x, down, up, scale=scale, residual=x)
        y.backward(torch.ones(1, 2))
    assert y.tolist() == [[3.0, 4.0]]
    assert x.grad.tolist() == [[9.0, 1.0]]
    assert up.grad.tolist() == [[2.0, 0.0], [2.0, 0.0]]
    assert down.grad.tolist() == [[8.0, -16.0], [0.0, 0.0]]
    assert scale.grad.item() == 4.0


@given(
    inputs=st.integers(1, 5),
    columns=st.integers(1, 9),
    outputs=st.integers(1, 9),
    activation=st.sampled_from(list(ACTIVATIONS)),
    parts=st.sets(st.sampled_from(["bias_down", "bias_up", "scale", "norm", "residual"])),
    p=st.sampled_from([0.0, 0.4]),
)
def test_every_gradient_of_the_fallback(inputs, columns, outputs, activation, parts, p):
    x, down, up, options = sample(inputs, columns, 3, outputs, torch.float64, parts)
    run, *leaves = as_reference(x, down, up, options)

    def ours(x, down, up, weight, bias, *values):
        names = [k for k in options if k != "norm"]
        given = dict(zip(names, values, strict=True))
        if "norm" in options:
            given["norm"] = options["norm"]._replace(weight=weight, bias=bias)
        return bottleneck.linear(x, down, up, activation=activation, dropout=p, seed=9, **given)

    for leaf in leaves:
        if leaf is not None:
            leaf.requires_grad_()
    with _native.Instead(_native.references):
        assert torch.autograd.gradcheck(ours, leaves)
