"""LoRA on a frozen linear, quantised or dense: the drop-in layer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from peftkern.qlora import bnb, dora, init
from peftkern.qlora.config import SPLITTING, LoraConfig, quantized_base
from peftkern.qlora.format import Format
from peftkern.qlora.ops import linear
from peftkern.qlora.weight import QuantizedWeight, stored_as


class QLoRALinear(nn.Module):
    """y = x W^T + bias + scaling * (D(x) A^T) B^T; W and bias are frozen, A and B train.

    With `use_dora` (Liu et al., 2024), m trains too and

        y = (m / n) * (x W^T + scaling * (D(x) A^T) B^T) + bias,   n_i = |(W + scaling * B A)_i|,

    where n has no gradient and m = n at first. So dropout concerns the low-rank term alone, as it
    does without DoRA; in training peft drops from the share (m / n - 1) of the base product too.

    A start that splits the weight ("pissa", "olora", "corda") leaves W as it is, and the low-rank
    term is scaling * D(x) (B A - B0 A0)^T with frozen copies B0, A0 of the start: exactly zero at
    first, on a quantised base too, for twice the rank.

    `state_dict` has the keys and bytes that bitsandbytes writes (`weight`, `weight.absmax`, …; for
    int8 `weight`, `SCB`, `weight_format`) or one dense `weight`, `bias`, `lora_A` and `lora_B`;
    `lora_magnitude_vector` is m `[out]`, and `initial_A`, `initial_B` are A0, B0.

    Args:
        weight: `[out, in]`, quantised or dense. Its storage is shared, never copied or changed.
        bias: `[out]` or None.
        config: rank, scale, dropout, start and variant; its placement and base do not matter here.
        factors: A and B to start from, where they are not drawn or decomposed here.

    Shape:
        `[..., in]` -> `[..., out]`, in the input's dtype.

    Raises:
        ValueError: a start that this weight does not allow.
    """

    initial_A: Tensor | None
    initial_B: Tensor | None

    def __init__(
        self,
        weight: QuantizedWeight | Tensor,
        bias: Tensor | None,
        config: LoraConfig,
        factors: init.Factors | None = None,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.r, self.lora_dropout = config.r, config.lora_dropout
        self.rescale(config)
        a, b = init.factors(weight, config) if factors is None else factors
        self._quantized: QuantizedWeight | None = None
        if isinstance(weight, QuantizedWeight):
            self.weight = _frozen(weight.packed)
            self._quantized = weight.without_bytes()
        else:
            self.weight = _frozen(weight)
        self.bias = None if bias is None else _frozen(bias)
        self.trains_bias = self.bias is not None and config.bias == "lora_only"
        if self.bias is not None:
            self.bias.requires_grad_(self.trains_bias)
        # At least float32, as in peft: small steps vanish in the sums of 16-bit parameters.
        self.lora_A = nn.Parameter(a.contiguous(), requires_grad=config.start != "orthogonal")
        self.lora_B = nn.Parameter(b.contiguous())
        split = config.start in SPLITTING
        self.register_buffer("initial_A", self.lora_A.detach().clone() if split else None)
        self.register_buffer("initial_B", self.lora_B.detach().clone() if split else None)
        # LoftQ's later rounds quantise other values than the weight's.
        self.own_base = config.start == "loftq" and (config.start_number or 1) > 1
        self._norms = dora.Norms()
        self.lora_magnitude_vector: nn.Parameter | None = None
        if config.use_dora:
            self.lora_magnitude_vector = nn.Parameter(self.row_norms())

    def rescale(self, config: LoraConfig) -> None:
        """Takes the scale of the low-rank term from the config's alpha and rule."""
        config = replace(config, r=self.r)
        self.lora_alpha, self.use_rslora = config.lora_alpha, config.use_rslora
        self.scaling = config.scaling

    @property
    def use_dora(self) -> bool:
        return self.lora_magnitude_vector is not None

    def adapter(self) -> list[nn.Parameter]:
        """The parameters that are not the frozen base's."""
        names = ("lora_", "bias") if self.trains_bias else ("lora_",)
        return [p for name, p in self.named_parameters() if name.startswith(names)]

    def factors(self) -> init.Factors:
        """A and B such that W + scaling * B A is what the layer multiplies by, DoRA apart.

        Where a start is taken off again: B A - B0 A0 = (B - B0) A + B0 (A - A0), of rank 2 r and
        exactly zero at first.
        """
        if self.initial_A is None or self.initial_B is None:
            return self.lora_A, self.lora_B
        a = torch.cat([self.lora_A, self.lora_A - self.initial_A])
        return a, torch.cat([self.lora_B - self.initial_B, self.initial_B], 1)

    def row_norms(self) -> Tensor:
        """n of DoRA's equation, `[out]`, without a gradient."""
        parts = (self.lora_A, self.lora_B, self.initial_A, self.initial_B)
        made_of = [part for part in parts if part is not None]
        return self._norms(self._base, *self.factors(), self.scaling, made_of)

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
        """A layer in the place of an `nn.Linear`, or of a quantised one of bitsandbytes.

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
    def from_config(
        cls, linear: nn.Module, config: LoraConfig, factors: init.Factors | None = None
    ) -> QLoRALinear:
        """As `from_linear`, of a config; `factors` as for the layer itself."""
        base = base_of(linear)
        if isinstance(base, Tensor):
            if config.base is None:
                base = base if base.is_contiguous() else base.detach().contiguous()
            elif config.start == "loftq":
                base, factors = init.loftq(base, config)
            else:  # A and B come from the weight as it was
                factors = factors or init.factors(base, config)
                base = quantized_base(base, config)
        return cls(base, linear.bias, config, factors).train(linear.training)  # type: ignore[arg-type]

    @property
    def quantized_weight(self) -> QuantizedWeight | None:
        """The base as its producer stores it; None for a dense base."""
        # Made anew, and not kept: `fully_shard` puts other parameters in the place of `weight`,
        # and frees only what nobody holds on to.
        return None if self._quantized is None else self._quantized.with_bytes(self.weight)

    @property
    def _base(self) -> QuantizedWeight | Tensor:
        return self.quantized_weight or self.weight

    def forward(self, x: Tensor) -> Tensor:
        dropout = self.lora_dropout if self.training else 0.0
        a, b = self.factors()
        if self.lora_magnitude_vector is None:
            return linear(x, self._base, self.bias, a, b, self.scaling, dropout)
        product = linear(x, self._base, None, a, b, self.scaling, dropout)
        return dora.rescale(product, self.lora_magnitude_vector, self.row_norms(), self.bias)

    def _apply(self, fn: Any, recurse: bool = True) -> QLoRALinear:
        """The scales follow the packed bytes from device to device, and all keep their dtype.

        Bytes may be stored as floats, which `fn` would convert: it is shown them as bytes.
        """
        codes = None if self._quantized is None else self.weight

        def bits_kept(tensor: Tensor) -> Tensor:
            if tensor is not codes or not tensor.is_floating_point():
                return fn(tensor)  # type: ignore[no-any-return]
            return stored_as(fn(stored_as(tensor, torch.uint8)), tensor.dtype)

        super()._apply(bits_kept, recurse)  # type: ignore[no-untyped-call]
        if self._quantized is not None:
            self._quantized = self._quantized.scales_to(self.weight.device)
        self._norms = dora.Norms()
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if (weight := self.quantized_weight) is not None:
            for name, tensor in bnb.statistics(weight).items():
                destination[prefix + name] = tensor

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, metadata: Any, strict: bool, missing: list[str],
        unexpected: list[str], errors: list[str],
    ) -> None:  # fmt: skip
        """Takes bitsandbytes' keys too; the weight must be of this layer's format and shape."""
        key, loaded = f"{prefix}weight", None
        if self._quantized is not None and key in state_dict:
            own = {k for k in state_dict if k.startswith(prefix)}
            names = {k for k in own if bnb.is_statistic(k.removeprefix(prefix))}
            statistics = {k.removeprefix(prefix): state_dict[k] for k in names}
            others = {k: v for k, v in state_dict.items() if k not in names}
            try:
                loaded = bnb.loaded(self._quantized, state_dict[key], statistics)
                state_dict = others | {key: loaded.packed}
            except ValueError as error:  # bytes without their scales would be another weight
                errors.append(f"{key}: {error}")
                state_dict = others | {key: self.weight}
        super()._load_from_state_dict(
            state_dict, prefix, metadata, strict, missing, unexpected, errors
        )
        self._norms = dora.Norms()
        if loaded is not None:
            self._quantized = loaded.scales_to(self.weight.device).without_bytes()

    def extra_repr(self) -> str:
        weight = self.quantized_weight
        base = weight.format.name if weight else "dense"
        if weight and weight.block_size:
            base += f", block_size={weight.block_size}"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, r={self.r}, "
            f"lora_alpha={self.lora_alpha}, lora_dropout={self.lora_dropout}, base={base}, "
            f"bias={self.bias is not None}" + ", dora=True" * self.use_dora
        )


def base_of(linear: nn.Module) -> QuantizedWeight | Tensor:
    """The weight of a linear as it is stored: quantised by bitsandbytes, or the very parameter."""
    if bnb.is_quantized(linear):
        return QuantizedWeight.from_bnb(linear)
    return linear.weight  # type: ignore[return-value]


def _frozen(tensor: Tensor) -> nn.Parameter:
    """The very parameter where it is one, so that tied weights stay tied."""
    if isinstance(tensor, nn.Parameter) and type(tensor) is nn.Parameter:
        tensor.requires_grad_(False)
        return tensor
    return nn.Parameter(tensor, requires_grad=False)
