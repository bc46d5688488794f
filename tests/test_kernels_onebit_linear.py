"""onebit's products in Triton against the reference: on packed codes, and of the adapter."""

import itertools

import pytest
import torch
from close import assert_as_good
from hypothesis import given
from hypothesis import strategies as st

from peftkern import _native
from peftkern.bottleneck import reference as bottleneck
from peftkern.onebit import fallback, reference
from peftkern.qlora.reference import linear

triton_onebit = pytest.importorskip("peftkern.kernels.onebit", reason="needs triton")
from launchers import DTYPES, SIZES, TILES, on  # noqa: E402

from peftkern.kernels import onebit_linear  # noqa: E402
from peftkern.kernels import qlora_paths as paths  # noqa: E402

BITS = st.sampled_from(reference.BITS)
COLUMNS = st.one_of(st.integers(0, 70), st.sampled_from([64, 128, 192]))
PATHS = ["gemm", "panels"]


def sample(device, rows, columns, inputs, bits, dtype=torch.float32, mean=0.1, std=0.6):
    """x, the canonical codes, their statistics and a bias."""
    torch.manual_seed(rows * 31 + columns)
    codes = torch.randint(2**bits, (rows, columns), dtype=torch.uint8)
    x, bias = torch.randn(inputs, columns, dtype=dtype), torch.randn(rows)
    return on(device, x, reference.pack(codes, bits), torch.tensor([[mean, std]]), bias)


def plain(packed, bits):
    """The product in plain torch; W is rounded in the dtype of the statistics that it is given."""

    def run(x, statistics, bias=None):
        return linear(x, reference.dequantize(packed, statistics, bits, x.shape[-1]), bias)

    return run


def run(x, packed, statistics, bits, bias, path=None, tile=None):
    laid_out = triton_onebit.lay_out(packed, bits, x.shape[-1])
    with paths.forced(path, tile):
        return triton_onebit.linear(x, laid_out, statistics, bits, len(packed), bias)


@pytest.mark.parametrize("path", PATHS)
@given(
    rows=SIZES, columns=COLUMNS, inputs=st.integers(0, 40), bits=BITS, dtype=DTYPES,
    has_bias=st.booleans(), mean=st.sampled_from([0.0, 0.4, -600.0]), tile=st.sampled_from(TILES),
)  # fmt: skip
def test_linear_is_the_reference(
    device, path, rows, columns, inputs, bits, dtype, has_bias, mean, tile
):
    x, packed, statistics, bias = sample(device, rows, columns, inputs, bits, dtype, mean)
    bias = bias if has_bias else None
    y = run(x, packed, statistics, bits, bias, path, tile)
    assert_as_good(y, plain(packed, bits), x, statistics, bias)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("bits", reference.BITS)
def test_a_mean_that_dwarfs_the_std_does_not_swallow_the_codes(device, path, bits):
    """W rounded to bfloat16 would be its mean alone; here that is multiplied by nothing."""
    x, packed, statistics, _ = sample(device, 40, 128, 10, bits, mean=1000.0, std=1.0)
    half = x[:, :64].to(torch.bfloat16)
    y = run(torch.cat([half, -half], 1), packed, statistics, bits, None, path)
    codes = reference.unpack(packed, bits, 128).long()
    level = torch.tensor(reference.levels(bits), device=device)[codes]
    assert_as_good(y, linear, half, level[:, :64] - level[:, 64:])


@pytest.mark.parametrize("bits", reference.BITS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_tile_of_the_table_gives_the_reference(device, bits, dtype):
    x, packed, statistics, bias = sample(device, 40, 140, 40, bits, dtype)
    table = paths.TILES[f"onebit {8 * dtype.itemsize}"]
    for _, tile in itertools.chain.from_iterable(table.values()):
        y = run(x, packed, statistics, bits, bias, "gemm", tile._replace(splits=2))
        assert_as_good(y, plain(packed, bits), x, statistics, bias)


def test_panels_end_where_rows_do(device, monkeypatch):
    monkeypatch.setattr(onebit_linear, "PANEL_BYTES", 1)
    monkeypatch.setattr(onebit_linear, "PANEL_STEP", 16)
    x, packed, statistics, bias = sample(device, 37, 21, 5, 1)
    y = run(x, packed, statistics, 1, bias, "panels")
    assert_as_good(y, plain(packed, 1), x, statistics, bias)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("shape", [(40,), (0, 40), (2, 0, 40), (2, 3, 40), (3, 0)])
def test_x_has_any_number_of_dimensions(device, path, shape):
    _, packed, statistics, bias = sample(device, 9, shape[-1], 1, 2)
    (x,) = on(device, torch.randn(shape))
    y = run(x, packed, statistics, 2, bias, path)
    assert_as_good(y, plain(packed, 2), x, statistics, bias)


@pytest.mark.parametrize("bits", reference.BITS)
@pytest.mark.parametrize("columns", [1, 8, 31, 32, 33])
def test_every_code_has_a_place_of_its_own_in_the_layout(device, bits, columns):
    """Each code in turn is the last one and all others the first: the product shows which."""
    eye = torch.eye(3 * columns, dtype=torch.uint8).view(-1, 3, columns) * (2**bits - 1)
    x, statistics = on(device, torch.eye(columns), torch.tensor([[0.0, 1.0]]))
    first, last = reference.levels(bits)[0], reference.levels(bits)[-1]
    for codes in eye[:: max(1, len(eye) // 8)]:
        (packed,) = on(device, reference.pack(codes, bits))
        y = run(x, packed, statistics, bits, None, "gemm").t().cpu()
        torch.testing.assert_close(y, torch.where(codes == 0, first, last))


@pytest.mark.parametrize(("inputs", "taken"), [(1, True), (16, True), (17, False)])
def test_few_rows_are_left_to_the_kernel_in_cuda_where_there_is_one(device, inputs, taken):
    x, packed, statistics, bias = sample(device, 9, 40, inputs, 2)
    calls, laid_out = [], triton_onebit.lay_out(packed, 2, 40)

    def decode(*args):
        calls.append(args)
        return fallback.decode(*args)

    with _native.Instead({"onebit_decode": decode}):
        y = triton_onebit.linear(x, laid_out, statistics, 2, 9, bias)
    assert bool(calls) == taken
    assert_as_good(y, plain(packed, 2), x, statistics, bias)


def test_double_precision_is_left_to_the_fallback(device):
    x, packed, statistics, bias = sample(device, 5, 33, 4, 1, torch.float64)
    wanted = fallback.linear(x, packed.view(-1), statistics, 1, 5, bias)
    assert torch.equal(run(x, packed, statistics, 1, bias), wanted)


def test_the_same_call_gives_the_same_bits(device):
    x, packed, statistics, bias = sample(device, 40, 100, 20, 1, torch.bfloat16)
    first, again = (run(x, packed, statistics, 1, bias, "gemm", TILES[1]) for _ in range(2))
    assert torch.equal(first, again)


def adapter_sample(device, inputs, columns, rank, outputs, dtype, latent):
    """x, down, up, the gradient of y and a residual; both weights on a grid."""
    torch.manual_seed(outputs * 31 + columns)
    shapes = [(rank, columns), (outputs, rank)]
    # None of them is so near to a threshold that float64 finds another code than float32.
    down, up = ((torch.randint(-128, 129, shape) / 64).to(latent) for shape in shapes)
    x, *others = (torch.randn(inputs, n, dtype=dtype) for n in (columns, outputs, outputs))
    return on(device, x, down, up, *others)


STATISTICS = torch.tensor([[0.0137, 0.11], [-0.021, 0.43]])


@given(
    inputs=st.integers(0, 40), columns=SIZES, rank=st.integers(1, 40), outputs=SIZES, bits=BITS,
    dtype=DTYPES, latent=DTYPES, activation=st.sampled_from(list(bottleneck.ACTIVATIONS)),
    residual=st.sampled_from(["none", "x", "other"]), p=st.sampled_from([0.0, 0.25]),
    needs=st.tuples(*[st.booleans()] * 3),
)  # fmt: skip
def test_the_adapter_is_the_reference(
    device, inputs, columns, rank, outputs, bits, dtype, latent, activation, residual, p, needs
):
    outputs = columns if residual == "x" else outputs
    args = adapter_sample(device, inputs, columns, rank, outputs, dtype, latent)
    statistics, seed = on(device, STATISTICS, torch.tensor([5]))

    def plainly(x, down, up, grad, other):
        """y, h and all gradients, by plain torch in the dtype of x; W as latents and x have it."""
        found = statistics.to(torch.promote_types(down.dtype, torch.float32))
        dense = fallback.quantize([t.to(found.dtype) for t in (down, up)], found, bits)
        leaves = [x, *(w.to(latent).to(dtype).to(x.dtype) for w in dense)]
        x, *dense = leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        to = {"none": None, "x": x, "other": other}[residual]
        y = bottleneck.linear(x, *dense, None, None, 0.5, activation, to, None, p, seed)
        grad_x, *grads = torch.autograd.grad(y, leaves, grad)
        each = zip(grads, (down, up), found, strict=True)
        grads = [grad_x, *(reference.quantize_bwd(*of_one, bits) for of_one in each)]
        hidden = (x @ dense[0].t()).to(torch.promote_types(x.dtype, torch.float32))
        return [y.detach(), hidden.detach(), *itertools.compress(grads, needs)]

    x, down, up, grad, other = args
    number = list(bottleneck.ACTIVATIONS).index(activation)
    rest = (down, up, statistics, bits, 0.5, number)
    given = other if residual == "other" else None
    y, hidden = triton_onebit.adapter(x, *rest, given, residual == "x", p, seed)
    grads = triton_onebit.adapter_bwd(grad, x, hidden, *rest, residual == "x", p, seed, needs)
    found = [y, hidden, *grads]
    assert len(found) == 2 + sum(needs)
    for i, one in enumerate(found):
        assert_as_good(one, lambda *args, i=i: plainly(*args)[i], *args)
