"""Bottlenecks in models: where they go, that they start as nothing, and train."""

import copy

import bottleneck_models
import pytest
import torch
import transformers
from bottleneck_models import FAMILIES, Plain, build, reads
from close import assert_as_good
from models import assert_unchanged, disturb, reasons, snapshot
from torch import nn

import peftkern
from peftkern import BottleneckAdapter, BottleneckConfig, LoraConfig, QLoRALinear
from peftkern.bottleneck import Norm, reference


def adapted(model, **options):
    return peftkern.adapt(model, BottleneckConfig(r=4, **options))


def placed(model):
    return [name for name, m in model.named_modules() if isinstance(m, BottleneckAdapter)]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", ["parallel", "sequential"])
def test_each_sublayer_of_each_model_gets_one_and_computes_the_same_at_first(family, mode):
    model, call, names = build(family)
    model.requires_grad_(False)  # torch picks other kernels for attention that trains
    before = call(model)
    for place, chosen in (("attn", names[::2]), ("ffn", names[1::2]), ("both", names)):
        one = adapted(copy.deepcopy(model), mode=mode, place=place)
        assert placed(one) == [f"{name}.adapter" for name in chosen]
        assert torch.equal(call(one), before)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", ["parallel", "sequential"])
def test_each_sublayer_computes_the_equation(family, mode):
    """Its output is the plain one's, and the reference's branch of what its `Place` says."""
    model, call, names = build(family)
    disturb(adapted(model, mode=mode, place="both"))
    for name in names:
        seen = reads(model, name, call)
        adapter = model.get_submodule(name).adapter
        x = seen.x if mode == "parallel" else seen.plain
        factors = (adapter.down, adapter.up, adapter.bias_down, adapter.bias_up)

        def equation(x, plain, *factors):
            return reference.linear(x, *factors, residual=plain)

        with torch.no_grad():
            assert_as_good(seen.y, equation, x, seen.plain, *factors)
        assert not torch.equal(seen.y, seen.plain)


@pytest.mark.parametrize("family", ["llama", "bert", "whisper", "vit", "gpt2", "bloom"])
@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(mode="sequential"),
        dict(norm="in", activation="gelu"),
        dict(norm="out"),
        dict(train_scale=True, scale=4.0),
    ],
)
def test_two_steps_move_every_parameter_of_the_adapter_and_no_other(family, options):
    model, call, _ = build(family)
    adapted(model, place="both", **options).train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(peftkern.trainable_parameters(model), lr=1e-2)
    for _ in range(2):
        y = call(model)
        target = torch.randn(y.shape, generator=torch.Generator().manual_seed(3))
        (y * target).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if ".adapter." in name}


@pytest.mark.parametrize("family", ["llama", "whisper"])
@pytest.mark.parametrize("base", ["qlora", "bitsandbytes"])
def test_quantised_linears_inside_stay_as_they_are(family, base):
    model, call, names = build(family)
    if base == "qlora":
        peftkern.adapt(model, LoraConfig(r=2, base="nf4"))
    else:
        bottleneck_models.quantise(model)
    model.requires_grad_(False)
    before, state = call(model), set(model.state_dict())
    adapted(model, place="both")
    assert torch.equal(call(model), before)
    after = set(model.state_dict())
    assert state <= after and all(".adapter." in name for name in after - state)
    disturb(model)
    call(model).sum().backward()
    grads = [p.grad for name, p in model.named_parameters() if ".adapter." in name]
    assert grads and all(grad is not None for grad in grads)


@pytest.mark.parametrize("order", [1, -1])
def test_lora_and_bottleneck_stand_in_one_model_in_any_order(order):
    """On one module too: whisper's fc2 gives way to LoRA, and has the bottleneck's child."""
    model, call, names = build("whisper")
    configs = (LoraConfig(r=2, base="nf4"), BottleneckConfig(r=4, place="both"))
    peftkern.adapt(model, configs[::order])
    assert placed(model) == [f"{name}.adapter" for name in names]
    fc2 = model.encoder.layers[0].fc2
    assert isinstance(fc2, QLoRALinear) and isinstance(fc2.adapter, BottleneckAdapter)
    call(disturb(model)).sum().backward()
    assert all(p.grad is not None for p in peftkern.trainable_parameters(model))


def test_lora_after_a_bottleneck_still_shares_one_pass_over_the_input():
    model, _, _ = build("llama")
    adapted(model, place="attn")
    peftkern.adapt(model, LoraConfig(r=2, target_modules=["q_proj", "k_proj", "v_proj"]))
    assert [len(names) for names in peftkern.report(model).shared] == [3]


def test_lora_on_a_linear_that_has_a_child_is_refused_by_name():
    model, _, _ = build("whisper")
    adapted(model)
    peftkern.adapt(model, LoraConfig(r=2))
    assert reasons(model)["encoder.layers.0.fc2"] == "has an adapter already"


@pytest.mark.parametrize("mode", ["parallel", "sequential"])
def test_any_module_of_any_model_is_named_by_target_modules(mode):
    model, x = Plain(), torch.randn(3, 8)
    before = model(x)
    adapted(model, mode=mode, target_modules=["second", "norm"])
    assert placed(model) == ["second.adapter", "norm.adapter"]
    assert torch.equal(model(x), before)
    sizes = model.second.adapter.in_features, model.second.adapter.out_features
    assert sizes == ((8, 5) if mode == "parallel" else (5, 5))
    disturb(model)(x).sum().backward()
    assert all(p.grad is not None for p in peftkern.trainable_parameters(model))


def test_a_pattern_names_and_another_excludes():
    model, _, names = build("llama", layers=3)
    adapted(model, place="both", exclude_modules=r"layers\.[1-9]\..*")
    assert placed(model) == ["layers.0.self_attn.adapter", "layers.0.mlp.adapter"]


def test_timm_models_have_places_too(timm):
    options = dict(depth=2, embed_dim=16, num_heads=2, img_size=32, num_classes=3)
    model = timm.create_model("vit_tiny_patch16_224", **options).eval().requires_grad_(False)
    x = torch.randn(2, 3, 32, 32)
    before = model(x)
    adapted(model, place="both")
    sublayers = [f"blocks.{i}.{part}.adapter" for i in range(2) for part in ("attn", "mlp")]
    assert placed(model) == sublayers and torch.equal(model(x), before)
    options = dict(img_size=56, depths=(1, 1), num_heads=(2, 4), embed_dim=16, num_classes=3)
    swin = adapted(timm.create_model("swin_tiny_patch4_window7_224", **options))
    assert [swin.get_submodule(name).in_features for name in placed(swin)] == [16, 32]


def test_a_rate_divides_the_width_and_must_leave_a_rank():
    model, _, _ = build("vit")
    peftkern.adapt(model, BottleneckConfig(rate=5))
    assert model.layers[0].mlp.adapter.r == 3  # round(16 / 5)
    with pytest.raises(ValueError, match="rate 40 leaves no rank of its width 16"):
        peftkern.adapt(build("vit")[0], BottleneckConfig(rate=40))


def test_a_report_has_a_row_for_each_and_merging_is_refused_with_the_reason():
    model, _, names = build("vit")
    adapted(model)
    (row,) = peftkern.report(model).rows
    assert (row.name, row.layer, row.format) == (
        "layers.0.mlp.adapter",
        "BottleneckAdapter",
        "float32",
    )
    assert row.trainable == 2 * 4 * 16 + 4 + 16 and row.bytes == 4 * row.trainable
    assert row.mergeable == "no: it is not linear in its input" and row.vllm == "no: bottleneck"
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"mlp\.adapter must have a place in a weight to merge"):
        peftkern.merge(model)
    assert_unchanged(model, before)


def test_explain_says_which_kernel_runs_it():
    model, _, _ = build("bert")
    adapted(model)
    told = peftkern.explain(model.encoder.layer[0].output.dropout.adapter)
    assert "16 to 4 to 16 in float32 on cpu" in told and "bottleneck_linear_bwd: " in told
    assert "goes through its adapter" in peftkern.explain(model.encoder.layer[0].output.dropout)
    assert "read by the adapter" in peftkern.explain(model.encoder.layer[0].intermediate)


@pytest.mark.parametrize("norm", [None, "in", "out"])
@pytest.mark.parametrize("with_residual", [False, True])
def test_the_layer_alone_is_the_reference(norm, with_residual):
    config = BottleneckConfig(r=3, norm=norm, activation="gelu", scale=2.0, train_scale=True)
    layer = disturb(BottleneckAdapter(8, 8, config))
    x = torch.randn(5, 8)
    parts = list(layer.parameters())

    def equation(x, *parts):
        named = dict(zip((n for n, _ in layer.named_parameters()), parts, strict=True))
        weight, bias = named.get("norm.weight"), named.get("norm.bias")
        factors = (named[n] for n in ("down", "up", "bias_down", "bias_up"))
        residual = x if with_residual else None
        if norm == "out":
            branch = reference.linear(x, *factors, activation="gelu")
            branch = nn.functional.layer_norm(branch, (8,), weight, bias) * named["scale"]
            return branch if residual is None else residual + branch
        before = None if norm is None else Norm(weight, bias, 1e-5)
        options = dict(scale=named["scale"], activation="gelu", residual=residual, norm=before)
        return reference.linear(x, *factors, **options)

    with torch.no_grad():
        assert_as_good(layer(x, x if with_residual else None), equation, x, *parts)


def test_names_of_classes_and_instances_stay_what_libraries_ask_for():
    model, _, _ = build("llama")
    adapted(model, place="both")
    block = model.layers[0]
    assert type(block.mlp).__name__ == "LlamaMLP"
    assert isinstance(block.self_attn, transformers.models.llama.modeling_llama.LlamaAttention)
