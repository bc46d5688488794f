"""Places of supports: parameters of modules that stay, and quantised linears, which give way."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from peftkern import _check, _family, _select
from peftkern._family import Parts, Places, Undo, Wanted
from peftkern.qlora.frozen import base_of
from peftkern.qlora.placing import LinearTarget, features
from peftkern.sparse import stored, swap
from peftkern.sparse.pattern import Pattern, matrix_shape
from peftkern.sparse.state import states
from peftkern.sparse.support import Owner, put_on


def parameters_of(module: nn.Module, names: Iterable[str]) -> list[tuple[str, nn.Parameter]]:
    """Those of these names that the module has itself."""
    found = ((name, module._parameters.get(name)) for name in names)
    return [(name, parameter) for name, parameter in found if parameter is not None]


class SparseTarget(_family.Target):
    """A module whose parameters get supports, where they lie.

    Args:
        module, names: the module, and every name it has.
        config: a `SparseConfig`.
        special: why "all-linear" leaves it alone.
        owners: of every parameter of the model, as `owners_of` gives them.
    """

    def __init__(
        self,
        module: nn.Module,
        names: list[str],
        config: Any,
        special: str | None,
        owners: Mapping[int, Sequence[Owner]],
    ) -> None:
        super().__init__(module, names, config)
        self.special, self.owners = special, owners

    def parameters(self) -> list[tuple[str, nn.Parameter]]:
        return parameters_of(self.module, self.config.parameters)

    def obstacle(self, model: nn.Module) -> str | None:
        if self.special is not None:
            return self.special
        if not self.parameters():
            return f"it has no parameter {' or '.join(self.config.parameters)}"
        for name in self.names:
            parts = name.split(".")
            parents = (model.get_submodule(".".join(parts[:n])) for n in range(len(parts)))
            if any(_select.is_a(parent, "peft", "BaseTunerLayer") for parent in parents):
                return "inside an adapter of peft"
        for name, parameter in self.parameters():
            if (reason := swap.obstacle(self.module, name, self.config.form)) is not None:
                return f"its {name} {reason}"
            if type(parameter) is not nn.Parameter or type(parameter.data) is not Tensor:
                return f"its {name} is a {type(parameter.data).__name__}, not a plain tensor"
            if parameter.is_meta:
                return f"its {name} is on the meta device"
            if parameter.dtype not in _check.FLOATS:
                return f"its {name} is {parameter.dtype}, not float"
        return None

    def wanted(self) -> Wanted:
        found: Wanted = {}
        for name, parameter in self._at_home():
            found |= stored.wanted(name, parameter.shape)
        return found

    def check(self, name: str, parts: Parts, base_hash: Any) -> None:
        mine = self._at_home()
        shapes = {own: parameter.shape for own, parameter in mine}
        hashes = {own: stored.base_hash(parameter) for own, parameter in mine}
        stored.check(name, parts, base_hash, shapes, hashes)

    def _at_home(self) -> list[tuple[str, nn.Parameter]]:
        """A tied one is told of by the module that comes first."""
        return [(n, p) for n, p in self.parameters() if self.owners[id(p)][0][0] is self.module]

    def put(self, model: nn.Module, places: Places) -> Iterator[Undo]:
        rule = self.config.fields()["rule"]
        for attribute, parameter in self.parameters():
            if attribute in states(self.module):  # tied to one that has its support by now
                continue
            name = f"{self.name}.{attribute}".lstrip(".")
            if self.shared is None:
                pattern = none_of(parameter)
            elif not (pattern := self.shared[name]).nnz:
                continue
            here = self.owners[id(parameter)]
            for module, own_name in here:
                yield partial(_take_back, module, own_name)
            put_on(name, here, pattern, self.config.form, rule)


def _take_back(module: nn.Module, attribute: str) -> None:
    if attribute in states(module):
        swap.swap_back(module, attribute)


def none_of(weight: Tensor) -> Pattern:
    """A pattern without an entry, which a file fills."""
    none = torch.empty(0, dtype=torch.int64, device=weight.device)
    return Pattern.from_indices(none, none, matrix_shape(weight.shape))


class QuantizedTarget(LinearTarget):
    """A linear that is quantised, or is to be: S stands beside its weight."""

    def oriented(self, dense: Tensor) -> Tensor:
        """As `[out, in]`."""
        return dense.t() if _select.is_a(self.module, "transformers", "Conv1D") else dense

    def check(self, name: str, parts: Parts, base_hash: Any) -> None:
        hashes = {"weight": stored.base_hash(base_of(self.module))}
        stored.check(name, parts, base_hash, {"weight": features(self.module)}, hashes)

    def put(self, model: nn.Module, places: Places) -> Iterator[Undo]:
        if self.shared is not None:
            self.shared = self.shared[f"{self.name}.weight"]
        yield from super().put(model, places)
