"""Is sparse well registered, does it compile whole, is it deterministic and small in memory?"""

import pytest
import torch
from sparses import DTYPES, KINDS, normal, pattern, sums
from torch.utils.checkpoint import checkpoint

from peftkern import _native, qlora, sparse
from peftkern.sparse import Pattern, ops

TESTS = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_the_ops_are_well_registered(dtype, kind):
    found = pattern(9, 40, 0.2, kind)
    pair, operand = (normal(1, 5, 40, dtype=dtype), normal(2, 5, 9, dtype=dtype)), found.operand()
    values, weight = normal(3, found.nnz, dtype=sums(dtype)), normal(4, 9, 40, dtype=dtype)
    conv = pattern(4, 12, 0.4, kind)
    images = normal(5, 2, 3, 5, 6, dtype=dtype), normal(6, 2, 4, 4, 5, dtype=dtype)
    for name, args in {
        "sparse_sddmm": (*pair, *operand, 0.5),
        "sparse_sddmm_": (values, *pair, *operand, 0.5),
        "sparse_gather": (weight, *operand),
        "sparse_scatter_": (weight, values, *operand),
        "sparse_matmul": (pair[0], values, *operand, pair[1], 0.5),
        "sparse_matmul_t": (pair[1], values, *operand, None, 0.5),
        "sparse_conv2d_sddmm": (*images, *conv.operand(), [2, 2, 1, 1, 0, 0, 1, 1, 1], 0.5),
    }.items():
        torch.library.opcheck(getattr(torch.ops.peftkern, name).default, args, test_utils=TESTS)


@pytest.mark.parametrize("form", ["value", "delta"])
@pytest.mark.parametrize("quantized", [False, True])
def test_linear_compiles_to_one_graph_for_any_batch(form, quantized):
    if quantized and form == "value":
        pytest.skip("a quantised weight holds no values")
    found, weight = pattern(8, 64, 0.2), normal(1, 8, 64)
    weight = qlora.quantize(weight) if quantized else weight
    values, bias = normal(2, found.nnz).requires_grad_(), normal(3, 8).requires_grad_()

    def run(x, values, bias):
        return sparse.linear(x, weight, values, found, bias, form)

    compiled = torch.compile(run, fullgraph=True, dynamic=True)
    for batch in (5, 2, 7):
        x = normal(batch, batch, 64).requires_grad_()
        one, other = compiled(x, values, bias), run(x, values, bias)
        torch.testing.assert_close(one, other)
        for a, b in zip(
            torch.autograd.grad(one.sum(), [x, values, bias]),
            torch.autograd.grad(other.sum(), [x, values, bias]),
            strict=True,
        ):
            torch.testing.assert_close(a, b)


def test_conv2d_and_the_functions_compile_to_one_graph():
    found, weight = pattern(4, 12, 0.4), normal(1, 4, 3, 2, 2)
    values, x = normal(2, found.nnz).requires_grad_(), normal(3, 2, 3, 5, 5)

    def run(x, weight, values):
        held = sparse.scatter_(weight.clone(), values.detach(), found)
        y = sparse.conv2d(x, held, values, found, padding=1)
        return y, sparse.gather(held, found), sparse.sddmm(normal_x, normal_grad, found)

    normal_x, normal_grad = normal(4, 5, 12), normal(5, 5, 4)
    one, other = torch.compile(run, fullgraph=True)(x, weight, values), run(x, weight, values)
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b)
    (a,), (b,) = (torch.autograd.grad(out[0].sum(), values) for out in (one, other))
    torch.testing.assert_close(a, b)


@pytest.mark.ops("sparse_sddmm", "sparse_matmul", "sparse_matmul_t")
@pytest.mark.parametrize("form", ["value", "delta"])
def test_autocast_casts_x_and_not_the_values(isa, form):
    found, weight = pattern(9, 40, 0.2), normal(1, 9, 40)
    x, values = normal(2, 5, 40), normal(3, found.nnz).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = sparse.linear(x, weight, values, found, form=form)
    plain = sparse.linear(x.bfloat16(), weight, values, found, form=form)
    assert y.dtype == torch.bfloat16 and torch.equal(y, plain)
    with torch.autocast("cpu", torch.bfloat16):
        (found_grad,) = torch.autograd.grad(y.sum(), values)
    (wanted,) = torch.autograd.grad(plain.sum(), values)
    assert found_grad.dtype == torch.float32 and torch.equal(found_grad, wanted)


@pytest.mark.parametrize("form", ["value", "delta"])
def test_a_backward_under_autocast_keeps_the_dtype_of_its_forward(form):
    found, weight = pattern(9, 40, 0.2), normal(1, 9, 40)
    x, values = normal(2, 5, 40).requires_grad_(), normal(3, found.nnz).requires_grad_()

    def grads():
        return torch.autograd.grad(
            sparse.linear(x, weight, values, found, form=form).sum(), (x, values)
        )

    wanted = grads()
    y = sparse.linear(x, weight, values, found, form=form)
    with torch.autocast("cpu", torch.bfloat16):
        got = torch.autograd.grad(y.sum(), (x, values))
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


@pytest.mark.ops("sparse_sddmm", "sparse_matmul", "sparse_matmul_t")
@pytest.mark.parametrize("form", ["value", "delta"])
def test_checkpointing_computes_the_same_again(isa, form):
    found, weight = pattern(9, 40, 0.2), normal(1, 9, 40)
    x, values = normal(2, 5, 40), normal(3, found.nnz).requires_grad_()
    (whole,) = torch.autograd.grad(
        sparse.linear(x, weight, values, found, form=form).square().sum(), values
    )
    y = checkpoint(
        lambda x: sparse.linear(x, weight, values, found, form=form), x, use_reentrant=False
    )
    assert torch.equal(torch.autograd.grad(y.square().sum(), values)[0], whole)


def outputs(threads, density, kind, dtype):
    found, weight = pattern(130, 2300, density, kind), normal(1, 130, 2300, dtype=dtype)
    x, grad = normal(2, 200, 2300, dtype=dtype), normal(3, 200, 130, dtype=dtype)
    conv = pattern(40, 12, density, kind)
    images = normal(5, 2, 3, 9, 9, dtype=dtype), normal(6, 2, 40, 8, 8, dtype=dtype)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        values = sparse.sddmm(x, grad, found)
        onto = sparse.sddmm(x, grad, found, onto=values.clone())
        operand, window = found.operand(), [2, 2, 1, 1, 0, 0, 1, 1, 1]
        return [
            values, onto, sparse.gather(weight, found), sparse.scatter_(weight, values, found),
            ops.matmul_op(x, values, *operand, None, 1.0),
            ops.matmul_t_op(grad, values, *operand, None, 1.0),
            ops.conv2d_sddmm_op(*images, *conv.operand(), window, 1.0),
        ]  # fmt: skip
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("density", [0.01, 0.2, 0.8])
def test_neither_threads_nor_the_format_change_bits(isa, density, dtype):
    once = outputs(1, density, "csr", dtype)
    for threads, kind in ((2, "bitmap"), (3, "csr"), (1, "bitmap")):
        other = outputs(threads, density, kind, dtype)
        assert all(torch.equal(a, b) for a, b in zip(once, other, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_instruction_sets_gather_and_scatter_the_same_bits(dtype):
    found = []
    for name in _native.available_isas():
        with _native.using_isa(name):
            weight, entries = normal(1, 40, 300, dtype=dtype), pattern(40, 300, 0.2)
            values = normal(2, entries.nnz, dtype=sums(dtype))
            gathered = sparse.gather(weight, entries)
            found.append((gathered, sparse.scatter_(weight, values, entries)))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_shapes_whose_products_do_not_fit_into_32_bits_are_taken():
    """Rows times columns, and tokens times columns, are 2^36 and more; nothing dense is made."""
    shape = (2**18, 2**18)
    rows, columns = torch.tensor([0, 2**17, 2**18 - 1]), torch.tensor([2**18 - 1, 5, 2**17])
    found = Pattern.from_indices(rows, columns, shape)
    tokens = 2**18 // 2**8
    x = torch.full((1, 1), 2.0).expand(tokens, shape[1])
    grad = torch.ones(1, shape[0]).cumsum(1).expand(tokens, -1)
    wanted = 2.0 * tokens * (rows + 1).float()
    assert torch.equal(sparse.sddmm(x, grad, found), wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_an_op_of_its_own_refuses_a_pattern_that_points_outside(kind):
    """Raw ops, past the checks of Python: what they write must be theirs."""
    found = pattern(9, 40, 0.3, kind)
    x, grad = normal(1, 5, 40), normal(2, 5, 9)
    places = 1 if kind == "csr" else 0
    for at in (0, 1):
        tensors, layout = found.operand()
        broken = tensors[at].to(torch.int64)
        if kind == "bitmap" and at == places:
            broken[0, 1] = -1  # columns behind the last one
        else:
            broken.view(-1)[3] += 50
        tensors[at] = broken.to(tensors[at].dtype)
        with pytest.raises(RuntimeError, match="pattern must have its entries inside"):
            ops.sddmm_op(x, grad, tensors, layout, 1.0)
    tensors, layout = found.operand()
    with pytest.raises(RuntimeError, match="must have"):
        ops.sddmm_op(x, grad, tensors, [*layout[:3], found.nnz + 1], 1.0)
    with pytest.raises(RuntimeError, match="wrong dtype"):
        ops.sddmm_op(x, grad, [t.float() for t in tensors], layout, 1.0)
