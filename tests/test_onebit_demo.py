"""The demos of 1-bit adapters: on a language model of a few thousand parameters, and on digits."""

import json

import pytest
import torch
from test_demo import book, folder  # noqa: F401

import peftkern
from peftkern import cli, onebit
from peftkern.demo import DemoFailed, Options, model, text, train
from peftkern.demo.run import run


@pytest.fixture
def vision():
    pytest.importorskip("sklearn", reason="reads the digits of scikit-learn")
    from peftkern.demo import vision

    return vision


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--vision"], "--vision must stand with --method onebit, got qlora"),
        (["--method", "onebit", "--vision", "--text", __file__], "without --text and --model"),
        (["--method", "onebit", "--compare-peers"], "must stand with what peft has, got --method"),
        (["--method", "onebit", "--vision", "--steps", "0"], "--steps must be at least 1, got 0"),
    ],
)
def test_wrong_arguments_are_status_2(arguments, message, capsys):
    assert cli.main(["demo", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_missing_extra_is_named(monkeypatch, capsys):
    monkeypatch.setitem(peftkern._extras.MODULES, "vision", ("not_a_module",))
    assert cli.main(["demo", "--method", "onebit", "--vision"]) == 1
    assert capsys.readouterr().err == (
        "peftkern: --vision must have not_a_module installed, got none: "
        "pip install 'peftkern[vision]'\n"
    )


def test_the_language_demo_from_end_to_end(folder, book, tmp_path, capsys):  # noqa: F811
    arguments = ["demo", "--method", "onebit", "--model", str(folder), "--text", str(book)]
    assert cli.main([*arguments, "--out", str(tmp_path), "--steps", "3"]) == 0
    shown = capsys.readouterr().out
    assert "requantised to nf4" in shown and "held-out perplexity, after" in shown
    assert "adapter's file" in shown and "LoRA's file, same rank, float32" in shown
    document = json.loads((tmp_path / "result.json").read_text())
    result = train.Result(**document["results"]["peftkern"])
    size = (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size
    assert size < 4 * result.trainable / 3  # names and shapes take more than such small matrices
    assert result.held_out_after < result.held_out_before

    loaded = model.load(folder, bars=False)
    peftkern.adapt(loaded.model, peftkern.OneBitConfig(r=16, base="nf4"))
    peftkern.load_adapter(loaded.model, tmp_path / "adapter")
    held_out = text.windows(text.split(text.read(book)).held_out, loaded.tokenizer, 128)
    found = train.evaluate(loaded.model.eval(), held_out, 4)
    assert found == pytest.approx(result.held_out_after, rel=1e-5)


def test_the_vision_demo_from_end_to_end(vision, tmp_path, monkeypatch, capsys):
    short = vision.Recipe(steps=40, base_steps=60, r=8)
    monkeypatch.setattr(vision, "Recipe", lambda **own: short)
    assert cli.main(["demo", "--method", "onebit", "--vision", "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr()
    assert "held out" in shown.out and "1 bit, read from its file" in shown.out
    assert "step 40 of 40" in shown.err
    document = json.loads((tmp_path / "result.json").read_text())
    results = {n: vision.Result(**r) for n, r in document["results"].items()}
    assert list(results) == [vision.HEAD, vision.FLOAT, vision.OURS]
    head, plain, ours = results.values()
    assert ours.accuracy > head.accuracy and plain.trainable == ours.trainable > head.trainable
    assert ours.adapter_bytes == (tmp_path / "adapter.bin").stat().st_size == 4 * 2 * (64 + 8)
    assert plain.adapter_bytes > 25 * ours.adapter_bytes
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")

    torch.manual_seed(short.seed)
    reader = vision.transformer()
    config = peftkern.OneBitConfig(r=8, scale=short.scale, placement="adaptformer")
    onebit.import_bits(peftkern.adapt(reader, config), tmp_path / "adapter.bin")
    twin = peftkern.load_adapter(vision.transformer(), tmp_path / "adapter")
    for a, b in zip(reader.vit.layers, twin.vit.layers, strict=True):
        assert torch.equal(a.adapter.dense()[1], b.adapter.dense()[1])


def test_the_twin_starts_as_the_identity_and_where_ours_starts(vision):
    recipe = vision.Recipe()
    pixels = torch.rand(3, 1, 8, 8)
    outputs, downs = [], []
    for place in (lambda *_: None, vision._place_float, vision._place):
        torch.manual_seed(0)
        base = vision.transformer().eval()
        place(base, recipe)
        outputs.append(base(pixels).logits.detach())
        downs.append(getattr(base.vit.layers[1], "adapter", None))
    assert torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[0], outputs[2])
    torch.testing.assert_close(outputs[0], outputs[2], rtol=0.2, atol=0.05)
    assert torch.equal(downs[1].down, downs[2].down) and not downs[1].up.any()


def test_no_image_is_on_two_sides(vision):
    digits = vision.digits()
    assert [len(part) for part in (digits.base, digits.train, digits.held_out)] == [900, 600, 297]
    assert digits.base.pixels.shape == (900, 1, 8, 8) and digits.base.pixels.max() == 1
    upright = digits.train.pixels.rot90(-1, (2, 3))
    seen = {image.numpy().tobytes() for image in digits.base.pixels}
    repeats = sum(image.numpy().tobytes() in seen for image in upright)
    assert repeats == 0 and not torch.equal(upright, digits.train.pixels)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"accuracy": 0.5}, "must read more than the head alone, got 50.0% and 60.0%"),
        ({"read": 0.6}, "the file must hold what was trained, got 60.0% from it"),
    ],
)
def test_a_demo_that_shows_nothing_fails(change, message, vision):
    head = vision.Result([1.0], [1.0], 0.6, 1, 0)
    ours = vision.Result([1.0], [1.0], change.get("accuracy", 0.7), 1, 1)
    with pytest.raises(DemoFailed, match=message):
        vision._judge({vision.HEAD: head, vision.OURS: ours}, change.get("read", 0.7))


def test_lora_says_nothing_of_1_bit_files(folder, book, tmp_path, capsys):  # noqa: F811
    run(Options(steps=1, text=book, model=folder, out=tmp_path, quiet=True))
    shown = capsys.readouterr().out
    assert "adapter's file" in shown and "LoRA's file" not in shown
