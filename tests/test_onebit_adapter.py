"""Is the adapter of two quantised weights bottleneck's, with the quantiser in front?"""

import itertools

import pytest
import torch
from close import assert_as_good
from hypothesis import given
from hypothesis import strategies as st
from test_onebit_machinery import TESTS
from test_qlora_machinery import Count
from torch.utils.checkpoint import checkpoint

from peftkern import _native, bottleneck, onebit
from peftkern.bottleneck import ACTIVATIONS
from peftkern.onebit import codes, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SIZES = st.integers(1, 70)
BITS = st.sampled_from(reference.BITS)
RESIDUALS = [None, "x", "other"]
ADAPTER = ("onebit_statistics", "onebit_adapter", "onebit_adapter_bwd")
RAW = (*ADAPTER, "onebit_quantize", "onebit_quantize_bwd")


def sample(inputs, columns, rank, outputs, dtype=torch.float32, latent=torch.float32):
    torch.manual_seed(inputs + 71 * columns + rank)
    x, other = (torch.randn(inputs, n).to(dtype) for n in (columns, outputs))
    return x, *(torch.randn(s).to(latent) for s in ((rank, columns), (outputs, rank))), other


def step(adapter, x, down, up, other, residual, *options):
    """y, and the gradients of x, down, up and of a residual of its own."""
    leaves = [t.detach().requires_grad_() for t in (x, down, up, other)]
    onto = {None: None, "x": leaves[0], "other": leaves[3]}[residual]
    y = adapter(*leaves[:3], 0.5, onto, *options)
    grad = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
    return [y, *torch.autograd.grad(y, leaves if residual == "other" else leaves[:3], grad)]


@pytest.mark.ops(*RAW)
@given(
    inputs=st.integers(0, 40),
    columns=SIZES,
    rank=st.integers(1, 40),
    outputs=SIZES,
    dtype=st.sampled_from(DTYPES),
    latent=st.sampled_from([torch.float32, torch.bfloat16]),
    activation=st.sampled_from(list(ACTIVATIONS)),
    residual=st.sampled_from(RESIDUALS),
    p=st.sampled_from([0.0, 0.25]),
    bits=BITS,
)
def test_it_is_bottleneck_behind_the_quantiser(
    isa, inputs, columns, rank, outputs, dtype, latent, activation, residual, p, bits
):
    """To the bit: W is that of the quantiser, and the gradient of W goes through its own."""
    if residual == "x":
        outputs = columns
    x, down, up, other = sample(inputs, columns, rank, outputs, dtype, latent)
    options = (residual, activation, p, 7)
    found = step(lambda *a: onebit.adapter(*a, bits=bits), x, down, up, other, *options)
    statistics = codes.statistics([down, up])
    dense = codes.quantize_op([down, up], statistics, bits)

    def behind(x, down, up, scale, onto, activation, p, seed):
        return bottleneck.linear(x, down, up, None, None, scale, activation, onto, None, p, seed)

    # Wide, as the adapter has the gradient of a 16-bit W.
    y, grad_x, *grads = step(behind, x, *(w.float() for w in dense), other, *options)
    assert torch.equal(found[0], y) and torch.equal(found[1], grad_x)
    latents = codes.quantize_bwd_op(grads[:2], [down, up], statistics, bits)
    # Of float64 Triton has no kernel: all of the adapter's step is the fallback's there, while
    # the latents' gradient alone is the kernel's, with sums in another order.
    exact = (isa, dtype) != ("triton", torch.float64)
    for ours, theirs in zip(found[2:], [*latents, *grads[2:]], strict=True):
        assert torch.equal(ours, theirs) if exact else torch.allclose(ours, theirs, 1e-5, 1e-6)


@pytest.mark.ops(*ADAPTER)
@given(
    inputs=st.integers(0, 20),
    columns=SIZES,
    rank=st.integers(1, 40),
    activation=st.sampled_from(list(ACTIVATIONS)),
    residual=st.sampled_from(RESIDUALS),
    p=st.sampled_from([0.0, 0.25]),
    bits=BITS,
)
def test_it_is_the_reference(isa, inputs, columns, rank, activation, residual, p, bits):
    """In float64, by autograd through the statistics."""
    operands = [t.double() for t in sample(inputs, columns, rank, columns)]
    options = (residual, activation, p, torch.tensor([3]), bits)
    for found, wanted in zip(
        step(onebit.adapter, *operands, *options), step(reference.adapter, *operands, *options),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("residual", RESIDUALS)
def test_the_fallback_is_the_reference(residual):
    operands = [t.double() for t in sample(5, 6, 3, 6)]
    options = (residual, "gelu", 0.25, torch.tensor([3]), 2)
    with _native.Instead(_native.references):
        found = step(onebit.adapter, *operands, *options)
    for a, b in zip(found, step(reference.adapter, *operands, *options), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.ops(*ADAPTER)
@pytest.mark.parametrize("dtype", DTYPES)
def test_it_loses_no_more_than_plain_torch(isa, dtype):
    x, down, up, _ = sample(197, 768, 32, 768, dtype)
    dense = codes.quantize_op([down, up], codes.statistics([down, up]), 1)

    def plain(x, down, up):
        return x + 0.1 * (torch.relu(x @ down.t().to(x.dtype)) @ up.t().to(x.dtype))

    assert_as_good(onebit.adapter(x, down, up, 0.1, x), plain, x, *dense)


@pytest.mark.ops(*ADAPTER)
def test_only_what_is_asked_for_is_computed(isa):
    x, down, up, _ = sample(5, 6, 3, 6)
    statistics = codes.statistics([down, up])
    fixed = (statistics, 1, 0.5, 1, True, 0.25, torch.tensor([3]))
    _, hidden = torch.ops.peftkern.onebit_adapter(
        x, down, up, *fixed[:4], None, *fixed[4:]
    )  # fmt: skip
    backward = torch.ops.peftkern.onebit_adapter_bwd
    full = backward(torch.ones_like(x), x, hidden, down, up, *fixed, [True] * 3)
    for needs in itertools.product([False, True], repeat=3):
        found = backward(torch.ones_like(x), x, hidden, down, up, *fixed, list(needs))
        wanted = [grad for grad, need in zip(full, needs, strict=True) if need]
        assert len(found) == len(wanted)
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.ops(*ADAPTER)
def test_given_statistics_change_nothing(isa):
    operands = sample(5, 6, 3, 6)
    statistics = codes.statistics([operands[1], *operands[1:3]])[1:].contiguous()
    alone = step(lambda *a: onebit.adapter(*a), *operands, "x")
    shared = step(lambda *a: onebit.adapter(*a, statistics=statistics), *operands, "x")
    assert all(torch.equal(a, b) for a, b in zip(alone, shared, strict=True))


@pytest.mark.parametrize("bits", reference.BITS)
def test_the_ops_are_well_registered(bits):
    x, down, up, _ = sample(5, 33, 3, 33, torch.bfloat16)
    fixed = (codes.statistics([down, up]), bits, 0.5, 1, True, 0.25, torch.tensor([3]))
    op = torch.ops.peftkern
    forward = (x, down, up, *fixed[:4], None, *fixed[4:])
    _, hidden = op.onebit_adapter(*forward)
    backward = (x, x, hidden, down, up, *fixed, [True, False, True])
    torch.library.opcheck(op.onebit_adapter.default, forward, test_utils=TESTS)
    torch.library.opcheck(op.onebit_adapter_bwd.default, backward, test_utils=TESTS)


@pytest.mark.parametrize("residual", RESIDUALS)
def test_it_compiles_to_one_graph_for_any_batch(residual):
    def run(x, down, up, *rest):
        return onebit.adapter(x, down, up, *rest)

    compiled = torch.compile(run, fullgraph=True, dynamic=True)
    for inputs in (5, 2, 7):
        operands = sample(inputs, 33, 3, 33)
        found, wanted = (step(f, *operands, residual, "gelu", 0.25, 3) for f in (compiled, run))
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_autocast_casts_x_alone(isa):
    x, down, up, _ = sample(5, 33, 3, 33)
    with torch.autocast("cpu", torch.bfloat16):
        y = onebit.adapter(x, down, up)
        onto = onebit.adapter(x, down, up, residual=x)
    assert y.dtype == torch.bfloat16 and torch.equal(y, onebit.adapter(x.bfloat16(), down, up))
    assert onto.dtype == torch.float32 and torch.equal(onto, x + y)


def test_checkpointing_drops_the_same_again(isa):
    x, down, up, _ = sample(50, 33, 3, 33)
    leaves = [t.requires_grad_() for t in (x, down, up)]
    options = (1.0, x, "relu", 0.5)
    torch.manual_seed(5)
    whole = torch.autograd.grad(onebit.adapter(*leaves, *options).sum(), leaves)
    torch.manual_seed(5)
    y = checkpoint(onebit.adapter, *leaves, *options, use_reentrant=False)
    again = torch.autograd.grad(y.sum(), leaves)
    assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))


def test_threads_do_not_change_bits(isa):
    operands = sample(700, 96, 32, 96)
    before, found = torch.get_num_threads(), []
    for threads in (1, 2, 3, 1):
        torch.set_num_threads(threads)
        found.append(step(onebit.adapter, *operands, "x", "relu", 0.1, 3))
    torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.ops(*ADAPTER)
def test_a_weight_that_is_not_finite_spoils_y(isa):
    x, down, up, _ = sample(5, 33, 3, 33)
    up[2, 1] = torch.nan
    assert onebit.adapter(x, down, up, activation="identity").isnan().all()


def test_a_step_takes_four_calls_and_keeps_no_weight_of_its_own():
    x, down, up, _ = sample(5, 33, 3, 33)
    leaves = [t.requires_grad_() for t in (down, up)]
    with Count() as count:
        y = onebit.adapter(x, *leaves, residual=x)
    assert [c._opname for c in count.calls] == ["onebit_statistics", "onebit_adapter"]
    kept = y.grad_fn.saved_tensors
    assert sum(t is x or t is down or t is up for t in kept) == 3
    assert sorted(t.numel() for t in kept if t is not x and t is not down and t is not up) == [
        4, 5 * 3,
    ]  # fmt: skip
    grad = torch.ones_like(y)
    with Count() as count:
        torch.autograd.grad(y, leaves, grad)
    assert [c._opname for c in count.calls] == ["onebit_adapter_bwd"]


def test_a_second_derivative_is_refused():
    x, down, up, _ = sample(5, 33, 3, 33)
    down.requires_grad_()
    y = onebit.adapter(x, down, up)
    (grad,) = torch.autograd.grad(y.pow(2).sum(), down, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
