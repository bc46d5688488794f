"""CorDA: what a calibration run makes of a layer, and the ways in which such a run goes wrong."""

import copy
import dataclasses
import sys
from functools import partial
from types import SimpleNamespace

import bitsandbytes as bnb
import peft
import pytest
import safetensors.torch
import torch
from cordas import decomposed, moment
from models import assert_unchanged, disturb, placed, snapshot, tokens, toy
from peft.tuners.lora.config import CordaConfig
from torch import nn
from transformers.pytorch_utils import Conv1D

import peftkern
from peftkern import LoraConfig, QLoRALinear
from peftkern.qlora import dequantize, linear

CONFIG = LoraConfig(r=4, lora_alpha=8, init_lora_weights="corda")


def product(layer):
    return layer.scaling * (layer.lora_B @ layer.lora_A).detach()


def calibrated(model=None, config=CONFIG, batches=3, **options):
    model = toy() if model is None else model
    data = [tokens(seed=i, shape=(4, 20)) for i in range(batches)]
    return peftkern.corda(model, config, lambda: [model(batch) for batch in data], **options)


def starts(model):
    return {name: product(model.get_submodule(name)) for name in placed(model)}


@pytest.mark.parametrize("base", [None, "nf4"])
@pytest.mark.parametrize("mode", ["ipm", "kpm"])
def test_a_calibrated_model_computes_the_same_to_the_last_bit(mode, base):
    config = LoraConfig(r=4, init_lora_weights="corda", base=base)
    model = calibrated(config=config, mode=mode)
    plain = peftkern.adapt(toy(), LoraConfig(base=base))
    assert placed(model) == placed(plain)
    assert torch.equal(model(tokens()), plain(tokens()))
    assert all(start.any() for start in starts(model).values())


def test_the_start_is_that_of_the_inputs_that_a_layer_saw():
    model, seen = toy(), []
    model.layers[1].q_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    weight = model.layers[1].q_proj.weight.detach().clone()
    model.train()
    calibrated(model, config=LoraConfig(r=4, lora_alpha=8, init_lora_weights="corda", base="nf4"))
    x = torch.cat([x.reshape(-1, 32) for x in seen])
    assert len(x) == 3 * 4 * 20  # each token once, whatever batch it came in
    layer = model.layers[1].q_proj
    expected = decomposed(weight, moment(x), 4, layer.scaling)
    torch.testing.assert_close(product(layer), expected, rtol=1e-3, atol=1e-5)
    assert model.training and layer.training


def test_negative_inputs_and_uneven_batches_count_alike():
    """x / max(x) turned the former round and weighed a batch by its largest element."""
    torch.manual_seed(0)
    source = nn.Sequential(nn.Linear(32, 24))
    x = torch.randn(60, 32) - 3
    products = []
    for batches in ([x], [-x], [x[:1], x[1:7], x[7:]], [x.view(3, 20, 32)], [100 * x]):
        model = copy.deepcopy(source)
        peftkern.corda(model, CONFIG, partial(list, map(model, batches)))
        products.append(product(model[0]))
    for other in products[1:]:
        torch.testing.assert_close(other, products[0], rtol=1e-3, atol=1e-4)


def test_the_split_is_that_of_peft_where_peft_weighs_alike(monkeypatch):
    """One batch of one sequence, whose largest magnitude is positive."""
    # Of attrs, which need not be there, peft takes what the standard library has.
    monkeypatch.setitem(sys.modules, "attr", SimpleNamespace(dataclass=dataclasses.dataclass))
    from peft.tuners.lora.corda import preprocess_corda

    torch.manual_seed(0)
    x = torch.randn(1, 100, 32)
    x[0, 0, 0] = 10
    source = nn.Linear(32, 24)
    ours = nn.Sequential(copy.deepcopy(source))
    peftkern.corda(ours, CONFIG, lambda: ours(x))
    theirs = nn.Sequential(copy.deepcopy(source))
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["0"], init_lora_weights="corda",
        corda_config=CordaConfig(corda_method="ipm"),
    )  # fmt: skip
    preprocess_corda(theirs, config, run_model=lambda: theirs(x))
    layer = peft.get_peft_model(theirs, config).base_model.model[0]
    expected = layer.get_delta_weight("default").detach()
    torch.testing.assert_close(product(ours[0]), expected, rtol=1e-3, atol=1e-4)


def test_groups_of_layers_are_one_pass_each_and_give_the_same():
    whole, runs = starts(calibrated()), []
    model = toy()
    data = [tokens(seed=i, shape=(4, 20)) for i in range(3)]

    def run():
        runs.append(1)
        for batch in data:
            model(batch)

    largest = 4 * 64**2
    peftkern.corda(model, CONFIG, run, memory=largest + 2 * 4 * 32**2)
    assert len(runs) == 2
    assert starts(model).keys() == whole.keys()
    assert all(torch.equal(start, whole[name]) for name, start in starts(model).items())
    alone = toy()
    peftkern.corda(alone, CONFIG, lambda: runs.append(alone(data[0])), memory=1)
    assert len(runs) == 2 + len(whole)


def test_a_cache_spares_the_run_and_serves_other_ranks_and_modes(tmp_path):
    whole = starts(calibrated(cache=tmp_path / "moments"))
    files = sorted(file.name for file in (tmp_path / "moments").iterdir())
    assert files == sorted(f"{name}.safetensors" for name in whole)

    def no_run():
        raise AssertionError("the cache should have served")

    again = peftkern.corda(toy(), CONFIG, no_run, cache=tmp_path / "moments")
    assert all(torch.equal(start, whole[name]) for name, start in starts(again).items())
    config = LoraConfig(r=2, init_lora_weights="corda")
    other = peftkern.corda(toy(), config, no_run, mode="kpm", cache=tmp_path / "moments")
    expected = starts(calibrated(config=config, mode="kpm"))
    assert all(torch.equal(start, expected[name]) for name, start in starts(other).items())


@pytest.mark.parametrize(
    "damage",
    [
        lambda file: file.write_bytes(file.read_bytes()[:-1]),
        lambda file: file.write_bytes(safetensors.torch.save({"other": torch.eye(32)})),
        lambda file: file.write_bytes(safetensors.torch.save({"moment": torch.eye(31)})),
        lambda file: file.write_bytes(
            safetensors.torch.save({"moment": torch.full((32, 32), torch.nan)})
        ),
    ],
)
def test_a_damaged_cache_is_refused(damage, tmp_path):
    calibrated(cache=tmp_path)
    damage(tmp_path / "layers.0.q_proj.safetensors")
    model = toy()
    before = snapshot(model)
    with pytest.raises(ValueError, match="must"):
        calibrated(model, cache=tmp_path)
    assert_unchanged(model, before)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_inputs_that_are_not_finite_are_refused_before_anything_changes(value):
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32)).train()
    x = torch.randn(5, 32)
    x[2, 3] = value
    before = snapshot(model)
    with pytest.raises(ValueError, match="^inputs must be finite, got NaN or infinity into 0"):
        peftkern.corda(model, CONFIG, lambda: model(x))
    assert_unchanged(model, before)
    assert model.training and not model[0]._forward_pre_hooks


def test_a_run_that_fails_or_misses_a_layer_changes_nothing():
    def fail():
        raise RuntimeError("out of data")

    for run, words in ((lambda: None, "got none into layers.0.q_proj"), (fail, "out of data")):
        model = toy()
        before = snapshot(model)
        with pytest.raises((ValueError, RuntimeError), match=words):
            peftkern.corda(model, CONFIG, run)
        assert_unchanged(model, before)
        assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("words", "options"),
    [
        ("mode must be 'ipm' or 'kpm', got 'ipa'", dict(mode="ipa")),
        ("metric must be 'corda' or 'whitened', got ''", dict(metric="")),
        ("init_lora_weights must be 'corda', got True", dict(config=LoraConfig())),
    ],
)
def test_words_that_mean_nothing_here_are_refused(words, options):
    with pytest.raises(ValueError, match=f"^{words}$"):
        calibrated(**options)


def test_adapt_alone_has_no_data_for_it():
    model = toy()
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"must come through peftkern\.corda"):
        peftkern.adapt(model, (LoraConfig(), CONFIG))
    assert_unchanged(model, before)
    with pytest.raises(ValueError, match=r"must come through peftkern\.corda"):
        QLoRALinear.from_linear(nn.Linear(8, 8), init_lora_weights="corda")


def test_a_base_of_bitsandbytes_and_a_transposed_one_are_calibrated():
    torch.manual_seed(0)
    quantised = bnb.nn.Linear4bit(64, 64, quant_type="nf4").to("cpu")
    model = nn.Sequential(quantised, nn.ReLU(), Conv1D(24, 64)).train()
    x = torch.randn(3, 40, 64)
    convolution = copy.deepcopy(model[2])
    peftkern.corda(model, CONFIG, lambda: model(x))
    layer = model[0]
    assert torch.equal(layer(x), linear(x, layer.quantized_weight, layer.bias))
    expected = decomposed(
        dequantize(layer.quantized_weight), moment(x.view(-1, 64)), 4, layer.scaling
    )
    torch.testing.assert_close(product(layer), expected, rtol=1e-3, atol=1e-4)
    y = torch.randn(3, 64)
    torch.testing.assert_close(model[2](y), convolution(y))
    assert product(model[2]).any()


def test_a_calibrated_adapter_is_an_ordinary_one_on_disk(tmp_path):
    model = disturb(calibrated())
    peftkern.save_adapter(model, tmp_path)
    for other in (
        peftkern.load_adapter(toy(), tmp_path),
        peft.PeftModel.from_pretrained(toy(), tmp_path),
        peftkern.load_adapter(calibrated(mode="kpm"), tmp_path),
    ):
        torch.testing.assert_close(other(tokens()), model(tokens()), rtol=1e-4, atol=1e-4)
