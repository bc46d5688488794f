"""Are linear and conv2d what they are said to be, gradients and both forms included?"""

import pytest
import torch
from close import assert_as_good
from hypothesis import given
from hypothesis import strategies as st
from sparses import DENSITIES, KINDS, normal, pattern, sums

from peftkern import qlora, sparse
from peftkern.sparse import Pattern, reference

LINEAR = ("sparse_sddmm", "sparse_matmul", "sparse_matmul_t")
FORMS = ["value", "delta"]
DOUBLE = torch.float64


def places(*entries, shape):
    mask = torch.zeros(shape, dtype=torch.bool)
    for entry in entries:
        mask[entry] = True
    return Pattern.from_mask(mask)


@pytest.mark.ops(*LINEAR)
def test_the_worked_example(isa):
    x = torch.tensor([[1.0, 2, 3], [4, 5, 6]], dtype=DOUBLE, requires_grad=True)
    weight = torch.tensor([[1.0, 0, -1], [2, 1, 0]], dtype=DOUBLE)
    bias = torch.tensor([0.5, -0.5], dtype=DOUBLE, requires_grad=True)
    values = torch.tensor([10.0, -1, 3], dtype=DOUBLE, requires_grad=True)
    found = places((0, 1), (1, 0), (1, 2), shape=(2, 3))
    y = sparse.linear(x, weight, values, found, bias, "delta")
    assert y.tolist() == [[18.5, 11.5], [48.5, 26.5]]
    grad = torch.tensor([[1.0, -1], [2, 0.5]], dtype=DOUBLE)
    grad_x, grad_values, grad_bias = torch.autograd.grad(y, (x, values, bias), grad)
    assert grad_values.tolist() == [12, 1, 0] and grad_bias.tolist() == [3, -0.5]
    assert grad_x.tolist() == [[0, 9, -4], [2.5, 20.5, -0.5]]
    everywhere = sparse.sddmm(x.detach(), grad, pattern(2, 3, 1.0))
    assert everywhere.tolist() == [9, 12, 15, 1, 0.5, 0]


@pytest.mark.ops("sparse_conv2d_sddmm")
@pytest.mark.parametrize(
    ("entries", "wanted"),
    [
        ([(0, 0, 0, 0)], [12]),
        ([(0, 0, 0, 1), (0, 0, 1, 1)], [16, 28]),
        ([(0, 0)], [12, 16, 24, 28]),
    ],
)
def test_the_worked_example_of_a_convolution(isa, entries, wanted):
    x = torch.arange(1.0, 10, dtype=DOUBLE).view(1, 1, 3, 3)
    found = places(*entries, shape=(1, 1, 2, 2))
    values = torch.zeros(found.nnz, dtype=DOUBLE, requires_grad=True)
    sparse.conv2d(x, torch.zeros(1, 1, 2, 2, dtype=DOUBLE), values, found).sum().backward()
    assert values.grad.tolist() == wanted


MASKS = {
    "a single entry": lambda n, k: places((n - 1, k // 2), shape=(n, k)),
    "a full row": lambda n, k: places((n // 2,), shape=(n, k)),
    "a full column": lambda n, k: places((slice(None), k - 1), shape=(n, k)),
    "a checkerboard": lambda n, k: Pattern.from_mask(
        (torch.arange(n)[:, None] + torch.arange(k)) % 2 == 0
    ),
    "everything": lambda n, k: pattern(n, k, 1.0),
    "nothing": lambda n, k: pattern(n, k, 0.0),
}


@pytest.mark.ops(*LINEAR)
@pytest.mark.parametrize("mask", MASKS)
def test_the_gradient_of_linear_is_that_of_finite_differences(isa, mask):
    """Of x, values and bias. In the form "value" the weight follows the values by scatter_, as a
    layer does it; finite differences of what is read from them alone are those of W'."""
    for tokens, rows, columns in (((3,), 4, 5), ((1,), 7, 2), ((2, 2), 1, 1)):
        found = MASKS[mask](rows, columns)
        x = normal(1, *tokens, columns, dtype=DOUBLE).requires_grad_()
        weight, bias = normal(2, rows, columns, dtype=DOUBLE), normal(3, rows, dtype=DOUBLE)
        values = normal(4, found.nnz, dtype=DOUBLE).requires_grad_()

        def delta(x, values, bias, found=found, weight=weight):
            return sparse.linear(x, weight, values, found, bias, "delta", 0.5)

        def value(x, values, bias, found=found, weight=weight):
            held = sparse.scatter_(weight.clone(), values.detach(), found)
            return sparse.linear(x, held, values, found, bias)

        for form in (delta, value):
            assert torch.autograd.gradcheck(form, (x, values, bias.requires_grad_()))


@pytest.mark.ops("sparse_conv2d_sddmm", "sparse_gather", "sparse_scatter_")
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("last", [False, True])
def test_the_gradient_of_conv2d_is_that_of_finite_differences(isa, groups, last):
    layout = torch.channels_last if last else torch.contiguous_format
    weight = normal(2, 2, 2 // groups, 2, 3, dtype=DOUBLE).contiguous(memory_format=layout)
    found = Pattern.from_mask(normal(5, *weight.shape) > 0.3)
    x = normal(1, 2, 2, 4, 5, dtype=DOUBLE).contiguous(memory_format=layout).requires_grad_()
    bias = normal(3, 2, dtype=DOUBLE).requires_grad_()
    values = normal(4, found.nnz, dtype=DOUBLE).requires_grad_()
    steps = {"stride": (2, 1), "padding": 1, "dilation": (1, 2), "groups": groups}

    def delta(x, values, bias):
        return sparse.conv2d(
            x, weight, values, found, bias, **steps, form="delta", scale=0.5
        )  # fmt: skip

    def value(x, values, bias):
        held = sparse.scatter_(weight.clone(), values.detach(), found)
        return sparse.conv2d(x, held, values, found, bias, **steps)

    for form in (delta, value):
        assert torch.autograd.gradcheck(form, (x, values, bias))


@pytest.mark.ops(*LINEAR)
@given(
    density=DENSITIES, kind=st.sampled_from(KINDS), form=st.sampled_from(FORMS),
    dtypes=st.sampled_from(
        [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16),
         (torch.float16, torch.float32), (torch.bfloat16, torch.float32), (DOUBLE, DOUBLE)]
    ),
)  # fmt: skip
def test_linear_is_the_reference(isa, density, kind, form, dtypes):
    dtype, weight_dtype = dtypes
    found = pattern(33, 130, density, kind)
    x, weight = normal(1, 3, 5, 130, dtype=dtype), normal(2, 33, 130, dtype=weight_dtype)
    values = normal(3, found.nnz, dtype=sums(dtype))
    bias, grad = normal(4, 33), normal(5, 3, 5, 33, dtype=dtype)
    if form == "value":
        values = sparse.gather(weight, found).to(values.dtype)

    def step(run, grad, x, weight, values, bias):
        leaves = [t.detach().requires_grad_() for t in (x, values, bias)]
        y = run(leaves[0], weight, leaves[1], leaves[2])
        return [y.detach(), *torch.autograd.grad(y, leaves, grad)]

    def ours(x, weight, values, bias):
        return sparse.linear(x, weight, values, found, bias, form)

    def plain(x, weight, values, bias):
        return reference.linear(x, weight, values, found.indices(), bias, form)

    operands = (grad, x, weight, values, bias)
    for i, one in enumerate(step(ours, *operands)):
        assert_as_good(one, lambda *all, i=i: step(plain, *all)[i], *operands)


@pytest.mark.ops(*LINEAR)
@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_on_a_quantised_base_s_stays_beside_it(isa, format):
    base = qlora.quantize(normal(1, 32, 64), format)
    found = pattern(32, 64, 0.1)
    x, values = normal(2, 5, 64).requires_grad_(), normal(3, found.nnz).requires_grad_()
    y = sparse.linear(x, base, values, found, form="delta", scale=0.5)
    wanted = reference.linear(
        x, base.dequantize(), 0.5 * values, found.indices(), form="delta"
    )  # fmt: skip
    torch.testing.assert_close(y, wanted, rtol=1e-4, atol=1e-4)
    grad = normal(4, *y.shape)
    for one, other in zip(
        torch.autograd.grad(y, (x, values), grad),
        torch.autograd.grad(wanted, (x, values), grad),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.ops(*LINEAR, "sparse_gather", "sparse_scatter_")
def test_a_merged_weight_gives_what_a_separate_s_gives(isa):
    weight, found = normal(1, 33, 70), pattern(33, 70, 0.2)
    x, values = normal(2, 9, 70), normal(3, found.nnz)
    apart = sparse.linear(x, weight, values, found, form="delta")
    saved = sparse.gather(weight, found)
    merged = sparse.scatter_(weight.clone(), saved + values, found)
    together = sparse.linear(x, merged, saved + values, found)
    torch.testing.assert_close(apart, together, rtol=1e-4, atol=1e-4)
    assert torch.equal(sparse.scatter_(merged, saved, found), weight)


@pytest.mark.ops("sparse_sddmm", "sparse_scatter_", "sparse_gather")
def test_entries_that_do_not_train_keep_their_bits(isa):
    found, start = pattern(20, 40, 0.1), normal(1, 20, 40)
    weight, values = start.clone(), sparse.gather(start, found).requires_grad_()
    optimizer = torch.optim.AdamW([values], lr=0.1)
    for step in range(20):
        x = normal(step, 6, 40)
        sparse.linear(x, weight, values, found).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        sparse.scatter_(weight, values.detach(), found)
    mask = found.mask()
    assert torch.equal(weight[~mask], start[~mask])
    assert (weight[mask] != start[mask]).all()


def test_no_dense_gradient_exists():
    """Of what a backward allocates, nothing is as large as the weight."""
    found = pattern(512, 512, 0.01)
    weight, x = normal(1, 512, 512), normal(2, 4, 512)
    values = sparse.gather(weight, found).requires_grad_()
    y = sparse.linear(x, weight, values, found)
    with torch.profiler.profile(profile_memory=True) as profile:
        y.sum().backward()
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert 0 < largest < weight.nbytes / 4


def test_a_backward_behind_a_written_weight_is_refused():
    found = pattern(8, 16, 0.3)
    weight, x = normal(1, 8, 16), normal(2, 4, 16).requires_grad_()
    values = sparse.gather(weight, found).requires_grad_()
    y = sparse.linear(x, weight, values, found)
    sparse.scatter_(weight, values.detach() + 1, found)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
