"""DoRA: peft's numbers without peft's dense weight, and rows that have nothing to divide by."""

import copy

import bitsandbytes as bnb
import peft
import pytest
import torch
from close import assert_as_good
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from peftkern.qlora import LoraConfig, QLoRALinear, dora, reference

BASES = (None, "nf4")
TRAINED = ("lora_A", "lora_B", "lora_magnitude_vector")


def make(rows=24, columns=64, base=None, bias=True, dtype=torch.float32, **options):
    """As after some training."""
    torch.manual_seed(0)
    linear = nn.Linear(columns, rows, bias=bias, dtype=dtype)
    options = {"r": 4, "base": base, "use_dora": True} | options
    return disturb(QLoRALinear.from_linear(linear, **options))


def disturb(layer):
    nn.init.normal_(layer.lora_B, std=0.1)
    with torch.no_grad():
        layer.lora_magnitude_vector.mul_(torch.linspace(0.5, 2, layer.out_features))
    return layer


def dense(layer):
    weight = layer.quantized_weight
    return layer.weight.detach() if weight is None else weight.dequantize(torch.float32)


def expected(layer, x, weight, a, b, magnitude, bias=None, seed=None):
    """The equation, with W + c B A in full."""
    low_rank = reference.dropout(x, layer.lora_dropout * layer.training, seed) @ a.t() @ b.t()
    norm = torch.linalg.vector_norm(weight + layer.scaling * (b @ a), dim=1).detach()
    y = magnitude / norm * (x @ weight.t() + layer.scaling * low_rank)
    return y if bias is None else y + bias


def arguments(layer):
    return (dense(layer), layer.lora_A, layer.lora_B, layer.lora_magnitude_vector, layer.bias)


def detached(layer):
    return [None if t is None else t.detach() for t in arguments(layer)]


@pytest.mark.parametrize("base", BASES)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 130),
    inputs=st.integers(0, 5),
    r=st.integers(1, 9),
    bias=st.booleans(),
)
def test_the_output_is_the_equation(isa, base, rows, columns, inputs, r, bias):
    layer = make(rows, columns, base, bias, r=r)
    x = torch.randn(inputs, columns)
    assert_as_good(
        layer(x).detach(), lambda *tensors: expected(layer, *tensors), x, *detached(layer)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_inputs_are_rounded_once_more_than_the_plain_product(dtype):
    layer = make(dtype=dtype)
    x = torch.randn(5, 64).to(dtype)
    truth = expected(layer, x.double(), *(t.double() for t in detached(layer)))
    y = layer(x)
    assert y.dtype == dtype
    floor = 4 * torch.finfo(dtype).eps * truth.abs().max()  # a handful of roundings
    assert (y.double() - truth).abs().max() <= floor


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("base", BASES)
def test_gradients_are_those_of_the_equation(base, dropout, monkeypatch):
    layer = make(base=base, lora_dropout=dropout, bias=True)
    seed = torch.tensor([7])
    monkeypatch.setattr("peftkern.qlora.ops._seed", lambda *args: seed)
    x = torch.randn(5, 64, requires_grad=True)
    layer.bias.requires_grad_()
    inputs = [x, layer.lora_A, layer.lora_B, layer.lora_magnitude_vector, layer.bias]
    ours = torch.autograd.grad(layer(x).square().sum(), inputs)
    whole = expected(layer, x, *arguments(layer), seed)
    theirs = torch.autograd.grad(whole.square().sum(), inputs)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-4)


def with_peft(linear, **options):
    """peft's layer around the linear and ours beside it, with equal parameters."""
    model = nn.Sequential(linear)
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["0"], use_dora=True, **options)
    model.is_loaded_in_4bit = isinstance(linear, bnb.nn.Linear4bit)
    theirs = peft.get_peft_model(model, config).base_model.model[0]
    ours = QLoRALinear.from_linear(linear, r=4, lora_alpha=6, use_dora=True)
    modules = (theirs.lora_A, theirs.lora_B, theirs.lora_magnitude_vector)
    parameters = [module["default"].weight for module in modules]
    torch.testing.assert_close(ours.lora_magnitude_vector, parameters[2])
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in zip(TRAINED, parameters, strict=True):
            values = torch.rand(parameter.shape, generator=generator)
            parameter.copy_(values)
            getattr(ours, name).copy_(values)
    return theirs, parameters, ours, [getattr(ours, name) for name in TRAINED]


def assert_as_in_peft(linear, dtype, tolerance):
    theirs, parameters, ours, own = with_peft(linear)
    results = []
    for layer, trained in ((theirs, parameters), (ours, own)):
        x = torch.linspace(-1, 1, 5 * 64, dtype=dtype).view(5, 64).requires_grad_()
        y = layer(x)
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, *trained])])
    for their, mine in zip(*results, strict=True):
        torch.testing.assert_close(mine, their, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("bias", [False, True])
def test_output_and_gradients_are_those_of_peft(bias):
    assert_as_in_peft(nn.Linear(64, 48, bias, dtype=torch.float64), torch.float64, 1e-12)


def test_on_the_base_of_bitsandbytes_too():
    linear = bnb.nn.Linear4bit(64, 48, quant_type="nf4").to("cpu")
    assert_as_in_peft(linear, torch.float32, 1e-5)


@pytest.mark.parametrize("size", [1e-12, 1e-4, 1.0, 1e4, 1e12])
def test_norms_are_right_at_any_size_of_b(size):
    layer = make(rows=48)
    with torch.no_grad():
        layer.lora_B.mul_(size)
    whole = dense(layer).double() + layer.scaling * (layer.lora_B.double() @ layer.lora_A.double())
    expected = torch.linalg.vector_norm(whole, dim=1).float()
    torch.testing.assert_close(layer.row_norms(), expected, rtol=1e-5, atol=0)


def test_a_row_that_cancels_stays_finite_and_trains():
    layer = make(rows=4, columns=64, r=4)
    with torch.no_grad():  # W + c B A = 0 but for rounding
        layer.lora_A.copy_(torch.randn(4, 64))
        layer.lora_B.copy_(torch.eye(4))
        layer.weight.copy_(-layer.scaling * layer.lora_A)
    norms, size = layer.row_norms(), layer.weight.norm(dim=1)
    assert (norms < 2e-3 * size).all() and (norms > 5e-4 * size).all()
    x = torch.randn(3, 64, requires_grad=True)
    layer(x).square().sum().backward()
    for tensor in (x, layer.lora_A, layer.lora_B, layer.lora_magnitude_vector):
        assert torch.isfinite(tensor.grad).all()


@pytest.mark.parametrize("base", BASES)
def test_a_row_of_zeros_stays_zero(base):
    linear = nn.Linear(64, 24)
    with torch.no_grad():
        linear.weight[3] = 0
    layer = QLoRALinear.from_linear(linear, r=4, base=base, use_dora=True)
    x = torch.randn(3, 64, requires_grad=True)
    y = layer(x)
    assert torch.equal(y[:, 3], linear.bias[3].expand(3))
    y.square().sum().backward()
    for tensor in (x, layer.lora_A, layer.lora_B, layer.lora_magnitude_vector):
        assert torch.isfinite(tensor.grad).all()
    assert layer.lora_magnitude_vector.grad[3] == 0 and not layer.lora_B.grad[3].any()


@pytest.mark.parametrize("base", BASES)
def test_a_new_adapter_changes_nothing(base):
    linear = nn.Linear(64, 24)
    plain = QLoRALinear.from_linear(linear, base=base)
    layer = QLoRALinear.from_linear(linear, base=base, use_dora=True)
    x = torch.randn(3, 64)
    torch.testing.assert_close(layer(x), plain(x))
    assert {n for n, p in layer.named_parameters() if p.requires_grad} == set(TRAINED)


def test_a_change_of_the_weight_or_of_a_and_b_is_noticed():
    layer, x = make().eval(), torch.randn(3, 64)

    def fresh():
        return expected(layer, x, *detached(layer))

    def change(tensor):
        with torch.no_grad():
            tensor.mul_(-1.5)

    def optimiser_of_c():
        """Writes past torch's counters, after a forward that has a gradient."""
        layer(x).sum().backward()
        layer.lora_B.data.mul_(2)

    def other_weight():
        layer.weight = nn.Parameter(torch.randn(24, 64), requires_grad=False)

    changes = [
        lambda: None,
        lambda: change(layer.lora_A),
        lambda: change(layer.lora_B),
        lambda: change(layer.weight),
        lambda: layer.rescale(LoraConfig(lora_alpha=100)),
        optimiser_of_c,
        other_weight,
        lambda: layer.load_state_dict(make(lora_alpha=8).state_dict()),
        lambda: layer.double().float(),
    ]
    for step in changes:
        step()
        for _ in range(2):
            with torch.no_grad():
                torch.testing.assert_close(layer(x), fresh())
        torch.testing.assert_close(layer(x), fresh())


def test_generation_computes_the_norms_once(monkeypatch):
    layer, calls = make().eval(), []
    norms = dora.norms
    monkeypatch.setattr(dora, "norms", lambda *args: calls.append(1) or norms(*args))
    with torch.inference_mode():
        for _ in range(3):
            layer(torch.randn(1, 64))
    assert len(calls) == 1
    layer(torch.randn(1, 64)).sum().backward()
    assert len(calls) == 2


@pytest.mark.parametrize("base", BASES)
def test_the_squares_of_the_base_are_computed_once(base, monkeypatch):
    calls, squares = [], dora.squares
    monkeypatch.setattr(dora, "squares", lambda weight: calls.append(1) or squares(weight))
    layer = make(base=base)
    for _ in range(3):
        layer(torch.randn(2, 64)).sum().backward()
    assert len(calls) == 1
    assert not any("norm" in key or "square" in key for key in layer.state_dict())


@pytest.mark.parametrize("base", BASES)
def test_no_dense_weight_is_made_or_kept(base):
    """Neither W + c B A nor an identity: the largest fresh tensor is of the output's size."""
    layer, sizes = make(rows=96, columns=128, base=base), []
    layer(torch.randn(2, 128))  # the squares are there

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            known = {t.data_ptr() for t in layer.parameters()}
            for tensor in torch.utils._pytree.tree_leaves(result):
                if isinstance(tensor, torch.Tensor) and tensor.data_ptr() not in known:
                    sizes.append(tensor.numel())
            return result

    with Sizes():
        layer(torch.randn(2, 128)).sum().backward()
    assert max(sizes) <= 4 * 128 + 4 * 96  # A and B are larger than the outputs here


def test_saved_for_backward_is_the_product_and_little_else():
    layer = make(bias=True)
    x = torch.randn(20, 64, requires_grad=True)
    known = {t.untyped_storage().data_ptr() for t in (x, *layer.parameters())}
    new = {}

    def count(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            new[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(count, lambda tensor: tensor):
        layer(x)
    product, down, gains = 20 * 24 * 4, 20 * layer.r * 4, 2 * 24 * 4  # m / n and 1 / n
    assert sum(new.values()) == product + down + gains


@pytest.mark.parametrize("backend", ["inductor", "aot_eager"])
@pytest.mark.parametrize("base", BASES)
def test_the_layer_compiles_whole(base, backend):
    layer = make(base=base)
    x = torch.randn(6, 64, requires_grad=True)
    inputs = [x, *(getattr(layer, name) for name in TRAINED)]
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    for _ in range(2):
        results = []
        for run in (layer, compiled):
            y = run(x)
            results.append([y, *torch.autograd.grad(y.square().sum(), inputs)])
        for eager, whole in zip(*results, strict=True):
            torch.testing.assert_close(whole, eager)
        with torch.no_grad():
            layer.lora_B.mul_(3)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_dropout_repeats_itself(reentrant):
    layer = make(lora_dropout=0.5)

    def step(run):
        torch.manual_seed(7)
        x = torch.linspace(-1, 1, 20 * 64).view(20, 64).requires_grad_()
        layer.zero_grad()
        run(x).square().sum().backward()
        return x.grad, *(getattr(layer, name).grad for name in TRAINED)

    replayed = step(lambda x: checkpoint(layer, x, use_reentrant=reentrant))
    assert all(map(torch.equal, replayed, step(layer)))


@pytest.mark.parametrize("base", BASES)
def test_autocast_computes_in_its_dtype_and_norms_in_float32(base):
    layer = make(base=base)
    x = torch.randn(3, 64, requires_grad=True)
    norms = layer.row_norms()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        assert torch.equal(layer.row_norms(), norms)
    assert y.dtype == torch.bfloat16 and torch.equal(y, layer(x.bfloat16()))
    y.float().square().sum().backward()
    assert {getattr(layer, name).grad.dtype for name in TRAINED} == {torch.float32}
    assert x.grad.dtype == torch.float32


def test_a_copy_lives_apart():
    layer = make(base="nf4").eval()
    x = torch.randn(3, 64)
    with torch.no_grad():
        before = layer(x)
        twin = copy.deepcopy(layer)
        assert torch.equal(twin(x), before)
        twin.weight.zero_()
        twin.lora_B.mul_(2)
        assert not torch.equal(twin(x), before) and torch.equal(layer(x), before)


def test_the_text_names_it():
    assert "dora=True" in repr(make())
