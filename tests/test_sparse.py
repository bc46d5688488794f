"""Is every kernel of sparse the reference, on every instruction set that this machine has?"""

import pytest
import torch
from close import assert_as_good
from hypothesis import given
from hypothesis import strategies as st
from sparses import DENSITIES, DTYPES, KINDS, SIZES, TOKENS, normal, pattern, sums

from peftkern import sparse
from peftkern.sparse import Pattern, fallback, ops, reference

KIND, DTYPE = st.sampled_from(KINDS), st.sampled_from(DTYPES)
# Behind a block of columns, a bitmap's tile, and more columns than 16 bits count.
WIDTHS = st.one_of(SIZES, st.sampled_from([129, 300, 2100]))
LAYOUTS = {
    "dense": lambda x: x,
    "transposed": lambda x: x.t().contiguous().t(),
    "every other": lambda x: torch.stack([x, x], -1).flatten(1)[:, ::2],
    "expanded": lambda x: x[:1].expand_as(x),
}


@pytest.mark.ops("sparse_sddmm", "sparse_sample_")
@given(
    tokens=TOKENS, rows=SIZES, columns=WIDTHS, density=DENSITIES, kind=KIND, dtype=DTYPE,
    layouts=st.tuples(st.sampled_from([*LAYOUTS]), st.sampled_from([*LAYOUTS])),
)  # fmt: skip
def test_sddmm_is_the_reference(isa, tokens, rows, columns, density, kind, dtype, layouts):
    found = pattern(rows, columns, density, kind)
    operands = (normal(1, tokens, columns, dtype=dtype), normal(2, tokens, rows, dtype=dtype))
    x, grad = (LAYOUTS[name](t) for name, t in zip(layouts, operands, strict=True))
    values = sparse.sddmm(x, grad, found, 0.5)
    assert values.dtype == sums(dtype) and values.shape == (found.nnz,)
    assert_as_good(values, reference.sddmm, x, grad, found.indices(), 0.5)


@pytest.mark.ops("sparse_sddmm", "sparse_sample_")
@pytest.mark.parametrize("dtype", DTYPES)
def test_sddmm_sums_in_float32_whatever_comes_in(isa, dtype):
    """The bound of the method: 1e-5 sqrt(M) max|x| max|grad|, also where sums are long."""
    found = pattern(65, 129, 0.05)
    x, grad = normal(1, 1000, 129, dtype=dtype), normal(2, 1000, 65, dtype=dtype)
    exact = reference.sddmm(x.double(), grad.double(), found.indices())
    error = (sparse.sddmm(x, grad, found).double() - exact).abs().max()
    assert error <= 1e-5 * 1000**0.5 * float(x.abs().max()) * float(grad.abs().max())


@pytest.mark.ops("sparse_sddmm")
def test_a_matrix_without_columns_or_rows_has_no_gradient(isa):
    for rows, columns in ((5, 0), (0, 5)):
        found = pattern(rows, columns, 1.0)
        values = sparse.sddmm(torch.ones(2, 3, columns), torch.ones(2, 3, rows), found)
        assert values.shape == (0,)


@pytest.mark.ops("sparse_sddmm")
@pytest.mark.parametrize("kind", KINDS)
def test_kernels_of_all_densities_agree(isa, kind):
    """Sampled, and dense in panels: sizes are no multiple of a tile."""
    x, grad = normal(1, 257, 129), normal(2, 257, 65)
    dense = grad.t() @ x
    for density in (0.0, 1e-4, 1e-2, 0.2, 0.45, 1.0):
        found = pattern(65, 129, density, kind)
        torch.testing.assert_close(
            sparse.sddmm(x, grad, found), dense[found.mask()], rtol=1e-4, atol=1e-4
        )


@pytest.mark.ops("sparse_sddmm")
def test_a_full_mask_gives_the_whole_gradient(isa):
    x, grad = normal(1, 40, 70, dtype=torch.float64), normal(2, 40, 33, dtype=torch.float64)
    values = sparse.sddmm(x, grad, pattern(33, 70, 1.0))
    torch.testing.assert_close(values.view(33, 70), grad.t() @ x, rtol=1e-13, atol=1e-13)


@pytest.mark.ops("sparse_sddmm", "sparse_sddmm_", "sparse_sample_")
@given(
    tokens=TOKENS, rows=SIZES, columns=WIDTHS, density=DENSITIES, kind=KIND, dtype=DTYPE,
)  # fmt: skip
def test_sums_are_added_in_place_where_they_are_asked_for(
    isa, tokens, rows, columns, density, kind, dtype
):
    found = pattern(rows, columns, density, kind)
    x, grad = normal(1, tokens, columns, dtype=dtype), normal(2, tokens, rows, dtype=dtype)
    onto = normal(3, found.nnz, dtype=sums(dtype))

    def plain(x, grad, onto):
        return onto + reference.sddmm(x, grad, found.indices(), 2.0)

    start = onto.clone()
    assert sparse.sddmm(x, grad, found, 2.0, onto=onto) is onto
    assert_as_good(onto, plain, x, grad, start)


@pytest.mark.ops("sparse_sddmm", "sparse_sddmm_")
def test_two_half_batches_are_the_whole_one(isa):
    found = pattern(33, 70, 0.2)
    x, grad = normal(1, 64, 70, dtype=torch.float64), normal(2, 64, 33, dtype=torch.float64)
    whole = sparse.sddmm(x, grad, found)
    half = sparse.sddmm(x[:32], grad[:32], found)
    sparse.sddmm(x[32:], grad[32:], found, onto=half)
    torch.testing.assert_close(half, whole, rtol=1e-13, atol=1e-13)


@pytest.mark.ops("sparse_sddmm", "sparse_sample_")
def test_values_follow_their_entries(isa):
    """In whatever order entries are given, and whatever else is in their row."""
    x, grad = normal(1, 20, 70), normal(2, 20, 9)
    rows, columns = pattern(9, 70, 0.2).indices()
    shuffled = torch.randperm(len(rows))
    found = Pattern.from_indices(rows[shuffled], columns[shuffled], (9, 70))
    given_order = torch.empty(found.nnz)
    given_order[found.order] = sparse.sddmm(x, grad, found)
    wanted = reference.sddmm(x, grad, torch.stack([rows, columns])[:, shuffled])
    torch.testing.assert_close(given_order, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.ops("sparse_gather", "sparse_scatter_")
@given(rows=SIZES, columns=WIDTHS, density=DENSITIES, kind=KIND, dtype=DTYPE)
def test_gather_and_scatter_are_the_reference(isa, rows, columns, density, kind, dtype):
    found = pattern(rows, columns, density, kind)
    weight = normal(1, rows, columns, dtype=dtype)
    values = sparse.gather(weight, found)
    assert torch.equal(values, reference.gather(weight, found.indices()))
    moved, before = normal(2, found.nnz, dtype=sums(dtype)), weight.clone()
    assert sparse.scatter_(weight, moved, found) is weight
    assert torch.equal(weight, reference.scatter(before, moved, found.indices()))


@pytest.mark.ops("sparse_gather", "sparse_scatter_")
@pytest.mark.parametrize("shape", [(4, 3, 3, 2), (4, 1, 2, 2), (1, 5, 1, 3), (6, 4, 1, 1)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_of_convolutions_may_have_their_channels_last(isa, shape, dtype):
    weight = normal(1, *shape, dtype=dtype)
    found = Pattern.from_mask(normal(2, *shape) > 0)
    last = weight.clone(memory_format=torch.channels_last)
    every_other = torch.stack([weight, weight], -1)[..., 0]
    for other in (weight.clone(), last, every_other):
        assert torch.equal(sparse.gather(other, found), sparse.gather(weight, found))
        moved, stride = normal(3, found.nnz, dtype=sums(dtype)), other.stride()
        sparse.scatter_(other, moved, found)
        assert torch.equal(other, reference.scatter(weight, moved, found.indices()))
        assert other.stride() == stride


@pytest.mark.ops("sparse_scatter_")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_values_are_rounded_to_the_nearest(isa, dtype):
    """Ties to even, beyond the range to infinity, and what is no number stays none."""
    some = [1.00390625, 1.01171875, 1 + 2**-11, 1 + 3 * 2**-11, 65520.0, 3.4e38, 1e-8, -0.0]
    values = torch.tensor([*some, float("inf"), -float("inf"), float("nan")])
    weight, found = torch.zeros(1, 11, dtype=dtype), pattern(1, 11, 1.0)
    sparse.scatter_(weight, values, found)
    torch.testing.assert_close(weight[0], values.to(dtype), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(weight[0, :10].view(torch.int16), values.to(dtype)[:10].view(torch.int16))


@pytest.mark.ops("sparse_matmul", "sparse_matmul_t")
@given(
    tokens=TOKENS, rows=SIZES, columns=WIDTHS, density=DENSITIES, kind=KIND, dtype=DTYPE,
    residual=st.booleans(),
)  # fmt: skip
def test_products_with_s_are_the_reference(
    isa, tokens, rows, columns, density, kind, dtype, residual
):
    found = pattern(rows, columns, density, kind)
    x, y = normal(1, tokens, columns, dtype=dtype), normal(2, tokens, rows, dtype=dtype)
    values = normal(3, found.nnz, dtype=sums(dtype))
    for op, plain, left, beside in (
        (ops.matmul_op, reference.matmul, x, y),
        (ops.matmul_t_op, reference.matmul_t, y, x),
    ):
        beside = beside if residual else None
        out = op(left, values, *found.operand(), beside, 0.5)
        assert_as_good(out, plain, left, values, found.indices(), found.shape, beside, 0.5)


@pytest.mark.ops("sparse_matmul", "sparse_matmul_t")
@pytest.mark.parametrize("leading", [(), (2, 3), (0, 3)])
def test_products_with_s_keep_the_leading_axes(isa, leading):
    found = pattern(9, 40, 0.2)
    x, values = normal(1, *leading, 40), normal(2, found.nnz)
    y = ops.matmul_op(x, values, *found.operand(), None, 1.0)
    assert y.shape == (*leading, 9)
    wanted = x @ reference.dense(values, found.indices(), (9, 40)).t()
    torch.testing.assert_close(y, wanted, rtol=1e-5, atol=1e-5)
    assert ops.matmul_t_op(y, values, *found.operand(), None, 1.0).shape == x.shape


WINDOWS = [
    ((1, 1), (0, 0), (1, 1)), ((2, 1), (1, 1), (2, 2)), ((1, 3), (2, 0), (1, 2)),
    ((3, 2), (4, 5), (1, 1)), ((2, 2), (1, 0), (3, 1)),
]  # fmt: skip


@pytest.mark.ops("sparse_conv2d_sddmm")
@given(
    window=st.sampled_from(WINDOWS), groups=st.sampled_from([1, 2]), density=DENSITIES, kind=KIND,
    dtype=DTYPE, last=st.booleans(), batch=st.integers(0, 3),
)  # fmt: skip
def test_conv2d_sddmm_is_the_reference(isa, window, groups, density, kind, dtype, last, batch):
    stride, padding, dilation = window
    found = pattern(4, 6 // groups * 6, density, kind)
    x = normal(1, batch, 6, 9, 8, dtype=dtype)
    weight = normal(2, 4, 6 // groups, 3, 2, dtype=torch.float64)
    y = torch.nn.functional.conv2d(x.double(), weight, None, stride, padding, dilation, groups)
    grad = normal(3, *y.shape, dtype=dtype)
    if last:
        x, grad = (t.contiguous(memory_format=torch.channels_last) for t in (x, grad))
    sizes = [3, 2, *stride, *padding, *dilation, groups]
    values = ops.conv2d_sddmm_op(x, grad, *found.operand(), sizes, 0.5)
    assert_as_good(values, reference.conv2d_sddmm, x, grad, found.indices(), sizes, 0.5)


@given(
    tokens=TOKENS, rows=SIZES, columns=WIDTHS, density=DENSITIES, kind=KIND, dtype=DTYPE,
)  # fmt: skip
def test_fallbacks_are_the_reference(tokens, rows, columns, density, kind, dtype):
    found = pattern(rows, columns, density, kind)
    x, grad = normal(1, tokens, columns, dtype=dtype), normal(2, tokens, rows, dtype=dtype)
    values = fallback.sddmm(x, grad, *found.operand(), 0.5)
    assert_as_good(values, reference.sddmm, x, grad, found.indices(), 0.5)
    for op, plain, left in (
        (fallback.matmul, reference.matmul, x), (fallback.matmul_t, reference.matmul_t, grad),
    ):  # fmt: skip
        out = op(left, values, *found.operand(), None, 0.5)
        assert_as_good(out, plain, left, values, found.indices(), found.shape, None, 0.5)
