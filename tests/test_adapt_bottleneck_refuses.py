"""Bottlenecks where they cannot be: what is refused, and that nothing is half done."""

import peft
import pytest
from bottleneck_models import Plain, build
from models import assert_unchanged, reasons, snapshot
from torch import nn

import peftkern
from peftkern import BottleneckAdapter, BottleneckConfig


def adapted(model, **options):
    return peftkern.adapt(model, BottleneckConfig(r=4, **options))


def placed(model):
    return [name for name, m in model.named_modules() if isinstance(m, BottleneckAdapter)]


def test_what_has_no_place_is_refused_with_what_is_there():
    model = Plain()
    before = snapshot(model)
    with pytest.raises(ValueError, match="place must name a sublayer.*got 'ffn'.*Linear in rest"):
        peftkern.adapt(model, BottleneckConfig())
    with pytest.raises(ValueError, match="act: ReLU holds no linear that tells its width"):
        adapted(model, target_modules=["act"])
    with pytest.raises(ValueError, match="nowhere: names no module"):
        adapted(model, target_modules=["nowhere"])
    assert_unchanged(model, before)


def test_what_has_one_already_keeps_it():
    model, _, _ = build("vit")
    adapted(model)
    with pytest.raises(ValueError, match="has an adapter already"):
        adapted(model)
    adapted(model, place="both")
    assert placed(model) == ["layers.0.attention.adapter", "layers.0.mlp.adapter"]
    assert reasons(model) == {"layers.0.mlp": "has an adapter already"}


def test_what_an_adapter_consists_of_is_no_place_and_neither_is_what_nobody_calls():
    model = Plain()
    adapted(model, norm="in", target_modules=["second"])
    adapted(model, target_modules=r"second\..*|norm|rest")
    assert placed(model) == ["second.adapter", "norm.adapter"]
    assert reasons(model) == {
        "second.adapter": "is an adapter itself",
        "rest": "ModuleList is never called",
    }


def test_what_another_library_has_put_around_a_module_is_left_alone():
    model, _, _ = build("vit")
    model.layers[0].mlp.forward = model.layers[0].mlp.forward
    with pytest.raises(ValueError, match="replaced on the instance"):
        adapted(model)
    wrapped = peft.get_peft_model(build("vit")[0], peft.LoraConfig(target_modules=["fc2"]))
    with pytest.raises(ValueError, match="inside an adapter of peft"):
        adapted(wrapped, target_modules=["base_layer"])
    adapted(wrapped)  # around it, there is nothing in the way
    assert len(placed(wrapped)) == 1
    layer = nn.TransformerEncoderLayer(8, 2, 16)
    with pytest.raises(ValueError, match="TransformerEncoderLayer reads its weight"):
        adapted(nn.Sequential(layer), target_modules=["linear2"])


def test_a_failure_on_the_way_leaves_the_model_as_it_was(monkeypatch):
    model, _, _ = build("whisper")
    before = snapshot(model)
    classes = {name: type(m) for name, m in model.named_modules()}
    made, build_one = [], BottleneckConfig.build

    def fail(config, target, device):
        if device.type != "meta" and len(made) == 3:
            raise MemoryError("no more")
        made.append(target)
        return build_one(config, target, device)

    monkeypatch.setattr(BottleneckConfig, "build", fail)
    with pytest.raises(MemoryError):
        adapted(model, place="both")
    assert_unchanged(model, before)
    assert {name: type(m) for name, m in model.named_modules()} == classes
    assert not any("carries" in vars(module) for module in model.modules())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(r=0), "r must be at least 1, got 0"),
        (dict(rate=0.0), "rate must be above 0"),
        (dict(activation="swish"), "activation must be one of 'identity'"),
        (dict(mode="beside"), "mode must be one of 'parallel', 'sequential', got 'beside'"),
        (dict(place="mlp"), "place must be one of"),
        (dict(norm="before"), "norm must be one of None, 'in', 'out'"),
        (dict(dropout=1.5), "dropout must be between 0 and 1"),
        (dict(scale=float("nan")), "scale must be finite"),
        (dict(kind="transformer"), "kind must be one of"),
        (dict(kernel=3), "kernel must be None for kind 'linear'"),
        (dict(repeat=2), "repeat must be 1 for kind 'linear'"),
        (dict(repeat=0), "repeat must be at least 1"),
        (dict(target_modules="("), "target_modules must be a regular expression"),
    ],
)
def test_a_config_refuses_what_it_cannot_be(options, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        BottleneckConfig(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(r=4.5), "r must be an int, got 4.5"),
        (dict(r="4"), "r must be an int, got '4'"),
        (dict(kind="conv", target_modules=["a"], kernel=1.5), "kernel must be an int, got 1.5"),
        (dict(target_modules=5), "target_modules must be a string or a list of strings, got 5"),
        (dict(exclude_modules=[5]), r"exclude_modules must be a string or a list .*, got \[5\]"),
    ],
)
def test_a_config_refuses_what_is_of_another_kind(options, message):
    with pytest.raises(TypeError, match=f"^{message}"):
        BottleneckConfig(**options)
