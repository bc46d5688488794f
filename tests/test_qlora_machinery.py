"""Are qlora's ops well registered, do they compile whole, are they deterministic?"""

import pytest
import torch
from close import assert_as_good
from samples import FORMATS, sample
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from peftkern import QLoRALinear, qlora
from peftkern.qlora import reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("inputs", [0, 3, 20])
@pytest.mark.parametrize("format", FORMATS)
def test_the_ops_are_well_registered(dtype, inputs, format):
    x, weight, bias, lora_a, lora_b = sample(8, 32, inputs, 2, dtype, nested=True, format=format)
    seed = torch.tensor([3])
    rest = [bias, lora_a, lora_b, 0.5, 0.25, seed, None, None]
    down = torch.randn(inputs, 2)
    out = torch.empty(weight.shape)
    op = torch.ops.peftkern
    # The raw ops have no gradient by design: the Function around them has it.
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    for name, args in {
        "qlora_quantize": (
            out.normal_(), weight.format.tables(out.device), weight.block_size or 0,
            weight.format.bits,
        ),
        "qlora_dequantize": (weight.buffers, weight.layout, out),
        "qlora_linear": (x, weight.buffers, weight.layout, *rest),
        "qlora_linear_bwd": (
            torch.randn(inputs, 8, dtype=dtype), x, down, weight.buffers, weight.layout, *rest,
            [True, False, True, True, True],
        ),
    }.items():  # fmt: skip
        torch.library.opcheck(getattr(op, name).default, args, test_utils=tests)


@pytest.mark.parametrize("shape", [(4,), (0, 4), (2, 0, 4), (2, 3, 0), (0,)])
def test_a_compiler_is_told_the_shapes_that_come(shape):
    x, weight = torch.ones(shape), torch.ones(5, shape[-1])
    lora = [torch.ones(2, shape[-1]), torch.ones(5, 2)]
    rest = [None, *lora, 1.0, 0.0, None, None, None]
    found = torch.ops.peftkern.qlora_linear(x, [weight], [1, *weight.shape, 0, 0], *rest)
    with FakeTensorMode(allow_non_fake_inputs=True):
        told = torch.ops.peftkern.qlora_linear(x, [weight], [1, *weight.shape, 0, 0], *rest)
    assert [t.shape for t in told] == [t.shape for t in found]


def test_a_seed_is_not_copied_from_the_host():
    """That would wait for the device, and no CUDA graph could hold it."""
    x, weight, _, lora_a, lora_b = sample(8, 32, 5, 2)

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            assert func._opname not in {"lift_fresh", "copy_", "_to_copy"}
            return func(*args, **(kwargs or {}))

    with Copies():
        found = qlora.linear(x, weight, None, lora_a, lora_b, 1.0, 0.5, -(2**63))
    assert_as_good(
        found, reference.linear, x, weight.dequantize(), None, lora_a, lora_b, 1.0, 0.5,
        torch.tensor([-(2**63)]),
    )  # fmt: skip


@pytest.mark.parametrize(("format", "p"), [(f, 0.0) for f in FORMATS] + [("nf4", 0.5), (None, 0.5)])
def test_it_compiles_to_one_graph(format, p):
    x, weight, bias, lora_a, lora_b = sample(8, 32, 5, 2, format=format or "nf4")
    base = weight if format else weight.dequantize()
    leaves = [t.requires_grad_() for t in (x, bias, lora_a, lora_b)]

    def run(x, bias, lora_a, lora_b):
        return qlora.linear(x, base, bias, lora_a, lora_b, 0.5, p, 13)

    compiled = torch.compile(run, fullgraph=True)
    grad = torch.randn(5, 8)
    found, wanted = compiled(*leaves), run(*leaves)
    assert torch.equal(found, wanted)
    for a, b in zip(
        torch.autograd.grad(found, leaves, grad),
        torch.autograd.grad(wanted, leaves, grad),
        strict=True,
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_experts_and_dequantize_compile_to_one_graph(format):
    x, weight, bias, lora_a, lora_b = sample(8, 32, 5, 2, experts=2, format=format)
    offsets = torch.tensor([0, 2, 5])

    def run(x):
        return qlora.expert_linear(x, weight, offsets, bias, lora_a, lora_b), weight.dequantize()

    for found, wanted in zip(torch.compile(run, fullgraph=True)(x), run(x), strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"merge_aware": True}])
def test_no_graph_holds_a_reference_that_inductor_cannot_compile(options, monkeypatch):
    """Its last block, not a full one, would be garbage: `reference` tells of it."""
    for name in ("unnest", "dequantize"):
        monkeypatch.setattr(reference, name, untraced(getattr(reference, name)))
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(lambda t: reference.dequantize(t, t, t, (1,), 1), fullgraph=True)(
            torch.ones(1)
        )
    # 5 blocks of 64 are no full block of 256 scales, and their last one is not full.
    linear = nn.Linear(30, 10)
    layer = QLoRALinear.from_linear(linear, r=4, base="nf4", **options)
    nn.init.normal_(layer.lora_B, std=0.1)
    x = torch.randn(3, 30)

    def run(x):
        return layer(x), layer.quantized_weight.dequantize()

    for found, wanted in zip(torch.compile(run, fullgraph=True)(x), run(x), strict=True):
        torch.testing.assert_close(found, wanted)


def untraced(function):
    def run(*args):
        if torch.compiler.is_compiling():
            torch._dynamo.graph_break(msg=f"{function.__name__} is in a graph")
        return function(*args)

    return run


def outputs(inputs, dtype, threads, format="nf4"):
    """y, the gradients of bias, lora_a, lora_b and x, and the dense weight."""
    x, weight, bias, lora_a, lora_b = sample(300, 576, inputs, 16, dtype, format=format)
    leaves = [t.requires_grad_() for t in (bias, lora_a, lora_b, x)]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        y = qlora.linear(x, weight, bias, lora_a, lora_b, 0.5, 0.25, 3)
        return [y, *torch.autograd.grad(y, leaves, torch.ones_like(y)), weight.dequantize()]
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("inputs", [1, 3, 16, 17, 130])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_threads_do_not_change_bits(isa, inputs, dtype, format):
    """Of our kernels. The library may split its sums: y of many rows, the gradient of x."""
    once = outputs(inputs, dtype, 1, format)
    for threads in (2, 3, 1):
        again = outputs(inputs, dtype, threads, format)
        for i, (a, b) in enumerate(zip(once, again, strict=True)):
            if (i == 0 and inputs > 16) or i == 4:
                torch.testing.assert_close(a, b)
            else:
                assert torch.equal(a, b)


@pytest.mark.parametrize("inputs", [1, 17, 130])
def test_two_runs_give_the_same_bits(isa, inputs):
    for threads in (1, 2):
        first, second = (outputs(inputs, torch.float32, threads) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("format", FORMATS)
def test_how_rows_are_split_changes_roundings_at_most(isa, format):
    """Past a number of rows another kernel takes over; within one not a bit changes (test.cpp)."""
    x, weight, *_ = sample(40, 128, 70, 2, format=format)
    dense = weight.dequantize()
    for cut in (1, 2, 3, 5, 33, 64, 69):
        parts = torch.cat([qlora.linear(x[:cut], weight), qlora.linear(x[cut:], weight)])
        assert_as_good(parts, reference.linear, x, dense)


# Is it cheap to call?


class Count(TorchDispatchMode):
    """Calls that reach torch's dispatcher."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls.append(func)
        return func(*args, **(kwargs or {}))


def calls_of_a_step(layer, x):
    layer.train()
    layer(x).sum().backward()  # so that gradients are there to add to
    with Count() as count:
        layer(x).backward(torch.ones(len(x), 64))
    return len(count.calls)


def test_a_step_is_a_third_of_the_calls_of_peft_and_bitsandbytes():
    bnb, peft = pytest.importorskip("bitsandbytes"), pytest.importorskip("peft")
    linear = nn.Linear(64, 64, bias=False)
    quantized = bnb.nn.Linear4bit(64, 64, bias=False, quant_type="nf4")
    quantized.weight = bnb.nn.Params4bit(linear.weight.data, False, quant_type="nf4")
    model = nn.Sequential(quantized.to("cpu"))
    model.is_loaded_in_4bit = True
    config = peft.LoraConfig(r=4, target_modules=["0"], lora_dropout=0.1)
    theirs = peft.get_peft_model(model, config).base_model.model[0]
    ours = QLoRALinear.from_linear(linear, r=4, base="nf4", lora_dropout=0.1)
    x = torch.randn(8, 64, requires_grad=True)
    assert 3 * calls_of_a_step(ours, x) <= calls_of_a_step(theirs, x)
