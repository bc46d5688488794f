"""What the files of an adapter hold, and whether it fits what is wanted of them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from peftkern import _check
from peftkern._family import Config, Parts, Wanted


@dataclass(frozen=True)
class Stored:
    """What the two files of an adapter hold, checked against each other.

    Args:
        parts: of every layer, by its name.
        own: by the same names, the config of each.
        configs: those that put such layers into a model that has none, each with their names.
        bases: by the same names, of those that belong to one base alone, its hash.
    """

    parts: dict[str, Parts]
    own: dict[str, Config]
    configs: Sequence[tuple[Config, Collection[str]]]
    bases: dict[str, Any] = field(default_factory=dict)


def check_fit(source: str, stored: dict[str, Parts], places: dict[str, Wanted]) -> None:
    """Raises unless what is stored is what is wanted, name by name and shape by shape."""
    for title, names in (
        ("the model has no such adapter", stored.keys() - places.keys()),
        ("the file lacks them", places.keys() - stored.keys()),
    ):
        if names:
            raise ValueError(
                f"{source} must hold the model's adapters, got {title}: {_check.listed(names)}"
            )
    for name, have in stored.items():
        wanted = places[name]
        missing = {part for part, (_, needed) in wanted.items() if needed} - have.keys()
        if missing or have.keys() - wanted.keys():
            raise ValueError(
                f"{name} must have {', '.join(wanted)} as in the model, got {', '.join(have)}"
            )
        for part, tensor in have.items():
            _check.shape(f"{name}.{part}", tensor, wanted[part][0])
