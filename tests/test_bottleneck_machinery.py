"""Are bottleneck's ops well registered, do they compile whole, are they deterministic?"""

import pytest
import torch
from bottlenecks import as_reference, sample
from close import assert_as_good
from torch._subclasses.fake_tensor import FakeTensorMode

from peftkern import bottleneck
from peftkern.bottleneck import Norm, reference

ALL = ("bias_down", "bias_up", "scale", "norm", "residual")


def operands(options):
    """The op's, behind x, down and up; those of a norm come last but for dropout and seed."""
    norm = options.get("norm", (None, None, None))
    values = [options.get(name) for name in ("bias_down", "bias_up", "scale")]
    return values, (*norm, 0.25, torch.tensor([3]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("inputs", [0, 3, 60])
@pytest.mark.parametrize("parts", [(), ALL])
def test_the_ops_are_well_registered(dtype, inputs, parts):
    x, down, up, options = sample(inputs, 16, 5, 12, dtype, parts)
    values, rest = operands(options)
    residual = options.get("residual")
    needs = [True] * 3 + [bool(parts)] * 5
    op = torch.ops.peftkern
    # The raw ops have no gradient by design: the Function around them has it.
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    forward = (x, down, up, *values, 0.5, 2, residual, False, *rest)
    backward = (
        torch.randn(inputs, 12).to(dtype), x, torch.randn(inputs, 5), down, up, *values, 0.5, 2,
        False, *rest, needs,
    )  # fmt: skip
    torch.library.opcheck(op.bottleneck_linear.default, forward, test_utils=tests)
    torch.library.opcheck(op.bottleneck_linear_bwd.default, backward, test_utils=tests)


@pytest.mark.parametrize("shape", [(4,), (0, 4), (2, 0, 4), (2, 3, 0), (0,)])
def test_a_compiler_is_told_the_shapes_that_come(shape):
    x, down, up = torch.ones(shape), torch.ones(2, shape[-1]), torch.ones(5, 2)
    rest = [None, None, None, 1.0, 1, None, False, None, None, None, 0.0, None]
    found = torch.ops.peftkern.bottleneck_linear(x, down, up, *rest)
    with FakeTensorMode(allow_non_fake_inputs=True):
        told = torch.ops.peftkern.bottleneck_linear(x, down, up, *rest)
    assert [t.shape for t in told] == [t.shape for t in found]


@pytest.mark.parametrize("onto_x", [False, True])
def test_it_compiles_to_one_graph(onto_x):
    x, down, up, options = sample(30, 16, 5, 16, parts=ALL)
    norm = options.pop("norm")
    leaves = [t.requires_grad_() for t in (x, down, up, *norm[:2], *options.values())]

    def run(x, down, up, weight, bias, *values):
        given = dict(zip(options, values, strict=True)) | ({"residual": x} if onto_x else {})
        given["norm"] = Norm(weight, bias)
        return bottleneck.linear(x, down, up, activation="silu", dropout=0.5, seed=13, **given)

    compiled = torch.compile(run, fullgraph=True)
    grad = torch.randn(30, 16)
    found, wanted = compiled(*leaves), run(*leaves)
    assert torch.equal(found, wanted)
    trained = leaves[:-1] if onto_x else leaves
    grads = [torch.autograd.grad(y, trained, grad) for y in (found, wanted)]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("inputs", [1, 50, 1000])
def test_threads_do_not_change_bits(isa, dtype, inputs):
    x, down, up, options = sample(inputs, 100, 33, 100, dtype, ALL)
    run, *leaves = as_reference(x, down, up, options | {"activation": "gelu"}, bottleneck.linear)
    for leaf in leaves:
        leaf.requires_grad_()
    grad, before, found = torch.randn(inputs, 100).to(dtype), torch.get_num_threads(), []
    for threads in (1, 2, 3, 3):
        torch.set_num_threads(threads)
        y = run(*leaves)
        found.append([y, *torch.autograd.grad(y, leaves, grad)])
    torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_a_transposed_x_is_taken_as_it_is():
    x, down, up, options = sample(16, 40, 5, 16, parts=("residual",))
    across = torch.randn(40, 16).t()
    options["residual"] = torch.randn(16, 16).t()
    y = bottleneck.linear(across, down, up, **options)
    assert_as_good(y, *as_reference(across, down, up, options))


def test_a_branch_under_autocast_keeps_the_residual_as_it_was():
    x, down, up, _ = sample(20, 16, 5, 16)
    x.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        alone, onto_x = bottleneck.linear(x, down, up), bottleneck.linear(x, down, up, residual=x)
    assert alone.dtype == torch.bfloat16 and onto_x.dtype == torch.float32
    assert torch.equal(onto_x, x + alone)
    assert_as_good(alone, reference.linear, x.detach().bfloat16(), down, up)
    (grad,) = torch.autograd.grad(onto_x.sum(), x)
    assert grad.dtype == torch.float32


def test_dropout_without_a_seed_follows_torchs_generator():
    x, down, up, _ = sample(20, 16, 5, 16)

    def run(seed):
        torch.manual_seed(seed)
        return bottleneck.linear(x, down, up, dropout=0.5)

    assert torch.equal(run(1), run(1)) and not torch.equal(run(1), run(2))
    x.requires_grad_()
    checkpointed = torch.utils.checkpoint.checkpoint(
        lambda x: bottleneck.linear(x, down, up, dropout=0.5, residual=x), x, use_reentrant=False
    )
    torch.autograd.grad(checkpointed.sum(), x)
