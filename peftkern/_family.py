"""What `adapt`, `report`, `merge`, `save_adapter`, `load_adapter` and `explain` ask of a family.

How a family hooks in:

1. Its config is a frozen dataclass and a `Config`. `targets` finds the places that it names. There
   are three kinds of place, and a config builds for each what stands there:
   - `qlora.placing.LinearTarget`: a linear gives way to a layer that holds its weight. The config
     derives from `LinearConfig`, the layer from `LinearAdapter`: qlora has both. A layer whose
     term is linear in x gets merging by its `merged_rows`.
   - `_attached.AttachedTarget`: a module, be it a linear, an MLP, an attention or a whole block,
     stays, and gets a child that adds to its output, from its own input or from that of an earlier
     module. So all names of the model stay. The config derives from `AttachedConfig`, the child
     from `AttachedAdapter`: bottleneck has both.
   - `sparse.placing.SparseTarget`: a module stays as well, and its own parameters train, in part. A
     subclass of its class, which is an `InPlace`, tells what they are.
2. Its layer is an `Adapter`. What is asked of it has an answer here, for a layer of parameters that
   belongs to no file of peft's and cannot be merged; it overrides what it answers otherwise.
3. `_own.CONFIGS` knows the config by its `method`, so that files are read.

A config that stands for several, as a pair of methods does, says so by `configs`. What all layers
of a config have in common, a pool or a statistic, is made once by its `share`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from peftkern import _select, _sharded

Self = TypeVar("Self", bound="Config")

Parts = dict[str, Tensor]
# What is wanted of each part: its shape, with a word for a size that the file decides, and whether
# a file must have it.
Wanted = dict[str, tuple[Sequence[int | str], bool]]
Undo = Callable[[], object]
# Of every module, by id, the parents that hold it and its name there.
Places = dict[int, list[tuple[nn.Module, str]]]


@dataclass(frozen=True)
class Explained:
    """What `explain` tells of a layer.

    Args:
        holds: its weights' shape and how they are stored.
        device: the type of that of its weights.
        runs: the function, and what it computes in one pass.
        ops: by the pass, "forward" and "backward", the op that serves it.
        paths: of a GPU, by what its kernels are chosen; None where there is no choice.
    """

    holds: str
    device: str
    runs: str
    ops: dict[str, str]
    paths: Callable[[], str] | None = None


class Adapter(nn.Module):
    """What `adapt` puts into a model; what is saved and what trains is its own."""

    method: ClassVar[str]  # of its config
    config: Config

    @property
    def merged(self) -> bool:
        """Whether it is in a weight, so that it can neither train nor load."""
        return False

    def trained(self) -> list[nn.Parameter]:
        """The parameters that train."""
        return list(self.parameters())

    def parts(self) -> Parts:
        """What a file holds of it, detached and by the name behind the layer's own."""
        return dict(self.state_dict())

    def training_parts(self) -> Parts:
        """What a file may hold besides, for training to go on from where `parts` is rounded."""
        return {}

    def fill(self, parts: Parts) -> None:
        """The reverse of `parts`; they have been checked against `wanted`."""
        for name, part in self.state_dict().items():
            _sharded.fill(part, parts[name])

    def wanted(self) -> Wanted:
        return {name: (list(part.shape), True) for name, part in self.state_dict().items()}

    def fields(self) -> dict[str, Any]:
        """What a file says of it: fields of its config."""
        return self.config.fields()

    def base_hash(self) -> Any:
        """What a file says of the base that it belongs to, in JSON's types; None where any does."""
        return None

    def check(self, name: str, parts: Parts, base_hash: Any) -> None:
        """Raises TypeError or ValueError, by this name, where a file's parts, which have the wanted
        shapes, do not fit each other, or belong to another base.
        """

    def misfit(self, config: Config) -> str | None:
        """Why it cannot become what a file's config says; None where `take` can do it."""
        have, want = self.fields(), config.fields()
        other = (n for n in want if n not in config.free and want[n] != have.get(n))
        return ", ".join(f"{n} {want[n]!r}, not {have.get(n)!r}" for n in other) or None

    def take(self, config: Config) -> None:
        """Takes from a file's config what does not change a shape: a scale, say."""

    def warning(self) -> str | None:
        """What to know before it is saved."""
        return None

    def merge_obstacle(self) -> str | None:
        """Why no weight can take it in; None where it is a `LinearAdapter`."""
        return "it is not linear in its input"

    def format(self) -> str:
        """How what it computes with is stored, for a report."""
        return str(next(self.parameters()).dtype).removeprefix("torch.")

    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in (*self.parameters(), *self.buffers()))

    def mergeable(self) -> str:
        return f"no: {self.merge_obstacle()}"

    def vllm(self, layers: Sequence[Adapter]) -> str:
        """Whether vLLM loads it, where these are all of a model."""
        return f"no: {self.method}"

    def explained(self) -> Explained:
        raise NotImplementedError


class InPlace(Adapter):
    """One that is merged into weights where they lie, and whose module stays when it goes."""

    def refuse_merge(self, name: str, dtype: torch.dtype | None, requantize: bool) -> None:
        """Raises ValueError where `merge` cannot have it so, before anything changes."""
        raise NotImplementedError

    def merge_in_place(self) -> None:
        raise NotImplementedError

    def unmerge_in_place(self) -> None:
        """Gives the weights the bits back that they had before any training."""
        raise NotImplementedError

    def unload(self) -> None:
        """Leaves the module that was there before, with its weights as they are."""
        raise NotImplementedError


class Config:
    """What an adapter is to be, and where. Those of families are frozen dataclasses."""

    method: ClassVar[str]  # its name in files
    # Fields in which a file may differ from a layer that it is loaded into.
    free: ClassVar[frozenset[str]] = frozenset({"target_modules", "exclude_modules"})

    target_modules: Any
    exclude_modules: Any

    def configs(self) -> tuple[Config, ...]:
        """What is put in, in this order."""
        return (self,)

    def check(self, model: nn.Module, configs: Sequence[Config]) -> None:
        """Raises ValueError where it cannot stand beside these, or beside what is in the model."""

    def targets(self, model: nn.Module) -> Iterator[Target]:
        """The places that it names, those that cannot take it among them."""
        raise NotImplementedError

    def unmatched(self, names: Iterable[str]) -> list[str]:
        """The listed endings that none of these names has."""
        if isinstance(self.target_modules, str) or self.target_modules is None:
            return []
        there = list(names)
        return [
            ending
            for ending in self.target_modules
            if not any(_select.matches([ending], name) for name in there)
        ]

    def nothing(self, model: nn.Module) -> str:
        """Of a model in which it finds no place: what it asks for, and what is there instead."""
        raise NotImplementedError

    def share(self, targets: Sequence[Target]) -> Any:
        """What the layers at these places, all that it gets, have in common."""
        return None

    def of_module(self: Self, name: str) -> Self:
        """The config of the module of this name, where modules differ."""
        return self

    def fields(self) -> dict[str, Any]:
        """What a file says of it, in JSON's types."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]
        return {n: list(v) if isinstance(v, tuple) else v for n, v in values.items()}

    @classmethod
    def from_fields(cls: type[Self], content: dict[str, Any], names: Sequence[str]) -> Self:
        """The reverse, for the modules of these names.

        Raises:
            TypeError, ValueError: a field is unknown, or has no value of its.
        """
        return cls(**content)


class Target:
    """A place that may get an adapter.

    Args:
        module: as it is before.
        names: all that it has in the model.
        config: of this place alone.
    """

    slot: ClassVar[str] = ""  # one adapter a module and slot; "" is the module's own place
    order: int = 0  # what is put in earlier has a lower one
    final = False  # nothing can be undone from here on

    def __init__(self, module: nn.Module, names: list[str], config: Any) -> None:
        self.module, self.names, self.config = module, names, config
        self.start: Any = None  # what the adapter starts from, where its config does not make it
        self.shared: Any = None  # what its config's `share` gave

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def layer_name(self) -> str:
        """Of the `Adapter` that will be there."""
        return self.name

    def obstacle(self, model: nn.Module) -> str | None:
        """Why it cannot get one; None where it can."""
        raise NotImplementedError

    def remark(self) -> str | None:
        """What is left out though it gets one."""
        return None

    def wanted(self) -> Wanted:
        """As that of the `Adapter` that will be there."""
        raise NotImplementedError

    def check(self, name: str, parts: Parts, base_hash: Any) -> None:
        """As that of the `Adapter` that will be there."""

    def put(self, model: nn.Module, places: Places) -> Iterator[Undo]:
        """Puts it in, step by step; before each, gives what undoes it.

        Args:
            model: in which other targets' adapters may be by now.
            places: of all modules, as they were before.
        """
        raise NotImplementedError


def adapters(model: nn.Module) -> dict[str, Adapter]:
    """Every adapter by its name; one that stands in several places by the first."""
    return {n: m for n, m in model.named_modules() if isinstance(m, Adapter)}


def inside(model: nn.Module) -> set[nn.Module]:
    """What adapters consist of: no layers of the model, so no places for others."""
    layers = adapters(model).values()
    return {part for layer in layers for part in layer.modules() if part is not layer}
