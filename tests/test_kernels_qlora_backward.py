"""The backward in Triton against autograd of the reference: on a GPU, or in the interpreter."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from launchers import COLUMNS, DTYPES, SIZES, TILES, counted, on
from samples import FORMATS, sample

from peftkern import _verdict
from peftkern.qlora import fallback, reference
from peftkern.qlora.ops import operand

triton_qlora = pytest.importorskip("peftkern.kernels.qlora", reason="needs triton")
from peftkern.kernels import qlora_backward as triton_backward  # noqa: E402
from peftkern.kernels import qlora_paths as paths  # noqa: E402
from peftkern.kernels import qlora_strips as strips  # noqa: E402

PATHS = st.sampled_from(["gemm", "panels"])


def arguments(grad, x, weight, bias, lora_a, lora_b, *rest):
    """Those of the op, but for `needs`; `rest` from the scale on."""
    rest = [*operand(weight), bias, lora_a, lora_b, *rest]
    _, down = fallback.linear(x, *rest)
    return [grad, x, down, *rest]


def assert_every_gradient(
    grad, x, weight, bias, lora_a, lora_b, scale=0.5, dropout=0.0, seed=None, offsets=None,
    adapter=None, path=None, tile=None,
):  # fmt: skip
    """Of all operands that there are, and of a weight that is dense."""
    trains = isinstance(weight, torch.Tensor)
    needs = [True, trains, bias is not None, lora_a is not None, lora_b is not None]
    fixed = [scale, dropout, seed, offsets, adapter]
    given = arguments(grad, x, weight, bias, lora_a, lora_b, *fixed)
    with paths.forced(path, tile):
        found = triton_qlora.linear_bwd(*given, needs)

    def plain(grad, *operands):
        leaves = [t if t is None else t.detach() for t in operands]
        wanted = [t.requires_grad_() for t, need in zip(leaves, needs, strict=True) if need]
        x, w, *parameters = leaves
        if offsets is None:
            y = reference.linear(x, w, *parameters, scale, dropout, seed)
        else:
            y = reference.expert_linear(x, w, offsets, *parameters, scale, dropout, seed, adapter)
        return torch.autograd.grad(y, wanted, grad)

    dense = weight if trains else weight.dequantize(torch.float32)
    verdicts = list(_verdict.judge(found, plain, grad, x, dense, bias, lora_a, lora_b))
    assert all(v.passed for v in verdicts), [str(v) for v in verdicts]


@given(
    rows=SIZES,
    columns=COLUMNS,
    inputs=st.integers(0, 40),
    rank=st.integers(1, 20),
    block_size=st.sampled_from([16, 64, 128]),
    nested=st.booleans(),
    dtype=DTYPES,
    bias=st.booleans(),
    low_rank=st.booleans(),
    p=st.sampled_from([0.0, 0.25, 1.0]),
    format=st.sampled_from([*FORMATS, "dense"]),
    path=PATHS,
    tile=st.sampled_from(TILES),
)
def test_every_gradient_is_the_reference_s(
    device, rows, columns, inputs, rank, block_size, nested, dtype, bias, low_rank, p, format,
    path, tile,
):  # fmt: skip
    dense = format == "dense"
    x, weight, b, *lora = on(
        device,
        *sample(
            rows,
            columns,
            inputs,
            rank,
            dtype,
            block_size,
            nested,
            format=FORMATS[0] if dense else format,
        ),
    )
    grad = torch.randn(inputs, rows, device=device).to(dtype)
    base = weight.dequantize(dtype) if dense else weight
    seed = torch.tensor([11], device=device) if p and low_rank else None
    rest = [b if bias else None, *(lora if low_rank else [None, None]), 0.5, p, seed]
    assert_every_gradient(grad, x, base, *rest, path=path, tile=tile)


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
)
def test_every_gradient_of_experts_is_the_reference_s(
    device, rows, columns, inputs, experts, mixed, cuts, dtype, format, tile
):
    dense = format == "dense"
    x, weight, *parameters = sample(
        rows, columns, inputs, 4, dtype, 16, experts=experts, format=FORMATS[0] if dense else format
    )
    inner = sorted(cuts.randint(0, inputs) for _ in range(experts - 1))
    offsets = torch.tensor([0, *inner, inputs])
    adapter = torch.randint(-1, experts, (inputs,), dtype=torch.int32) if mixed else None
    grad = torch.randn(inputs, rows).to(dtype)
    x, weight, grad, seed, offsets, adapter = on(
        device, x, weight, grad, torch.tensor([3]), offsets, adapter
    )
    base = weight.dequantize(dtype) if dense else weight
    rest = [*on(device, *parameters), 0.5, 0.25, seed, offsets, adapter]
    assert_every_gradient(grad, x, base, *rest, tile=tile)


@pytest.mark.parametrize("rank", [1, 17, 64, 65, 130])
def test_any_rank_is_served(device, rank):
    x, weight, bias, lora_a, lora_b = on(device, *sample(9, 64, 20, rank, torch.bfloat16))
    grad = torch.randn(20, 9, device=device).bfloat16()
    lora_a, lora_b = lora_a.double(), lora_b.to(torch.float16)  # of any float dtype
    assert_every_gradient(grad, x, weight, bias, lora_a, lora_b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("grouped", ["one", "experts", "mixed"])
def test_strips_of_several_blocks_are_added_up(device, dtype, grouped, monkeypatch):
    monkeypatch.setattr(strips, "STRIPS", 2)  # so that each is three blocks long
    monkeypatch.setattr(strips, "BLOCK_PARTS", 1)  # so that parts are added up in several steps
    x, weight, *parameters = on(device, *sample(18, 32, 90, 3, dtype, 16, experts=4))
    grad = torch.randn(90, 18, device=device).to(dtype)
    offsets, adapter, seed = on(
        device,
        torch.tensor([0, 7, 7, 70, 90]),
        torch.arange(90, dtype=torch.int32) % 5 - 1,
        torch.tensor([5]),
    )
    groups = [offsets, adapter if grouped == "mixed" else None]
    if grouped == "one":
        weight, groups = weight.dequantize(dtype)[0], []
        parameters = [t[0] for t in parameters]
    assert_every_gradient(grad, x, weight, *parameters, 0.5, 0.25, seed, *groups, tile=TILES[1])


@pytest.mark.parametrize("rows", [0, 9])
def test_the_gradient_of_a_wider_weight_is_rounded_once(device, rows):
    grad, x = on(device, *(torch.randn(rows, n, dtype=torch.bfloat16) for n in (5, 20)))
    found = triton_backward.grad_weight(grad, x, torch.empty(5, 20, device=device), None)
    torch.testing.assert_close(found, grad.float().t() @ x.float(), rtol=1e-5, atol=1e-5)


def test_all_of_x_may_be_dropped(device):
    x, weight, *parameters = on(device, *sample(9, 64, 20, 4))
    grad, seed = torch.randn(20, 9, device=device), torch.tensor([3], device=device)
    for path in ("gemm", "panels"):
        assert_every_gradient(grad, x, weight, *parameters, 0.5, 1.0, seed, path=path)


@pytest.mark.parametrize("kernel", ["lora_bwd", "grad_a", "grad_weight"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_tile_of_the_table_gives_the_reference(device, kernel, dtype):
    x, weight, *parameters = on(device, *sample(40, 72, 90, 20, dtype, experts=2))
    grad = torch.randn(90, 40, device=device).to(dtype)
    rest = [*parameters, 0.5, 0.0, None, torch.tensor([0, 50, 90], device=device)]
    for _, tile in itertools.chain.from_iterable(
        paths.TILES[f"{kernel} {8 * dtype.itemsize}"].values()
    ):
        assert_every_gradient(
            grad, x, weight.dequantize(dtype), *rest, tile=tile._replace(splits=1)
        )


def bits(device, experts, mixed, needs, inputs=20):
    x, weight, *parameters = sample(10, 32, inputs, 3, torch.bfloat16, 16, experts=experts)
    offsets = torch.tensor([0, 11, inputs]) if experts else None
    adapter = torch.arange(inputs, dtype=torch.int32) % 3 - 1 if mixed else None
    grad = torch.randn(inputs, 10).bfloat16()
    base = weight.dequantize()
    rest = [*parameters, 0.5, 0.25, torch.tensor([9]), offsets, adapter]
    grad, x, *rest = arguments(grad, x, base, *rest)
    read = x if needs[1] or needs[3] else None  # by the gradients of weight and lora_a alone
    given = [t.to(device) if isinstance(t, torch.Tensor) else t for t in (grad, read, *rest)]
    given[3] = on(device, *given[3])
    return triton_qlora.linear_bwd(*given, needs)


@pytest.mark.parametrize(("experts", "mixed"), [(0, False), (2, False), (2, True)])
def test_only_what_is_asked_for_is_computed_and_in_the_same_bits(device, experts, mixed):
    full = bits(device, experts, mixed, [True] * 5)
    each = [[i == j for i in range(5)] for j in range(5)]
    for needs in [[False] * 5, *each, *([not need for need in needs] for needs in each)]:
        wanted = [grad for grad, need in zip(full, needs, strict=True) if need]
        found = bits(device, experts, mixed, needs)
        assert len(found) == len(wanted)
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize(("experts", "mixed"), [(0, False), (2, False), (2, True)])
def test_bits_do_not_depend_on_what_memory_held(device, experts, mixed, monkeypatch):
    first = bits(device, experts, mixed, [True] * 5)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    again = bits(device, experts, mixed, [True] * 5)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_what_is_not_finite_stays_in_its_row_and_its_output(device):
    x, weight, *parameters = on(device, *sample(8, 64, 40, 4))
    grad = torch.ones(40, 8, device=device)
    grad[2, 3] = torch.nan
    given = arguments(grad, x, weight, *parameters, 0.5, 0.0, None, None, None)
    grad_x, grad_bias, _, grad_b = triton_qlora.linear_bwd(*given, [True, False, True, True, True])
    others = torch.arange(40) != 2, torch.arange(8) != 3
    assert grad_x[2].isnan().all() and not grad_x[others[0]].isnan().any()
    assert grad_bias[3].isnan() and not grad_bias[others[1]].isnan().any()
    assert grad_b[3].isnan().all() and not grad_b[others[1]].isnan().any()


@pytest.mark.parametrize("shape", [(64,), (0, 64), (2, 0, 64), (2, 3, 64), (3, 0)])
@pytest.mark.parametrize("rows", [0, 9])
def test_x_has_any_number_of_dimensions(device, shape, rows):
    _, weight, *parameters = on(device, *sample(rows, shape[-1], 1, 4))
    x = torch.randn(shape, device=device)
    grad = torch.randn(*shape[:-1], rows, device=device)
    assert_every_gradient(grad, x, weight, *parameters)


def test_double_precision_is_left_to_the_fallback(device):
    x, weight, *parameters = on(device, *sample(9, 64, 5, 4, torch.float64))
    grad = torch.randn(5, 9, dtype=torch.float64, device=device)
    assert_every_gradient(grad, x, weight, *parameters)


def test_a_training_step_is_a_handful_of_launches_and_allocations(device):
    x, weight, bias, lora_a, lora_b = on(device, *sample(20, 64, 40, 4, torch.bfloat16))
    seed = torch.tensor([1], device=device)
    rest = [*operand(weight), bias, lora_a, lora_b, 0.5, 0.25, seed, None, None]
    grad, needs = torch.ones(40, 20, dtype=x.dtype, device=device), [True, False, True, True, True]
    with paths.forced("gemm", paths.Tile(32, 32, 64, 4, 1, 1)):
        (_, down), launches, rooms = counted(lambda: triton_qlora.linear(x, *rest))
        assert launches == ["down_kernel", "gemm_kernel"]
        assert rooms == 2  # y and down
        _, launches, rooms = counted(lambda: triton_qlora.linear_bwd(grad, x, down, *rest, needs))
    sums = ["lora_bwd_kernel", "finish_kernel", "grad_a_kernel", "finish_kernel"]
    assert launches == [*sums, "gemm_kernel"]
    assert rooms == 9  # four gradients, t, and the parts of four sums
