"""1-bit adapters on disk: the published flat binary, and our two files."""

import json
import struct
from copy import deepcopy

import pytest
import torch
from onebits import blocks, config, pairs
from safetensors.torch import load_file, save_file
from torch import nn

import peftkern
from peftkern import OneBitConfig, onebit
from peftkern.onebit import reference

PLACEMENTS = ("lora", "adaptformer")
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
NAN = struct.pack("<f", float("nan"))


@pytest.fixture(params=PLACEMENTS)
def placement(request):
    return request.param


def adapted(placement, seed=1, **options):
    """Trained, for what that matters: no latent is as it was drawn."""
    model = blocks()
    torch.manual_seed(seed)
    peftkern.adapt(model, config(placement, **options))
    with torch.no_grad():
        for layer in pairs(model):
            for latent in (layer.down, layer.up):
                latent.add_(torch.randn_like(latent) * 0.02 + 0.004)
    return model


def evaluated(model):
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        return model.eval()(torch.randn(2, 5, 16, generator=generator))


# The published flat binary


def vit(placement, r):
    """As wide and as deep as ViT-B, and nothing else of it."""
    if placement == "adaptformer":
        model = nn.Sequential(*(Bare() for _ in range(12)))
        own = OneBitConfig(r=r, placement=placement, blocks={"Bare": "norm"})
    else:
        with torch.device("meta"):
            layer = {name: nn.Linear(768, 768) for name in ("query", "key", "value")}
            model = nn.Sequential(*(nn.ModuleDict(deepcopy(layer)) for _ in range(12)))
        model.to_empty(device="cpu")  # what its own weights are does not matter
        own = OneBitConfig(r=r, target_modules=["query", "value"])
    return peftkern.adapt(model, own)


class Bare(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(768)

    def forward(self, x):
        return x + self.norm(x)


@pytest.mark.parametrize(
    "placement, r, size",
    [
        ("adaptformer", 32, 73_920),
        ("lora", 32, 147_840),
        ("adaptformer", 1, 2_496),
        ("lora", 1, 4_992),
    ],
)
def test_files_have_the_published_sizes(placement, r, size, tmp_path):
    torch.manual_seed(0)
    model = vit(placement, r)
    onebit.export_bits(model, tmp_path / "bits.bin")
    data = (tmp_path / "bits.bin").read_bytes()
    assert len(data) == size
    matrix = r * 768 // 8
    for at in range(0, size, matrix + 8):
        mean, std = struct.unpack("<2f", data[at + matrix : at + matrix + 8])
        assert abs(mean) < std and 5e-4 < std < 0.03


def test_the_bytes_of_a_matrix_are_the_published_ones(tmp_path):
    model = by_hand()
    onebit.export_bits(model, tmp_path / "bits.bin")
    data = (tmp_path / "bits.bin").read_bytes()
    assert len(data) == 2 * (1 + 8)
    assert data[:1] == b"\x6d" and data[1:5] == struct.pack("<f", 0.015625) == bytes.fromhex(
        "0000803c"
    )
    assert struct.unpack("<f", data[5:9])[0] == pytest.approx(0.8030007894498877, rel=1e-7)


def by_hand(bits=1):
    model = nn.Sequential(nn.Linear(4, 4))
    peftkern.adapt(model, OneBitConfig(r=2, bits=bits))
    with torch.no_grad():
        model[0].down.copy_(torch.tensor([[0.5, -1, 0.25, 0.75], [-0.25, 0.125, 1, -1.25]]))
    return model


@pytest.mark.parametrize("bits", reference.BITS)
def test_the_published_reader_reads_it(placement, bits, tmp_path):
    """In the order of the modules, `down` first; a head comes last."""
    model = adapted(placement, bits=bits, exclude_modules=["2"])
    head = model[2]
    onebit.export_bits(model, tmp_path / "bits.bin", head=head)
    data = (tmp_path / "bits.bin").read_bytes()
    for layer in pairs(model):
        for latent in (layer.down, layer.up):
            size = latent.numel() * bits // 8
            codes = [byte >> at & (2**bits - 1) for byte in data[:size] for at in range(0, 8, bits)]
            mean, std = struct.unpack("<ff", data[size : size + 8])
            read = torch.tensor(reference.levels(bits))[codes].view_as(latent) * std + mean
            torch.testing.assert_close(read, reference.quantize(latent.detach(), bits))
            data = data[size + 8 :]
    values = [*head.weight.flatten().tolist(), *head.bias.tolist()]
    assert data == struct.pack(f"<{len(values)}f", *values)


@pytest.mark.parametrize("bits", reference.BITS)
def test_what_is_imported_is_what_was_exported(placement, bits, tmp_path):
    first, second = (adapted(placement, seed, bits=bits) for seed in (1, 2))
    with torch.no_grad():
        second[2].weight.mul_(2)
    wanted, had = evaluated(first), evaluated(second)
    assert not torch.allclose(wanted, had)
    onebit.export_bits(first, tmp_path / "bits.bin", head=first[2])
    assert onebit.import_bits(second, tmp_path / "bits.bin", head=second[2]) is second
    assert torch.equal(evaluated(second), wanted)
    onebit.export_bits(second, tmp_path / "again.bin", head=second[2])
    assert (tmp_path / "again.bin").read_bytes() == (tmp_path / "bits.bin").read_bytes()


@pytest.mark.parametrize("bits", reference.BITS)
def test_training_goes_on_from_the_function_of_the_bits(placement, bits, tmp_path):
    first, second = (adapted(placement, seed, bits=bits) for seed in (1, 2))
    onebit.export_bits(first, tmp_path / "bits.bin")
    onebit.import_bits(second, tmp_path / "bits.bin")
    for ours, theirs in zip(pairs(second), pairs(first), strict=True):
        for name in ("down", "up"):
            latent, trained = getattr(ours, name), getattr(theirs, name)
            assert latent.unique().numel() <= 2**bits
            found, wanted = (reference.statistics(w.detach()) for w in (latent, trained))
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-8)
    y = second.train()(x := torch.randn(2, 5, 16))
    torch.testing.assert_close(y, first.train()(x), rtol=1e-5, atol=1e-6)
    y.square().sum().backward()
    assert all(layer.up.grad.any() for layer in pairs(second))


def test_codes_that_no_normal_gives_are_computed_on_all_the_same(tmp_path):
    """All of 4 bits' highest level but one code: no latent has such codes and such statistics."""
    model = by_hand(bits=4)
    data = bytes([0xFF, 0xFF, 0xFF, 0xF0]) + struct.pack("<2f", 0.5, 0.25)
    (tmp_path / "bits.bin").write_bytes(2 * data)
    onebit.import_bits(model, tmp_path / "bits.bin")
    down, _ = model[0].dense()
    levels = reference.levels(4)
    wanted = [0.5 + 0.25 * levels[15]] * 8
    wanted[6] = 0.5 + 0.25 * levels[0]
    torch.testing.assert_close(down.flatten(), torch.tensor(wanted))
    onebit.export_bits(model, tmp_path / "again.bin")
    assert (tmp_path / "again.bin").read_bytes() == 2 * data


def test_a_last_byte_that_is_not_full_is_written_and_read(tmp_path):
    def odd(seed):
        torch.manual_seed(seed)
        return peftkern.adapt(nn.Sequential(nn.Linear(5, 7, bias=False)), OneBitConfig(r=3))

    model = odd(0)
    onebit.export_bits(model, tmp_path / "bits.bin")
    data = (tmp_path / "bits.bin").read_bytes()
    assert len(data) == 2 + 8 + 3 + 8 and data[1] < 2**7 and data[12] < 2**5  # 15 and 21 bits
    twin = onebit.import_bits(odd(1), tmp_path / "bits.bin")
    for ours, theirs in zip(twin[0].dense(), model[0].dense(), strict=True):
        assert torch.equal(ours, theirs)
    (tmp_path / "bits.bin").write_bytes(data[:1] + data[2:12] + data[13:])
    with pytest.raises(
        ValueError,
        match="of 21 bytes .*, got 19 bytes: the published code has dropped the last codes",
    ):
        onebit.import_bits(twin, tmp_path / "bits.bin")


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda data: data[:-1], "a file of 210 bytes for 12 matrices of this model, got 209"),
        (lambda data: data + bytes(64), "got 274 bytes: a head follows the matrices, perhaps"),
        (lambda data: data[:8] + NAN + data[12:], "got nan and .* for number 0"),
        (lambda data: data[:12] + struct.pack("<f", -1.0) + data[16:], "and -1 for number 0"),
    ],
)  # fmt: skip
def test_a_file_that_does_not_fit_changes_nothing(change, message, tmp_path):
    model = adapted("lora", target_modules=["mix", "0.mlp.0", "0.mlp.2", "2"])
    onebit.export_bits(model, tmp_path / "bits.bin")
    data = (tmp_path / "bits.bin").read_bytes()
    wanted, latents = evaluated(model), [p.detach().clone() for p in model.parameters()]
    (tmp_path / "bits.bin").write_bytes(change(data))
    with pytest.raises(ValueError, match=message):
        onebit.import_bits(model, tmp_path / "bits.bin")
    assert all(map(torch.equal, model.parameters(), latents))
    assert torch.equal(evaluated(model), wanted)


def test_a_model_without_1_bit_adapters_is_refused(tmp_path):
    model = peftkern.adapt(blocks(), peftkern.LoraConfig(r=2))
    for call in (onebit.export_bits, onebit.import_bits):
        with pytest.raises(ValueError, match="model must have 1-bit adapters"):
            call(model, tmp_path / "bits.bin")
    assert not any(tmp_path.iterdir())


def test_a_latent_that_is_not_finite_is_not_written(tmp_path):
    model = adapted("lora")
    with torch.no_grad():
        pairs(model)[1].up[0, 0] = torch.inf
    for call in (onebit.export_bits, peftkern.save_adapter):
        with pytest.raises(ValueError, match="weight must be finite"):
            call(model, tmp_path / "file")
    assert not any(tmp_path.iterdir())


# Our two files


@pytest.mark.parametrize("bits", reference.BITS)
@pytest.mark.parametrize("latents", [False, True])
@pytest.mark.parametrize("onto", ["adapted", "plain"])
def test_a_loaded_adapter_computes_the_same(placement, bits, latents, onto, tmp_path):
    model = adapted(placement, bits=bits, scale=2.5)
    wanted = evaluated(model)
    peftkern.save_adapter(model, tmp_path, latents=latents)
    twin = blocks()
    if onto == "adapted":
        twin = adapted(placement, seed=2, bits=bits, scale=1.0)
    peftkern.load_adapter(twin, tmp_path)
    assert torch.equal(evaluated(twin), wanted)
    assert {layer.scale for layer in pairs(twin)} == {2.5}
    same = [torch.equal(a.down, b.down) for a, b in zip(pairs(model), pairs(twin), strict=True)]
    assert all(same) if latents else not any(same)
    peftkern.save_adapter(twin, tmp_path / "again", latents=latents)
    for name in (CONFIG, TENSORS):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / name).read_bytes()


def test_training_goes_on_from_latents_as_if_it_had_not_stopped(placement, tmp_path):
    model = adapted(placement)
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
    model = adapted(placement, bits=2, r=5)
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
    model = adapted("adaptformer")
    peftkern.save_adapter(model, tmp_path)
    twin = adapted(**{"placement": "adaptformer", "seed": 2, **other})
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
    model = adapted("adaptformer")
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
    model = adapted("adaptformer")
    peftkern.save_adapter(model, tmp_path)
    save_file(change(load_file(tmp_path / TENSORS)), tmp_path / TENSORS)
    twin = adapted("adaptformer", seed=2)
    wanted = evaluated(twin)
    with pytest.raises((ValueError, TypeError), match=error):
        peftkern.load_adapter(twin, tmp_path)
    assert torch.equal(evaluated(twin), wanted)


def test_a_merged_model_still_saves_its_bits(tmp_path):
    model = adapted("lora")
    wanted = evaluated(model)
    peftkern.merge(model)
    peftkern.save_adapter(model, tmp_path)
    torch.testing.assert_close(evaluated(peftkern.load_adapter(blocks(), tmp_path)), wanted)


def test_a_state_dict_holds_the_latents(placement):
    model, twin = adapted(placement), adapted(placement, seed=2)
    twin.load_state_dict(model.state_dict())
    assert torch.equal(evaluated(twin), evaluated(model))
