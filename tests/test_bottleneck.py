"""Is every kernel of bottleneck the reference, on every instruction set that this machine has?"""

import itertools

import pytest
import torch
from bottlenecks import as_reference, sample
from close import assert_as_good
from hypothesis import given
from hypothesis import strategies as st

from peftkern import _native, bottleneck, qlora
from peftkern.bottleneck import ACTIVATIONS, Norm, reference
from peftkern.qlora.reference import dropout

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SIZES = st.integers(1, 70)
ANY_ACTIVATION = st.sampled_from(list(ACTIVATIONS))
ANY_PARTS = st.sets(
    st.sampled_from(["bias_down", "bias_up", "scale", "norm", "plain norm", "residual"])
)


@pytest.mark.ops("bottleneck_linear")
@given(
    inputs=st.integers(0, 60),
    columns=st.one_of(SIZES, st.sampled_from([64, 300, 768])),
    rank=st.one_of(st.integers(1, 70), st.sampled_from([256, 300])),
    outputs=SIZES,
    dtype=st.sampled_from(DTYPES),
    activation=ANY_ACTIVATION,
    parts=ANY_PARTS,
    p=st.sampled_from([0.0, 0.25, 1.0]),
)
def test_linear_is_the_reference(isa, inputs, columns, rank, outputs, dtype, activation, parts, p):
    x, down, up, options = sample(inputs, columns, rank, outputs, dtype, parts)
    y = bottleneck.linear(x, down, up, activation=activation, dropout=p, seed=5, **options)
    rest = dict(activation=activation, p=p, seed=torch.tensor([5]))
    assert_as_good(y, *as_reference(x, down, up, options | rest))


@given(
    inputs=st.integers(0, 40),
    columns=SIZES,
    rank=st.integers(1, 40),
    outputs=SIZES,
    dtype=st.sampled_from(DTYPES),
    activation=ANY_ACTIVATION,
    parts=ANY_PARTS,
)
def test_the_fallback_is_the_reference(inputs, columns, rank, outputs, dtype, activation, parts):
    with _native.Instead(_native.references):
        test_linear_is_the_reference.hypothesis.inner_test(
            None, inputs, columns, rank, outputs, dtype, activation, parts, 0.25
        )


@pytest.mark.ops("bottleneck_linear")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 33), (3, 50, 33), (2, 3, 4, 33), (33,)])
def test_x_itself_may_be_the_residual(isa, dtype, shape):
    _, down, up, _ = sample(1, 33, 7, 33, dtype)
    x = torch.randn(shape).to(dtype)
    y = bottleneck.linear(x, down, up, residual=x, activation="gelu", norm=Norm())
    same = bottleneck.linear(x, down, up, residual=x.clone(), activation="gelu", norm=Norm())
    assert y.shape == x.shape and torch.equal(y, same)

    def plain(x, down, up):
        return reference.linear(x, down, up, activation="gelu", residual=x, norm=Norm())

    assert_as_good(y, plain, x, down, up)


@pytest.mark.ops("bottleneck_linear")
@pytest.mark.parametrize("parameters", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_parameters_may_have_another_dtype_than_x(isa, dtype, parameters):
    parts = ("bias_down", "bias_up", "scale", "norm")
    x, down, up, options = sample(20, 40, 9, 50, torch.float32, parts)
    narrow = [t.to(parameters) for t in (down, up, *list(options.values())[:3])]
    norm = Norm(*(t.to(parameters) for t in options["norm"][:2]))
    y = bottleneck.linear(x.to(dtype), *narrow, norm=norm)

    def plain(x, *rest):
        return reference.linear(x, *rest[:5], norm=Norm(*rest[5:]))

    assert_as_good(y, plain, x.to(dtype), *(t.to(dtype) for t in (*narrow, *norm[:2])))


@pytest.mark.ops("bottleneck_linear")
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_are_exact_to_two_units_of_what_they_are_of(isa, activation):
    """down and up are the identity, so y is the activation of x."""
    ends = torch.tensor([0.0, -0.0, 1e-30, 80.0, -80.0, 1e30, -1e30])
    h = torch.cat([torch.linspace(-12, 12, 4001), ends])
    rows = torch.nn.functional.pad(h, (0, -len(h) % 16)).view(-1, 16)
    eye = torch.eye(16)
    y = bottleneck.linear(rows, eye, eye, activation=activation)
    error = (y.double() - ACTIVATIONS[activation](rows.double())).abs()
    assert (error <= 2 * torch.finfo(torch.float32).eps * rows.double().abs()).all()


@pytest.mark.ops("bottleneck_linear")
@pytest.mark.parametrize("rows", [1, 20])
def test_values_that_are_not_finite_come_through(isa, rows):
    for activation in ACTIVATIONS:
        x, down, up, _ = sample(rows, 24, 5, 24)
        x[0, 3] = torch.nan
        y = bottleneck.linear(x, down, up, activation=activation, residual=x)
        assert y[0].isnan().all() and not y[1:].isnan().any()


@pytest.mark.ops("bottleneck_linear", "bottleneck_linear_bwd")
def test_the_worked_example(isa):
    """Catalogue 2.0's, by hand."""
    x = torch.tensor([[1.0, -2.0]], requires_grad=True)
    down = torch.eye(2, requires_grad=True)
    up = torch.tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True)
    scale = torch.tensor(2.0, requires_grad=True)
    y = bottleneck.linear(x, down, up, scale=scale, residual=x)
    y.backward(torch.ones(1, 2))
    assert y.tolist() == [[3.0, 4.0]]
    assert x.grad.tolist() == [[9.0, 1.0]]
    assert up.grad.tolist() == [[2.0, 0.0], [2.0, 0.0]]
    assert down.grad.tolist() == [[8.0, -16.0], [0.0, 0.0]]
    assert scale.grad.item() == 4.0


@pytest.mark.ops("bottleneck_linear")
@pytest.mark.parametrize("dtype", DTYPES)
def test_dropout_drops_the_same_elements_on_every_kernel(isa, dtype):
    """up = identity shows which elements of act(h) it saw."""
    x, eye = torch.ones(37, 21, dtype=dtype), torch.eye(21, dtype=dtype)
    for seed, p in itertools.product([0, -5, 2**40 + 3], [0.1, 0.5]):
        seen = bottleneck.linear(x, eye, eye, dropout=p, seed=seed) != 0
        assert torch.equal(seen, dropout(x, p, torch.tensor([seed])) != 0)


@given(
    inputs=st.integers(1, 60),
    columns=st.one_of(SIZES, st.sampled_from([300, 768])),
    rank=st.one_of(st.integers(1, 40), st.sampled_from([256, 300])),
    outputs=SIZES,
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_identity_without_biases_is_the_low_rank_term_of_qlora(
    isa, inputs, columns, rank, outputs, dtype
):
    x, down, up, _ = sample(inputs, columns, rank, outputs, dtype)
    nothing = torch.zeros(outputs, columns, dtype=dtype)
    wanted = qlora.linear(x, nothing, None, down, up, 0.75)
    assert torch.equal(bottleneck.linear(x, down, up, scale=0.75, activation="identity"), wanted)
