"""sparse's CUDA kernels against the reference: on a GPU, or in the emulator."""

from contextlib import nullcontext

import pytest
import torch
from close import assert_as_good
from hypothesis import given
from hypothesis import strategies as st
from sparses import SIZES, TOKENS, normal, pattern

from peftkern import _native, sparse
from peftkern.sparse import Pattern, fallback, reference

if "sparse_sample_" not in _native.emulated and not torch.cuda.is_available():
    pytest.skip("neither a GPU nor the emulator's library", allow_module_level=True)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = {
    "dense": lambda x: x,
    "transposed": lambda x: x.t().contiguous().t(),
    "every other": lambda x: torch.stack([x, x], -1).flatten(1)[:, ::2],
    "expanded": lambda x: x[:1].expand_as(x),
}
LAYOUT = st.sampled_from([*LAYOUTS])


def sampled(device, x, grad, found, scale=1.0, onto=None):
    """What the op makes of them; without `onto` it starts from NaN."""
    values = torch.full([found.nnz], torch.nan) if onto is None else onto.clone()
    values = values.to(device)
    operand = found.to(device).operand()
    with _native.Instead(_native.emulated) if device.type == "cpu" else nullcontext():
        torch.ops.peftkern.sparse_sample_(
            values, x.to(device), grad.to(device), *operand, scale, onto is not None
        )
    return values.cpu()


@given(
    tokens=TOKENS, rows=SIZES, columns=st.one_of(SIZES, st.sampled_from([129, 300, 70000])),
    density=st.sampled_from([0.0, 1e-3, 1e-2, 0.2]), dtype=st.sampled_from(DTYPES),
    layouts=st.tuples(LAYOUT, LAYOUT), add=st.booleans(),
)  # fmt: skip
def test_few_values_are_the_reference(device, tokens, rows, columns, density, dtype, layouts, add):
    found = pattern(rows, columns, density * min(1, 300 / columns), "csr")
    operands = normal(1, tokens, columns, dtype=dtype), normal(2, tokens, rows, dtype=dtype)
    x, grad = (LAYOUTS[name](t) for name, t in zip(layouts, operands, strict=True))
    onto = normal(3, found.nnz) if add else None

    def plain(x, grad, onto):
        values = reference.sddmm(x, grad, found.indices(), 0.5)
        return values if onto is None else onto + values

    assert_as_good(sampled(device, x, grad, found, 0.5, onto), plain, x, grad, onto)


def test_the_reference_beside_the_op_is_the_reference():
    found, x, grad = pattern(9, 70, 0.1, "csr"), normal(1, 20, 70), normal(2, 20, 9)
    start = normal(3, found.nnz)
    for add in (False, True):
        values = start.clone()
        fallback.sample_(values, x, grad, *found.operand(), 0.5, add)
        wanted = reference.sddmm(x, grad, found.indices(), 0.5) + start * add
        torch.testing.assert_close(values, wanted, rtol=1e-5, atol=1e-5)


def test_a_value_has_the_same_bits_whatever_else_is_there(device):
    """Sums run in one order: no other entry, and no order of warps, is part of it."""
    x, grad = normal(1, 300, 129, dtype=torch.bfloat16), normal(2, 300, 65, dtype=torch.bfloat16)
    many = pattern(65, 129, 0.1, "csr")
    values = sampled(device, x, grad, many)
    assert torch.equal(values, sampled(device, x, grad, many))
    rows, columns = many.indices()[:, ::7]
    few = Pattern.from_indices(rows, columns, many.shape, "csr")
    assert torch.equal(sampled(device, x, grad, few), values[::7])


def test_what_is_not_finite_stays_with_its_column(device):
    found = pattern(9, 70, 0.3, "csr")
    x, grad = normal(1, 20, 70), normal(2, 20, 9)
    x[3, 5] = torch.inf
    values = sampled(device, x, grad, found)
    assert torch.equal(values.isfinite(), found.indices()[1] != 5)


@pytest.mark.parametrize("change", ["grad", "pattern", "values", "dtype", "width"])
def test_the_op_refuses_what_does_not_fit(device, change):
    wide = change == "width"
    found = Pattern.from_indices(torch.tensor([0]), torch.tensor([0]), (3, 131070 if wide else 7))
    found = found.bitmap() if change == "pattern" else found
    dtype = torch.float64 if change == "dtype" else torch.float32
    x = torch.zeros(1, dtype=dtype).expand(4, found.shape[1])
    grad = torch.zeros(5 if change == "grad" else 4, 3, dtype=dtype)
    onto = torch.zeros(found.nnz + (change == "values"))
    with pytest.raises(RuntimeError, match=r"must (be|have)"):
        sampled(device, x, grad, found, 1.0, onto)


def test_both_ops_take_it_where_it_serves(device, monkeypatch):
    pytest.importorskip("triton")
    found, x, grad = pattern(9, 70, 0.005, "csr"), normal(1, 20, 70), normal(2, 20, 9)
    calls = []

    def sample(values, *operands):
        calls.append(operands[-1])
        fallback.sample_(values, *operands)

    x, grad, there = x.to(device), grad.to(device), found.to(device)
    with _native.Instead(_native.launchers | {"sparse_sample_": sample}):
        values = sparse.sddmm(x, grad, there)
        sparse.sddmm(x, grad, there, onto=values)
        sparse.sddmm(x, grad, there.bitmap())
        sparse.sddmm(x.double(), grad.double(), there)
    assert calls == [False, True]
    torch.testing.assert_close(values, 2 * reference.sddmm(x, grad, there.indices()))
