"""What a bottleneck adapter is to be, and beside or behind which modules."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from peftkern import _check, _select
from peftkern._attached import AttachedConfig, AttachedTarget
from peftkern.bottleneck import places
from peftkern.bottleneck.conformer import ConformerAdapter
from peftkern.bottleneck.convolution import ConvAdapter
from peftkern.bottleneck.layer import BottleneckAdapter, Branch
from peftkern.bottleneck.reference import ACTIVATIONS

_KINDS = {"linear": BottleneckAdapter, "conv": ConvAdapter, "conformer": ConformerAdapter}
_CHOICES = {
    "activation": tuple(ACTIVATIONS),
    "mode": ("parallel", "sequential"),
    "place": ("ffn", "attn", "both"),
    "norm": (None, "in", "out"),
    "kind": tuple(_KINDS),
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
        kernel: pixels along an axis that kind "conv" sees at once, 1 where None; tokens that kind
            "conformer" sees, 31 where None.
        repeat: how many of kind "conv" stand one behind the other, which is sequential.
        kind: "linear"; "conv" on images `[batch, channels, height, width]`, of modules that are
            named; "conformer" on sequences, which has its own activation. `ConvAdapter` and
            `ConformerAdapter` have their equations; "conv" takes no norm "out", since behind `up`
            it makes a branch of size 1 of whatever is there.
        prenorm: of kind "conformer", its own LayerNorm of x.
        target_modules: None for what `place` says; or a list of name endings, or a regular
            expression for the whole name, of modules of any model, which `place` then leaves open.
            Such a module is called with x first, and gives a tensor or a tuple that begins with it.
        exclude_modules: name endings, or a regular expression, that are left alone.

    Raises:
        TypeError: a width or a count that is no int, or names that are no strings.
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
    prenorm: bool = True
    target_modules: str | tuple[str, ...] | list[str] | None = None
    exclude_modules: str | tuple[str, ...] | list[str] = ()

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if (value := getattr(self, name)) not in choices:
                raise ValueError(f"{name} must be one of {_listed(choices)}, got {value!r}")
        for name in ("r", "repeat"):
            _check.count(name, getattr(self, name))
        if self.rate is not None and not self.rate > 0:
            raise ValueError(f"rate must be above 0, got {self.rate}")
        self._check_kind()
        if not math.isfinite(self.scale):
            raise ValueError(f"scale must be finite, got {self.scale}")
        _check.probability("dropout", self.dropout)
        if self.target_modules is not None:
            _check.expression("target_modules", self.target_modules)
        _check.expression("exclude_modules", self.exclude_modules)

    def _check_kind(self) -> None:
        """What a kind has no use for is refused, where it differs from what a field starts as."""
        allowed: dict[str, tuple[object, ...]] = {}
        if self.kind == "linear":
            allowed = {"kernel": (None,), "prenorm": (True,)}
        elif self.kind == "conv":
            allowed = {"norm": (None, "in"), "prenorm": (True,)}
        else:
            allowed = {"activation": ("relu",), "norm": (None,)}
        if self.kind != "conv":
            allowed["repeat"] = (1,)
        elif self.repeat > 1:
            allowed["mode"] = ("sequential",)
        for name, values in allowed.items():
            if (value := getattr(self, name)) not in values:
                wanted = " or ".join(map(repr, values))
                raise ValueError(f"{name} must be {wanted} for kind {self.kind!r}, got {value!r}")
        if self.kernel is not None:
            _check.count("kernel", self.kernel)
        if self.kind == "conv" and self.target_modules is None:
            raise ValueError("target_modules must name modules for kind 'conv', got None")

    def rank(self, width: int) -> int:
        """On an input of this width."""
        return self.r if self.rate is None else round(width / self.rate)

    def targets(self, model: nn.Module) -> Iterator[AttachedTarget]:
        found = places.by_place(model, self.place)
        if self.target_modules is not None:
            found = places.by_name(model, self.target_modules, self.kind == "conv")
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
        if self.rank(target.widths[0]) < 1:
            return f"rate {self.rate:g} leaves no rank of its width {target.widths[0]}"
        return None

    def build(self, target: AttachedTarget, device: torch.device | None) -> Branch:
        assert target.widths is not None
        floats = (p.dtype for p in target.module.parameters() if p.is_floating_point())
        dtype = torch.promote_types(next(floats, torch.float32), torch.float32)
        kind = _KINDS[self.kind]
        return kind(*target.widths, self, device, dtype).train(target.module.training)


def _listed(choices: tuple[str | None, ...]) -> str:
    return ", ".join(map(repr, choices))
