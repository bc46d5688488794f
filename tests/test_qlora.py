"""The seven questions, asked of qlora's ops on every instruction set that this machine has."""

import itertools

import pytest
import torch
from close import assert_as_good
from hypothesis import given
from hypothesis import strategies as st

from peftkern import _native, qlora
from peftkern.qlora import fallback, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SIZES = st.integers(1, 70)


@pytest.fixture(autouse=True)
def poisoned():
    """Scratch and outputs start as NaN, so that nothing unwritten can pass for a result."""
    if _native.loaded:
        torch.ops.peftkern.poison(True)
    yield
    if _native.loaded:
        torch.ops.peftkern.poison(False)


def sample(
    rows, columns, inputs, rank, dtype=torch.float32, block_size=64, nested=False, experts=0
):
    """x, weight, bias, lora_a, lora_b; all experts' in one where there are experts."""
    torch.manual_seed(rows * 31 + columns)
    lead = [experts] if experts else []
    weight = qlora.quantize(torch.randn(*lead, rows, columns), "nf4", block_size, nested)
    x = torch.randn(inputs, columns, dtype=dtype)
    bias, lora_a, lora_b = (
        torch.randn(*lead, *shape, dtype=dtype) for shape in ([rows], [rank, columns], [rows, rank])
    )
    return x, weight, bias, lora_a, lora_b


# Is every kernel the reference?


@given(
    shape=st.lists(st.integers(0, 40), min_size=1, max_size=3),
    block_size=st.sampled_from([16, 32, 64, 256, 4096]),
    dtype=st.sampled_from(DTYPES),
)
def test_quantize_is_the_reference(isa, shape, block_size, dtype):
    w = torch.randn(shape).to(dtype)
    found = qlora.quantize(w, "nf4", block_size)
    packed, absmax = reference.quantize(w, reference.midpoints(found.codebook), block_size)
    assert torch.equal(found.packed, packed) and torch.equal(found.absmax, absmax)


@given(
    shape=st.lists(st.integers(0, 40), min_size=1, max_size=3),
    block_size=st.sampled_from([16, 32, 64, 256, 4096]),
    nested=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
def test_dequantize_is_the_reference(isa, shape, block_size, nested, dtype):
    weight = qlora.quantize(torch.randn(shape), "nf4", block_size, nested)
    truth = fallback.dense(weight.buffers, weight.layout).view(shape)
    assert torch.equal(qlora.dequantize(weight, dtype), truth.to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_pattern_survives_the_way_to_float_and_back(isa, dtype):
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    bias, zero = bits.view(dtype), qlora.quantize(torch.zeros(2**16, 32), block_size=32)
    y = qlora.linear(torch.zeros(1, 32, dtype=dtype), zero, bias)[0]
    same = y == bias  # so a NaN is not
    assert torch.equal(~same, bias.isnan()) and torch.equal(y.isnan(), bias.isnan())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_floats_are_rounded_to_16_bits_as_torch_rounds(isa, dtype):
    bits = torch.randint(-(2**31), 2**31, (2**16,)).to(torch.int32)
    edges = torch.tensor([65504, 65519.99, 65520, 2**-24, 2**-25, 3 * 2**-26, 3.4e38, 2**-133])
    values = torch.cat([bits.view(torch.float32), edges, -edges, torch.arange(2**12) / 2**10])
    weight = qlora.quantize(torch.zeros(len(values), 32), block_size=32)
    y = qlora.linear(torch.zeros(1, 32, dtype=dtype), weight, values)[0]
    wanted = values.to(dtype)
    assert torch.equal(y.isnan(), wanted.isnan())
    assert torch.equal(y[~y.isnan()], wanted[~wanted.isnan()])


@given(
    rows=SIZES,
    columns=st.one_of(SIZES, st.sampled_from([64, 128, 192, 576])),
    inputs=st.integers(0, 40),
    rank=st.integers(1, 20),
    block_size=st.sampled_from([16, 32, 64, 128]),
    nested=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    bias=st.booleans(),
    low_rank=st.booleans(),
)
def test_linear_is_the_reference(
    isa, rows, columns, inputs, rank, block_size, nested, dtype, bias, low_rank
):
    x, weight, b, lora_a, lora_b = sample(rows, columns, inputs, rank, dtype, block_size, nested)
    rest = [b if bias else None, *([lora_a, lora_b] if low_rank else [None, None]), 0.5]
    y = qlora.linear(x, weight, *rest)
    assert_as_good(y, reference.linear, x, weight.dequantize(torch.float32), *rest)


@given(
    rows=SIZES,
    columns=SIZES,
    inputs=st.integers(0, 40),
    p=st.sampled_from([0.0, 0.25, 1.0]),
    low_rank=st.booleans(),
)
def test_a_dense_base_takes_the_same_path(isa, rows, columns, inputs, p, low_rank):
    x, weight, bias, *lora = sample(rows, columns, inputs, 4)
    rest = [bias, *(lora if low_rank else [None, None]), 2.0, p]
    dense, seed = weight.dequantize(), torch.tensor([7])
    assert_as_good(qlora.linear(x, dense, *rest, seed), reference.linear, x, dense, *rest, seed)


@given(
    rows=SIZES,
    columns=SIZES,
    inputs=st.integers(0, 40),
    experts=st.integers(1, 4),
    mixed=st.booleans(),
    cuts=st.randoms(),
)
def test_expert_linear_is_the_reference(isa, rows, columns, inputs, experts, mixed, cuts):
    x, weight, bias, lora_a, lora_b = sample(
        rows, columns, inputs, 4, block_size=16, experts=experts
    )
    inner = sorted(cuts.randint(0, inputs) for _ in range(experts - 1))
    offsets = torch.tensor([0, *inner, inputs])
    adapter = torch.randint(-1, experts, (inputs,), dtype=torch.int32) if mixed else None
    rest = [bias, lora_a, lora_b, 0.5, 0.25, torch.tensor([3]), adapter]
    y = qlora.expert_linear(x, weight, offsets, *rest)
    assert_as_good(y, reference.expert_linear, x, weight.dequantize(), offsets, *rest)


@given(rows=SIZES, columns=SIZES, inputs=st.integers(0, 20), grouped=st.booleans())
def test_the_fallback_is_the_reference(rows, columns, inputs, grouped):
    x, weight, bias, lora_a, lora_b = sample(rows, columns, inputs, 4, experts=2)
    seed, offsets = torch.tensor([5]), torch.tensor([0, inputs // 2, inputs])
    if not grouped:
        weight, bias, lora_a, lora_b = (
            qlora.quantize(weight.dequantize()[0]), bias[0], lora_a[0], lora_b[0],
        )  # fmt: skip
        offsets = None
    rest = [bias, lora_a, lora_b, 0.5, 0.25, seed]
    y, _ = fallback.linear(x, weight.buffers, weight.layout, *rest, offsets, None)
    if grouped:
        assert_as_good(y, reference.expert_linear, x, weight.dequantize(), offsets, *rest)
    else:
        assert_as_good(y, reference.linear, x, weight.dequantize(), *rest)


@pytest.mark.parametrize("inputs", [1, 40])
def test_values_that_are_not_finite_come_through(isa, inputs):
    x, weight, *_ = sample(8, 128, inputs, 4)
    x[0, 3] = torch.nan
    assert qlora.linear(x, weight)[0].isnan().all()
    if inputs > 1:
        assert not qlora.linear(x, weight)[1:].isnan().any()
    spoilt = weight.dequantize()
    spoilt[2, 5] = torch.nan
    y = qlora.linear(torch.ones(inputs, 128), qlora.quantize(spoilt))
    assert y[:, 2].isnan().all() and not y[:, [0, 1, 3, 4, 5, 6, 7]].isnan().any()


def test_the_worked_example_of_the_layer(isa):
    """Two rows of 32, by hand in float64: y, s, t and every gradient."""
    rows = ["1f30415263748596a7b8c9daebfc0d1e", "809dbad7f4112e4b6885a2bfdcf91633"]
    packed = torch.tensor(list(bytes.fromhex("".join(rows))), dtype=torch.uint8)[:, None]
    codebook = torch.tensor(reference.NF4)
    weight = qlora.QuantizedWeight(
        packed, torch.tensor([0.5, 0.25]), codebook, torch.Size([2, 32]), torch.float32,
        qlora.formats["nf4"], 32,
    )  # fmt: skip
    i = torch.arange(32, dtype=torch.float64)
    x = torch.stack([(i % 8 - 3.5) / 4, (3 * i % 8) / 8]).requires_grad_()
    lora_a = ((i % 5 - 2) / 10)[None].requires_grad_()
    lora_b = torch.tensor([[0.5], [-1.0]], dtype=torch.float64, requires_grad=True)
    bias = torch.tensor([0.125, -0.25], dtype=torch.float64, requires_grad=True)
    y = qlora.linear(x, weight, bias, lora_a, lora_b, 2.0)
    y.backward(torch.tensor([[1.0, -1.0], [0.5, 2.0]], dtype=torch.float64))

    def same(found, *expected):
        wanted = torch.tensor(expected, dtype=torch.float64)
        torch.testing.assert_close(found.flatten(), wanted, rtol=0, atol=2e-9)

    same(y.detach(), -0.4628434993, -0.0370111776, 0.1758864086, 0.4592199392)
    same(lora_b.grad, -0.4875, -0.825)
    same(bias.grad, 1.5, 1.0)
    same(lora_a.grad[0, :4], -2.625, -3.1875, -3.75, -0.8125)
    same(lora_a.grad.sum(), -49.0)
    same(x.grad[0, :4], -0.9679914754, 0.45, -0.2376912944, -0.3406542510)
    same(x.grad.sum(), 1.0966638659)


def test_philox_is_the_published_generator():
    words = reference.philox(torch.tensor([0]), 4).tolist()
    assert words == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


@pytest.mark.parametrize("dtype", DTYPES)
def test_dropout_drops_the_same_elements_on_every_kernel(isa, dtype):
    """A = identity shows which elements of x the low-rank term saw."""
    x = torch.ones(37, 21, dtype=dtype)
    eye, zero = torch.eye(21, dtype=dtype), torch.zeros(21, 21, dtype=dtype)
    for seed, p in itertools.product([0, -5, 2**40 + 3], [0.1, 0.5]):
        seen = qlora.linear(x, zero, None, eye, eye, 1.0, p, seed) != 0
        assert torch.equal(seen, reference.dropout(x, p, torch.tensor([seed])) != 0)
        assert abs(seen.float().mean() - (1 - p)) < 0.1


# Is the gradient right?


@given(
    rows=st.integers(1, 6),
    columns=st.integers(1, 20),
    inputs=st.integers(1, 5),
    p=st.sampled_from([0.0, 0.4]),
    quantized=st.booleans(),
)
def test_every_gradient(isa, rows, columns, inputs, p, quantized):
    x, weight, *parameters = sample(rows, columns, inputs, 2, torch.float64, block_size=16)
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
)
def test_every_gradient_of_experts(isa, inputs, experts, mixed, quantized):
    x, weight, *parameters = sample(3, 10, inputs, 2, torch.float64, 16, experts=experts)
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
)
def test_gradients_lose_no_more_than_plain_torch(isa, rows, columns, inputs, dtype, p):
    x, weight, *parameters = sample(rows, columns, inputs, 5, dtype)
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


# Is the op well registered?


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("inputs", [0, 3, 20])
def test_the_ops_are_well_registered(dtype, inputs):
    x, weight, bias, lora_a, lora_b = sample(8, 32, inputs, 2, dtype, nested=True)
    seed = torch.tensor([3])
    rest = [bias, lora_a, lora_b, 0.5, 0.25, seed, None, None]
    down = torch.randn(inputs, 2)
    out = torch.empty(weight.shape)
    op = torch.ops.peftkern
    # The raw ops have no gradient by design: the Function around them has it.
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    for name, args in {
        "qlora_quantize": (out.normal_(), reference.midpoints(weight.codebook), 64),
        "qlora_dequantize": (weight.buffers, weight.layout, out),
        "qlora_linear": (x, weight.buffers, weight.layout, *rest),
        "qlora_linear_bwd": (
            torch.randn(inputs, 8, dtype=dtype), x, down, weight.buffers, weight.layout, *rest,
            [True, False, True, True, True],
        ),
    }.items():  # fmt: skip
        torch.library.opcheck(getattr(op, name).default, args, test_utils=tests)


# Does it compile whole?


@pytest.mark.parametrize("quantized", [True, False])
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_it_compiles_to_one_graph(quantized, p):
    x, weight, bias, lora_a, lora_b = sample(8, 32, 5, 2)
    base = weight if quantized else weight.dequantize()
    leaves = [t.requires_grad_() for t in (x, bias, lora_a, lora_b)]

    def run(x, bias, lora_a, lora_b):
        return qlora.linear(x, base, bias, lora_a, lora_b, 0.5, p, 13)

    compiled = torch.compile(run, fullgraph=True)
    grad = torch.randn(5, 8)
    found, wanted = compiled(*leaves), run(*leaves)
    assert torch.equal(found, wanted)
    for a, b in zip(
        torch.autograd.grad(found, leaves, grad),
        torch.autograd.grad(wanted, leaves, grad),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_experts_and_dequantize_compile_to_one_graph():
    x, weight, bias, lora_a, lora_b = sample(8, 32, 5, 2, experts=2)
    offsets = torch.tensor([0, 2, 5])

    def run(x):
        return qlora.expert_linear(x, weight, offsets, bias, lora_a, lora_b), weight.dequantize()

    for found, wanted in zip(torch.compile(run, fullgraph=True)(x), run(x), strict=True):
        assert torch.equal(found, wanted)


# Is it deterministic?


def outputs(inputs, dtype, threads):
    """y, the gradients of bias, lora_a, lora_b and x, and the dense weight."""
    x, weight, bias, lora_a, lora_b = sample(300, 576, inputs, 16, dtype)
    leaves = [t.requires_grad_() for t in (bias, lora_a, lora_b, x)]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        y = qlora.linear(x, weight, bias, lora_a, lora_b, 0.5, 0.25, 3)
        return [y, *torch.autograd.grad(y, leaves, torch.ones_like(y)), weight.dequantize()]
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("inputs", [1, 3, 16, 17, 130])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_do_not_change_bits(isa, inputs, dtype):
    """Of our kernels. The library may split its sums: y of many rows, the gradient of x."""
    once = outputs(inputs, dtype, 1)
    for threads in (2, 3, 1):
        for i, (a, b) in enumerate(zip(once, outputs(inputs, dtype, threads), strict=True)):
            if (i == 0 and inputs > 16) or i == 4:
                torch.testing.assert_close(a, b)
            else:
                assert torch.equal(a, b)


@pytest.mark.parametrize("inputs", [1, 17, 130])
def test_two_runs_give_the_same_bits(isa, inputs):
    for threads in (1, 2):
        first, second = (outputs(inputs, torch.float32, threads) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_how_rows_are_split_does_not_change_few_rows(isa):
    x, weight, *_ = sample(40, 128, 9, 2)
    whole = qlora.linear(x, weight)
    for cut in range(1, 9):
        parts = torch.cat([qlora.linear(x[:cut], weight), qlora.linear(x[cut:], weight)])
        assert torch.equal(whole, parts)


# Does it refuse?


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"x": torch.ones(3, 32, dtype=torch.int32)}, TypeError, "x must be float32"),
        ({"x": torch.ones(3, 31)}, ValueError, r"x must have shape \[..., 32\], got \[3, 31\]"),
        ({"x": torch.ones(())}, ValueError, "x must have shape"),
        ({"x": torch.ones(3, 32, device="meta")}, ValueError, "weight must be on meta, got cpu"),
        ({"weight": "nf4"}, TypeError, "weight must be a Tensor or a QuantizedWeight, got str"),
        ({"weight": torch.ones(8, 32).int()}, TypeError, "weight must be float32"),
        ({"weight": torch.ones(32, 8).t()}, ValueError, "weight must be contiguous"),
        ({"weight": torch.ones(2, 8, 32)}, ValueError, r"\[out, in\]; expert_linear takes experts"),
        ({"bias": torch.ones(7)}, ValueError, r"bias must have shape \[8\], got \[7\]"),
        ({"bias": torch.ones(8).int()}, TypeError, "bias must be float32"),
        ({"lora_a": None}, ValueError, "must come together, got only lora_b"),
        ({"lora_b": None}, ValueError, "must come together, got only lora_a"),
        ({"lora_a": torch.ones(2, 31)}, ValueError, r"lora_a must have shape \[2, 32\]"),
        ({"lora_a": torch.ones(32)}, ValueError, "lora_a must have shape"),
        (
            {"lora_a": torch.ones(0, 32), "lora_b": torch.ones(8, 0)},
            ValueError,
            "rank of at least 1, got 0",
        ),
        ({"lora_a": torch.ones(32, 2).t()}, ValueError, "lora_a must be contiguous"),
        ({"lora_b": torch.ones(8, 3)}, ValueError, r"lora_b must have shape \[8, 2\]"),
        ({"dropout": 1.5}, ValueError, "dropout must be between 0 and 1, got 1.5"),
        ({"dropout": -0.1}, ValueError, "dropout must be between 0 and 1"),
        ({"dropout": 0.5, "seed": torch.ones(1)}, TypeError, "seed must be int64"),
        ({"dropout": 0.5, "seed": torch.ones(2).long()}, ValueError, r"seed must have shape \[1\]"),
    ],
)
def test_linear_refuses(change, error, match):
    x, weight, bias, lora_a, lora_b = sample(8, 32, 3, 2)
    given = dict(x=x, weight=weight, bias=bias, lora_a=lora_a, lora_b=lora_b) | change
    with pytest.raises(error, match=match):
        qlora.linear(**given)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"x": torch.ones(1, 3, 32)}, ValueError, r"x must have shape \[rows, in\]"),
        ({"weight": torch.ones(8, 32)}, ValueError, r"weight must have shape \[experts, out, in\]"),
        ({"offsets": torch.tensor([0, 3])}, ValueError, r"offsets must have shape \[3\]"),
        ({"offsets": torch.tensor([0, 1, 3]).int()}, TypeError, "offsets must be int64"),
        ({"offsets": torch.tensor([0, 4, 3])}, ValueError, "offsets must rise from 0 to 3"),
        ({"offsets": torch.tensor([0, 1, 2])}, ValueError, "offsets must rise from 0 to 3"),
        ({"adapter": torch.tensor([0, 0, 2]).int()}, IndexError, r"adapter must lie in \[-1, 2\)"),
        ({"adapter": torch.tensor([0, 0, -2]).int()}, IndexError, "got -2 to 0"),
        ({"adapter": torch.tensor([0, 0, 1])}, TypeError, "adapter must be int32"),
        ({"lora_a": torch.ones(3, 2, 32), "lora_b": torch.ones(3, 8, 2)}, ValueError, "2 experts"),
    ],
)
def test_expert_linear_refuses(change, error, match):
    x, weight, bias, lora_a, lora_b = sample(8, 32, 3, 2, experts=2)
    given = dict(x=x, weight=weight, offsets=torch.tensor([0, 1, 3]), bias=bias)
    with pytest.raises(error, match=match):
        qlora.expert_linear(**given | dict(lora_a=lora_a, lora_b=lora_b) | change)


def test_quantize_and_dequantize_refuse():
    w = torch.ones(4, 32)
    with pytest.raises(TypeError, match="weight must be float32"):
        qlora.quantize(w.int())
    with pytest.raises(ValueError, match="format must be one of nf4, got 'nf5'"):
        qlora.quantize(w, "nf5")
    with pytest.raises(ValueError, match="block_size must be one of .* got 48"):
        qlora.quantize(w, block_size=48)
    weight = qlora.quantize(w)
    with pytest.raises(TypeError, match="weight must be a QuantizedWeight, got Tensor"):
        qlora.dequantize(w)
    with pytest.raises(TypeError, match="out must be float32"):
        qlora.dequantize(weight, torch.int32)
    with pytest.raises(ValueError, match=r"out must have shape \[4, 32\]"):
        qlora.dequantize(weight, out=torch.empty(32, 4))
    with pytest.raises(ValueError, match="out must be contiguous"):
        qlora.dequantize(weight, out=torch.empty(32, 4).t())


@pytest.mark.skipif(not _native.loaded, reason="needs the compiled library")
def test_a_raw_op_cannot_leave_its_memory():
    """Under the public checks lies a net of its own."""
    x, weight, bias, lora_a, lora_b = sample(8, 32, 3, 2)
    op, buffers, layout = torch.ops.peftkern.qlora_linear, weight.buffers, weight.layout
    rest = [0.5, 0.0, None, None, None]
    for bad in (
        (x[:, :31].contiguous(), buffers, layout, bias, lora_a, lora_b, *rest),
        (x.t(), buffers, layout, bias, lora_a, lora_b, *rest),
        (x, buffers, [1, 9, 32, 64], bias, lora_a, lora_b, *rest),
        (x, buffers[:1], layout, bias, lora_a, lora_b, *rest),
        (x, buffers, layout, bias[:7], lora_a, lora_b, *rest),
        (x, buffers, layout, bias, lora_a, lora_b[:7], *rest),
        (x, buffers, layout, bias, lora_a, None, *rest),
        (x, buffers, layout, bias, lora_a, lora_b, 0.5, 0.5, None, None, None),
        (x, buffers, layout, bias, lora_a, lora_b, *rest[:3], torch.tensor([0, 9]), None),
    ):
        with pytest.raises(RuntimeError):
            op(*bad)
