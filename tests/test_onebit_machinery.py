"""Is onebit well registered, does it compile whole, is it deterministic and cheap to call?"""

import pytest
import torch
from test_qlora_machinery import Count
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from peftkern import onebit
from peftkern.onebit import codes, reference

TESTS = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")


def sample(rows=8, columns=33, inputs=5, dtype=torch.float32):
    torch.manual_seed(rows)
    weight, bias = torch.randn(rows, columns), torch.randn(rows)
    return torch.randn(inputs, columns).to(dtype), weight, bias


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("bits", reference.BITS)
def test_the_ops_are_well_registered(dtype, bits):
    weights = [torch.randn(s).to(dtype) for s in ((4, 33), (5, 8))]
    statistics = codes.statistics(weights)
    packed = onebit.quantize(weights[0], bits).packed
    for name, args in {
        "onebit_statistics": (weights,),
        "onebit_quantize": (weights, statistics, bits),
        "onebit_quantize_bwd": (weights, weights, statistics, bits),
        "onebit_encode": (weights[0], statistics[:1], bits),
        "onebit_pack": (torch.ones(2, 3, 33, dtype=torch.uint8), bits),
        "onebit_unpack": (packed, bits, 33),
        "onebit_dequantize": (packed, statistics[:1], bits, 33, dtype),
    }.items():
        torch.library.opcheck(getattr(torch.ops.peftkern, name).default, args, test_utils=TESTS)


def test_a_compiler_is_told_the_shapes_that_come():
    weight = torch.randn(5, 9)
    statistics = codes.statistics([weight])
    for bits in reference.BITS:
        packed = onebit.quantize(weight, bits).packed
        with FakeTensorMode(allow_non_fake_inputs=True):
            told = torch.ops.peftkern.onebit_encode(weight, statistics, bits)
        assert told.shape == packed.shape and told.dtype == packed.dtype


@pytest.mark.parametrize("bits", reference.BITS)
def test_linear_compiles_to_one_graph_for_any_batch(bits):
    x, weight, bias = sample()
    leaves = [t.requires_grad_() for t in (weight, bias)]

    def run(x, weight, bias):
        return onebit.linear(x, weight, bias, bits)

    compiled = torch.compile(run, fullgraph=True, dynamic=True)
    for inputs in (5, 2, 7):
        rows = torch.randn(inputs, 33, requires_grad=True)
        found, wanted = compiled(rows, *leaves), run(rows, *leaves)
        assert torch.equal(found, wanted)
        for a, b in zip(
            torch.autograd.grad(found.sum(), [rows, *leaves]),
            torch.autograd.grad(wanted.sum(), [rows, *leaves]),
            strict=True,
        ):
            assert torch.equal(a, b)


def test_quantize_and_dequantize_compile_to_one_graph():
    weight = torch.randn(5, 9)

    def run(weight):
        return onebit.quantize(weight, 2).dequantize(), onebit.pack(weight.to(torch.uint8), 4)

    for found, wanted in zip(torch.compile(run, fullgraph=True)(weight), run(weight), strict=True):
        assert torch.equal(found, wanted)


def test_autocast_casts_x_and_neither_statistics_nor_gradient(isa):
    x, weight, bias = sample()
    leaves = [t.requires_grad_() for t in (weight, bias)]
    with torch.autocast("cpu", torch.bfloat16):
        y = onebit.linear(x, *leaves)
    assert y.dtype == torch.bfloat16
    plain = onebit.linear(x.bfloat16(), *leaves)
    assert torch.equal(y, plain)
    for a, b in zip(
        torch.autograd.grad(y.sum(), leaves), torch.autograd.grad(plain.sum(), leaves), strict=True
    ):
        assert a.dtype == torch.float32 and torch.equal(a, b)


def test_checkpointing_computes_the_same_again(isa):
    x, weight, bias = sample()
    weight.requires_grad_()
    whole = torch.autograd.grad(onebit.linear(x, weight, bias).square().sum(), weight)[0]
    y = checkpoint(onebit.linear, x, weight, bias, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(y.square().sum(), weight)[0], whole)


def outputs(threads, bits):
    """Of 330 rows of 701, some 57 pieces: statistics, W, codes, dense and the gradient."""
    torch.manual_seed(1)
    weights = [torch.randn(330, 701), torch.randn(3, 5), torch.randn(64, 128)]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        statistics = codes.statistics(weights)
        dense = codes.quantize_op(weights, statistics, bits)
        grads = codes.quantize_bwd_op(dense, weights, statistics, bits)
        found = onebit.quantize(weights[0], bits)
        unpacked = onebit.unpack(found.packed, bits, 701)
        return [
            statistics, *dense, *grads, found.packed, found.dequantize(), unpacked,
            onebit.pack(unpacked, bits),
        ]  # fmt: skip
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("bits", reference.BITS)
def test_threads_do_not_change_bits(isa, bits):
    once = outputs(1, bits)
    for threads in (2, 3, 1):
        assert all(torch.equal(a, b) for a, b in zip(once, outputs(threads, bits), strict=True))


@pytest.mark.parametrize("bits", reference.BITS)
def test_instruction_sets_do_not_change_bits(bits):
    from peftkern import _native

    found = []
    for name in _native.available_isas():
        with _native.using_isa(name):
            found.append(outputs(2, bits))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_a_step_takes_few_calls():
    """Statistics, W and the product; backward the product's gradient and the quantiser's, and W
    again where x asks for its own."""
    x, weight, bias = sample()
    weight.requires_grad_()
    with Count() as count:
        y = onebit.linear(x, weight, bias)
    assert len(count.calls) == 3
    grad = torch.ones_like(y)
    with Count() as count:
        torch.autograd.grad(y, weight, grad)
    ops = [call._opname for call in count.calls if call.namespace == "peftkern"]
    assert ops == ["qlora_linear_bwd", "onebit_quantize_bwd"]
    assert len(count.calls) <= 4  # and two of torch, for the sum that qlora keeps and this lacks
