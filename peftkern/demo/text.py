"""The text: what is trained on, what is held out, and both as windows of tokens."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peftkern.demo.options import DemoFailed

HELD_OUT_SHARE = 1 / 8
PASSAGE_CHARACTERS = 2000  # of a user's own file: a few windows of tokens


@dataclass(frozen=True)
class Split:
    train: list[str]
    held_out: list[str]


def read(path: Path | None) -> dict[str, str]:
    """Text by topic: Python's own help, or a file cut into passages that name themselves."""
    if path is None:
        from pydoc_data.topics import topics

        return dict(topics)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DemoFailed(f"--text must be readable UTF-8, got {path}: {error}") from error
    passages: list[str] = []
    for paragraph in paragraphs(text):
        if passages and len(passages[-1]) < PASSAGE_CHARACTERS:
            passages[-1] += "\n\n" + paragraph
        else:
            passages.append(paragraph)
    return {passage: passage for passage in passages}


def split(topics: dict[str, str]) -> Split:
    """Holds out the eighth of the topics that a hash of their names puts first.

    The hash is the same in every process, unlike Python's own. Topics quote one another, so a
    paragraph of a held-out topic is taken out of every topic that is trained on.
    """
    order = sorted(topics, key=lambda name: hashlib.sha256(name.encode()).digest())
    first = math.ceil(len(order) * HELD_OUT_SHARE)
    held_out = [topics[name] for name in order[:first]]
    unseen = {_words(paragraph) for text in held_out for paragraph in paragraphs(text)}
    train = []
    for name in order[first:]:
        kept = [p for p in paragraphs(topics[name]) if _words(p) not in unseen]
        if kept:
            train.append("\n\n".join(kept))
    return Split(train, held_out)


def paragraphs(text: str) -> list[str]:
    return [paragraph for paragraph in text.split("\n\n") if paragraph.strip()]


def _words(paragraph: str) -> str:
    """The same for every indentation and line length."""
    return " ".join(paragraph.split())


def windows(texts: list[str], tokenizer: Any, length: int) -> Tensor:
    """Tokens of all texts, one after the other: `[windows, length]`; what is left over is dropped.

    Raises:
        DemoFailed: there is less than one window.
    """
    tokens: list[int] = []
    for text in texts:
        tokens += tokenizer(text, add_special_tokens=False)["input_ids"]
        if tokenizer.eos_token_id is not None:
            tokens.append(tokenizer.eos_token_id)
    count = len(tokens) // length
    if count == 0:
        raise DemoFailed(
            f"text must have at least {length} tokens to train on and as many to hold out, "
            f"got {len(tokens)}"
        )
    return torch.tensor(tokens[: count * length]).view(count, length)


def prompt(split: Split) -> str:
    """The opening of the first held-out paragraph that reads as prose."""
    for text in split.held_out:
        for paragraph in paragraphs(text):
            words = paragraph.split()
            if len(words) >= 24 and words[0].isalpha():
                return " ".join(words[:12])
    return " ".join(split.held_out[0].split()[:12])


@dataclass(frozen=True)
class Data:
    train: Tensor  # [windows, length]
    held_out: Tensor
    prompt: str


def data(path: Path | None, tokenizer: Any, length: int) -> Data:
    """What the demo trains on, holds out and samples from."""
    parts = split(read(path))
    return Data(
        windows(parts.train, tokenizer, length),
        windows(parts.held_out, tokenizer, length),
        prompt(parts),
    )
