"""Is every gradient of onebit right, on every instruction set that this machine has?"""

import pytest
import torch
from close import assert_as_good
from hypothesis import example, given
from hypothesis import strategies as st

from peftkern import onebit
from peftkern.onebit import codes, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SIZES = st.integers(1, 70)
BITS = st.sampled_from(reference.BITS)
STEP = ("onebit_statistics", "onebit_quantize", "onebit_quantize_bwd")


@pytest.mark.parametrize("bits", reference.BITS)
def test_the_closed_form_is_what_autograd_makes_of_the_reference(bits):
    torch.manual_seed(bits)
    weight = torch.randn(7, 11, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(7, 11, dtype=torch.float64)
    (wanted,) = torch.autograd.grad(reference.quantize(weight, bits), weight, grad)
    found = reference.quantize_bwd(grad, weight, reference.statistics(weight), bits)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.ops(*STEP)
@given(rows=SIZES, columns=SIZES, bits=BITS, shift=st.sampled_from([0.0, 0.65]))
def test_the_gradient_is_that_of_the_reference(isa, rows, columns, bits, shift):
    """By autograd, in float64; and all of it sums to the sum of what came in."""
    torch.manual_seed(rows * 71 + columns)
    weight = (torch.randn(rows, columns).double() + shift).requires_grad_()
    grad = torch.randn(rows, columns).double()
    (found,) = torch.autograd.grad(codes.quantized(weight, bits), weight, grad)
    (wanted,) = torch.autograd.grad(reference.quantize(weight, bits), weight, grad)
    size = max(1, columns * rows)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12 * size)
    torch.testing.assert_close(found.sum(), grad.sum(), rtol=1e-12, atol=1e-12 * size)


@pytest.mark.ops(*STEP)
@pytest.mark.parametrize("bits", reference.BITS)
def test_the_gradient_is_that_of_a_smooth_surrogate(isa, bits):
    """Straight through has no finite difference; this has the same value and gradient at the point:
    W = mean + std * (level + u - u there), level and u there being fixed."""
    torch.manual_seed(bits)
    point = torch.randn(3, 5, dtype=torch.float64)
    mean, std = reference.statistics(point)
    fixed = (point - mean) / (std + reference.EPS)
    found = reference.codes(point, torch.stack([mean, std]), bits)
    level = torch.tensor(reference.levels(bits), dtype=torch.float64)[found.long()]

    def surrogate(weight):
        mean, std = weight.mean(), weight.std()
        return mean + std * (level + (weight - mean) / (std + reference.EPS) - fixed)

    weight = point.requires_grad_()
    assert torch.autograd.gradcheck(surrogate, weight)
    grad = torch.randn(3, 5, dtype=torch.float64)
    ours, theirs = codes.quantized(weight, bits), surrogate(weight)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    for a, b in zip(
        torch.autograd.grad(ours, weight, grad), torch.autograd.grad(theirs, weight, grad),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.ops(*STEP)
@given(
    rows=SIZES,
    columns=SIZES,
    inputs=st.integers(1, 40),
    dtype=st.sampled_from(DTYPES),
    latent=st.sampled_from([torch.float32, torch.bfloat16]),
    bits=BITS,
)
@example(rows=4, columns=5, inputs=3, dtype=torch.bfloat16, latent=torch.float32, bits=1)
def test_gradients_lose_no_more_than_plain_torch(isa, rows, columns, inputs, dtype, latent, bits):
    torch.manual_seed(rows * 71 + columns)
    weight, bias = torch.randn(rows, columns).to(latent), torch.randn(rows)
    x, grad = torch.randn(inputs, columns).to(dtype), torch.randn(inputs, rows).to(dtype)
    statistics = codes.statistics([weight])
    chosen = reference.codes(weight, statistics[0], bits)
    (dense,) = codes.quantize_op([weight], statistics, bits)

    def ours(which):
        leaves = [t.detach().requires_grad_() for t in (x, bias, weight)]
        y = onebit.linear(leaves[0], leaves[2], leaves[1], bits)
        return torch.autograd.grad(y, leaves[which], grad)[0]

    def plain(which, x, bias, weight, grad, row, dense):
        if which == 0:
            return grad @ dense.to(x.dtype)
        if which == 1:
            return grad.to(row.dtype).sum(0).to(bias.dtype)
        of_w = grad.to(row.dtype).t() @ x.to(row.dtype)
        return reference.quantize_bwd(of_w, weight, row, bits, chosen)

    for which in range(3):
        assert_as_good(
            ours(which), lambda *args, which=which: plain(which, *args),
            x, bias, weight, grad, statistics[0], dense,
        )  # fmt: skip


@pytest.mark.ops(*STEP)
@pytest.mark.parametrize("bits", reference.BITS)
def test_x_and_bias_by_finite_differences(isa, bits):
    torch.manual_seed(bits)
    weight = torch.randn(3, 5, dtype=torch.float64)
    leaves = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((2, 5), (3,))]
    assert torch.autograd.gradcheck(lambda x, b: onebit.linear(x, weight, b, bits), leaves)


@pytest.mark.ops(*STEP)
def test_given_statistics_have_the_gradient_through_them_too(isa):
    torch.manual_seed(1)
    weight, x = torch.randn(6, 9, requires_grad=True), torch.randn(4, 9)
    grads = []
    for statistics in (None, codes.statistics([weight, weight])[1:].contiguous()):
        y = onebit.linear(x, weight, statistics=statistics)
        grads.append(torch.autograd.grad(y.square().sum(), weight)[0])
    assert torch.equal(*grads)


def test_only_what_is_asked_for_is_kept_and_computed():
    torch.manual_seed(1)
    weight, x, bias = torch.randn(8, 32), torch.randn(4, 32, requires_grad=True), torch.randn(8)
    y = onebit.linear(x, weight, bias)
    assert all(t is None or t.shape != x.shape for t in y.grad_fn.saved_tensors)
    y = onebit.linear(x, weight.requires_grad_(), bias)
    # The latent weight itself, x itself, and two numbers: no quantised weight.
    kept = [t for t in y.grad_fn.saved_tensors if t is not None]
    assert sum(t is x or t is weight for t in kept) == 2
    assert sum(t.numel() for t in kept if t is not x and t is not weight) == 2
    every = torch.autograd.grad(y.sum(), [x, weight], retain_graph=True)
    for leaf, wanted in zip((x, weight), every, strict=True):
        (alone,) = torch.autograd.grad(y.sum(), leaf, retain_graph=True)
        assert torch.equal(alone, wanted)


def test_a_second_derivative_is_refused():
    weight, x = torch.randn(8, 32, requires_grad=True), torch.randn(4, 32)
    (grad,) = torch.autograd.grad(onebit.linear(x, weight).pow(2).sum(), weight, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def published(weight):
    """The published module's forward in plain torch: b = 1, by its sign."""
    mean, std = weight.mean(), weight.std()
    u = (weight - mean) / (std + 1e-5)
    code = torch.sign(u) * 0.6744897501960817
    return (code + u - u.detach()) * std + mean


def test_training_follows_the_published_module():
    """One step of AdamW is the same step; fifty end at the same loss."""
    torch.manual_seed(0)
    x, y = torch.randn(64, 24), torch.randn(64, 8)
    start = torch.randn(8, 24) * 0.1
    losses, first = [], []
    for layer in (onebit.linear, lambda x, w: x @ published(w).t()):
        weight = start.clone().requires_grad_()
        optimizer = torch.optim.AdamW([weight], lr=1e-2)
        for i in range(50):
            loss = (layer(x, weight) - y).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if i == 0:
                first.append(weight.detach().clone())
        losses.append(loss.item())
    torch.testing.assert_close(first[0], first[1], rtol=1e-4, atol=1e-6)
    assert losses[0] < 1 and abs(losses[0] - losses[1]) < 1e-3
