"""The demo of selected weights, on a language model of a few thousand parameters."""

import json

import pytest
from test_demo import book, folder  # noqa: F401

import peftkern
from peftkern import cli
from peftkern.demo import model, selected, text, train


def test_it_runs_from_end_to_end_and_its_file_gives_the_trained_model(
    folder,  # noqa: F811
    book,  # noqa: F811
    tmp_path,
    capsys,
):
    arguments = ["demo", "--method", "sparse", "--model", str(folder), "--text", str(book)]
    assert cli.main([*arguments, "--out", str(tmp_path), "--steps", "3"]) == 0
    shown = capsys.readouterr().out
    assert "Packed and dense differ by" in shown and "bytes a trained weight" in shown
    results = json.loads((tmp_path / "result.json").read_text())["results"]
    ours, dense, lora = (train.Result(**results[name]) for name in selected.CONTENDERS)
    assert ours.trainable == dense.trainable
    assert ours.held_out_after == pytest.approx(dense.held_out_after, abs=1e-4)
    assert 0.5 < lora.trainable / ours.trainable < 2

    loaded = model.load(folder, bars=False)
    peftkern.load_adapter(loaded.model, tmp_path / "adapter")
    held_out = text.windows(text.split(text.read(book)).held_out, loaded.tokenizer, 128)
    found = train.evaluate(loaded.model, held_out, 4)
    assert found == pytest.approx(ours.held_out_after, rel=1e-5)


def test_it_does_not_go_beside_peft(capsys):
    assert cli.main(["demo", "--method", "sparse", "--compare-peers"]) == 2
    message = "--compare-peers must stand with what peft has, got --method sparse"
    assert message in capsys.readouterr().err
