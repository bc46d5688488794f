"""What a bottleneck adapter is to be, and beside or behind which modules."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from peftkern import _check, _select
from peftkern._attached import AttachedAdapter, AttachedConfig, AttachedTarget
from peftkern.bottleneck import layer, places
from peftkern.bottleneck.reference import ACTIVATIONS

_CHOICES = {
    "activation": tuple(ACTIVATIONS),
    "mode": ("parallel", "sequential"),
    "place": ("ffn", "attn", "both"),
    "norm": (None, "in", "out"),
    "kind": ("linear", "conv", "conformer"),
}


@dataclass(frozen=True)
class BottleneckConfig(AttachedConfig):
    """Adapters beside or behind the sublayers of a transformer (He et al., 2022; Houlsby, 2019).

    `BottleneckAdapter` has the equation. Parallel, the adapter reads what the sublayer reads and
    adds to what it gives; sequential, it reads what it gives, and adds to that.

    Args:
        r: width of the bottleneck, at least 1.
        rate: instead of r, what the input's width is divided by: r = round(width / rate).
        activation: identity, relu, gelu (by erf), gelu_tanh, quickgelu, silu or tanh.
        mode: "parallel" or "sequential".
        place: "ffn", "attn" or "both" of every block: of transformers, timm, or any model with
            blocks in a list, whose parts have names that are usual there.
        scale: what the branch is multiplied by; papers have 4 for translation, 2 for GLUE.
        train_scale: whether that trains.
        norm: None, a LayerNorm of x ("in"), or one of the branch ("out"), which the residual never
            sees.
        dropout: share of the activation's result that the second product does not see, in [0, 1].
        kernel: of kinds that have one; None is their own default.
        repeat: how many of kind "conv" stand one behind the other.
        kind: "linear"; "conv" on images; "conformer" on sequences.
        target_modules: None for what `place` says; or a list of name endings, or a regular
            expression for the whole name, of modules of any model, which `place` then leaves open.
            Such a module is called with x first, and gives a tensor or a tuple that begins with it.
        exclude_modules: name endings, or a regular expression, that are left alone.

    Raises:
        ValueError: a value out of range.
    """

    method = "bottleneck"
    free = frozenset(
        {"target_modules", "exclude_modules", "place", "r", "rate", "scale", "dropout"}
    )

    r: int = 64
    rate: float | None = None
    activation: str = "relu"
    mode: str = "parallel"
    place: str = "ffn"
    scale: float = 1.0
    train_scale: bool = False
    norm: str | None = None
    dropout: float = 0.0
    kernel: int | None = None
    repeat: int = 1
    kind: str = "linear"
    target_modules: str | tuple[str, ...] | list[str] | None = None
    exclude_modules: str | tuple[str, ...] | list[str] = ()

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if (value := getattr(self, name)) not in choices:
                raise ValueError(f"{name} must be one of {_listed(choices)}, got {value!r}")
        for name in ("r", "repeat"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.rate is not None and not self.rate > 0:
            raise ValueError(f"rate must be above 0, got {self.rate}")
        if self.kernel is not None and self.kind == "linear":
            raise ValueError(f"kernel must be None for kind 'linear', got {self.kernel}")
        if self.repeat > 1 and self.kind != "conv":
            raise ValueError(f"repeat must be 1 for kind {self.kind!r}, got {self.repeat}")
        if not math.isfinite(self.scale):
            raise ValueError(f"scale must be finite, got {self.scale}")
        _check.probability("dropout", self.dropout)
        for name in ("target_modules", "exclude_modules"):
            if isinstance(expression := getattr(self, name), str):
                try:
                    re.compile(expression)
                except re.error as error:
                    raise ValueError(
                        f"{name} must be a regular expression, got {expression!r} ({error})"
                    ) from error

    def rank(self, width: int) -> int:
        """On an input of this width."""
        return self.r if self.rate is None else round(width / self.rate)

    def targets(self, model: nn.Module) -> Iterator[AttachedTarget]:
        found = places.by_place(model, self.place)
        if self.target_modules is not None:
            found = places.by_name(model, self.target_modules)
        for place in found:
            if not any(_select.matches(self.exclude_modules, name) for name in place.names):
                reader = place.reader if self.mode == "parallel" else None
                widths = place.widths
                if self.mode == "sequential" and widths is not None:
                    widths = (widths[1], widths[1])
                yield AttachedTarget(place.module, place.names, self, reader, widths)

    def nothing(self, model: nn.Module) -> str:
        there = ", ".join(places.lists(model)) or "none"
        if self.target_modules is None:
            return (
                f"place must name a sublayer that can take an adapter, got {self.place!r}; layers "
                f"in lists there: {there}; target_modules names those of any model"
            )
        return (
            "target_modules must name a module that can take an adapter, got "
            f"{self.target_modules!r}; layers in lists there: {there}"
        )

    def unfit(self, target: AttachedTarget) -> str | None:
        assert target.widths is not None
        if self.kind not in layer.KINDS:
            return f"there is no adapter of kind {self.kind!r}"
        if self.rank(target.widths[0]) < 1:
            return f"rate {self.rate:g} leaves no rank of its width {target.widths[0]}"
        return None

    def build(self, target: AttachedTarget, device: torch.device | None) -> AttachedAdapter:
        assert target.widths is not None
        floats = (p.dtype for p in target.module.parameters() if p.is_floating_point())
        dtype = torch.promote_types(next(floats, torch.float32), torch.float32)
        kind = layer.KINDS[self.kind]
        return kind(*target.widths, self, device, dtype).train(target.module.training)


def _listed(choices: tuple[str | None, ...]) -> str:
    return ", ".join(map(repr, choices))
