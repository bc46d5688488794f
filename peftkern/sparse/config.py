"""Which weights of which modules train, and by what rule."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from peftkern import _check, _family, _select
from peftkern._family import Wanted
from peftkern.qlora.config import LoraConfig
from peftkern.qlora.format import Format
from peftkern.qlora.frozen import base_of
from peftkern.qlora.placing import LinearConfig, LinearTarget
from peftkern.sparse import select, stored
from peftkern.sparse.check import FORMS
from peftkern.sparse.pattern import Pattern
from peftkern.sparse.placing import QuantizedTarget, SparseTarget, parameters_of
from peftkern.sparse.select import AbsThreshold, Rule
from peftkern.sparse.support import owners_of


@dataclass(frozen=True)
class SparseConfig(LinearConfig):
    """Some weights train, and all others stay what they are: SaRA (Hu et al., 2024) and its kin.

    Args:
        rule: which ones: `sparse.AbsThreshold`, `SmallestFraction`, `Budget` or `TopGrad`, which
            look at all targets together, or masks or patterns by the parameters' names. Of a base
            to quantise it sees the weights as they are before, of one that is quantised already
            those that the codes stand for, among which many are equal.
        form: "value": the weights themselves, in float32 beside the model, train, and are written
            into it, so that it costs what it did without; "delta": a sparse S is added to what W
            gives, as a quantised base needs, which cannot take single values.
        parameters: of the targets, by their names there; those that a target lacks are passed over.
        target_modules: "all-linear" (every linear but the output head and routers), a list of name
            endings, or a regular expression for the whole name. What is named may be a convolution,
            an embedding, a norm, or any module with parameters.
        exclude_modules: name endings, or a regular expression, that are left alone.
        base, block_size, nested, quant_storage: of a base to quantise, as in `LoraConfig`. With
            "delta" alone.

    Raises:
        TypeError, ValueError: a value out of range.
    """

    method = "sparse"

    rule: Rule | Mapping[str, Any] = field(default_factory=lambda: AbsThreshold(2e-3))
    form: str = "value"
    parameters: tuple[str, ...] | list[str] = ("weight",)
    target_modules: str | tuple[str, ...] | list[str] = "all-linear"
    exclude_modules: str | tuple[str, ...] | list[str] = ()
    base: str | Format | None = None
    block_size: int = 64
    nested: bool = True
    quant_storage: torch.dtype = torch.uint8

    def __post_init__(self) -> None:
        select.as_rule(self.rule)
        if self.form not in FORMS:
            raise ValueError(f"form must be 'value' or 'delta', got {self.form!r}")
        if self.base is not None and self.form == "value":
            raise ValueError("form must be 'delta' on a quantised base, got 'value'")
        if isinstance(self.parameters, str) or not self.parameters:
            raise ValueError(f"parameters must be a list of names, got {self.parameters!r}")
        for name in ("target_modules", "exclude_modules"):
            _check.expression(name, getattr(self, name))
        self.of_base()

    def of_base(self) -> LoraConfig:
        """The config of a LoRA on the same base, which says what is wrong with it."""
        names = ("target_modules", "exclude_modules", "base", "block_size", "nested")
        options = {name: getattr(self, name) for name in (*names, "quant_storage")}
        return LoraConfig(**options)

    def targets(self, model: nn.Module) -> Iterator[_family.Target]:
        owners = owners_of(model)
        for target in super().targets(model):
            assert isinstance(target, LinearTarget)
            if target.config.base is None and isinstance(base_of_any(target.module), Tensor):
                yield SparseTarget(target.module, target.names, self, target.special, owners)
            else:
                yield QuantizedTarget(
                    target.module, target.names, target.config, target.tied, target.base,
                    target.special,
                )  # fmt: skip

    def nothing(self, model: nn.Module) -> str:
        linears = ", ".join(_select.linears(_select.names(model))) or "none"
        return (
            "target_modules must name a module whose parameters can train in part, got "
            f"{self.target_modules!r}; linears there: {linears}"
        )

    def share(self, targets: Sequence[_family.Target]) -> dict[str, Pattern]:
        """The selection, by the parameters' names; a weight that several share is asked once."""
        weights: dict[str, Tensor] = {}
        first: dict[int, str] = {}
        names: dict[str, str] = {}
        for target in targets:
            for name, weight in self._weights(target):
                names[name] = first.setdefault(id(weight), name)
                weights[names[name]] = weight
        found = select.as_rule(self.rule).select(weights)
        return {name: found[own] for name, own in names.items()}

    def _weights(self, target: _family.Target) -> Iterator[tuple[str, Tensor]]:
        if isinstance(target, QuantizedTarget):
            base = base_of(target.module)
            dense = base if isinstance(base, Tensor) else base.dequantize()
            yield f"{target.name}.weight", target.oriented(dense)
            return
        for attribute, weight in parameters_of(target.module, self.parameters):
            yield f"{target.name}.{attribute}".lstrip("."), weight

    def unquantised(self) -> SparseConfig:
        return replace(self, base=None)

    def unfit(self, module: nn.Module, quantized: bool) -> str | None:
        if quantized and self.form == "value":
            return "its base is quantised, which takes form='delta'"
        if "weight" not in self.parameters:
            return "of a quantised linear the weight alone can train"
        return self.of_base().unfit(module, quantized)

    def build(self, linear: nn.Module, start: Any, shared: Any) -> nn.Module:
        from peftkern.sparse.quantized import SparseQuantizedLinear  # which needs this module

        return SparseQuantizedLinear.from_config(linear, self, shared)

    def wanted(self, rows: int, columns: int, bias: bool) -> Wanted:
        return stored.wanted("weight", [rows, columns])

    def fields(self) -> dict[str, Any]:
        """What the base is, belongs to the model."""
        return {
            "form": self.form,
            "parameters": list(self.parameters),
            "rule": select.as_rule(self.rule).fields(),
        }

    @classmethod
    def from_fields(cls, content: dict[str, Any], names: Sequence[str]) -> SparseConfig:
        return FromFile(
            **{name: value for name, value in content.items() if name != "rule"},
            target_modules="|".join(map(re.escape, names)),
            told=content.get("rule"),
        )


@dataclass(frozen=True)
class FromFile(SparseConfig):
    """One whose entries a file names; whatever the rule was, it is only told of."""

    told: dict[str, Any] | None = None

    def targets(self, model: nn.Module) -> Iterator[_family.Target]:
        yield from super().targets(model)
        if _select.matches(self.target_modules, ""):  # the model, which no other config can name
            yield SparseTarget(model, [""], self, None, owners_of(model))

    def share(self, targets: Sequence[_family.Target]) -> Any:
        return None

    def fields(self) -> dict[str, Any]:
        return super().fields() | {"rule": self.told}


def base_of_any(module: nn.Module) -> Any:
    """The weight of a linear as it is stored, or that of any other module, a tensor."""
    weight = module._parameters.get("weight")
    return base_of(module) if weight is not None else torch.empty(0)
