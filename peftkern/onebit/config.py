"""What a 1-bit adapter is to be, and where: in the place of linears, or beside the MLPs of vision
transformers."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar

import torch
from torch import nn

from peftkern import _check, _family
from peftkern._attached import AttachedConfig, AttachedTarget
from peftkern._family import Wanted
from peftkern.onebit import blocks, check
from peftkern.qlora.config import LoraConfig
from peftkern.qlora.format import Format
from peftkern.qlora.placing import LinearConfig


@dataclass(frozen=True)
class OneBitConfig(_family.Config):
    """Adapters of one bit a weight (Jie, Wang and Deng, Bi-AdaptFormer and Bi-LoRA, 2023).

    The weights that train are float32; every forward takes a sign of each, and a mean and a std of
    each matrix. An adapter is not the identity at first, as it is not where it was published: its
    `up` starts at +-6e-4, since zeros have no sign.

    Args:
        r: rank, or width of the bottleneck; at least 1.
        scale: what the branch is multiplied by; published runs search 0.01 to 100, tenfold apart.
        bits: 1, 2 or 4 a weight.
        placement: "lora" adds scale * Up Down x to linears, "adaptformer" adds
            scale * Up relu(Down x) to the blocks of vision transformers, where x is the stream that
            the block's MLP reads, before its norm.
        dropout: share of the r features that `up` does not see in training, in [0, 1]; 0.1 where it
            was published.
        target_modules: "all-linear" (every linear but the output head and routers; with
            "adaptformer" every block of a known class), a list of name endings, or a regular
            expression for the whole name.
        exclude_modules: name endings, or a regular expression, that are left alone.
        blocks: further classes of blocks, by their names, and for each the name of the norm in it
            whose input the adapter is to read: {"MyBlock": "norm2"}. With "adaptformer" alone.
        base, block_size, nested, quant_storage: of a base to quantise, as in `LoraConfig`. With
            "lora" alone.

    Raises:
        TypeError, ValueError: a value out of range.
    """

    method: ClassVar[str] = "onebit"

    r: int = 32
    scale: float = 1.0
    bits: int = 1
    placement: str = "lora"
    dropout: float = 0.0
    target_modules: str | tuple[str, ...] | list[str] = "all-linear"
    exclude_modules: str | tuple[str, ...] | list[str] = ()
    blocks: dict[str, str] = field(default_factory=dict)
    base: str | Format | None = None
    block_size: int = 64
    nested: bool = True
    quant_storage: torch.dtype = torch.uint8

    def __post_init__(self) -> None:
        if self.r < 1:
            raise ValueError(f"r must be at least 1, got {self.r}")
        if isinstance(self.scale, torch.Tensor) or not abs(self.scale) < float("inf"):
            raise ValueError(f"scale must be a finite number, got {self.scale}")
        check.bits(self.bits)
        _check.probability("dropout", self.dropout)
        if self.placement not in PLACEMENTS:
            raise ValueError(
                f"placement must be {' or '.join(map(repr, PLACEMENTS))}, got {self.placement!r}"
            )
        if self.blocks and self.placement != "adaptformer":
            raise ValueError(f"blocks must be left out for {self.placement!r}, got {self.blocks}")
        if self.base is not None and self.placement == "adaptformer":
            raise ValueError(
                f"base must be None for 'adaptformer', which touches no linear, got {self.base!r}"
            )
        self.of_base()

    def of_base(self) -> LoraConfig:
        """The config of a LoRA on the same base, which says what is wrong with it."""
        names = ("target_modules", "exclude_modules", "base", "block_size", "nested")
        options = {name: getattr(self, name) for name in (*names, "quant_storage")}
        return LoraConfig(r=self.r, **options)

    def configs(self) -> tuple[_family.Config, ...]:
        own = {f.name: getattr(self, f.name) for f in fields(self)}
        return (PLACEMENTS[self.placement](**own),)

    def fields(self) -> dict[str, Any]:
        """What the base is, belongs to the model."""
        names = ("r", "scale", "bits", "placement", "dropout", "blocks")
        return {name: getattr(self, name) for name in names}

    @classmethod
    def from_fields(cls, content: dict[str, Any], names: Sequence[str]) -> OneBitConfig:
        """Sizes stand in a file for those who read it without the model."""
        own = {n: v for n, v in content.items() if n not in ("in_features", "out_features")}
        placement = own.get("placement", cls.placement)
        if placement not in PLACEMENTS:
            raise ValueError(f"placement must be one of {', '.join(PLACEMENTS)}, got {placement!r}")
        fixed = {"activation": ACTIVATIONS[placement], **FORMAT}
        for name, value in fixed.items():
            if own.pop(name, None) != value:
                raise ValueError(f"{name} must be {value!r}, got {content.get(name)!r}")
        ending = ".adapter" if placement == "adaptformer" else ""
        pattern = "|".join(re.escape(name.removesuffix(ending)) for name in names)
        return PLACEMENTS[placement](**own, target_modules=pattern)


class InLinears(OneBitConfig, LinearConfig):
    """1-bit LoRA."""

    def unquantised(self) -> InLinears:
        return replace(self, base=None)

    def unfit(self, module: nn.Module, quantized: bool) -> str | None:
        return self.of_base().unfit(module, quantized)

    def build(self, linear: nn.Module, start: Any, shared: Any) -> nn.Module:
        from peftkern.onebit.layer import OneBitLinear  # which needs this module

        return OneBitLinear.from_config(linear, self)

    def wanted(self, rows: int, columns: int, bias: bool) -> Wanted:
        from peftkern.onebit import described  # which needs this module

        return described.wanted(self, columns, rows)


class BesideMlps(OneBitConfig, AttachedConfig):
    """Bi-AdaptFormer."""

    def targets(self, model: nn.Module) -> Iterator[_family.Target]:
        return blocks.targets(model, self)

    def nothing(self, model: nn.Module) -> str:
        return blocks.nothing(model, self)

    def build(self, target: AttachedTarget, device: torch.device | None) -> Any:
        from peftkern.onebit.layer import OneBitAdapter  # which needs this module

        assert target.widths is not None
        layer = OneBitAdapter.from_config(target.widths, self, device)
        return layer.train(target.module.training)


# What the bits of a file stand for: `onebit.reference` has both.
FORMAT = {"levels": "normal medians", "bit_order": "lowest first"}
ACTIVATIONS = {"lora": "identity", "adaptformer": "relu"}
PLACEMENTS: dict[str, type[OneBitConfig]] = {"lora": InLinears, "adaptformer": BesideMlps}
