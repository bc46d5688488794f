"""1-bit adapters in our two files."""

import json

import pytest
import torch
from onebits import blocks, evaluated, pairs, shifted
from safetensors.torch import load_file, save_file
from torch import nn

import peftkern
from peftkern import OneBitConfig, onebit
from peftkern.onebit import reference

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


@pytest.mark.parametrize("bits", reference.BITS)
@pytest.mark.parametrize("latents", [False, True])
@pytest.mark.parametrize("onto", ["adapted", "plain"])
def test_a_loaded_adapter_computes_the_same(placement, bits, latents, onto, tmp_path):
    model = shifted(placement, bits=bits, scale=2.5)
    wanted = evaluated(model)
    peftkern.save_adapter(model, tmp_path, latents=latents)
    twin = blocks()
    if onto == "adapted":
        twin = shifted(placement, seed=2, bits=bits, scale=1.0)
    peftkern.load_adapter(twin, tmp_path)
    assert torch.equal(evaluated(twin), wanted)
    assert {layer.scale for layer in pairs(twin)} == {2.5}
    same = [torch.equal(a.down, b.down) for a, b in zip(pairs(model), pairs(twin), strict=True)]
    assert all(same) if latents else not any(same)
    peftkern.save_adapter(twin, tmp_path / "again", latents=latents)
    for name in (CONFIG, TENSORS):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / name).read_bytes()


def test_training_goes_on_from_latents_as_if_it_had_not_stopped(placement, tmp_path):
    model = shifted(placement)
    peftkern.save_adapter(model, tmp_path, latents=True)
    twin = peftkern.load_adapter(blocks(), tmp_path)
    for one in (model, twin):
        optimizer = torch.optim.AdamW(peftkern.trainable_parameters(one), lr=1e-2)
        for _ in range(3):
            one.train()(torch.ones(1, 2, 16)).square().sum().backward()
            optimizer.step()
    for ours, theirs in zip(pairs(twin), pairs(model), strict=True):
        assert torch.equal(ours.down, theirs.down) and torch.equal(ours.up, theirs.up)


def test_a_file_says_what_its_bits_are(placement, tmp_path):
    model = shifted(placement, bits=2, r=5)
    peftkern.save_adapter(model, tmp_path)
    content = json.loads((tmp_path / CONFIG).read_text())
    assert content["peft_type"] == "PEFTKERN" and content["version"] == 1
    entry = content["adapters"][0]
    fields = entry["config"]
    assert entry["method"] == "onebit" and fields["placement"] == placement
    assert (fields["r"], fields["bits"], fields["scale"]) == (5, 2, 3.0)
    assert (fields["levels"], fields["bit_order"]) == ("normal medians", "lowest first")
    assert fields["activation"] == ("identity" if placement == "lora" else "relu")
    name = entry["modules"][0]
    tensors = load_file(tmp_path / TENSORS)
    sizes = fields["in_features"], fields["out_features"]
    layer = model.get_submodule(name)
    assert sizes == (layer.down.shape[1], layer.up.shape[0])
    own = {key.removeprefix(f"{name}."): t for key, t in tensors.items() if key.startswith(name)}
    assert own.keys() == {"down.bits", "up.bits", "statistics"}
    down = onebit.OneBitWeight(
        own["down.bits"], *own["statistics"][0], torch.Size([5, sizes[0]]), 2, torch.float32
    )
    assert torch.equal(down.dequantize(), layer.dense()[0])


def test_bits_take_a_32nd_of_the_latents(tmp_path):
    model = peftkern.adapt(nn.Sequential(nn.Linear(1024, 1024)), OneBitConfig(r=32))
    peftkern.save_adapter(model, tmp_path / "bits")
    peftkern.save_adapter(model, tmp_path / "latents", latents=True)
    bits, latents = ((tmp_path / n / TENSORS).stat().st_size for n in ("bits", "latents"))
    assert bits < 2 * 1024 * 32 / 8 + 400 and latents - bits > 2 * 1024 * 32 * 4


@pytest.mark.parametrize(
    "other, message",
    [
        ({"r": 8}, "down.bits must have shape"),
        ({"bits": 2}, "down.bits must have shape"),
        ({"placement": "lora"}, "must hold the model's adapters"),
    ],
)
def test_another_adapter_is_refused_whole(other, message, tmp_path):
    model = shifted("adaptformer")
    peftkern.save_adapter(model, tmp_path)
    twin = shifted(**{"placement": "adaptformer", "seed": 2, **other})
    wanted = evaluated(twin)
    with pytest.raises(ValueError, match=message):
        peftkern.load_adapter(twin, tmp_path)
    assert torch.equal(evaluated(twin), wanted)


@pytest.mark.parametrize(
    "name, value, error",
    [
        ("levels", "lloyd-max", "levels must be 'normal medians', got 'lloyd-max'"),
        ("bit_order", None, "bit_order must be 'lowest first', got None"),
        ("activation", "gelu", "activation must be 'relu', got 'gelu'"),
        ("placement", "prefix", "placement must be one of lora, adaptformer, got 'prefix'"),
        ("bits", 3, "bits must be 1, 2 or 4, got 3"),
        ("r", 3, "down.bits must have shape"),
        ("unknown", 1, "config must be one of onebit"),
    ],
)
def test_a_config_that_says_otherwise_is_refused(name, value, error, tmp_path):
    model = shifted("adaptformer")
    peftkern.save_adapter(model, tmp_path)
    content = json.loads((tmp_path / CONFIG).read_text())
    content["adapters"][0]["config"][name] = value
    (tmp_path / CONFIG).write_text(json.dumps(content))
    twin = blocks()
    with pytest.raises(ValueError, match=error):
        peftkern.load_adapter(twin, tmp_path)
    assert not pairs(twin)


@pytest.mark.parametrize(
    "change, error",
    [
        (lambda t: t | {"0.adapter.up.bits": t["0.adapter.up.bits"].float()}, "must be uint8"),
        (lambda t: {k: t[k] for k in t if k != "1.adapter.statistics"}, "1.adapter must have"),
        (lambda t: t | {"0.adapter.up": torch.zeros(3, 4)}, "up must have shape"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit_are_refused(change, error, tmp_path):
    model = shifted("adaptformer")
    peftkern.save_adapter(model, tmp_path)
    save_file(change(load_file(tmp_path / TENSORS)), tmp_path / TENSORS)
    twin = shifted("adaptformer", seed=2)
    wanted = evaluated(twin)
    with pytest.raises((ValueError, TypeError), match=error):
        peftkern.load_adapter(twin, tmp_path)
    assert torch.equal(evaluated(twin), wanted)


def test_a_merged_model_still_saves_its_bits(tmp_path):
    model = shifted("lora")
    wanted = evaluated(model)
    peftkern.merge(model)
    peftkern.save_adapter(model, tmp_path)
    torch.testing.assert_close(evaluated(peftkern.load_adapter(blocks(), tmp_path)), wanted)


def test_a_state_dict_holds_the_latents(placement):
    model, twin = shifted(placement), shifted(placement, seed=2)
    twin.load_state_dict(model.state_dict())
    assert torch.equal(evaluated(twin), evaluated(model))
