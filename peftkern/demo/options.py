"""What can be chosen. Light, since the command line reads it to print its help."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from peftkern.onebit import OneBitConfig
from peftkern.qlora import LoraConfig
from peftkern.sparse import SmallestFraction, SparseConfig

SHARE = 0.05  # of the weights, that train with "sparse"
# Name on the command line -> the config that `peftkern.adapt` takes.
METHODS: dict[str, Callable[[], LoraConfig | OneBitConfig | SparseConfig]] = {
    "qlora": lambda: LoraConfig(r=16, lora_alpha=32, base="nf4"),
    "onebit": lambda: OneBitConfig(r=16, scale=10.0, base="nf4"),
    "sparse": lambda: SparseConfig(SmallestFraction(SHARE)),
}


class DemoFailed(Exception):
    """The demo could not do its work; the message is all that a user needs to see."""


@dataclass(frozen=True)
class Options:
    method: str = "qlora"
    steps: int | None = None  # the demo's own number
    text: Path | None = None
    model: Path | None = None
    out: Path = Path("demo-out")
    compare_peers: bool = False
    quiet: bool = False
    vision: bool = False
