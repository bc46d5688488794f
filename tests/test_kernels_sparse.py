"""sparse's kernels in Triton against the reference: on a GPU, or in the interpreter."""

import pytest
import torch
from close import assert_as_good
from hypothesis import given
from hypothesis import strategies as st

from peftkern.sparse import fallback, reference
from peftkern.sparse.pattern import KINDS, Pattern

triton_sparse = pytest.importorskip("peftkern.kernels.sparse", reason="needs triton")
from launchers import DTYPES, SIZES, on  # noqa: E402

from peftkern.kernels import qlora_paths as paths  # noqa: E402
from peftkern.kernels import sparse_matmul, sparse_paths, sparse_sddmm, sparse_tiles  # noqa: E402

COLUMNS = st.one_of(SIZES, st.sampled_from([128, 200, 300]))
DENSITIES = st.sampled_from([0.0, 0.02, 0.3, 1.0])
KIND = st.sampled_from(KINDS)
# Of the interpreter; tiles of a word and of several, steps and splits of all lengths.
TILES = [
    None,
    paths.Tile(16, 128, 32, 4, 1, 3),
    paths.Tile(32, 64, 16, 4, 1, 2),
    paths.Tile(16, 256, 64, 4, 1, 1),
]


def patterned(device, rows, columns, density, kind):
    torch.manual_seed(rows * 31 + columns)
    return Pattern.from_mask(torch.rand(rows, columns) < density, kind).to(device)


@given(
    rows=SIZES, columns=COLUMNS, inputs=st.integers(0, 70), density=DENSITIES, kind=KIND,
    dtype=DTYPES, tile=st.sampled_from(TILES), turned=st.booleans(),
)  # fmt: skip
def test_sddmm_is_the_reference(device, rows, columns, inputs, density, kind, dtype, tile, turned):
    pattern = patterned(device, rows, columns, density, kind)
    x, grad = (torch.randn(inputs, n).to(device, dtype) for n in (columns, rows))
    if turned:
        x = x.t().contiguous().t()
    operand, indices = pattern.operand(), pattern.indices()
    with paths.forced(tile=tile):
        values = triton_sparse.sddmm(x, grad, *operand, 0.5)
        sums = torch.ones_like(values)
        triton_sparse.sddmm_(sums, x, grad, *operand, 0.5)
    if pattern.nnz:
        assert_as_good(values, lambda x, grad: reference.sddmm(x, grad, indices, 0.5), x, grad)
        assert_as_good(sums, lambda x, grad: 1 + reference.sddmm(x, grad, indices, 0.5), x, grad)


@pytest.mark.parametrize("kind", KINDS)
def test_a_tile_takes_as_many_turns_as_its_fullest_row(device, kind, monkeypatch):
    """A row that is full beside rows that are empty, and entries on both sides of every edge."""
    monkeypatch.setattr(sparse_sddmm, "GROUP", 2)  # of tiles below each other: the last are fewer
    mask = torch.zeros(40, 300, dtype=torch.bool)
    mask[3], mask[7, 120:140], mask[39, 255:258] = True, True, True
    pattern = Pattern.from_mask(mask, kind).to(device)
    x, grad = on(device, torch.randn(9, 300), torch.randn(9, 40))
    for tile in TILES:
        with paths.forced(tile=tile):
            values = triton_sparse.sddmm(x, grad, *pattern.operand(), 1.0)
        assert_as_good(values, reference.sddmm, x, grad, pattern.indices())


@pytest.mark.parametrize(("stride_x", "stride_grad"), [((0, 0), (0, 0)), ((0, 1), (1, 0))])
def test_operands_that_are_expanded_are_read_as_they_lie(device, stride_x, stride_grad):
    pattern = patterned(device, 20, 40, 0.3, "csr")
    x = torch.randn(400, device=device).as_strided((10, 40), stride_x)
    grad = torch.randn(400, device=device).as_strided((10, 20), stride_grad)
    assert sparse_sddmm.readable(x) is x and sparse_sddmm.readable(grad) is grad
    values = triton_sparse.sddmm(x, grad, *pattern.operand(), 1.0)
    assert_as_good(values, reference.sddmm, x, grad, pattern.indices())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", KINDS)
def test_every_tile_of_the_table_gives_the_reference(device, kind, dtype):
    pattern = patterned(device, 140, 150, 0.2, kind)
    x, grad = (torch.randn(40, n).to(device, dtype) for n in (150, 140))
    for table in paths.TILES[f"sddmm {8 * dtype.itemsize}"].values():
        for _, tile in table:
            with paths.forced(tile=tile._replace(splits=2)):
                values = triton_sparse.sddmm(x, grad, *pattern.operand(), 1.0)
            assert_as_good(values, reference.sddmm, x, grad, pattern.indices())


@pytest.mark.parametrize(
    ("architecture", "most"), [("sm90", 8500), ("sm80", 15000), ("sm75", 8500)]
)
def test_density_decides_whether_products_are_sampled(architecture, most, monkeypatch):
    monkeypatch.setattr(sparse_paths, "architecture", lambda device: architecture)
    gpu = torch.device("cuda:0")
    half, single = torch.bfloat16, torch.float32
    samples = sparse_paths.samples
    assert samples(gpu, half, 1000, 1000, most) and samples(gpu, single, 1000, 1000, most)
    assert not samples(gpu, half, 1000, 1000, most + 1)
    assert not samples(gpu, single, 1000, 1000, 10 * most)
    width = sparse_paths.WIDTH
    assert samples(gpu, half, 8, width - 8, 9) and not samples(gpu, half, 8, width - 7, 9)


def test_the_same_call_gives_the_same_bits(device):
    pattern = patterned(device, 33, 65, 0.3, "csr")
    x, grad = (torch.randn(50, n, device=device, dtype=torch.bfloat16) for n in (65, 33))
    with paths.forced(tile=TILES[1]):
        first, again = (triton_sparse.sddmm(x, grad, *pattern.operand(), 1.0) for _ in range(2))
    assert torch.equal(first, again)


def test_both_kinds_of_a_pattern_give_the_same_bits(device):
    csr = patterned(device, 33, 150, 0.3, "csr")
    x, grad = (torch.randn(50, n, device=device) for n in (150, 33))
    found = [triton_sparse.sddmm(x, grad, *p.operand(), 1.0) for p in (csr, csr.bitmap())]
    assert torch.equal(*found)


@given(rows=SIZES, columns=COLUMNS, density=DENSITIES, kind=KIND, dtype=DTYPES)
def test_gather_and_scatter_are_the_fallback_to_the_bit(
    device, rows, columns, density, kind, dtype
):
    pattern = patterned(device, rows, columns, density, kind)
    operand = pattern.operand()
    weight = torch.randn(rows, columns).to(device, dtype)
    assert torch.equal(triton_sparse.gather(weight, *operand), fallback.gather(weight, *operand))
    values, wanted = torch.randn(pattern.nnz, device=device), weight.clone()
    triton_sparse.scatter_(weight, values, *operand)
    fallback.scatter_(wanted, values, *operand)
    assert torch.equal(weight, wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_long_rows_have_several_programs(device, kind, monkeypatch):
    monkeypatch.setattr(sparse_tiles, "CHUNKS", 4)
    monkeypatch.setattr(sparse_tiles, "CSR_CHUNKS", 2)
    pattern = patterned(device, 3, 900, 0.4, kind)
    weight = torch.randn(3, 900, device=device)
    operand = pattern.operand()
    assert sparse_tiles.Operand.of(*operand).grid(900)[1] > 2
    assert torch.equal(triton_sparse.gather(weight, *operand), fallback.gather(weight, *operand))


@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_in_channels_last_is_taken_as_it_lies(device, kind):
    weight = torch.randn(6, 5, 3, 2, device=device).contiguous(memory_format=torch.channels_last)
    operand = patterned(device, 6, 30, 0.4, kind).operand()
    assert torch.equal(triton_sparse.gather(weight, *operand), fallback.gather(weight, *operand))
    values, wanted = torch.randn(operand[1][3], device=device), weight.clone()
    triton_sparse.scatter_(weight, values, *operand)
    fallback.scatter_(wanted, values, *operand)
    assert torch.equal(weight, wanted)


@given(
    rows=SIZES, columns=COLUMNS, inputs=st.integers(0, 20), density=DENSITIES, kind=KIND,
    dtype=DTYPES, onto=st.booleans(), panel=st.sampled_from([1, 20000]),
)  # fmt: skip
def test_both_products_are_the_reference(
    device, rows, columns, inputs, density, kind, dtype, onto, panel
):
    pattern = patterned(device, rows, columns, density, kind)
    shape, indices, operand = pattern.shape, pattern.indices(), pattern.operand()
    values = torch.randn(pattern.nnz, device=device).to(dtype).float()  # as panels have them
    x, grad = (torch.randn(inputs, n).to(device, dtype) for n in (columns, rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sparse_matmul, "PANEL_BYTES", panel)
        y = triton_sparse.matmul(x, values, *operand, grad if onto else None, 0.5)
        back = triton_sparse.matmul_t(grad, values, *operand, x if onto else None, 0.5)
    rest = (values, indices, shape)
    assert_as_good(y, reference.matmul, x, *rest, grad if onto else None, 0.5)
    assert_as_good(back, reference.matmul_t, grad, *rest, x if onto else None, 0.5)


@pytest.mark.parametrize("shape", [(40,), (0, 40), (2, 0, 40), (2, 3, 40)])
def test_activations_have_any_number_of_dimensions(device, shape):
    pattern = patterned(device, 40, 40, 0.3, "bitmap")
    x, values = torch.randn(shape, device=device), torch.randn(pattern.nnz, device=device)
    for name in ("matmul", "matmul_t"):
        y = getattr(triton_sparse, name)(x, values, *pattern.operand(), x, 2.0)
        rest = (values, pattern.indices(), pattern.shape, x, 2.0)
        assert_as_good(y, getattr(reference, name), x, *rest)


WINDOWS = [
    [3, 3, 1, 1, 1, 1, 1, 1, 1],
    [3, 2, 2, 1, 1, 0, 1, 2, 2],
    [1, 1, 1, 1, 0, 0, 1, 1, 1],
    [2, 2, 1, 1, 0, 1, 2, 1, 6],  # each channel by itself
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("last", [False, True])
def test_a_convolution_is_the_reference(device, kind, window, last):
    torch.manual_seed(0)
    kh, kw, sh, sw, ph, pw, dh, dw, groups = window
    x = torch.randn(2, 6, 7, 6, device=device)
    weight = torch.empty(12, 6 // groups, kh, kw, device=device)
    grad = torch.conv2d(x, weight, None, (sh, sw), (ph, pw), (dh, dw), groups).normal_()
    if last:
        x, grad = (t.contiguous(memory_format=torch.channels_last) for t in (x, grad))
    pattern = patterned(device, 12, weight[0].numel(), 0.5, kind)
    indices = pattern.indices()
    for dtype, tile in zip((torch.float32, torch.bfloat16), TILES, strict=False):
        with paths.forced(tile=tile):
            operands = (x.to(dtype), grad.to(dtype))
            values = triton_sparse.conv2d_sddmm(*operands, *pattern.operand(), window, 0.5)
        assert_as_good(
            values, lambda *args: reference.conv2d_sddmm(*args, indices, window, 0.5), *operands
        )


def test_double_precision_is_left_to_the_fallback(device):
    pattern = patterned(device, 7, 9, 0.5, "csr")
    x, grad = (torch.randn(5, n, device=device, dtype=torch.float64) for n in (9, 7))
    values = triton_sparse.sddmm(x, grad, *pattern.operand(), 1.0)
    assert torch.equal(values, fallback.sddmm(x, grad, *pattern.operand(), 1.0))
    y = triton_sparse.matmul(x, values, *pattern.operand(), grad, 1.0)
    assert torch.equal(y, fallback.matmul(x, values, *pattern.operand(), grad, 1.0))
    back = triton_sparse.matmul_t(grad, values, *pattern.operand(), x, 1.0)
    assert torch.equal(back, fallback.matmul_t(grad, values, *pattern.operand(), x, 1.0))
    weight = torch.randn(7, 9, device=device, dtype=torch.float64)
    assert torch.equal(triton_sparse.gather(weight, *pattern.operand()), weight[pattern.mask()])
