"""bottleneck's Triton launchers against the reference: on a GPU, or in Triton's interpreter."""

import itertools

import pytest
import torch
from bottlenecks import sample
from hypothesis import assume, given
from hypothesis import strategies as st
from launchers import DTYPES, SIZES, TILES, counted, on

from peftkern import _verdict
from peftkern.bottleneck import ACTIVATIONS, Norm, fallback, reference
from peftkern.qlora.reference import dropout

triton_bottleneck = pytest.importorskip("peftkern.kernels.bottleneck", reason="needs triton")
from peftkern.kernels import qlora_paths as paths  # noqa: E402
from peftkern.kernels import qlora_strips as strips  # noqa: E402

NAMES = list(ACTIVATIONS)
PARTS = ["bias_down", "bias_up", "scale", "norm", "residual"]
# One kernel serves both products where its programs fill the GPU.
WAYS = {"one": 1, "three": 10**9}  # launches, and multiprocessors that make it so


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    monkeypatch.setattr(paths, "multiprocessors", lambda device: WAYS[request.param])
    return request.param


def operands(device, inputs, columns, rank, outputs, dtype=torch.float32, parts=PARTS):
    """x, residual and parameters; down, up, their biases, gate, the norm's weight and bias."""
    x, down, up, found = sample(inputs, columns, rank, outputs, dtype, parts)
    norm = found.get("norm") or Norm()
    parameters = [down, up, *(found.get(part) for part in PARTS[:3]), *norm[:2]]
    x, residual, *parameters = on(device, x, found.get("residual"), *parameters)
    return x, residual, parameters


def run(x, residual, parameters, activation="gelu", eps=None, p=0.0, seed=None, needs=None):
    """y and h of the launchers, and the gradients of x and all parameters for a gradient of y."""
    *factors, weight, bias = parameters
    onto_x = residual is x
    torch.manual_seed(5)
    rest = [onto_x, weight, bias, eps, p, seed]
    fixed = [0.5, NAMES.index(activation)]
    y, hidden = triton_bottleneck.linear(x, *factors, *fixed, None if onto_x else residual, *rest)
    grad = torch.randn(y.shape).to(y)
    if needs is None:
        needs = [True, *(t is not None for t in parameters)]
    return (
        y,
        hidden,
        grad,
        triton_bottleneck.linear_bwd(grad, x, hidden, *factors, *fixed, *rest, needs),
    )


def assert_reference(x, residual, parameters, activation="gelu", eps=None, p=0.0, seed=None):
    y, hidden, grad, grads = run(x, residual, parameters, activation, eps, p, seed)
    assert hidden.dtype == torch.promote_types(x.dtype, torch.float32)

    def plain(grad, x, residual, *parameters):
        leaves = [t if t is None else t.detach().requires_grad_() for t in (x, *parameters)]
        x, down, up, bias_down, bias_up, gate, weight, bias = leaves
        y = reference.linear(
            x, down, up, bias_down, bias_up, 0.5 if gate is None else 0.5 * gate, activation,
            x if onto_x else residual, None if eps is None else Norm(weight, bias, eps), p, seed,
        )  # fmt: skip
        leaves = [t for t in leaves if t is not None]
        return y.detach(), *torch.autograd.grad(y, leaves, grad, materialize_grads=True)

    onto_x = residual is x
    verdicts = list(_verdict.judge([y, *grads], plain, grad, x, residual, *parameters))
    assert all(v.passed for v in verdicts), [str(v) for v in verdicts]


@given(
    inputs=st.integers(0, 40),
    columns=SIZES,
    rank=st.integers(1, 40),
    outputs=SIZES,
    dtype=DTYPES,
    activation=st.sampled_from(NAMES),
    parts=st.sets(st.sampled_from([*PARTS, "plain norm", "x"])),
    p=st.sampled_from([0.0, 0.25, 1.0]),
    tile=st.sampled_from(TILES),
)
def test_outputs_and_gradients_are_the_reference_s(
    device, way, inputs, columns, rank, outputs, dtype, activation, parts, p, tile
):
    # N(x) in 16 bits may take h across the kink.
    normed = bool(parts & {"norm", "plain norm"})
    assume(activation != "relu" or not normed or dtype == torch.float32)
    outputs = columns if "x" in parts else outputs
    x, residual, parameters = operands(
        device, inputs, columns, rank, outputs, dtype, parts - {"plain norm", "x"}
    )
    seed = torch.tensor([11], device=device) if p else None
    with paths.forced(tile=tile):
        assert_reference(
            x, x if "x" in parts else residual, parameters, activation, 1e-5 if normed else None,
            p, seed,
        )  # fmt: skip


@pytest.mark.parametrize("onto_x", [False, True])
@pytest.mark.parametrize("tile", TILES[1:], ids=["small", "large"])
def test_everything_at_once_is_the_reference_s(device, way, onto_x, tile):
    """In several tiles to each axis, with a mask."""
    x, residual, parameters = operands(device, 40, 36, 24, 36)
    with paths.forced(tile=tile):
        assert_reference(
            x, x if onto_x else residual, parameters, "silu", 1e-5, 0.25,
            torch.tensor([3], device=device),
        )  # fmt: skip


@pytest.mark.parametrize("rank", [1, 17, 65, 130])
def test_any_rank_is_served(device, way, rank):
    """130 by the way of three launches alone."""
    x, residual, (down, up, *others) = operands(device, 20, 33, rank, 9, torch.bfloat16)
    parameters = [down.double(), up.to(torch.float16), *others]  # of any float dtype
    assert_reference(x, residual, parameters, "tanh", 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_tile_of_the_table_gives_the_reference(device, way, dtype):
    x, residual, parameters = operands(device, 70, 72, 40, 70, dtype)
    names = [f"{kernel} {8 * dtype.itemsize}" for kernel in ("bottleneck", "bottleneck_sums")]
    for _, tile in itertools.chain.from_iterable(paths.TILES[name]["any"] for name in names):
        with paths.forced(tile=tile._replace(splits=2)):
            assert_reference(x, residual, parameters, "gelu_tanh", 1e-5)


def test_strips_of_several_blocks_are_added_up(device, monkeypatch):
    monkeypatch.setattr(strips, "STRIPS", 2)  # so that each is three blocks long
    monkeypatch.setattr(strips, "BLOCK_PARTS", 1)  # so that parts are added up in several steps
    with paths.forced(tile=TILES[1]):
        assert_reference(*operands(device, 90, 18, 40, 20), eps=1e-5)


@pytest.mark.parametrize("activation", NAMES)
def test_an_activation_and_its_slope_are_torch_s(device, activation):
    h = torch.cat([torch.linspace(-12, 12, 97), torch.logspace(-30, 2, 65), torch.zeros(1)])
    h = torch.cat([h, -h])[:, None].to(device)
    one = torch.ones(1, 1, device=device)
    fixed = [one, one, None, None, None, 1.0, NAMES.index(activation)]
    rest = [False, None, None, None, 0.0, None]
    y, hidden = triton_bottleneck.linear(h, *fixed, None, *rest)
    needs = [True, *[False] * 7]
    (slope,) = triton_bottleneck.linear_bwd(torch.ones_like(y), h, hidden, *fixed, *rest, needs)
    exact = h.double().requires_grad_()
    truth = ACTIVATIONS[activation](exact)
    (wanted,) = torch.autograd.grad(truth.sum(), exact)
    # What 1 + erf(h) and 1 + tanh(h) lose where they are all but 0 is lost relative to h.
    lost = 0.0 if activation == "tanh" else 2e-7
    assert ((y - truth).abs() <= lost * h.abs() + 1e-6 * truth.abs()).all()
    kink = (h == 0) & (activation == "relu")
    assert ((slope - wanted).abs() <= 2e-6).logical_or(kink).all()


@pytest.mark.parametrize("rank", [20, 21])
@pytest.mark.parametrize("tile", TILES, ids=["usual", "small", "large"])
def test_dropout_drops_the_same_elements_in_every_tile(device, way, rank, tile):
    """Factors that are the identity show which elements of h were kept, and got a gradient."""
    x, eye = torch.ones(37, rank, device=device), torch.eye(rank, device=device)
    parameters = [eye, eye, *[None] * 5]
    for seed, p in [(-5, 0.1), (2**40 + 3, 0.5), (0, 1.0)]:
        key = torch.tensor([seed], device=device)
        with paths.forced(tile=tile):
            y, _, grad, (grad_x, *_) = run(x, None, parameters, "identity", None, p, key)
        assert torch.equal(y, 0.5 * dropout(x, p, key))
        torch.testing.assert_close(grad_x, 0.5 * dropout(grad, p, key))


def test_a_dropout_of_everything_lets_nothing_through(device, way):
    x, eye = torch.full((20, 5), torch.inf, device=device), torch.eye(5, device=device)
    key = torch.tensor([2], device=device)
    y, hidden, _, (grad_x, *_) = run(x, None, [eye, eye, *[None] * 5], "identity", None, 1.0, key)
    assert not hidden.isfinite().any()
    assert not y.any() and not grad_x.any()


@pytest.mark.parametrize("inputs", [3, 40])
def test_rows_far_from_zero_are_normed_by_what_they_differ_in(device, way, inputs):
    x, residual, parameters = operands(device, inputs, 150, 8, 20)
    assert_reference(x + 1e3, residual, parameters, "gelu", 1e-5)


def all_gradients(device, needs=None):
    x, residual, parameters = operands(device, 20, 24, 12, 18, torch.bfloat16)
    seed = torch.tensor([7], device=device)
    y, hidden, _, grads = run(x, residual, parameters, "gelu", 1e-5, 0.25, seed, needs)
    return [y, hidden], grads


def test_only_what_is_asked_for_is_computed_and_in_the_same_bits(device, way):
    _, full = all_gradients(device)
    each = [[i == j for i in range(8)] for j in range(8)]
    for needs in [[False] * 8, *each, *([not need for need in needs] for needs in each)]:
        wanted = [grad for grad, need in zip(full, needs, strict=True) if need]
        _, found = all_gradients(device, needs)
        assert len(found) == len(wanted)
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_bits_do_not_depend_on_what_memory_held(device, way, monkeypatch):
    first = all_gradients(device)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    again = all_gradients(device)
    for one, other in zip(first, again, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("eps", [None, 1e-5])
def test_what_is_not_finite_stays_in_its_row(device, way, eps):
    x, residual, parameters = operands(device, 40, 24, 20, 24)
    x[2, 3] = torch.nan
    y, hidden, _, (grad_x, *_) = run(x, residual, parameters, "tanh", eps)
    others = torch.arange(40) != 2
    for found in (y, hidden, grad_x):
        assert found[2].isnan().all() and not found[others].isnan().any()


@pytest.mark.parametrize("shape", [(64,), (0, 64), (2, 0, 64), (2, 3, 64), (3, 0)])
@pytest.mark.parametrize("outputs", [0, 9])
def test_x_has_any_number_of_dimensions(device, way, shape, outputs):
    _, _, parameters = operands(device, 1, shape[-1], 4, outputs)
    x = torch.randn(shape, device=device)
    residual = torch.randn(*shape[:-1], outputs, device=device)
    assert_reference(x, residual, parameters, "relu", 1e-5 if shape[-1] else None)


def test_double_precision_is_left_to_the_fallback(device):
    x, residual, parameters = operands(device, 5, 24, 4, 9, torch.float64)
    y, hidden, _, _ = run(x, residual, parameters, eps=1e-5)
    *factors, weight, bias = parameters
    rest = [False, weight, bias, 1e-5, 0.0, None]
    wanted = fallback.linear(x, *factors, 0.5, NAMES.index("gelu"), residual, *rest)
    assert torch.equal(y, wanted[0]) and torch.equal(hidden, wanted[1])
    assert_reference(x, residual, parameters, eps=1e-5)


def test_a_training_step_is_a_handful_of_launches_and_allocations(device, way):
    x, residual, parameters = operands(device, 40, 24, 20, 18, torch.bfloat16)
    *factors, _, _ = parameters
    fixed = [0.5, NAMES.index("gelu")]
    rest = [False, None, None, None, 0.25, torch.tensor([1], device=device)]
    grad, needs = torch.ones(40, 18, dtype=x.dtype, device=device), [True] * 6 + [False] * 2
    (_, hidden), forward, rooms = counted(
        lambda: triton_bottleneck.linear(x, *factors, *fixed, residual, *rest)
    )
    _, backward, more = counted(
        lambda: triton_bottleneck.linear_bwd(grad, x, hidden, *factors, *fixed, *rest, needs)
    )
    up = ["activate_kernel", "grad_up_kernel", "finish_kernel", "finish_kernel"]
    down = ["grad_down_kernel", "finish_kernel"]
    if way == "one":
        assert forward == ["linear_kernel"] and rooms == 2  # y and h
        assert backward == [*up, "linear_bwd_kernel", *down]
        # Six gradients, D(act(h)), t, the gate's of each output, and the parts of five sums.
        assert more == 14
    else:
        assert forward == ["project_kernel", "activate_kernel", "expand_kernel"] and rooms == 3
        assert backward == [*up, "project_kernel", "grad_hidden_kernel", "grad_x_kernel", *down]
        assert more == 16  # and two more of h's shape
