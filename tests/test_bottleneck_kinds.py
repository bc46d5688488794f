"""Conv and conformer bottlenecks, and prefixes beside them, in models: training, files, copies."""

import copy

import pytest
import torch
import transformers
from models import assert_unchanged, disturb, reasons, snapshot
from prefixed import ast, bart, bert, llama, made
from torch import nn

import peftkern
from peftkern import BottleneckConfig, MamConfig, PrefixConfig
from peftkern.bottleneck import ConformerAdapter, ConvAdapter

CONFORMER = dict(kind="conformer", rate=8, kernel=5)
CONV = dict(kind="conv", rate=4, activation="gelu", mode="sequential")


class Unet(nn.Module):
    """A block with a norm first and convolutions of other channels within."""

    def __init__(self):
        super().__init__()
        self.stem, self.block = nn.Conv2d(3, 8, 3), Block(8, 12)
        self.head = nn.Linear(12, 2)

    def forward(self, x):
        return self.head(self.block(self.stem(x)).mean((2, 3)))


class Block(nn.Module):
    def __init__(self, columns, rows):
        super().__init__()
        self.norm, self.time = nn.GroupNorm(2, columns), nn.Linear(4, rows)
        self.first = nn.Conv2d(columns, rows, 3, padding=1)
        self.last = nn.Conv2d(rows, rows, 3, padding=1)

    def forward(self, x):
        return self.last(self.first(self.norm(x)).relu())


def unet():
    torch.manual_seed(0)
    return Unet().eval(), dict(x=torch.randn(2, 3, 7, 6))


def seen(model, inputs):
    out = model(**inputs)
    return out if isinstance(out, torch.Tensor) else out.logits


CASES = {
    "conv": (unet, dict(CONV, target_modules=["block"])),
    "conv of 3 x 3": (unet, dict(CONV, kernel=3, norm="in", target_modules=["block"])),
    "stack": (unet, dict(CONV, kernel=2, repeat=2, target_modules=["block"], train_scale=True)),
    "beside": (unet, dict(CONV, mode="parallel", target_modules=["block"], scale=2.0)),
    "conformer": (lambda: made(ast), dict(CONFORMER)),
    "conformer behind": (lambda: made(ast), dict(CONFORMER, mode="sequential", place="both")),
    "conformer without norm": (
        lambda: made(ast), dict(CONFORMER, prenorm=False, train_scale=True, scale=4.0),
    ),
}  # fmt: skip
EVERY_CASE = pytest.mark.parametrize("case", CASES)


def adapted(case, **changes):
    make, options = CASES[case]
    model, inputs = make()
    return peftkern.adapt(model, BottleneckConfig(**options | changes)), inputs


@EVERY_CASE
def test_at_the_start_the_model_computes_what_it_did(case):
    plain, inputs = CASES[case][0]()
    model, _ = adapted(case)
    assert torch.equal(seen(model, inputs), seen(plain.requires_grad_(False), inputs))
    disturb(model)
    assert not torch.allclose(seen(model, inputs), seen(plain, inputs), atol=1e-4)


@EVERY_CASE
def test_adapters_alone_train_and_all_of_them_within_two_steps(case):
    model, inputs = adapted(case)
    before = {name: p.clone() for name, p in model.named_parameters()}
    optimiser = torch.optim.Adam(peftkern.trainable_parameters(model), 1e-2)
    for _ in range(2):
        optimiser.zero_grad()
        seen(model, inputs).log_softmax(-1)[..., 0].mean().backward()
        optimiser.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if ".adapter." in name}


@EVERY_CASE
def test_files_bring_back_what_was_trained(case, tmp_path):
    model, inputs = adapted(case)
    disturb(model).train()
    with torch.no_grad():
        seen(model, inputs)  # which moves what a BatchNorm has counted
    peftkern.save_adapter(model.eval(), tmp_path)
    fresh = peftkern.load_adapter(CASES[case][0]()[0], tmp_path)
    assert torch.equal(seen(fresh, inputs), seen(model, inputs))
    there, _ = adapted(case)
    peftkern.load_adapter(there, tmp_path)
    assert torch.equal(seen(there, inputs), seen(model, inputs))
    for name, buffer in model.named_buffers():
        assert torch.equal(fresh.get_buffer(name), buffer)


@EVERY_CASE
def test_copies_have_adapters_of_their_own(case):
    model, inputs = adapted(case)
    expected = seen(disturb(model), inputs)
    twin = copy.deepcopy(model)
    assert torch.equal(seen(twin, inputs), expected)
    disturb(twin)
    assert torch.equal(seen(model, inputs), expected)
    assert not torch.equal(seen(twin, inputs), expected)


@EVERY_CASE
def test_an_adapter_can_start_anew(case):
    model, inputs = adapted(case)
    fresh = {name: t.clone() for name, t in model.state_dict().items()}
    expected = seen(model, inputs)
    seen(disturb(model).train(), inputs)
    assert not torch.equal(seen(model.eval(), inputs), expected)
    for module in model.modules():
        if isinstance(module, (ConvAdapter, ConformerAdapter)):
            module.reset_parameters()
    assert torch.equal(seen(model, inputs), expected)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, fresh[name]) or name.endswith(("down", "taps"))


@EVERY_CASE
def test_kinds_are_reported_and_explained(case):
    model, _ = adapted(case)
    report = peftkern.report(model)
    layers = {name: model.get_submodule(name) for name in (row.name for row in report.rows)}
    count = sum(p.numel() for p in peftkern.trainable_parameters(model))
    assert report.trainable == count > 0
    for row in report.rows:
        assert row.mergeable.startswith("no: it is not linear")
        text = peftkern.explain(layers[row.name])
        assert "bottleneck_linear_bwd" in text and f"{layers[row.name].in_features} to " in text


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", ["conv", "conv of 3 x 3", "conformer"])
def test_16_bit_models_have_adapters_in_float32(case, dtype):
    model, inputs = adapted(case)
    expected = seen(disturb(model), inputs)
    narrow = CASES[case][0]()[0].to(dtype)
    peftkern.adapt(narrow, BottleneckConfig(**CASES[case][1]))
    assert {p.dtype for p in peftkern.trainable_parameters(narrow)} == {torch.float32}
    disturb(narrow)
    for wide, own in zip(*map(peftkern.trainable_parameters, (model, narrow)), strict=True):
        own.data.copy_(wide)
    result = seen(narrow, {name: x.to(dtype) for name, x in inputs.items()})
    assert result.dtype == dtype
    torch.testing.assert_close(result.float(), expected, atol=0.1, rtol=0.1)


@pytest.mark.parametrize("case", ["conv", "stack", "conformer"])
def test_kinds_compile_whole_and_run_under_autocast(case):
    model, inputs = adapted(case)
    expected = seen(disturb(model), inputs)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(seen(compiled, inputs), expected)
    with torch.autocast("cpu", torch.bfloat16):
        narrow = seen(model, inputs)
    torch.testing.assert_close(narrow.float(), expected, atol=0.1, rtol=0.1)
    narrow.float().sum().backward()
    assert all(p.grad is not None for p in peftkern.trainable_parameters(model))


def test_in_channels_and_out_channels_of_convolutions_inside_count():
    model, _ = adapted("beside")
    assert (model.block.adapter.in_features, model.block.adapter.out_features) == (8, 12)
    model, _ = adapted("conv")
    assert (model.block.adapter.in_features, model.block.adapter.out_features) == (12, 12)


class Adapting(transformers.LlamaModel):
    """A model that adapts itself, so that `from_pretrained` finds parameters without values."""

    def __init__(self, config, **kwargs):
        super().__init__(config, **kwargs)
        peftkern.adapt(self, BottleneckConfig(**CONFORMER))


def test_from_pretrained_leaves_new_conformers_the_identity_and_alive(tmp_path):
    plain, inputs = made(llama)
    plain = plain.model
    plain.save_pretrained(tmp_path)
    model = Adapting.from_pretrained(tmp_path).eval()
    expected = plain.requires_grad_(False)(**inputs)[0]
    assert torch.equal(model(**inputs)[0], expected)
    adapters = [m for m in model.modules() if isinstance(m, ConformerAdapter)]
    assert len(adapters) == 2 and all(m.down.std() > 0.01 < m.taps.std() for m in adapters)
    assert all(m.batch_norm.running_var.eq(1).all() for m in adapters)


@pytest.mark.parametrize("make", [llama, bert, bart])
def test_the_pair_of_mam_is_saved_and_loaded(make, tmp_path):
    model, inputs = made(make)
    disturb(peftkern.adapt(model, MamConfig(3, 4)))
    expected = model(**inputs).logits
    peftkern.save_adapter(model, tmp_path)
    fresh = peftkern.load_adapter(made(make)[0], tmp_path)
    assert torch.equal(fresh(**inputs).logits, expected)


def test_a_prefix_and_an_adapter_stand_in_one_attention():
    for configs in (
        (PrefixConfig(3), BottleneckConfig(r=4, place="attn")),
        (BottleneckConfig(r=4, place="attn"), PrefixConfig(3)),
    ):
        model, inputs = made(llama)
        plain = model(**inputs).logits
        peftkern.adapt(model, configs)
        attention = model.model.layers[0].self_attn
        assert {"prefix", "adapter"} <= attention._modules.keys()
        for part in (attention.prefix.values, attention.adapter.up):
            before = model(**inputs).logits
            nn.init.normal_(part)
            assert not torch.allclose(model(**inputs).logits, before, atol=1e-3)
        assert not torch.allclose(model(**inputs).logits, plain)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(kernel=3), "kernel must be None for kind 'linear', got 3"),
        (dict(prenorm=False), "prenorm must be True for kind 'linear'"),
        (dict(CONV), "target_modules must name modules for kind 'conv'"),
        (dict(CONV, norm="out"), "norm must be None or 'in' for kind 'conv', got 'out'"),
        (dict(CONV, mode="parallel", repeat=2), "mode must be 'sequential' for kind 'conv'"),
        (dict(CONV, kernel=0), "kernel must be at least 1, got 0"),
        (dict(CONFORMER, activation="gelu"), "activation must be 'relu' for kind 'conformer'"),
        (dict(CONFORMER, norm="in"), "norm must be None for kind 'conformer'"),
        (dict(CONFORMER, repeat=2), "repeat must be 1 for kind 'conformer'"),
    ],
)
def test_what_a_kind_has_no_use_for_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        BottleneckConfig(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(length=-1), "length must be at least 0"),
        (dict(r=0), "r must be at least 1"),
        (dict(dropout=2.0), "dropout must be between 0 and 1"),
    ],
)
def test_mam_refuses_what_its_parts_refuse(options, message):
    with pytest.raises(ValueError, match=message):
        MamConfig(**options)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("case", ["conv of 3 x 3", "conformer"])
def test_activations_may_be_wider_than_the_adapter(case, training):
    model, _ = adapted(case)
    kinds = (ConvAdapter, ConformerAdapter)
    (adapter, *_) = (m for m in disturb(model).modules() if isinstance(m, kinds))
    x = torch.randn((2, 12, 5, 4) if case.startswith("conv") else (2, 5, 32), dtype=torch.float64)
    y = adapter.train(training)(x)
    assert y.dtype == torch.float64
    torch.testing.assert_close(y.float(), adapter(x.float()), atol=1e-5, rtol=1e-5)


def test_images_and_sequences_of_other_shapes_are_refused():
    model, _ = adapted("conv")
    with pytest.raises(ValueError, match=r"x must have shape \[batch, channels, height, width\]"):
        model.block.adapter(torch.randn(2, 12, 4))
    model, _ = adapted("conformer")
    (adapter, *_) = (m for m in model.modules() if isinstance(m, ConformerAdapter))
    with pytest.raises(ValueError, match=r"x must have shape \[..., tokens, columns\]"):
        adapter(torch.randn(32))


def test_a_module_that_tells_no_channels_is_left_alone():
    model, _ = unet()
    model.block.add_module("act", nn.ReLU())
    before = snapshot(model)
    with pytest.raises(ValueError, match="target_modules must name"):
        peftkern.adapt(model, BottleneckConfig(**CONV, target_modules=["act"]))
    assert_unchanged(model, before)
    peftkern.adapt(model, BottleneckConfig(**CONV, target_modules=["act", "block"]))
    assert [n for n, m in model.named_modules() if isinstance(m, ConvAdapter)] == ["block.adapter"]
    assert "block.act" in reasons(model)
