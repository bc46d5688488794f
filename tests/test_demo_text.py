"""What the demo trains on, and what it holds out."""

import os
import subprocess
import sys

import torch

from peftkern.demo import text, train


def test_what_is_held_out_is_not_trained_on():
    topics = text.read(None)
    split = text.split(topics)
    seen = {" ".join(p.split()) for t in split.train for p in text.paragraphs(t)}
    unseen = {" ".join(p.split()) for t in split.held_out for p in text.paragraphs(t)}
    assert seen and unseen and not seen & unseen
    kept = sum(map(len, split.train)) + sum(map(len, split.held_out))
    assert kept > 0.6 * sum(map(len, topics.values()))


def test_the_split_is_the_same_in_every_process():
    script = "from peftkern.demo import text; print(text.split(text.read(None)))"
    outputs = {
        subprocess.run(
            [sys.executable, "-c", script],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1 and outputs.pop()


def test_the_order_of_topics_does_not_matter():
    topics = {f"topic {n}": f"text {n}" for n in range(20)}
    assert text.split(topics) == text.split(dict(reversed(topics.items())))


def test_every_text_has_something_to_hold_out(tmp_path):
    book = tmp_path / "book.txt"
    book.write_text("\n\n".join(f"paragraph {n}, " * 50 for n in range(20)))
    split = text.split(text.read(book))
    assert split.held_out and split.train
    short = tmp_path / "short.txt"
    short.write_text("one paragraph")
    assert text.split(text.read(short)).held_out == ["one paragraph"]


def test_every_window_comes_once_before_any_comes_again():
    windows = torch.arange(10).view(10, 1)
    recipe = train.Recipe(steps=5, batch=4)
    order = torch.cat(list(train.batches(windows, recipe))).flatten()
    assert sorted(order[:10].tolist()) == sorted(order[10:].tolist()) == list(range(10))
    assert torch.equal(order, torch.cat(list(train.batches(windows, recipe))).flatten())
