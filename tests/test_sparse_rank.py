"""The nuclear norm and its gradient: are they those of a decomposition, which they do without?"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peftkern.sparse import Pattern, rank

ERROR = {torch.float32: 1e-5, torch.float64: 1e-12}


def matrix(rows, columns, density, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    return (dense * (torch.rand(rows, columns, generator=generator) < density)).to(dtype)


def decomposed(dense):
    """The norm, and U V^T without what belongs to singular values of zero."""
    u, s, vh = torch.linalg.svd(dense.double(), full_matrices=False)
    there = s > 1e-12 * s.max().clamp_min(1e-300)
    return s.sum(), (u * there) @ vh


def assert_decomposed(dense, backend="polar", error=None):
    mask = dense != 0
    norm, gradient = rank.nuclear(dense[mask], Pattern.from_mask(mask), backend)
    assert norm.dtype == gradient.dtype == dense.dtype and norm.shape == ()
    wanted_norm, factor = decomposed(dense)
    error = error or ERROR[dense.dtype]
    assert abs(norm.double() - wanted_norm) <= error * wanted_norm
    wanted = factor[mask]
    assert (gradient.double() - wanted).norm() <= error * wanted.norm()


def products_alone(monkeypatch):
    def refuse(matrix):
        raise AssertionError("a decomposition")

    monkeypatch.setattr(rank, "_by_svd", refuse)


@pytest.mark.parametrize("backend", rank.BACKENDS)
def test_the_norm_of_two_by_two_is_the_one_by_hand(backend):
    dense = torch.tensor([[3.0, 0.0], [4.0, 5.0]])
    mask = torch.tensor([[True, True], [True, True]])
    norm, gradient = rank.nuclear(dense[mask], Pattern.from_mask(mask), backend)
    torch.testing.assert_close(norm, torch.tensor(8.9442719))
    wanted = torch.tensor([0.894427, -0.447214, 0.447214, 0.894427])
    torch.testing.assert_close(gradient, wanted)
    torch.testing.assert_close(dense[mask] @ gradient, norm)


@pytest.mark.parametrize("dtype", list(ERROR))
@pytest.mark.parametrize("shape", [(120, 480), (300, 90)])
def test_products_alone_give_what_a_decomposition_does(monkeypatch, shape, dtype):
    products_alone(monkeypatch)
    dense = matrix(*shape, 0.1, dtype)
    dense[3] = 0
    dense[:, 5] = 0
    assert_decomposed(dense)


@given(
    rows=st.integers(1, 40), columns=st.integers(1, 40),
    density=st.sampled_from([0.05, 0.3, 1.0]), dtype=st.sampled_from(list(ERROR)),
    seed=st.integers(0, 3),
)  # fmt: skip
def test_any_shape_and_density_has_the_norm_of_its_decomposition(
    rows, columns, density, dtype, seed
):
    """Of a gradient that is not defined, where a singular value is 0, one that is allowed."""
    dense = matrix(rows, columns, density, dtype, seed)
    mask = dense != 0
    norm, gradient = rank.nuclear(dense[mask], Pattern.from_mask(mask))
    wanted, _ = decomposed(dense)
    assert abs(norm.double() - wanted) <= 10 * ERROR[dtype] * wanted
    # The convex function lies above the plane that a subgradient spans.
    moved = dense.double().clone()
    moved[mask] += 0.1 * torch.linspace(-1, 1, int(mask.sum()), dtype=torch.float64)
    above = norm.double() + gradient.double() @ (moved - dense.double())[mask]
    assert decomposed(moved)[0] >= above - 1e-4 * wanted


def test_a_bad_condition_is_exact_as_well():
    """Singular values from 1 to 1e-4: products would take more steps than a decomposition."""
    q, _ = torch.linalg.qr(matrix(60, 60, 1.0))
    r, _ = torch.linalg.qr(matrix(90, 60, 1.0, seed=1))
    dense = (q * torch.logspace(0, -4, 60, dtype=torch.float64)) @ r.t()
    assert_decomposed(dense, error=1e-9)
    assert_decomposed(dense.float(), error=2e-3)  # a decomposition in float loses as much
    assert_decomposed(dense.t().contiguous(), error=1e-9)


def test_many_steps_reach_a_bad_condition_too(monkeypatch):
    """As on a GPU, where a decomposition is dearer than they are."""
    products_alone(monkeypatch)
    monkeypatch.setattr(rank, "_STEPS", {"cpu": 16})
    q, _ = torch.linalg.qr(matrix(60, 60, 1.0))
    r, _ = torch.linalg.qr(matrix(90, 60, 1.0, seed=1))
    dense = (q * torch.logspace(0, -3, 60, dtype=torch.float64)) @ r.t()
    assert_decomposed(dense)
    assert_decomposed(dense.float(), error=1e-3)


def test_equal_rows_are_of_low_rank_and_have_the_gradient_of_the_rest():
    dense = matrix(30, 50, 0.5)
    dense[7] = dense[8] = dense[9]
    assert_decomposed(dense)


def test_nothing_has_no_norm_and_no_gradient():
    full = torch.ones(3, 4, dtype=torch.bool)
    for mask in (full, torch.zeros(3, 4, dtype=torch.bool)):
        for backend in rank.BACKENDS:
            pattern = Pattern.from_mask(mask)
            norm, gradient = rank.nuclear(torch.zeros(pattern.nnz), pattern, backend)
            assert norm == 0 and not gradient.any() and len(gradient) == pattern.nnz


def test_magnitudes_do_not_matter():
    dense = matrix(20, 30, 0.5, torch.float32)
    mask = dense != 0
    pattern = Pattern.from_mask(mask)
    norm, gradient = rank.nuclear(dense[mask], pattern)
    for power in (-30, 30):
        scaled, same = rank.nuclear(dense[mask] * 2.0**power, pattern)
        torch.testing.assert_close(scaled, norm * 2.0**power)
        torch.testing.assert_close(same, gradient)


def test_two_calls_give_the_same_bits():
    dense = matrix(50, 70, 0.2, torch.float32)
    mask = dense != 0
    pattern = Pattern.from_mask(mask)
    first, second = (rank.nuclear(dense[mask], pattern)[1] for _ in range(2))
    assert torch.equal(first, second)


def test_what_the_norm_refuses():
    pattern = Pattern.from_mask(torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(TypeError, match="values must be float32 or float64, got torch.bfloat16"):
        rank.nuclear(torch.ones(6, dtype=torch.bfloat16), pattern)
    with pytest.raises(ValueError, match=r"values must have shape \[6\], got \[5\]"):
        rank.nuclear(torch.ones(5), pattern)
    with pytest.raises(ValueError, match="backend must be polar or svd, got 'qr'"):
        rank.nuclear(torch.ones(6), pattern, "qr")
