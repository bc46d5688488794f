"""The published flat binary of 1-bit adapters, byte for byte and both ways."""

import struct
from copy import deepcopy

import pytest
import torch
from onebits import blocks, evaluated, pairs, shifted
from torch import nn

import peftkern
from peftkern import OneBitConfig, onebit
from peftkern.onebit import reference

NAN = struct.pack("<f", float("nan"))


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
    model = shifted(placement, bits=bits, exclude_modules=["2"])
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
    first, second = (shifted(placement, seed, bits=bits) for seed in (1, 2))
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
    first, second = (shifted(placement, seed, bits=bits) for seed in (1, 2))
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
    model = shifted("lora", target_modules=["mix", "0.mlp.0", "0.mlp.2", "2"])
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
    model = shifted("lora")
    with torch.no_grad():
        pairs(model)[1].up[0, 0] = torch.inf
    for call in (onebit.export_bits, peftkern.save_adapter):
        with pytest.raises(ValueError, match="weight must be finite"):
            call(model, tmp_path / "file")
    assert not any(tmp_path.iterdir())
