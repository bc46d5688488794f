"""How A and B start: exact at the first step on any base, and equal to peft's where peft has it."""

import pytest
import torch
from models import disturb, tokens, toy
from torch import nn

import peftkern
from peftkern import LoraConfig, QLoRALinear
from peftkern.qlora import dequantize, init, linear, quantize

BASES = (None, "nf4")
SPLITTING = ("pissa", "pissa_niter_4", "olora")


def product(layer):
    return layer.scaling * (layer.lora_B @ layer.lora_A).detach()


@pytest.mark.parametrize("r", [1, 3, 24])
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("how", SPLITTING)
@pytest.mark.parametrize("rows_of_x", [1, 7, 300])
def test_a_splitting_start_is_zero_to_the_last_bit(isa, rows_of_x, how, base, r):
    layer = QLoRALinear.from_linear(nn.Linear(64, 24), r=r, base=base, init_lora_weights=how)
    x = torch.randn(rows_of_x, 64)
    weight = layer.quantized_weight or layer.weight
    assert layer.lora_A.any() and layer.lora_B.any()
    assert torch.equal(layer(x), linear(x, weight, layer.bias))


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("how", SPLITTING)
def test_after_training_a_splitting_start_is_taken_off_again(how, base):
    layer = QLoRALinear.from_linear(nn.Linear(64, 24), r=4, base=base, init_lora_weights=how)
    start = product(layer)
    disturb(layer)
    x = torch.randn(5, 64, requires_grad=True)
    whole = layer.quantized_weight.dequantize(torch.float32) if base else layer.weight.clone()
    low_rank = layer.scaling * (layer.lora_B @ layer.lora_A) - start
    expected = x @ (whole + low_rank).t() + layer.bias
    inputs = [x, layer.lora_A, layer.lora_B]
    ours, theirs = (
        [y, *torch.autograd.grad(y.square().sum(), inputs, retain_graph=True)]
        for y in (layer(x), expected)
    )
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("rslora", [False, True])
def test_pissa_takes_the_largest_singular_values_of_the_weight_before_it_is_quantised(rslora, base):
    source = nn.Linear(64, 24)
    options = {"r": 4, "lora_alpha": 8, "use_rslora": rslora, "init_lora_weights": "pissa"}
    layer = QLoRALinear.from_linear(source, base=base, **options)
    u, s, v = torch.linalg.svd(source.weight.detach())
    torch.testing.assert_close(product(layer), u[:, :4] * s[:4] @ v[:4], rtol=1e-4, atol=1e-5)
    # A and B share the singular values.
    torch.testing.assert_close(layer.lora_A.norm(dim=1), layer.lora_B.norm(dim=0))


def test_pissa_by_iterations_comes_near():
    torch.manual_seed(0)
    source = nn.Linear(64, 48)
    with torch.no_grad():  # singular values that fall, as those of trained weights do
        u, s, v = torch.linalg.svd(source.weight, full_matrices=False)
        source.weight.copy_(u * 0.8 ** torch.arange(48) @ v)
    exact, fast = (
        product(QLoRALinear.from_linear(source, r=4, init_lora_weights=how))
        for how in ("pissa", "pissa_niter_16")
    )
    torch.testing.assert_close(fast, exact, rtol=0, atol=2e-2 * exact.abs().max().item())


@pytest.mark.parametrize("how", ["pissa", "olora"])
def test_the_start_is_that_of_peft(how, peft):
    source = nn.Linear(64, 24)
    ours = QLoRALinear.from_linear(source, r=4, lora_alpha=4, init_lora_weights=how)
    config = peft.LoraConfig(r=4, lora_alpha=4, target_modules=["0"], init_lora_weights=how)
    theirs = peft.get_peft_model(nn.Sequential(source), config).base_model.model[0]
    a, b = theirs.lora_A["default"].weight, theirs.lora_B["default"].weight
    torch.testing.assert_close(ours.lora_A, a)
    torch.testing.assert_close(ours.lora_B, b)


@pytest.mark.parametrize("how", ["pissa", "olora"])
def test_a_base_of_bitsandbytes_is_split_too(how, bnb):
    source = bnb.nn.Linear4bit(64, 24, quant_type="nf4").to("cpu")
    layer = QLoRALinear.from_linear(source, r=4, init_lora_weights=how)
    x = torch.randn(5, 64)
    assert torch.equal(layer(x), linear(x, layer.quantized_weight, source.bias))
    direct = QLoRALinear.from_linear(source, r=4, init_lora_weights=how)
    assert torch.equal(product(direct), product(layer)) and product(layer).any()


def test_loftq_makes_up_for_more_of_the_loss_with_every_round():
    torch.manual_seed(0)
    source = nn.Linear(128, 96)
    errors = []
    for rounds in (1, 5):
        layer = QLoRALinear.from_linear(
            source, r=16, lora_alpha=48, base="nf4", init_lora_weights=f"loftq_{rounds}"
        )
        weight = dequantize(layer.quantized_weight) + product(layer)
        errors.append((weight - source.weight).norm().item())
        assert layer.own_base == (rounds > 1)
    plain = (dequantize(quantize(source.weight)) - source.weight).norm().item()
    assert errors[1] < errors[0] < 0.9 * plain


def test_loftq_alternates_between_base_and_factors():
    torch.manual_seed(0)
    source, rest = nn.Linear(64, 48), 0
    weight = source.weight.detach()
    for _ in range(3):
        base = quantize(weight - rest, nested=True)
        u, s, v = torch.linalg.svd(weight - dequantize(base))
        rest = u[:, :4] * s[:4] @ v[:4]
    layer = QLoRALinear.from_linear(
        source, r=4, lora_alpha=12, base="nf4", init_lora_weights="loftq_3"
    )
    # Where a weight lies on the edge of a code, rounding decides.
    changed = dequantize(layer.quantized_weight) - dequantize(base)
    assert (changed.abs() > 1e-4).sum() <= 3
    torch.testing.assert_close(product(layer), rest, rtol=1e-2, atol=1e-3)


def test_one_round_of_loftq_leaves_the_quantised_base_as_it_is():
    source = nn.Linear(64, 24, dtype=torch.bfloat16)
    plain = quantize(source.weight, nested=True)
    layer = QLoRALinear.from_linear(source, r=4, base="nf4", init_lora_weights="loftq")
    weight = layer.quantized_weight
    assert all(map(torch.equal, weight.buffers, plain.buffers)) and weight.dtype == plain.dtype
    u, s, v = torch.linalg.svd(source.weight.detach().float() - dequantize(plain, torch.float32))
    torch.testing.assert_close(product(layer), u[:, :4] * s[:4] @ v[:4], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", ["orthogonal", "orthogonal_0", "orthogonal_3"])
def test_an_orthogonal_a_is_orthonormal_and_frozen(how):
    source = nn.Linear(64, 24)
    layer = QLoRALinear.from_linear(source, r=8, init_lora_weights=how)
    gram = layer.lora_A.double() @ layer.lora_A.double().t()
    torch.testing.assert_close(gram, torch.eye(8, dtype=torch.float64), rtol=0, atol=1e-6)
    x = torch.randn(3, 64, requires_grad=True)
    torch.testing.assert_close(layer(x), source(x))
    layer(x).sum().backward()
    assert layer.lora_A.grad is None and layer.lora_B.grad is not None
    assert {n for n, p in layer.named_parameters() if p.requires_grad} == {"lora_B"}


def test_rows_of_one_basis_are_orthonormal_in_float64_and_do_not_meet():
    blocks = [
        init._orthonormal_rows(LoraConfig(r=5, init_lora_weights=f"orthogonal_{i}"), 15)
        for i in range(3)
    ]
    basis = torch.cat(blocks)
    torch.testing.assert_close(
        basis @ basis.t(), torch.eye(15, dtype=torch.float64), rtol=0, atol=1e-12
    )


def test_merged_orthogonal_adapters_do_not_disturb_each_other():
    torch.manual_seed(0)
    source = nn.Linear(64, 24)
    layers = [
        QLoRALinear.from_linear(source, r=8, init_lora_weights=f"orthogonal_{i}") for i in range(8)
    ]
    for layer in layers:
        nn.init.normal_(layer.lora_B)
    x = torch.randn(5, 8) @ layers[3].lora_A.detach()  # in the span of A_3
    merged = nn.functional.linear(x, source.weight + sum(map(product, layers)), source.bias)
    torch.testing.assert_close(merged, layers[3](x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("how", "r"), [("pissa", 25), ("olora", 25), ("orthogonal", 65), ("orthogonal_8", 8)]
)
def test_a_rank_beyond_what_is_there_is_refused_and_left_out(how, r):
    with pytest.raises(ValueError, match=r"^init_lora_weights must fit .* needs \d+ dimensions"):
        QLoRALinear.from_linear(nn.Linear(64, 24), r=r, init_lora_weights=how)
    model = nn.ModuleList([nn.Linear(64, 24), nn.Linear(90, 80)])
    peftkern.adapt(model, LoraConfig(r=r, init_lora_weights=how))
    assert isinstance(model[1], QLoRALinear) and isinstance(model[0], nn.Linear)
    assert "dimensions, not" in peftkern.report(model).skipped[0].reason


def test_loftq_is_refused_on_what_is_quantised_already(bnb):
    source = bnb.nn.Linear4bit(64, 64, quant_type="nf4").to("cpu")
    config = LoraConfig(base="nf4", init_lora_weights="loftq")
    with pytest.raises(ValueError, match="must have a float weight, got nf4"):
        QLoRALinear.from_config(source, config)
    with pytest.raises(ValueError, match="LoftQ needs the float weight"):
        peftkern.adapt(nn.Sequential(source), config)


def test_loftq_leaves_a_tied_weight_and_its_adapter_plain():
    model = toy(tied=True)
    config = LoraConfig(base="nf4", init_lora_weights="loftq", target_modules=["lm_head", "q_proj"])
    expected = model.embed.weight.clone()
    peftkern.adapt(model, config)
    assert torch.equal(model.lm_head.weight, expected) and not model.lm_head.lora_B.any()
    assert model.layers[0].q_proj.lora_B.any()


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("how", ["pissa", "orthogonal"])
def test_a_strict_load_gives_the_same_layer(how, base):
    options = {"r": 4, "base": base, "init_lora_weights": how, "use_dora": True}
    layer = disturb(QLoRALinear.from_linear(nn.Linear(64, 24), **options))
    other = QLoRALinear.from_linear(nn.Linear(64, 24), **options)
    x = torch.randn(3, 64)
    result = other.load_state_dict(layer.state_dict(), strict=True)
    assert not result.missing_keys and not result.unexpected_keys
    assert torch.equal(other(x), layer(x))


def test_a_splitting_start_compiles_whole():
    layer = QLoRALinear.from_linear(nn.Linear(64, 24), r=4, base="nf4", init_lora_weights="pissa")
    disturb(layer)
    x = torch.randn(6, 64, requires_grad=True)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    inputs = [x, layer.lora_A, layer.lora_B]
    results = [
        [y := run(x), *torch.autograd.grad(y.square().sum(), inputs)] for run in (layer, compiled)
    ]
    for eager, whole in zip(*results, strict=True):
        torch.testing.assert_close(whole, eager)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rows_of_x", [1, 5, 300])
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("r", [1, 3, 64, 512])
def test_any_rank_is_right(isa, r, base, rows_of_x, dtype):
    source = nn.Linear(64, 24, dtype=dtype)
    layer = disturb(QLoRALinear.from_linear(source, r=r, base=base))
    weight = layer.quantized_weight.dequantize() if base else layer.weight
    tensors = [torch.randn(rows_of_x, 64), layer.lora_A, layer.lora_B]
    x, a, b = (t.detach().double().requires_grad_() for t in tensors)
    whole = weight.double() + layer.scaling * (b @ a)
    y = x @ whole.t() + layer.bias.double()
    truth = [y, *torch.autograd.grad(y.square().sum(), [x, a, b])]
    x = x.detach().to(dtype).requires_grad_()
    y = layer(x)
    ours = [y, *torch.autograd.grad(y.square().sum(), [x, layer.lora_A, layer.lora_B])]
    for mine, other in zip(ours, truth, strict=True):
        error = (mine.double() - other).abs().max() / other.abs().max()
        assert error <= 30 * torch.finfo(dtype).eps  # y, its square and one sum more


def test_the_loftq_of_peft_brings_its_base_along(peft):
    config = peft.LoraConfig(r=4, target_modules=["q_proj"])
    # Set behind peft's back: it wants scipy before it takes the words.
    config.init_lora_weights, config.loftq_config = "loftq", {"loftq_bits": 4, "loftq_iter": 2}
    layer = peftkern.adapt(toy(), config).layers[0].q_proj
    assert layer.quantized_weight.format.name == "nf4" and not layer.quantized_weight.nested
    assert layer.own_base and layer.lora_B.any()


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("how", SPLITTING)
def test_a_model_still_computes_the_same(how, base):
    plain = peftkern.adapt(toy(), LoraConfig(r=2, base=base))
    model = peftkern.adapt(toy(), LoraConfig(r=2, base=base, init_lora_weights=how))
    assert torch.equal(model(tokens()), plain(tokens()))
