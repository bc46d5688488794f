"""LoRA on a frozen linear, quantised or dense: the drop-in layer, and the config that places it."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from peftkern import _check
from peftkern.qlora import merge_aware, merging
from peftkern.qlora.ops import linear, quantize
from peftkern.qlora.weight import BLOCK_SIZES, Format, QuantizedWeight, find_format


@dataclass(frozen=True)
class LoraConfig:
    """LoRA (Hu et al., 2021) on a base that may be quantised (Dettmers et al., 2023).

    Args:
        r: rank of the low-rank term, at least 1.
        lora_alpha: the term's scale is lora_alpha / r, or lora_alpha / sqrt(r) with `use_rslora`.
        lora_dropout: share of the input that the low-rank term does not see, in [0, 1].
        use_rslora: rank-stabilised scale (Kalajdzievski, 2023).
        init_lora_weights: True: A uniform as `nn.Linear` draws it, B zero; "gaussian": A normal
            with deviation 1 / r, B zero; False: both uniform.
        rank_pattern: other ranks, by name or regular expression, as in peft.
        alpha_pattern: other values of lora_alpha, likewise.
        target_modules: "all-linear" (every linear but the output head and routers), a list of name
            endings, or a regular expression for the whole name.
        exclude_modules: name endings, or a regular expression, that are left alone.
        base: a format's name or a `Format` to quantise the base to; None keeps it as it is.
        block_size, nested: of the quantised base.
        merge_aware: the forward sees the merged weight as a quantised base stores it, so that
            merging changes nothing; gradients go straight through the rounding. Takes a quantised
            base and no dropout, and keeps a second packed weight. The adapter's file does not
            tell: in a layer without it, the same A and B are another function.

    Raises:
        ValueError: a value out of range.
    """

    r: int = 16
    lora_alpha: float = 32
    lora_dropout: float = 0.0
    use_rslora: bool = False
    init_lora_weights: bool | str = True
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    target_modules: str | tuple[str, ...] | list[str] = "all-linear"
    exclude_modules: str | tuple[str, ...] | list[str] = ()
    base: str | Format | None = None
    block_size: int = 64
    nested: bool = True
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
        if self.init_lora_weights not in (True, False, "gaussian"):
            raise ValueError(
                "init_lora_weights must be True, False or 'gaussian', "
                f"got {self.init_lora_weights!r}"
            )
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
        if self.base is not None:
            find_format(self.base)
        if self.block_size not in BLOCK_SIZES:
            raise ValueError(f"block_size must be one of {BLOCK_SIZES}, got {self.block_size}")


class QLoRALinear(nn.Module):
    """y = x W^T + bias + scaling * (D(x) A^T) B^T; W and bias are frozen, A and B train.

    `state_dict` has `weight`, `weight.absmax`, … with the bytes that bitsandbytes writes (or one
    dense `weight`), `bias`, `lora_A` and `lora_B`; of a merged layer the merged weight and `bias`
    alone, as the plain linear has them.

    Args:
        weight: `[out, in]`, quantised or dense. Its storage is shared, never copied or changed.
        bias: `[out]` or None.
        config: rank, scale, dropout and initialisation; its placement and base do not matter here.

    Shape:
        `[..., in]` -> `[..., out]`, in the input's dtype.

    Raises:
        ValueError: `merge_aware` on a dense weight.
    """

    def __init__(
        self, weight: QuantizedWeight | Tensor, bias: Tensor | None, config: LoraConfig
    ) -> None:
        super().__init__()
        if config.merge_aware and not isinstance(weight, QuantizedWeight):
            raise ValueError(
                f"merge_aware must have a quantised base, got {weight.dtype}, which merges as it is"
            )
        self.out_features, self.in_features = weight.shape
        self.r, self.lora_dropout = config.r, config.lora_dropout
        self.rescale(config)
        self.merge_aware, self._requantized = config.merge_aware, merge_aware.Cache()
        self.original: merging.Original | None = None
        self.set_base(weight)
        dtype = torch.float32
        if not isinstance(weight, QuantizedWeight):
            # At least float32, as in peft: small steps vanish in the sums of 16-bit parameters.
            dtype = torch.promote_types(weight.dtype, dtype)
        self.bias = None if bias is None else _frozen(bias)
        options: dict[str, Any] = {"device": weight.device, "dtype": dtype}
        self.lora_A = nn.Parameter(torch.empty(config.r, self.in_features, **options))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, config.r, **options))
        self._initialize(config.init_lora_weights)

    def set_base(self, weight: QuantizedWeight | Tensor) -> None:
        """Takes a weight, and the very parameter where it is one."""
        self._quantized: QuantizedWeight | None = None
        if isinstance(weight, QuantizedWeight):
            self.weight = _frozen(weight.packed)
            self._quantized = replace(weight, packed=self.weight)
        else:
            self.weight = _frozen(weight)

    def rescale(self, config: LoraConfig) -> None:
        """Takes the scale of the low-rank term from the config's alpha and rule."""
        self.lora_alpha, self.use_rslora = config.lora_alpha, config.use_rslora
        self.scaling = config.lora_alpha / (math.sqrt(self.r) if config.use_rslora else self.r)

    def _initialize(self, how: bool | str) -> None:
        if how == "gaussian":
            nn.init.normal_(self.lora_A, std=1 / self.r)
        else:
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        if how is False:
            nn.init.kaiming_uniform_(self.lora_B, a=math.sqrt(5))

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        r: int = 16,
        lora_alpha: float = 32,
        base: str | Format | None = None,
        block_size: int = 64,
        nested: bool = True,
        **options: Any,
    ) -> QLoRALinear:
        """A layer in the place of an `nn.Linear` or of bitsandbytes' `Linear4bit`.

        Args:
            linear: what it replaces; its weight and bias are shared where they need no quantising.
            base: a format to quantise a float weight to; None keeps the weight as it is.
            options: further fields of `LoraConfig`.
        """
        config = LoraConfig(
            r, lora_alpha, base=base, block_size=block_size, nested=nested, **options
        )
        return cls.from_config(linear, config)

    @classmethod
    def from_config(cls, linear: nn.Module, config: LoraConfig) -> QLoRALinear:
        weight: Tensor = linear.weight  # type: ignore[assignment]
        base: QuantizedWeight | Tensor
        if getattr(weight, "quant_state", None) is not None:
            base = QuantizedWeight.from_bnb(weight)
        elif config.base is None:
            base = weight
        else:
            base = quantize(weight, config.base, config.block_size, config.nested)
        return cls(base, linear.bias, config).train(linear.training)  # type: ignore[arg-type]

    @property
    def quantized_weight(self) -> QuantizedWeight | None:
        """The base as its producer stores it; None for a dense base."""
        if self._quantized is not None and self._quantized.packed is not self.weight:
            self._quantized = replace(self._quantized, packed=self.weight)
        return self._quantized

    @property
    def base(self) -> QuantizedWeight | Tensor:
        """The weight that the forward takes; where it is merged, `original` is what it was."""
        return self.quantized_weight or self.weight

    @property
    def merged(self) -> bool:
        """Whether the low-rank term is in the weight."""
        return self.original is not None

    def forward(self, x: Tensor) -> Tensor:
        base = self.base
        if self.merged:
            merging.refuse_training(self)
            return linear(x, base, self.bias)
        adapter = (self.lora_A, self.lora_B, self.scaling)
        if self.merge_aware:
            assert isinstance(base, QuantizedWeight)
            return merge_aware.linear(x, base, self.bias, *adapter, self._requantized)
        dropout = self.lora_dropout if self.training else 0.0
        return linear(x, base, self.bias, *adapter, dropout)

    def merge(self, dtype: torch.dtype | None = None, requantize: bool = False) -> None:
        """As `peftkern.merge`, of this layer alone."""
        merged = merging.merged("layer", self, dtype, requantize)
        merging.warn({} if merged.loss is None else {"the layer": merged.loss})
        merging.take(self, merged)

    def unmerge(self) -> None:
        """As `peftkern.unmerge`, of this layer alone."""
        merging.give_back("layer", self)

    def merged_rows(self, panel: Tensor, rows: slice) -> Tensor:
        """What merging makes of these rows of the base, which come dense in float32 or float64."""
        return merging.adding(self.lora_A, self.lora_B, self.scaling)(panel, rows)

    def _apply(self, fn: Any, recurse: bool = True) -> QLoRALinear:
        """The scales follow the packed bytes from device to device, and keep their dtype."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self._quantized is not None:
            moved = self._quantized.scales_to(self.weight.device)
            self._quantized = replace(moved, packed=self.weight)
        if self.original is not None:
            self.original = self.original.moved(fn)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.merged:  # what holds W + D must not hold D again
            for name in {*self._parameters, *self._buffers} - {"weight", "bias"}:
                destination.pop(f"{prefix}{name}", None)
        if (weight := self.quantized_weight) is not None:
            for name, tensor in weight.statistics().items():
                destination[f"{prefix}weight.{name}"] = tensor

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, metadata: Any, strict: bool, missing: list[str],
        unexpected: list[str], errors: list[str],
    ) -> None:  # fmt: skip
        """Takes bitsandbytes' keys too; the weight must be of this layer's format and shape."""
        key, loaded = f"{prefix}weight", None
        if self.merged:
            errors.append(f"{key}: the layer must be unmerged before it loads, got a merged layer")
            return
        if self._quantized is not None and key in state_dict:
            names = [k for k in state_dict if k.startswith(f"{key}.")]
            statistics = {k.removeprefix(f"{key}."): state_dict[k] for k in names}
            others = {k: v for k, v in state_dict.items() if k not in names}
            try:
                loaded = self._quantized.with_statistics(state_dict[key], statistics)
                state_dict = others | {key: loaded.packed}
            except ValueError as error:  # bytes without their scales would be another weight
                errors.append(f"{key}: {error}")
                state_dict = others | {key: self.weight}
        super()._load_from_state_dict(
            state_dict, prefix, metadata, strict, missing, unexpected, errors
        )
        if loaded is not None:
            self._quantized = replace(loaded.scales_to(self.weight.device), packed=self.weight)

    def extra_repr(self) -> str:
        weight = self.quantized_weight
        base = f"{weight.format.name}, block_size={weight.block_size}" if weight else "dense"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, r={self.r}, "
            f"lora_alpha={self.lora_alpha}, lora_dropout={self.lora_dropout}, base={base}, "
            f"bias={self.bias is not None}"
            + (", merge_aware=True" if self.merge_aware else "")
            + (", merged=True" if self.merged else "")
        )


def _frozen(tensor: Tensor) -> nn.Parameter:
    """The very parameter where it is one, so that tied weights stay tied."""
    if isinstance(tensor, nn.Parameter) and type(tensor) is nn.Parameter:
        tensor.requires_grad_(False)
        return tensor
    return nn.Parameter(tensor, requires_grad=False)
