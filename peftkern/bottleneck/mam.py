"""Prefixes, and prefixes along with parallel adapters: what they are to be, and where."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from peftkern import _check, _family, _select
from peftkern._family import Undo, Wanted
from peftkern.bottleneck import attention
from peftkern.bottleneck.config import BottleneckConfig
from peftkern.bottleneck.prefix import Heads, Prefix, Trunk


@dataclass(frozen=True)
class PrefixConfig(_family.Config):
    """Prefix tuning (Li and Liang, 2021): learned keys and values in attentions of transformers.

    In those that take eager attention or sdpa from transformers' table of attention functions, as
    nearly all of its models do. Every query sees the whole prefix, whatever the mask; tokens keep
    their positions, and the cache of keys and values holds what it held. Attention weights, where
    a model returns them, have a column for each key of the prefix first.

    Args:
        length: keys and values a head, at least 0; with 0 the model computes the very same bits.
        prefix_projection: train keys and values as what an MLP with tanh makes of an embedding, one
            for all attentions of a kind (an encoder's, a decoder's, those across). A file has what
            the MLP makes, and not the MLP. It is the child `trunk` of the first prefix, and where
            `fully_shard` spreads a model, it must be a unit of its own.
        encoder_hidden_size: the MLP's width.
        target_modules: "all-attention", a list of name endings, or a regular expression for the
            whole name.
        exclude_modules: name endings, or a regular expression, that are left alone.

    Raises:
        TypeError: a length or a width that is no int, or names that are no strings.
        ValueError: a value out of range.
    """

    method: ClassVar[str] = "prefix"

    length: int = 30
    prefix_projection: bool = False
    encoder_hidden_size: int = 800
    target_modules: str | tuple[str, ...] | list[str] = "all-attention"
    exclude_modules: str | tuple[str, ...] | list[str] = ()

    def __post_init__(self) -> None:
        _check.count("length", self.length, least=0)
        _check.count("encoder_hidden_size", self.encoder_hidden_size)
        for name in ("target_modules", "exclude_modules"):
            _check.expression(name, getattr(self, name))

    def targets(self, model: nn.Module) -> Iterator[_family.Target]:
        for module, names in _select.names(model).items():
            if any(self._named(module, name) for name in names):
                yield PrefixTarget(module, names, self)

    def _named(self, module: nn.Module, name: str) -> bool:
        if _select.matches(self.exclude_modules, name):
            return False
        if self.target_modules == "all-attention":
            return attention.attention(module)
        return _select.matches(self.target_modules, name)

    def nothing(self, model: nn.Module) -> str:
        places = _select.names(model).items()
        found = [_select.starred(n[0]) for m, n in places if attention.attention(m)]
        there = ", ".join(dict.fromkeys(found)) or "none"
        return (
            "target_modules must name an attention that can take a prefix, got "
            f"{self.target_modules!r}; attentions there: {there}"
        )

    def share(self, targets: Sequence[_family.Target]) -> dict[tuple[str, Heads], Trunk]:
        """What those of one name, but for the number of a layer, are made of."""
        trunks: dict[tuple[str, Heads], Trunk] = {}
        for target in targets if self.prefix_projection else ():
            assert isinstance(target, PrefixTarget)
            if target.kind not in trunks:
                width = target.heads.number * target.heads.key
                trunk = Trunk(self.length, width, self.encoder_hidden_size, target.like)
                trunks[target.kind] = trunk
        return trunks

    def fields(self) -> dict[str, Any]:
        return {"length": self.length}

    @classmethod
    def from_fields(cls, content: dict[str, Any], names: Sequence[str]) -> PrefixConfig:
        attentions = (re.escape(name.removesuffix(f".{PrefixTarget.slot}")) for name in names)
        return cls(**content, target_modules="|".join(attentions))


class PrefixTarget(_family.Target):
    """An attention that gets a prefix, or why it cannot."""

    slot = "prefix"
    order = 2  # on what stands there once linears have given way

    @property
    def layer_name(self) -> str:
        return f"{self.name}.{self.slot}"

    @property
    def heads(self) -> Heads:
        heads = attention.heads(self.module)
        assert heads is not None  # otherwise it has an obstacle
        return heads

    @property
    def kind(self) -> tuple[str, Heads]:
        return _select.starred(self.name), self.heads

    @property
    def like(self) -> Tensor:
        return next(self.module.parameters())

    def obstacle(self, model: nn.Module) -> str | None:
        return attention.obstacle(self.module) or _select.closed(model, self.names)

    def wanted(self) -> Wanted:
        meta = torch.empty(0, device="meta")
        return Prefix(self.heads, self.config.length, meta).wanted()

    def put(self, model: nn.Module, places: Any) -> Iterator[Undo]:
        module = model.get_submodule(self.name)
        trunk = self.shared.get(self.kind)
        shared = any(trunk is part for part in model.modules())
        prefix = Prefix(self.heads, self.config.length, self.like, trunk, shared)
        yield partial(attention.take_out, module)
        attention.put(module, prefix)


@dataclass(frozen=True)
class MamConfig(_family.Config):
    """The mix-and-match adapter of He et al. (2022): a prefix, and a scaled adapter beside the FFN.

    The pair of a `PrefixConfig` and a `BottleneckConfig(mode="parallel", place="ffn")` with relu,
    which may as well be applied one by one, in either order. Published are a length of 30 and an r
    of 512 at a scale of 4 for generation, and a length and an r of 16 for classification, at 2.

    Args:
        length: of the prefix.
        r: width of the adapter.
        scale: of the adapter.
        dropout: share of what the adapter's `up` reads that it does not see, in [0, 1].
        prefix_projection, encoder_hidden_size: as in `PrefixConfig`.
        exclude_modules: name endings, or a regular expression, that are left alone by both.

    Raises:
        TypeError: a length or a width that is no int, or names that are no strings.
        ValueError: a value out of range.
    """

    length: int = 30
    r: int = 512
    scale: float = 4.0
    dropout: float = 0.0
    prefix_projection: bool = False
    encoder_hidden_size: int = 800
    exclude_modules: str | tuple[str, ...] | list[str] = ()

    def __post_init__(self) -> None:
        self.configs()  # which refuse what is out of range

    def configs(self) -> tuple[_family.Config, ...]:
        prefix = PrefixConfig(
            self.length, self.prefix_projection, self.encoder_hidden_size,
            exclude_modules=self.exclude_modules,
        )  # fmt: skip
        adapter = BottleneckConfig(
            r=self.r, activation="relu", mode="parallel", place="ffn", scale=self.scale,
            dropout=self.dropout, exclude_modules=self.exclude_modules,
        )  # fmt: skip
        return prefix, adapter
