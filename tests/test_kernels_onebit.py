"""onebit's kernels in Triton against the reference: on a GPU, or in the interpreter."""

import pytest
import torch
from close import assert_as_good
from hypothesis import given
from hypothesis import strategies as st

from peftkern.onebit import fallback, reference

triton_onebit = pytest.importorskip("peftkern.kernels.onebit", reason="needs triton")
from launchers import DTYPES, SIZES, on  # noqa: E402

from peftkern.kernels import onebit_latents as latents  # noqa: E402
from peftkern.kernels import onebit_levels as levels  # noqa: E402
from peftkern.kernels import onebit_statistics as moments  # noqa: E402

BITS = st.sampled_from(reference.BITS)
# Of weights on a grid, none is so near to a threshold that float64 finds another code than float32.
STATISTICS = torch.tensor([[0.0137, 0.61], [-0.21, 0.43], [0.3, 0.0]])


def on_a_grid(*shape, dtype=torch.float32):
    return (torch.randint(-128, 129, shape) / 64).to(dtype)


def matrices(shapes, dtype=torch.float32, mean=0.0):
    torch.manual_seed(sum(rows * 31 + columns for rows, columns in shapes))
    return [(torch.randn(shape) * 0.02 + mean).to(dtype) for shape in shapes]


def assert_statistics(found, weights):
    """Within four roundings: of a single number, plain torch's own loss says nothing."""
    for row, weight in zip(found.double(), weights, strict=True):
        mean, std = reference.statistics(weight.double())
        sizes = torch.stack([mean.abs() + std, std])
        error = (row - torch.stack([mean, std])).abs()
        assert (error <= 4 * torch.finfo(torch.float32).eps * sizes).all(), error / sizes


@given(
    shapes=st.lists(st.tuples(SIZES, SIZES), min_size=1, max_size=4),
    dtype=DTYPES,
    mean=st.sampled_from([0.0, 0.013, 20.0]),
)
def test_statistics_are_the_reference(device, shapes, dtype, mean):
    weights = on(device, *matrices(shapes, dtype, mean))
    found = triton_onebit.statistics(weights)
    assert found.dtype == torch.float32
    assert_statistics(found, weights)


@pytest.mark.parametrize("mean", [0.0, 20.0])
def test_parts_of_a_large_matrix_make_its_statistics(device, mean, monkeypatch):
    weights = on(device, *matrices([(200, 300), (3, 5), (257, 256)], mean=mean))
    found = triton_onebit.statistics(weights)
    monkeypatch.setattr(moments, "BLOCK_PARTS", 2)
    for by_parts in (found, triton_onebit.statistics(weights)):
        assert_statistics(by_parts, weights)


@pytest.mark.filterwarnings("ignore:invalid value")  # numpy, of the infinite
def test_what_has_no_spread_has_no_std_and_what_is_not_finite_spoils_both(device):
    # The mean of neither is that number in float32, and its square is left as a std.
    weights = [torch.full((3, 37), 0.3), torch.zeros(3, 2), torch.full((25, 40), -1e4 / 3)]
    weights += [torch.ones(1, 1), torch.zeros(0, 3), torch.tensor([[1, torch.inf]])]
    weights = on(device, *weights, torch.tensor([[0, torch.nan]]))
    found = triton_onebit.statistics(weights).cpu()
    assert (found[:5, 1] == 0).all() and torch.isnan(found[5:, 1]).all()
    torch.testing.assert_close(
        found[:5, 0], torch.tensor([0.3, 0, -1e4 / 3, 1, 0]), rtol=2e-7, atol=0
    )
    assert not found[5:, 0].isfinite().any()


def test_a_matrix_has_the_same_statistics_in_any_list(device):
    weights = on(device, *matrices([(200, 300), (7, 11), (128, 256), (129, 255), (1, 4)]))
    alone = torch.cat([triton_onebit.statistics([weight]) for weight in weights])
    assert torch.equal(triton_onebit.statistics(weights), alone)
    assert torch.equal(triton_onebit.statistics(weights[::-1]), alone.flip(0))


@given(
    shapes=st.lists(st.tuples(SIZES, SIZES), min_size=1, max_size=4), dtype=DTYPES, bits=BITS,
    as_float32=st.booleans(),
)  # fmt: skip
def test_quantize_is_the_fallback_to_the_bit(device, shapes, dtype, bits, as_float32):
    weights = on(device, *matrices(shapes, dtype, 0.01))
    found = triton_onebit.statistics(weights)
    quantized = triton_onebit.quantize(weights, found, bits, *[torch.float32] * as_float32)
    wide = [w.float() for w in weights]
    for w, wanted in zip(quantized, fallback.quantize(wide, found, bits), strict=True):
        assert torch.equal(w, wanted.to(torch.float32 if as_float32 else dtype))


@given(
    shapes=st.lists(st.tuples(SIZES, SIZES), min_size=1, max_size=3), dtype=DTYPES, bits=BITS,
    wide=st.booleans(),
)  # fmt: skip
def test_the_gradient_of_quantize_is_the_reference(device, shapes, dtype, bits, wide):
    torch.manual_seed(len(shapes))
    weights = on(device, *(on_a_grid(*shape, dtype=dtype) for shape in shapes))
    grads = [torch.randn_like(w, dtype=torch.float32 if wide else dtype) for w in weights]
    (statistics,) = on(device, STATISTICS[: len(shapes)])
    found = triton_onebit.quantize_bwd(grads, weights, statistics, bits)
    for row, grad, *rest in zip(found, grads, weights, statistics, strict=True):
        assert_as_good(row, lambda *args: reference.quantize_bwd(*args, bits), grad, *rest)


@pytest.mark.parametrize("bits", reference.BITS)
def test_parts_of_a_large_matrix_make_its_gradient(device, bits, monkeypatch):
    monkeypatch.setattr(latents, "BLOCK_SUM_PARTS", 2)
    torch.manual_seed(0)
    weights = on(device, on_a_grid(150, 150), on_a_grid(3, 5), on_a_grid(128, 64))
    grads, (statistics,) = [torch.randn_like(w) + 0.5 for w in weights], on(device, STATISTICS)
    found = triton_onebit.quantize_bwd(grads, weights, statistics, bits)
    for row, grad, *rest in zip(found, grads, weights, statistics, strict=True):
        assert_as_good(row, lambda *args: reference.quantize_bwd(*args, bits), grad, *rest)


def test_the_gradient_of_what_has_no_spread_is_finite(device):
    weight, grad = on(device, torch.full((3, 4), 0.3), torch.arange(12.0).view(3, 4))
    statistics = triton_onebit.statistics([weight])
    (found,) = triton_onebit.quantize_bwd([grad], [weight], statistics, 1)
    assert torch.equal(found, torch.full_like(found, 5.5))


class Counted:
    """A kernel, and how often it is launched."""

    def __init__(self, kernel):
        self.kernel, self.launches = kernel, 0

    def __getitem__(self, grid):
        self.launches += 1
        return self.kernel[grid]


@pytest.mark.parametrize("most", [96, 2])
def test_one_launch_serves_all_matrices_of_a_dtype(device, most, monkeypatch):
    kernels = []
    for module, names in (
        (moments, ["moments", "moments_parts"]),
        (latents, ["quantize", "quantize_sums", "quantize_bwd"]),
    ):
        for name in names:
            kernels.append(Counted(getattr(module, f"{name}_kernel")))
            monkeypatch.setattr(module, f"{name}_kernel", kernels[-1])
    monkeypatch.setattr(levels, "MATRICES", most)
    shapes = [(7, 5), (181, 182), (4, 4), (1, 9)]
    weights = on(device, *matrices(shapes), *matrices([(3, 3)], torch.bfloat16))
    found = triton_onebit.statistics(weights)
    wanted = triton_onebit.quantize(weights, found, 1)
    grads = triton_onebit.quantize_bwd(weights, weights, found, 1)
    launches = [1, 1, 1, 1, 1] if most == 2 else [0] * 5
    assert [k.launches for k in kernels] == [2 + launches[0], 1, *[2 + n for n in launches[2:]]]
    assert torch.equal(found, torch.cat([triton_onebit.statistics([w]) for w in weights]))
    for i, weight in enumerate(weights):
        (alone,) = triton_onebit.quantize([weight], found[i : i + 1], 1)
        (grad,) = triton_onebit.quantize_bwd([weight], [weight], found[i : i + 1], 1)
        assert torch.equal(wanted[i], alone) and torch.equal(grads[i], grad)


@given(rows=SIZES, columns=SIZES, dtype=DTYPES, bits=BITS, flat=st.booleans())
def test_codes_are_the_fallback_to_the_bit(device, rows, columns, dtype, bits, flat):
    torch.manual_seed(rows * 31 + columns)
    weight, statistics = on(
        device, on_a_grid(rows, columns, dtype=dtype), STATISTICS[2 * flat :][:1]
    )
    packed = triton_onebit.encode(weight, statistics, bits)
    assert torch.equal(packed, fallback.encode(weight, statistics, bits))
    codes = triton_onebit.unpack(packed, bits, columns)
    assert torch.equal(codes, reference.codes(weight, statistics.view(2), bits))
    assert torch.equal(triton_onebit.pack(codes, bits), packed)
    for wanted in (torch.float32, torch.bfloat16, torch.float64):
        dense = triton_onebit.dequantize(packed, statistics, bits, columns, wanted)
        assert torch.equal(dense, fallback.dequantize(packed, statistics, bits, columns, wanted))


@pytest.mark.parametrize("bits", reference.BITS)
@pytest.mark.parametrize("shape", [(5,), (0, 3), (3, 0), (2, 3, 9), (40, 33)])
def test_codes_of_any_shape_are_packed(device, bits, shape):
    (codes,) = on(device, torch.randint(256, shape, dtype=torch.uint8))
    packed = triton_onebit.pack(codes, bits)  # what no code has is cut off
    assert torch.equal(packed, reference.pack(codes, bits))
    assert torch.equal(triton_onebit.unpack(packed, bits, shape[-1]), codes & (2**bits - 1))


def test_a_tie_takes_the_lower_code_and_bytes_begin_with_their_lowest_bit(device):
    (tied,) = on(device, torch.tensor([[0.5, -1, 0.25, 0.75, -0.25, 0, 1, -1.25]]))
    statistics = triton_onebit.statistics([tied])
    assert triton_onebit.encode(tied, statistics, 1).item() == 0x4D
    (codes,) = on(device, torch.arange(4, dtype=torch.uint8))
    assert triton_onebit.pack(codes, 2).item() == 0xE4
    assert triton_onebit.pack(codes[1:3], 4).item() == 0x21


def test_double_precision_is_left_to_the_fallback(device):
    weights = on(device, *matrices([(5, 7), (3, 4)], torch.float64))
    statistics = triton_onebit.statistics(weights)
    assert torch.equal(statistics, fallback.statistics(weights))
    for found, wanted in [
        (triton_onebit.quantize, fallback.quantize),
        (lambda *args: triton_onebit.quantize_bwd(weights, *args),
         lambda *args: fallback.quantize_bwd(weights, *args)),
    ]:  # fmt: skip
        same = zip(found(weights, statistics, 2), wanted(weights, statistics, 2), strict=True)
        assert all(torch.equal(a, b) for a, b in same)
    packed = triton_onebit.encode(weights[0], statistics[:1], 2)
    assert torch.equal(packed, fallback.encode(weights[0], statistics[:1], 2))
    rest = (statistics[:1], 2, 7, torch.float32)
    assert torch.equal(triton_onebit.dequantize(packed, *rest), fallback.dequantize(packed, *rest))
