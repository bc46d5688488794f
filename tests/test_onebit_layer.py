"""1-bit adapters in models: at their places, as published, in one op each."""

import copy
import io
import math
from importlib import import_module

import pytest
import torch
from distributed import in_processes
from onebits import Block, Branch, Ops, blocks, config, pairs, trained, trained_in_shards
from torch import nn
from torch.utils.checkpoint import checkpoint

import peftkern
from peftkern import OneBitConfig, onebit, qlora
from peftkern.onebit import reference
from peftkern.onebit.blocks import KNOWN

PLACEMENTS = ("lora", "adaptformer")


@pytest.fixture(params=PLACEMENTS)
def placement(request):
    return request.param


def adapted(placement, **options):
    """Two models of the same weights: with our adapters, and with the published ones."""
    model = blocks()
    peftkern.adapt(model, config(placement, **options))
    theirs = blocks().requires_grad_(False)
    for name, module in model.named_modules():
        if isinstance(module, onebit.OneBitAdapter):
            theirs.get_submodule(name.removesuffix(".adapter")).branch = Branch(module)
        elif isinstance(module, onebit.OneBitLinear):
            parent, _, child = name.rpartition(".")
            linear = theirs.get_submodule(name)
            setattr(theirs.get_submodule(parent), child, Beside(linear, Branch(module)))
    return model, theirs


class Beside(nn.Module):
    def __init__(self, linear, branch):
        super().__init__()
        self.linear, self.branch = linear, branch

    def forward(self, x):
        return self.linear(x) + self.branch(x)


def latents(model):
    return [p for p in model.parameters() if p.requires_grad]


def x_of(width=16, *, rows=5, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, rows, width, generator=generator).to(dtype)


# Does the layer drop in?


@pytest.mark.parametrize("bits", reference.BITS)
def test_a_model_computes_what_the_published_one_does(placement, bits):
    model, theirs = adapted(placement, bits=bits)
    x = x_of()
    y, wanted = model(x), theirs(x)
    torch.testing.assert_close(y, wanted, rtol=1e-5, atol=1e-6)
    for output in (y, wanted):
        output.square().sum().backward()
    ours, published = latents(model), latents(theirs)
    assert len(ours) == len(published) == 2 * len(pairs(model)) > 0
    for one, other in zip(ours, published, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-6)


def test_fifty_steps_are_those_of_the_published_module(placement):
    model, theirs = adapted(placement)
    curves = []
    for one in (model, theirs):
        optimizer = torch.optim.AdamW(latents(one), lr=1e-2)
        curves.append([])
        for _ in range(50):
            loss = (one(x_of()) - 1).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            curves[-1].append(loss.item())
    assert curves[0][-1] < 0.7 * curves[0][0]
    assert max(abs(a - b) for a, b in zip(*curves, strict=True)) < 1e-3


def test_the_start_is_the_published_one_and_not_the_identity():
    torch.manual_seed(0)
    layer = onebit.OneBitAdapter(768, r=64)
    edge = 1 / math.sqrt(768)
    down, up = layer.down.detach(), layer.up.detach()
    assert down.abs().max() <= edge and down.std() == pytest.approx(0.0208, rel=0.02)
    assert up.abs().max() <= 2e-3 and up.std() == pytest.approx(8.8e-4, rel=0.02)
    y = layer(x_of(768))
    assert 0 < y.abs().max() < 0.1
    _, up = layer.dense()
    assert up.unique().numel() == 2 and up.abs().mean() == pytest.approx(5.9e-4, rel=0.03)


def test_the_branch_reads_the_stream_and_no_drop_path_touches_it():
    model = blocks(1)
    peftkern.adapt(model, config("adaptformer"))
    block = model[0].train()
    block.drop_path.p = 1.0  # nothing but the stream and the branch is left
    x = x_of()
    torch.testing.assert_close(block(x), x + Branch(block.adapter)(x))


def test_dropout_is_drawn_between_the_two_and_in_training_alone():
    layer = onebit.OneBitAdapter(16, r=32, dropout=0.5)
    x = x_of()
    torch.manual_seed(0)
    dropped = layer(x, x)
    torch.manual_seed(0)
    assert torch.equal(layer(x, x), dropped)
    assert not torch.equal(layer(x, x), dropped)
    plain = layer.eval()(x, x)
    torch.testing.assert_close(plain, x + Branch(layer)(x))
    layer.train().dropout = 1.0
    assert torch.equal(layer(x, x), x)


def of_transformers(module, name):
    """A block of the smallest model, and its width."""
    library = import_module(f"transformers.models.{module}.modeling_{module}")
    configs = [c for n, c in vars(library).items() if n.endswith("Config") and "Vision" in n]
    configs = configs or [c for n, c in vars(library).items() if n.endswith("Config")]
    configs = [c for c in configs if getattr(c, "model_type", "").startswith(module[:4])] or configs
    small = configs[0](hidden_size=16, intermediate_size=24, num_attention_heads=2)
    small._attn_implementation = "eager"
    return getattr(library, name)(small), 16


@pytest.mark.parametrize("path", [p for p in KNOWN if p.startswith("transformers")])
def test_every_known_block_of_transformers_gets_its_branch(path):
    module, name = path.split(".")[2], path.rpartition(".")[2]
    torch.manual_seed(0)
    block, width = of_transformers(module, name)
    angles = (torch.ones(5, width // 2), torch.zeros(5, width // 2))
    options = {"DINOv3ViTLayer": {"position_embeddings": angles}}
    masked = ("CLIPEncoderLayer", "SiglipEncoderLayer", "Siglip2EncoderLayer")
    options |= dict.fromkeys(masked, {"attention_mask": None})
    check_block(block, width, **options.get(name, {}))


@pytest.mark.parametrize("path", [p for p in KNOWN if p.startswith("timm")])
def test_every_known_block_of_timm_gets_its_branch(path, timm):
    module, _, name = path.rpartition(".")
    torch.manual_seed(0)
    block = getattr(import_module(module), name)(16, num_heads=2)
    check_block(block, 16)


def test_a_timm_model_trains_its_adapters(timm):
    model = timm.models.vision_transformer.VisionTransformer(
        img_size=8, patch_size=4, embed_dim=16, depth=2, num_heads=2, num_classes=3,
        drop_path_rate=0.5,
    )  # fmt: skip
    peftkern.adapt(model, OneBitConfig(r=4, scale=3.0, placement="adaptformer", dropout=0.1))
    assert [row.name for row in peftkern.report(model).rows] == [
        "blocks.0.adapter", "blocks.1.adapter",
    ]  # fmt: skip
    before = [p.detach().clone() for p in latents(model)]
    optimizer = torch.optim.AdamW(latents(model), lr=1e-2)
    for _ in range(2):
        model(torch.randn(4, 3, 8, 8)).square().sum().backward()
        optimizer.step()
    assert not any(torch.equal(p, b) for p, b in zip(latents(model), before, strict=True))


def check_block(block, width, **options):
    model = nn.Sequential(block).eval()
    streams = []
    x = x_of(width)
    with torch.no_grad():
        y = first(block(x, **options))
        peftkern.adapt(model, OneBitConfig(r=4, scale=3.0, placement="adaptformer"))
        model.eval()
        norm = block.get_submodule(block_norm(block))
        norm.register_forward_pre_hook(lambda module, args: streams.append(args[0]))
        branched = first(block(x, **options))
    (stream,) = streams
    assert not torch.equal(stream, x)  # attention has been added
    torch.testing.assert_close(branched, y + Branch(block.adapter)(stream), rtol=1e-5, atol=1e-6)


def first(output):
    return output if isinstance(output, torch.Tensor) else output[0]


def block_norm(block):
    return next(n for n in ("norm2", "layernorm_after", "layer_norm2") if hasattr(block, n))


# One op for the statistics of all


def test_statistics_are_one_op_a_step(placement):
    model, _ = adapted(placement)
    assert len(pairs(model)) > 1
    for _ in range(2):  # steps
        with Ops() as ops:
            model(x_of()).sum().backward()
        assert ops.count["onebit_statistics"] == 1
        assert ops.count["onebit_adapter"] == ops.count["onebit_adapter_bwd"] == len(pairs(model))


def test_both_placements_share_one_op():
    model = blocks()
    peftkern.adapt(model, config("lora"))
    peftkern.adapt(model, config("adaptformer"))
    with Ops() as ops:
        model(x_of())
    assert ops.count["onebit_statistics"] == 1
    assert ops.count["onebit_adapter"] == len(pairs(model)) == 9


def test_writes_that_torch_does_not_count_are_seen_in_the_next_step(placement):
    model, _ = adapted(placement)
    model(x_of())
    for latent in latents(model):
        latent.data.add_(torch.linspace(-1, 1, latent.numel()).view_as(latent))
    y = model(x_of())
    for layer in pairs(model):
        layer.statistics = None
    assert torch.equal(model(x_of()), y)


def test_a_layer_that_is_left_out_of_a_step_is_not_late():
    model, _ = adapted("adaptformer")
    model[0](x_of())  # makes the rows of the second block as well
    with torch.no_grad():
        for latent in latents(model):
            latent.mul_(-2).add_(0.01)
    y = model[1](x_of())
    model[1].adapter.statistics = None
    assert torch.equal(model[1](x_of()), y)


def test_checkpointing_and_statistics_agree(placement):
    model, _ = adapted(placement)
    model(x_of()).square().sum().backward()
    plain = [p.grad.clone() for p in latents(model)]
    model.zero_grad()
    x = x_of().requires_grad_()
    for block in model:
        x = checkpoint(block, x, use_reentrant=False)
    x.square().sum().backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(latents(model), plain, strict=True))


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_has_statistics_of_its_own(placement, how):
    model, _ = adapted(placement)
    y = model(x_of())
    if how == "deepcopy":
        twin = copy.deepcopy(model)
    else:
        file = io.BytesIO()
        torch.save(model, file)
        twin = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    ours = {layer.statistics for layer in pairs(twin)}
    assert len(ours) == 1 and ours.isdisjoint({layer.statistics for layer in pairs(model)})
    with torch.no_grad():
        for latent in latents(model):
            latent.neg_()
    with Ops() as ops:
        assert torch.equal(twin(x_of()), y)
    assert ops.count["onebit_statistics"] == 1


def test_it_compiles_whole(placement):
    model, _ = adapted(placement)
    y = model(x_of())
    y.square().sum().backward()
    wanted = [p.grad.clone() for p in latents(model)]
    model.zero_grad()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    found = compiled(x_of())
    found.square().sum().backward()
    torch.testing.assert_close(found, y)
    for latent, grad in zip(latents(model), wanted, strict=True):
        torch.testing.assert_close(latent.grad, grad)


# Eval on the bits


@pytest.mark.parametrize("bits", reference.BITS)
def test_eval_is_on_the_bits_and_what_training_computes(placement, bits):
    model, _ = adapted(placement, bits=bits)
    y = model(x_of())
    with torch.no_grad(), Ops() as ops:
        found = model.eval()(x_of())
    torch.testing.assert_close(found, y, rtol=1e-5, atol=1e-6)
    assert ops.count["onebit_linear"] == 2 * len(pairs(model)) and not ops.count["onebit_adapter"]
    with torch.no_grad(), Ops() as ops:
        model(x_of())
    assert not ops.count["onebit_encode"] and not ops.count["onebit_statistics"]


def test_eval_with_a_gradient_gives_the_latents_theirs(placement):
    model, _ = adapted(placement)
    model.eval()(x_of()).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in latents(model))


def test_frozen_bits_let_a_gradient_through(placement):
    model, _ = adapted(placement)
    grads = []
    for frozen in (False, True):
        if frozen:
            model.eval().requires_grad_(False)
        x = x_of().requires_grad_()
        with Ops() as ops:
            model(x).square().sum().backward()
        assert bool(ops.count["onebit_linear"]) == frozen
        grads.append(x.grad)
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", ["step", "in place", "load_state_dict", "data, a call between"])
def test_bits_are_dropped_when_a_latent_changes(placement, how):
    model, _ = adapted(placement)
    state = {name: -value for name, value in model.state_dict().items()}
    with torch.no_grad():
        model.eval()(x_of())
    if how == "step":
        model(x_of()).sum().backward()
        torch.optim.SGD(latents(model), lr=100.0).step()
    elif how == "in place":
        with torch.no_grad():
            for latent in latents(model):
                latent.neg_()
    elif how == "load_state_dict":
        model.load_state_dict(state)
    else:
        model.train()(x_of())
        for latent in latents(model):
            latent.data.neg_()
        model.eval()
    with torch.no_grad():
        found = model(x_of())
    torch.testing.assert_close(found, model(x_of()).detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_16_bit_model_keeps_float32_latents(placement, dtype):
    model = blocks().to(dtype)
    peftkern.adapt(model, config(placement))
    assert {p.dtype for p in latents(model)} == {torch.float32}
    y = model(x_of(dtype=dtype))
    assert y.dtype == dtype
    with torch.no_grad():
        found = model.eval()(x_of(dtype=dtype))
    assert found.dtype == dtype
    torch.testing.assert_close(found, y, rtol=2e-2, atol=2e-2)
    model.to(dtype)
    with pytest.raises(TypeError, match="down must be float32, in which small steps add up"):
        model(x_of(dtype=dtype))


def test_autocast_casts_x_alone(placement):
    model, _ = adapted(placement)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x_of())
        with torch.no_grad():
            found = model.eval()(x_of())
    assert y.dtype == found.dtype
    torch.testing.assert_close(found, y, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(y.float(), model(x_of()), rtol=5e-2, atol=5e-2)


# Bases, and merging


@pytest.mark.parametrize("base", ["nf4", "int8"])
def test_a_quantised_base_stays_in_its_bits(base):
    torch.manual_seed(0)
    linear = nn.Linear(64, 32)
    layer = onebit.OneBitLinear.from_linear(linear, r=4, base=base)
    assert layer.quantized_weight.format.name == base
    x = x_of(64)
    wanted = qlora.linear(x, layer.quantized_weight, layer.bias) + Branch(layer)(x)
    torch.testing.assert_close(layer(x), wanted, rtol=1e-5, atol=1e-6)
    assert [n for n, p in layer.named_parameters() if p.requires_grad] == ["down", "up"]


@pytest.mark.parametrize("bits", reference.BITS)
def test_what_is_merged_is_what_the_kernels_use(bits):
    model, _ = adapted("lora", bits=bits, scale=100.0)
    layer, before = model[0].mix, model[0].mix.weight
    y = model(x_of())
    down, up = (
        onebit.dequantize(onebit.quantize(w.detach(), bits)) for w in (layer.down, layer.up)
    )
    peftkern.merge(model)
    torch.testing.assert_close(layer.weight, before + 100 * (up @ down), rtol=0, atol=1e-6)
    assert not torch.equal(layer.weight, before)
    torch.testing.assert_close(model.eval()(x_of()), y.detach(), rtol=1e-4, atol=1e-5)
    assert model.state_dict().keys() == blocks().state_dict().keys()
    peftkern.unmerge(model)
    assert layer.weight is before
    torch.testing.assert_close(model.train()(x_of()), y)


def test_a_quantised_base_is_merged_where_one_says_into_what():
    model = nn.Sequential(nn.Linear(64, 64))
    peftkern.adapt(model, OneBitConfig(r=4, scale=100.0, base="nf4"))
    y, packed = model(x_of(64)), model[0].weight
    with pytest.raises(ValueError, match="0 must have a float base to merge into, got nf4"):
        peftkern.merge(model)
    peftkern.merge(model.eval(), dtype=torch.float32)
    torch.testing.assert_close(model(x_of(64)), y.detach(), rtol=1e-4, atol=1e-4)
    peftkern.unmerge(model)
    assert model[0].weight is packed


def test_an_adaptformer_is_not_merged_and_says_why():
    model, _ = adapted("adaptformer")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    reason = "its relu is not linear, and it reads what no weight of the model reads"
    with pytest.raises(ValueError, match=f"0.adapter must .*: {reason}"):
        peftkern.merge(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert {row.mergeable for row in peftkern.report(model).rows} == {f"no: {reason}"}


def test_a_merged_layer_refuses_to_train():
    model, _ = adapted("lora")
    peftkern.merge(model)
    with pytest.raises(RuntimeError, match="must be unmerged to train"):
        model.train()(x_of())


# Does it refuse?


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"r": 0}, ValueError, "r must be at least 1, got 0"),
        ({"bits": 3}, ValueError, "bits must be 1, 2 or 4, got 3"),
        ({"scale": math.nan}, ValueError, "scale must be a finite number, got nan"),
        ({"dropout": 1.5}, ValueError, "dropout must be between 0 and 1, got 1.5"),
        ({"placement": "prefix"}, ValueError, "placement must be 'lora' or 'adaptformer', got"),
        ({"blocks": {"Block": "norm"}}, ValueError, "blocks must be left out for 'lora', got"),
        ({"base": "nf5"}, ValueError, "nf5"),
        ({"base": "nf4", "block_size": 3}, ValueError, "block_size must be one of"),
        ({"target_modules": "("}, ValueError, "must be a regular expression"),
        (
            {"placement": "adaptformer", "base": "nf4"},
            ValueError,
            "base must be None for 'adaptformer', which touches no linear, got 'nf4'",
        ),
    ],
)
def test_a_config_refuses(options, error, message):
    with pytest.raises(error, match=message):
        OneBitConfig(**options)


def test_an_unknown_block_is_refused_by_name():
    model = blocks()
    with pytest.raises(ValueError, match="must find blocks of vision transformers.*of Block, "):
        peftkern.adapt(model, OneBitConfig(placement="adaptformer"))
    with pytest.raises(ValueError, match=r"0: Block is no known block; blocks=\{'Block': …\}"):
        peftkern.adapt(model, OneBitConfig(placement="adaptformer", target_modules=["0"]))
    with pytest.raises(ValueError, match="0: Block has no norm with a weight named norm3"):
        peftkern.adapt(model, config("adaptformer", blocks={"Block": "norm3"}))
    assert not peftkern.report(model).rows and type(model[0]) is Block


def test_blocks_are_chosen_by_name():
    model = blocks()
    peftkern.adapt(model, config("adaptformer", target_modules=["1"]))
    assert [row.name for row in peftkern.report(model).rows] == ["1.adapter"]


def test_shards_are_refused_with_the_reason():
    layer = onebit.OneBitAdapter(16)
    layer.down.device_mesh = object()  # what tells a DTensor from a whole one
    with pytest.raises(ValueError, match="must be whole, for their bits hang on the mean and the"):
        layer(x_of())


@pytest.mark.parametrize("units", [False, True], ids=["one unit", "a unit a block"])
def test_shards_train_and_are_saved_as_what_is_whole(placement, units, tmp_path):
    wanted = trained(placement, tmp_path / "alone")
    found = in_processes(
        2, trained_in_shards, tmp_path / "runs", placement, units, tmp_path / "two"
    )
    for y in found:
        torch.testing.assert_close(y, wanted, rtol=1e-5, atol=1e-5)
    both = [peftkern.load_adapter(blocks(), tmp_path / name) for name in ("alone", "two")]
    torch.testing.assert_close(*(m.eval()(x_of()) for m in both), rtol=1e-5, atol=1e-5)
    sizes = {(tmp_path / f"{name}.bin").stat().st_size for name in ("alone", "two")}
    assert len(sizes) == 1


def test_a_report_and_explain_know_them(placement):
    model, _ = adapted(placement)
    row = peftkern.report(model).rows[0]
    assert row.vllm == "no: onebit" and row.layer in ("OneBitLinear", "OneBitAdapter")
    text = peftkern.explain(pairs(model)[0])
    assert "16 to 4 to 16 in 1 bit on cpu" in text and "onebit_adapter_bwd" in text
