"""The forward in Triton against the reference, on every path: on a GPU, or in the interpreter."""

import itertools

import pytest
import torch
from close import assert_as_good
from hypothesis import given
from hypothesis import strategies as st
from launchers import COLUMNS, DTYPES, SIZES, TILES, on
from samples import FORMATS, quantized, sample

from peftkern import _native
from peftkern.qlora import fallback, ops, reference
from peftkern.qlora.ops import operand

triton_qlora = pytest.importorskip("peftkern.kernels.qlora", reason="needs triton")
from peftkern.kernels import qlora_panels as panels  # noqa: E402
from peftkern.kernels import qlora_paths as paths  # noqa: E402
from peftkern.kernels.qlora_forward import lora_down  # noqa: E402


def run(
    x, weight, bias=None, lora_a=None, lora_b=None, scale=1.0, dropout=0.0, seed=None,
    offsets=None, adapter=None, path=None, tile=None,
):  # fmt: skip
    """y of the launcher; `down` has to be what the fallback gives too."""
    tensors, layout = operand(weight)
    rest = [tensors, layout, bias, lora_a, lora_b, scale, dropout, seed, offsets, adapter]
    with paths.forced(path, tile):
        y, down = triton_qlora.linear(x, *rest)
    assert_as_good(down, lambda *args: fallback.linear(*args)[1], x, *rest)
    return y


@pytest.mark.parametrize("path", ["gemm", "panels"])
@given(
    rows=SIZES,
    columns=COLUMNS,
    inputs=st.integers(0, 40),
    rank=st.integers(1, 20),
    block_size=st.sampled_from([16, 32, 64, 128]),
    nested=st.booleans(),
    dtype=DTYPES,
    bias=st.booleans(),
    low_rank=st.booleans(),
    p=st.sampled_from([0.0, 0.25, 1.0]),
    format=st.sampled_from(FORMATS),
    tile=st.sampled_from(TILES),
)
def test_linear_is_the_reference(
    device, path, rows, columns, inputs, rank, block_size, nested, dtype, bias, low_rank, p,
    format, tile,
):  # fmt: skip
    x, weight, b, lora_a, lora_b = sample(
        rows, columns, inputs, rank, dtype, block_size, nested, format=format
    )
    x, weight, b, lora_a, lora_b, seed = on(
        device, x, weight, b, lora_a, lora_b, torch.tensor([11])
    )
    rest = [b if bias else None, *([lora_a, lora_b] if low_rank else [None, None]), 0.5, p, seed]
    y = run(x, weight, *rest, path=path, tile=tile)
    assert_as_good(y, reference.linear, x, weight.dequantize(torch.float32), *rest)


@given(
    rows=SIZES,
    columns=COLUMNS,
    inputs=st.integers(0, 40),
    experts=st.integers(1, 4),
    mixed=st.booleans(),
    cuts=st.randoms(),
    dtype=DTYPES,
    format=st.sampled_from([*FORMATS, "dense"]),
    tile=st.sampled_from(TILES),
    path=st.sampled_from(["gemm", "panels"]),
)
def test_expert_linear_is_the_reference(
    device, rows, columns, inputs, experts, mixed, cuts, dtype, format, tile, path
):
    dense = format == "dense"
    x, weight, bias, lora_a, lora_b = sample(
        rows, columns, inputs, 4, dtype, 16, experts=experts, format="nf4" if dense else format
    )
    inner = sorted(cuts.randint(0, inputs) for _ in range(experts - 1))
    offsets = torch.tensor([0, *inner, inputs])
    adapter = torch.randint(-1, experts, (inputs,), dtype=torch.int32) if mixed else None
    x, weight, bias, lora_a, lora_b, offsets, adapter, seed = on(
        device, x, weight, bias, lora_a, lora_b, offsets, adapter, torch.tensor([3])
    )
    rest = [bias, lora_a, lora_b, 0.5, 0.25, seed]
    base = weight.dequantize(dtype) if dense else weight
    y = run(x, base, *rest, offsets, adapter, path=path, tile=tile)
    truth = base if dense else weight.dequantize(torch.float32)
    assert_as_good(y, reference.expert_linear, x, truth, offsets, *rest, adapter)


@given(
    rows=SIZES, columns=SIZES, inputs=st.integers(0, 40), bias=st.booleans(),
    low_rank=st.booleans(), dtype=DTYPES, stored=DTYPES,
)  # fmt: skip
def test_a_dense_base_is_the_library_s_product(
    device, rows, columns, inputs, bias, low_rank, dtype, stored
):
    x, weight, b, *lora = on(device, *sample(rows, columns, inputs, 4, dtype))
    rest = [b if bias else None, *(lora if low_rank else [None, None]), 2.0]
    dense = weight.dequantize(stored)
    assert_as_good(run(x, dense, *rest), reference.linear, x, dense, *rest)


@given(rank=st.sampled_from([1, 17, 64, 65, 130]), dtype=DTYPES, tile=st.sampled_from(TILES))
def test_any_rank_is_served(device, rank, dtype, tile):
    x, weight, bias, lora_a, lora_b = on(device, *sample(9, 64, 20, rank, dtype))
    lora_a, lora_b = lora_a.double(), lora_b.to(torch.float16)  # of any float dtype
    rest = [bias, lora_a, lora_b, 0.5]
    y = run(x, weight, *rest, path="gemm", tile=tile)
    assert_as_good(y, reference.linear, x, weight.dequantize(torch.float32), *rest)


@pytest.mark.parametrize("kernel", ["gemm", "down"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_tile_of_the_table_gives_the_reference(device, kernel, dtype):
    x, weight, *rest = on(device, *sample(70, 192, 140, 20, dtype))
    table = paths.TILES[f"{kernel} {8 * dtype.itemsize}"]
    for _, tile in itertools.chain.from_iterable(table.values()):
        y = run(x, weight, *rest, path="gemm", tile=tile._replace(splits=2))
        assert_as_good(y, reference.linear, x, weight.dequantize(torch.float32), *rest)


@pytest.mark.parametrize("columns", [20, 21])
@pytest.mark.parametrize("tile", TILES, ids=["usual", "small", "large"])
def test_dropout_drops_the_same_elements_in_every_tile(device, columns, tile):
    """A = identity shows which elements of x the low-rank term saw."""
    x, eye = torch.ones(37, columns, device=device), torch.eye(columns, device=device)
    for seed, p in itertools.product([0, -5, 2**40 + 3], [0.1, 0.5, 0.9]):
        key = torch.tensor([seed], device=device)
        with paths.forced(tile=tile):
            down = lora_down(x, eye, p, key, None, None)
        assert torch.equal(down, reference.dropout(x, p, key))


@pytest.mark.parametrize("path", ["gemm", "panels"])
@pytest.mark.parametrize("shape", [(4, 96), (4, 80), (64, 48), (4, 32), (5, 37)])
@pytest.mark.parametrize("nested", [False, True])
def test_blocks_may_straddle_rows(device, path, shape, nested):
    torch.manual_seed(0)
    scaled = torch.randn(shape) * torch.arange(1, shape[0] + 1)[:, None]
    weight = quantized(scaled, "nf4", 64, nested).to(device)
    x = torch.randn(20, shape[1], device=device)
    y = run(x, weight, path=path)
    assert_as_good(y, reference.linear, x, weight.dequantize(torch.float32))


@pytest.mark.parametrize("size", [1, 20_000])
def test_a_weight_of_several_panels_is_the_reference(device, size, monkeypatch):
    """Of 128 rows each, and one that is shorter."""
    monkeypatch.setattr(panels, "PANEL_BYTES", size)
    x, weight, *rest = on(device, *sample(300, 64, 40, 4, torch.bfloat16))
    y = run(x, weight, *rest, path="panels")
    assert_as_good(y, reference.linear, x, weight.dequantize(torch.float32), *rest)


def test_a_dense_weight_in_another_dtype_is_rounded_in_panels(device, monkeypatch):
    """So that no second weight lies around."""
    monkeypatch.setattr(panels, "PANEL_BYTES", 1)
    shapes, decode = [], panels.decode

    def record(panel, *rest):
        shapes.append(tuple(panel.shape))
        decode(panel, *rest)

    monkeypatch.setattr(panels, "decode", record)
    x, weight, *rest = on(device, *sample(300, 64, 40, 4, torch.bfloat16))
    y = run(x, weight.dequantize(), *rest)
    assert_as_good(y, reference.linear, x, weight.dequantize(), *rest)
    assert shapes == [(128, 64), (128, 64), (44, 64)]
    run(x, weight.dequantize(torch.bfloat16), *rest)
    assert len(shapes) == 3


@pytest.mark.parametrize("path", ["gemm", "panels"])
def test_values_that_are_not_finite_stay_in_their_rows(device, path):
    x, weight, *_ = sample(8, 100, 40, 4)
    x[0, 3] = torch.nan
    y = run(*on(device, x, weight), path=path)
    assert y[0].isnan().all() and not y[1:].isnan().any()
    spoilt = weight.dequantize()
    spoilt[2, 5] = torch.nan
    x, weight = on(device, torch.ones(40, 128), quantized(torch.randn(8, 128), "nf4"))
    weight.absmax[4] = torch.nan  # the first block of the third row
    y = run(x, weight, path=path)
    assert y[:, 2].isnan().all() and not y[:, [0, 1, 3, 4, 5, 6, 7]].isnan().any()


@pytest.mark.parametrize("spoilt", ["lora_a", "lora_b"])
def test_an_adapter_that_is_not_finite_spoils_its_own_rows_alone(device, spoilt):
    x, weight, bias, lora_a, lora_b = on(device, *sample(10, 64, 12, 4, experts=2))
    offsets, adapter = on(
        device, torch.tensor([0, 6, 12]), torch.arange(12).to(torch.int32) % 3 - 1
    )
    (lora_a if spoilt == "lora_a" else lora_b)[1] = torch.nan
    rest = [*operand(weight), bias, lora_a, lora_b, 0.5, 0.0, None, offsets, adapter]
    y, down = triton_qlora.linear(x, *rest)
    needs = [True, False, False, False, False]
    (grad_x,) = triton_qlora.linear_bwd(torch.ones_like(y), x, down, *rest, needs)
    for found in (y, grad_x):
        assert torch.equal(found.isnan().any(1), adapter == 1)


@pytest.mark.parametrize("shape", [(64,), (0, 64), (2, 0, 64), (2, 3, 64), (3, 0)])
def test_x_has_any_number_of_dimensions(device, shape):
    _, weight, *rest = on(device, *sample(9, shape[-1], 1, 4))
    x = torch.randn(shape, device=device)
    for path in ("gemm", "panels"):
        y = run(x, weight, *rest, path=path)
        assert_as_good(y, reference.linear, x, weight.dequantize(torch.float32), *rest)


def test_double_precision_is_left_to_the_fallback(device):
    x, weight, *rest = on(device, *sample(9, 64, 5, 4, torch.float64))
    y = run(x, weight, *rest)
    wanted, _ = fallback.linear(x, *operand(weight), *rest, 1.0, 0.0, None, None, None)
    assert torch.equal(y, wanted)


@pytest.mark.parametrize("inputs", [1, 16, 17])
@pytest.mark.parametrize("mixed", [False, True])
def test_few_rows_of_one_adapter_go_to_qlora_decode(device, inputs, mixed):
    calls = []

    def decode(x, *rest):
        calls.append(len(x))
        return fallback.decode(x, *rest)

    x, weight, bias, lora_a, lora_b, adapter = on(
        device, *sample(9, 64, inputs, 4, torch.bfloat16), torch.zeros(inputs, dtype=torch.int32)
    )
    rest = [bias, lora_a, lora_b, 0.5, 0.25, torch.tensor([7], device=device), None]
    functions = {"qlora_linear": triton_qlora.linear, "qlora_decode": decode}
    with _native.Instead(functions):
        y, _ = ops._linear_op(x, weight.buffers, weight.layout, *rest, adapter if mixed else None)
    assert calls == ([inputs] if inputs <= 16 and not mixed else [])
    assert_as_good(y, reference.linear, x, weight.dequantize(torch.float32), *rest[:-1])


def test_rows_of_many_experts_come_in_tiles_for_those_of_one(device, monkeypatch):
    x, weight, *rest = on(device, *sample(16, 32, 12, 2, experts=4))
    asked, tile = [], paths.tile

    def record(kernel, device, dtype, rows):
        asked.append((kernel, rows))
        return tile(kernel, device, dtype, rows)

    monkeypatch.setattr(paths, "tile", record)
    offsets = torch.tensor([0, 1, 5, 7, 12], device=device)
    run(x, weight, *rest, offsets=offsets)
    assert asked == [("down", 3), ("gemm", 3)]


def test_the_same_call_gives_the_same_bits(device):
    x, weight, *rest = on(device, *sample(70, 192, 40, 20, torch.bfloat16))
    first, again = (run(x, weight, *rest, path="gemm", tile=TILES[1]) for _ in range(2))
    assert torch.equal(first, again)
