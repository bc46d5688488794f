"""Is every gradient of bottleneck right, on every instruction set that this machine has?"""

import itertools

import pytest
import torch
from bottlenecks import as_reference, sample
from close import assert_as_good
from hypothesis import given
from hypothesis import strategies as st

from peftkern import _native, bottleneck
from peftkern.bottleneck import ACTIVATIONS, fallback, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SIZES = st.integers(1, 70)
ANY_ACTIVATION = st.sampled_from(list(ACTIVATIONS))
ANY_PARTS = st.sets(
    st.sampled_from(["bias_down", "bias_up", "scale", "norm", "plain norm", "residual"])
)


@pytest.mark.ops("bottleneck_linear", "bottleneck_linear_bwd")
@given(
    inputs=st.integers(1, 5),
    columns=st.integers(2, 9),
    outputs=st.integers(1, 9),
    activation=ANY_ACTIVATION,
    parts=ANY_PARTS,
    onto_x=st.booleans(),
    p=st.sampled_from([0.0, 0.4]),
)
def test_every_gradient(isa, inputs, columns, outputs, activation, parts, onto_x, p):
    outputs = columns if onto_x else outputs
    x, down, up, options = sample(inputs, columns, 3, outputs, torch.float64, parts)
    options |= dict(activation=activation, dropout=p, seed=9)

    def fn(x, *rest, **given):
        return bottleneck.linear(x, *rest, **given | ({"residual": x} if onto_x else {}))

    run, *leaves = as_reference(x, down, up, options, fn)
    if activation == "relu":  # a difference across its bend is no slope
        down.data = down.data.abs() + 0.1
    for leaf in leaves:
        if leaf is not None:
            leaf.requires_grad_()
    assert torch.autograd.gradcheck(run, leaves)


@given(columns=st.integers(2, 9), activation=ANY_ACTIVATION, parts=ANY_PARTS)
def test_every_gradient_of_the_fallback(columns, activation, parts):
    with _native.Instead(_native.references):
        test_every_gradient.hypothesis.inner_test(None, 4, columns, 5, activation, parts, True, 0.4)


@pytest.mark.ops("bottleneck_linear", "bottleneck_linear_bwd")
@given(
    inputs=st.integers(1, 150),
    columns=st.one_of(SIZES, st.sampled_from([300, 768])),
    rank=st.one_of(st.integers(1, 40), st.just(300)),
    outputs=SIZES,
    dtype=st.sampled_from(DTYPES),
    activation=ANY_ACTIVATION,
    parts=ANY_PARTS,
    p=st.sampled_from([0.0, 0.4]),
)
def test_gradients_lose_no_more_than_plain_torch(
    isa, inputs, columns, rank, outputs, dtype, activation, parts, p
):
    if parts & {"norm", "plain norm"}:  # of very few columns it leaves signs, whose gradient is 0
        columns = max(columns, 8)
    x, down, up, options = sample(inputs, columns, rank, outputs, dtype, parts)
    grad = torch.randn(inputs, outputs, dtype=dtype)
    ours = dict(activation=activation, dropout=p, seed=11)
    plain = dict(activation=activation, p=p, seed=torch.tensor([11]))
    run, *operands = as_reference(x, down, up, options | ours, bottleneck.linear)
    truth, *_ = as_reference(x, down, up, options | plain)

    def gradients(fn, *operands):
        *operands, grad = operands
        leaves = [t if t is None else t.detach().requires_grad_() for t in operands]
        return torch.autograd.grad(fn(*leaves), [t for t in leaves if t is not None], grad)

    found = gradients(run, *operands, grad)
    for which, gradient in enumerate(found):

        def plainly(*operands, which=which):
            return gradients(truth, *operands)[which]

        # Torch adds up the rows of a vector in a tree, these kernels in their order.
        assert_as_good(gradient, plainly, *operands, grad, factor=4 if gradient.dim() == 1 else 2)


def backward_arguments(inputs=60, norm=True):
    """Operands of the raw backward op, all but `needs`."""
    parts = ["bias_down", "bias_up", "scale", *(["norm"] if norm else [])]
    x, down, up, o = sample(inputs, 30, 4, 30, torch.float64, parts)
    weight, bias, eps = o["norm"] if norm else (None, None, None)
    factors = (down, up, o["bias_down"], o["bias_up"], o["scale"], 0.5, 2)
    rest = (weight, bias, eps, 0.25, torch.tensor([3]))
    _, hidden = torch.ops.peftkern.bottleneck_linear(x, *factors, None, True, *rest)
    return [torch.randn_like(x), x, hidden, *factors, True, *rest]


@pytest.mark.skipif(not _native.loaded, reason="needs the compiled library")
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("backward", ["bottleneck_linear_bwd", fallback.linear_bwd])
def test_only_what_is_asked_for_is_computed(backward, norm):
    if isinstance(backward, str):
        backward = getattr(torch.ops.peftkern, backward)
    arguments = backward_arguments(norm=norm)
    there = [True] * 6 + [norm] * 2
    full = iter(backward(*arguments, [True] * 8))
    full = [next(full) if have else None for have in there]
    for needs in itertools.product([False, True], repeat=8):
        found = backward(*arguments, list(needs))
        wanted = [g for g, need in zip(full, needs, strict=True) if need and g is not None]
        assert len(found) == len(wanted)
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.skipif(not _native.loaded, reason="needs the compiled library")
@pytest.mark.parametrize("inputs", [0, 7, 500])
def test_the_fallback_computes_the_same_gradients(inputs):
    arguments = backward_arguments(inputs)
    found = fallback.linear_bwd(*arguments, [True] * 8)
    wanted = torch.ops.peftkern.bottleneck_linear_bwd(*arguments, [True] * 8)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("rows", [1576, 5000])
def test_sums_over_many_rows_lose_no_more_than_torchs(isa, rows):
    parts = ("bias_down", "bias_up", "scale", "norm")
    x, down, up, options = sample(rows, 40, 8, 200, torch.float32, parts)
    run, *leaves = as_reference(x, down, up, options, bottleneck.linear)
    truth, *_ = as_reference(x, down, up, options)
    grad = torch.randn(rows, 200)

    def gradients(fn, *operands):
        *operands, grad = operands
        leaves = [t.detach().requires_grad_() for t in operands]
        return torch.autograd.grad(fn(*leaves), leaves[1:], grad)

    for i, found in enumerate(gradients(run, *leaves, grad)):
        usual = gradients(truth, *leaves, grad)[i]
        exact = gradients(truth, *(t.double() for t in (*leaves, grad)))[i]
        error, allowed = ((t.double() - exact).abs().max() for t in (found, usual))
        # Torch adds the few elements of a bias in a tree, and may have them exactly by luck.
        assert error <= 2 * allowed + 4 * torch.finfo(torch.float32).eps * exact.abs().max()


def test_x_and_hidden_are_all_that_is_kept():
    x, down, up, options = sample(40, 16, 4, 16, parts=["bias_down", "norm"])
    down.requires_grad_()
    y = bottleneck.linear(x, down, up, residual=x, dropout=0.5, **options)
    given = {id(t) for t in (x, down, up, options["bias_down"], *options["norm"][:2])}
    kept = [t for t in y.grad_fn.saved_tensors if t is not None]
    assert [tuple(t.shape) for t in kept if id(t) not in given] == [(40, 4)]


def test_a_second_derivative_is_refused():
    x, down, up, _ = sample(4, 16, 3, 16)
    down.requires_grad_()
    y = bottleneck.linear(x, down, up, activation="gelu")
    (grad,) = torch.autograd.grad(y.pow(2).sum(), down, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.ops("bottleneck_linear", "bottleneck_linear_bwd")
@pytest.mark.parametrize(
    ("inputs", "columns", "outputs"), [(0, 8, 5), (3, 0, 5), (3, 8, 0), (60, 0, 5)]
)
def test_an_empty_side_is_a_product_too(isa, inputs, columns, outputs):
    x, down, up, options = sample(inputs, columns, 2, outputs, parts=["bias_down", "bias_up"])
    leaves = [t.requires_grad_() for t in (x, down, up, *options.values())]

    def run(fn):
        y = fn(*leaves, scale=0.5)
        return [y, *torch.autograd.grad(y.sum(), leaves)]

    for found, wanted in zip(run(bottleneck.linear), run(reference.linear), strict=True):
        torch.testing.assert_close(found, wanted)
