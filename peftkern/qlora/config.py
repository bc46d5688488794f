"""What an adapter is to be: rank, scale, start, variant, and the modules that get one."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from peftkern import _check, _family
from peftkern.qlora.codes import quantize
from peftkern.qlora.format import BLOCK_SIZES, Format, find_format
from peftkern.qlora.placing import LinearConfig, features
from peftkern.qlora.weight import QuantizedWeight, stored_as

# What peft calls "loftq" with iterations in a second config is "loftq_N" here.
_NUMBERED = re.compile(r"(pissa)_niter_(\d+)|(loftq|orthogonal)_(\d+)")
_NAMES = ("gaussian", "pissa", "olora", "corda", "loftq", "orthogonal")
# Starts that split the weight, so that a frozen copy of A and B has to be taken off again.
SPLITTING = ("pissa", "olora", "corda")
# Starts that divide singular values by the scale.
_DIVIDING = ("pissa", "corda", "loftq")
# As bitsandbytes has them; other dtypes have no collectives everywhere.
STORAGES = (torch.uint8, torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class LoraConfig(LinearConfig):
    """LoRA (Hu et al., 2021) on a base that may be quantised (Dettmers et al., 2023).

    Args:
        r: rank of the low-rank term, at least 1.
        lora_alpha: the term's scale is lora_alpha / r, or lora_alpha / sqrt(r) with `use_rslora`.
        lora_dropout: share of the input that the low-rank term does not see, in [0, 1].
        use_rslora: rank-stabilised scale (Kalajdzievski, 2023).
        use_dora: magnitude and direction apart (Liu et al., DoRA, 2024); `QLoRALinear` has the
            equation.
        init_lora_weights: how A and B start.
            True: A uniform as `nn.Linear` draws it, B zero; "gaussian": A normal with deviation
            1 / r, B zero; False: both uniform.
            "orthogonal": A's rows orthonormal at random and frozen, B zero (Po et al., 2024);
            "orthogonal_N": the N-th r rows, from 0, of one basis that is the same in every
            process, so that adapters of one rank and different N do not disturb each other.
            "pissa" (Meng et al., 2024), "pissa_niter_N" (by N subspace iterations): the largest
            singular triplets of the weight; "olora" (Büyükakyüz, 2024): the first columns of its
            QR decomposition; "corda" (Yang et al., 2024): by `peftkern.corda`, which calibrates.
            These three leave the base as it is and take the start off again:
            scaling * (B A - B0 A0), zero at first, with B0 and A0 kept frozen.
            "loftq", "loftq_N" (Li et al., 2023): the best rank-r fit to what the quantised base
            lost, alternating N times with quantising the rest. Above 1 the base is no longer the
            one that `quantize` gives, and an adapter belongs to it alone.
        bias: "none", or "lora_only" to train the biases of adapted linears too.
        rank_pattern: other ranks, by name or regular expression, as in peft.
        alpha_pattern: other values of lora_alpha, likewise.
        target_modules: "all-linear" (every linear but the output head and routers), a list of name
            endings, or a regular expression for the whole name.
        exclude_modules: name endings, or a regular expression, that are left alone.
        base: a format's name or a `Format` to quantise the base to; None keeps it as it is.
        block_size, nested: of the quantised base; int8, which has neither, ignores both.
        quant_storage: the dtype as which packed bytes of 4 bits are stored, the same bits: uint8,
            bfloat16, float16 or float32. FullyShardedDataParallel wants one for all parameters of
            a unit: then the dtype that adapters and compute have. In peft and transformers it is
            `bnb_4bit_quant_storage`. int8 has its own.
        merge_aware: the forward sees the merged weight as a quantised base stores it, so that
            merging changes nothing; gradients go straight through the rounding. Takes a quantised
            base, no dropout and no DoRA, and keeps a second packed weight. The adapter's file does
            not tell: in a layer without it, the same A and B are another function.

    Raises:
        ValueError: a value out of range.
    """

    method = "lora"

    r: int = 16
    lora_alpha: float = 32
    lora_dropout: float = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    init_lora_weights: bool | str = True
    bias: str = "none"
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    target_modules: str | tuple[str, ...] | list[str] = "all-linear"
    exclude_modules: str | tuple[str, ...] | list[str] = ()
    base: str | Format | None = None
    block_size: int = 64
    nested: bool = True
    quant_storage: torch.dtype = torch.uint8
    merge_aware: bool = False

    def __post_init__(self) -> None:
        for name, rank in [("r", self.r), *self.rank_pattern.items()]:
            if rank < 1:
                raise ValueError(f"{name} must be at least 1, got {rank}")
        _check.probability("lora_dropout", self.lora_dropout)
        if self.merge_aware and self.lora_dropout:
            raise ValueError(
                "lora_dropout must be 0 with merge_aware, where one weight meets all of x, "
                f"got {self.lora_dropout}"
            )
        if self.merge_aware and self.use_dora:
            raise ValueError("use_dora must be False with merge_aware, got True")
        self._check_start()
        if self.bias not in ("none", "lora_only"):
            raise ValueError(f"bias must be 'none' or 'lora_only', got {self.bias!r}")
        self._check_expressions()
        self._check_base()

    @property
    def start(self) -> str:
        """The name in `init_lora_weights` without its number; "uniform" for True and False."""
        return self._named_start()[0]

    @property
    def start_number(self) -> int | None:
        """The N of "pissa_niter_N", "loftq_N" and "orthogonal_N"."""
        return self._named_start()[1]

    @property
    def scaling(self) -> float:
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    def at_rank(self, r: int) -> LoraConfig:
        """At the same scale."""
        if r == self.r:
            return self
        lora_alpha = self.scaling * (math.sqrt(r) if self.use_rslora else r)
        return replace(self, r=r, lora_alpha=lora_alpha)

    def start_obstacle(self, rows: int, columns: int) -> str | None:
        """Why the start cannot fill the rank on a weight of this shape; None where it can."""
        most, needed = min(rows, columns), self.r
        if self.start == "orthogonal":
            most, needed = columns, self.r * ((self.start_number or 0) + 1)
        if self.start in ("uniform", "gaussian") or needed <= most:
            return None
        return f"{self.init_lora_weights!r} with r={self.r} needs {needed} dimensions, not {most}"

    def check(self, model: nn.Module, configs: Sequence[_family.Config]) -> None:
        layers = _family.adapters(model).values()
        dora = {c.use_dora for c in configs if isinstance(c, LoraConfig)}
        dora |= {m.use_dora for m in layers if isinstance(m, _layer())}
        if len(dora) > 1:
            raise ValueError("use_dora must be the same for every adapter of a model, got both")

    def of_module(self, name: str) -> LoraConfig:
        """Of several patterns the first that fits wins."""
        return replace(
            self,
            r=_of_pattern(self.rank_pattern, name, self.r),
            lora_alpha=_of_pattern(self.alpha_pattern, name, self.lora_alpha),
            rank_pattern={},
            alpha_pattern={},
        )

    def unquantised(self) -> LoraConfig:
        """Then LoftQ has nothing to make up for."""
        start = True if self.start == "loftq" else self.init_lora_weights
        return replace(self, base=None, init_lora_weights=start)

    def unfit(self, module: nn.Module, quantized: bool) -> str | None:
        if quantized and self.start == "loftq":
            return "quantised already, and LoftQ needs the float weight"
        if not quantized and self.base is None and self.merge_aware:
            return "its base is not quantised, which merge_aware needs"
        rows, columns = features(module)
        stored = None if quantized else storage_obstacle(rows * columns, self)
        return stored or self.start_obstacle(rows, columns)

    def build(self, linear: nn.Module, start: Any, shared: Any) -> nn.Module:
        return _layer().from_config(linear, self, start)  # type: ignore[no-any-return]

    def wanted(self, rows: int, columns: int, bias: bool) -> _family.Wanted:
        from peftkern.qlora import described  # which needs this module

        return described.wanted(self.r, rows, columns, self.use_dora, bias, False)

    @classmethod
    def from_fields(cls, content: dict[str, Any], names: Sequence[str]) -> LoraConfig:
        return cls(**content, target_modules="|".join(map(re.escape, names)))

    def _named_start(self) -> tuple[str, int | None]:
        if isinstance(self.init_lora_weights, bool):
            return "uniform", None
        if match := _NUMBERED.fullmatch(self.init_lora_weights):
            return match[1] or match[3], int(match[2] or match[4])
        return self.init_lora_weights, None

    def _check_start(self) -> None:
        given = self.init_lora_weights
        if not isinstance(given, bool) and (
            not isinstance(given, str) or self._named_start()[0] not in _NAMES
        ):
            raise ValueError(
                "init_lora_weights must be True, False, 'pissa_niter_N', 'loftq_N', "
                f"'orthogonal_N' or one of {', '.join(_NAMES)}, got {given!r}"
            )
        if self.start == "loftq":
            if self.base is None:
                raise ValueError("base must be a format for init_lora_weights 'loftq', got None")
            if self.start_number == 0:
                raise ValueError(f"init_lora_weights must ask for an iteration, got {given!r}")
        if self.start in _DIVIDING:
            for name, value in [("lora_alpha", self.lora_alpha), *self.alpha_pattern.items()]:
                if value <= 0:
                    raise ValueError(f"{name} must be above 0 for {given!r}, got {value}")

    def _check_base(self) -> None:
        if self.base is not None and not find_format(self.base).in_blocks:
            if self.block_size != 64:
                raise ValueError(
                    f"block_size must be left out for {self.base}, whose rows have one scale each, "
                    f"got {self.block_size}"
                )
            if self.quant_storage != torch.uint8:
                raise ValueError(
                    f"quant_storage must be left out for {self.base}, whose codes are signed "
                    f"bytes, got {self.quant_storage}"
                )
        if self.block_size not in BLOCK_SIZES:
            raise ValueError(f"block_size must be one of {BLOCK_SIZES}, got {self.block_size}")
        if self.quant_storage not in STORAGES:
            names = ", ".join(str(dtype).removeprefix("torch.") for dtype in STORAGES)
            raise TypeError(f"quant_storage must be one of {names}, got {self.quant_storage!r}")

    def _check_expressions(self) -> None:
        expressions = [("rank_pattern", k) for k in self.rank_pattern]
        expressions += [("alpha_pattern", k) for k in self.alpha_pattern]
        for name, value in (("target", self.target_modules), ("exclude", self.exclude_modules)):
            if isinstance(value, str):
                expressions.append((f"{name}_modules", value))
        for name, expression in expressions:
            try:
                re.compile(expression)
            except re.error as error:
                raise ValueError(
                    f"{name} must be a regular expression, got {expression!r} ({error})"
                ) from error


def quantized_base(weight: Tensor, config: LoraConfig) -> QuantizedWeight:
    """The base that a config asks for; block size, nesting and storage where its format has them.

    Raises:
        ValueError: bytes that do not fill the last float of their storage.
    """
    assert config.base is not None
    if not (form := find_format(config.base)).in_blocks:
        return quantize(weight, form)
    if reason := storage_obstacle(weight.shape.numel(), config):
        raise ValueError(f"quant_storage must fit the weight, got {reason}")
    base = quantize(weight, form, config.block_size, config.nested)
    return replace(base, packed=stored_as(base.packed, config.quant_storage))


def storage_obstacle(count: int, config: LoraConfig) -> str | None:
    """Why the packed bytes of so many elements cannot be stored as the config has it."""
    size, bytes_ = config.quant_storage.itemsize, -(-count // 2)
    if config.base is None or bytes_ % size == 0:
        return None
    name = str(config.quant_storage).removeprefix("torch.")
    return f"its {bytes_} packed bytes are no whole number of {name}"


def _of_pattern(pattern: dict[str, Any], name: str, default: Any) -> Any:
    return next((v for k, v in pattern.items() if re.match(rf"(.*\.)?({k})$", name)), default)


def _layer() -> Any:
    from peftkern.qlora.layer import QLoRALinear  # which needs this module

    return QLoRALinear
