"""LoRA on a frozen linear, quantised or dense: the drop-in layer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from peftkern.qlora import dora, init, merge_aware, merging
from peftkern.qlora.config import SPLITTING, LoraConfig, quantized_base
from peftkern.qlora.described import LoraAdapter
from peftkern.qlora.format import Format
from peftkern.qlora.frozen import base_of
from peftkern.qlora.ops import linear
from peftkern.qlora.sharing import SharedInput
from peftkern.qlora.siblings import Sibling
from peftkern.qlora.weight import QuantizedWeight


class QLoRALinear(LoraAdapter):
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
    `lora_magnitude_vector` is m `[out]`, and `initial_A`, `initial_B` are A0, B0. Of a merged layer
    it has the merged weight and `bias` alone, as the plain linear has them.

    Args:
        weight: `[out, in]`, quantised or dense. Its storage is shared, never copied or changed.
        bias: `[out]` or None.
        config: rank, scale, dropout, start and variant; its placement and base do not matter here.
        factors: A and B to start from, where they are not drawn or decomposed here.

    Shape:
        `[..., in]` -> `[..., out]`, in the input's dtype.

    Raises:
        ValueError: a start that this weight does not allow; `merge_aware` on a dense weight.
    """

    def __init__(
        self,
        weight: QuantizedWeight | Tensor,
        bias: Tensor | None,
        config: LoraConfig,
        factors: init.Factors | None = None,
    ) -> None:
        if config.merge_aware and not isinstance(weight, QuantizedWeight):
            raise ValueError(
                f"merge_aware must have a quantised base, got {weight.dtype}, which merges as it is"
            )
        a, b = init.factors(weight, config) if factors is None else factors
        super().__init__(weight, bias)
        self.r, self.lora_dropout = config.r, config.lora_dropout
        self.rescale(config)
        self.merge_aware, self._requantized = config.merge_aware, merge_aware.Cache()
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
        self.shared_input: SharedInput | None = None
        self._norms = dora.Norms()
        self.lora_magnitude_vector: nn.Parameter | None = None
        if config.use_dora:
            self.lora_magnitude_vector = nn.Parameter(self.row_norms())

    def rescale(self, config: LoraConfig) -> None:
        """Takes the scale of the low-rank term from the config's alpha and rule."""
        config = replace(config, r=self.r)
        self.lora_alpha, self.use_rslora = config.lora_alpha, config.use_rslora
        self.scaling = config.scaling

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
        return self._norms(self.base, *self.factors(), self.scaling, made_of)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        r: int = 16,
        lora_alpha: float = 32,
        base: str | Format | None = None,
        block_size: int = 64,
        nested: bool = True,
        quant_storage: torch.dtype = torch.uint8,
        **options: Any,
    ) -> QLoRALinear:
        """A layer in the place of an `nn.Linear` or of a linear of bitsandbytes.

        Args:
            linear: what it replaces; its weight and bias are shared where they need no quantising.
            base: a format to quantise a float weight to; None keeps the weight as it is.
            block_size, nested, quant_storage: of the quantised base.
            options: further fields of `LoraConfig`.
        """
        config = LoraConfig(
            r, lora_alpha, base=base, block_size=block_size, nested=nested,
            quant_storage=quant_storage, **options,
        )  # fmt: skip
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

    def forward(self, x: Tensor) -> Tensor:
        if self.shared_input is not None and (y := self.shared_input.forward(self, x)) is not None:
            return y
        if (plain := self.operands(x)) is not None:
            return linear(x, *plain[0], plain[1])
        if self.merged:
            merging.refuse_training(self)
            return linear(x, self.base, self.bias)
        base, factors = self.base, self.factors()
        if self.merge_aware:
            assert isinstance(base, QuantizedWeight)
            return merge_aware.linear(x, base, self.bias, *factors, self.scaling, self._requantized)
        dropout = self.lora_dropout if self.training else 0.0
        if self.lora_magnitude_vector is None:
            return linear(x, base, self.bias, *factors, self.scaling, dropout)
        product = linear(x, base, None, *factors, self.scaling, dropout)
        return dora.rescale(product, self.lora_magnitude_vector, self.row_norms(), self.bias)

    def operands(self, x: Tensor) -> tuple[Sibling, float] | None:
        """What plain LoRA multiplies x by, alone or together with others, and the dropout; None
        where `forward` does otherwise.
        """
        inside = self._parameters  # a module's own lookup takes longer than all the rest
        a, b, weight = inside.get("lora_A"), inside.get("lora_B"), inside.get("weight")
        # Of a sharded layer, or one that lies elsewhere, only its own call has the parameters here.
        if type(a) is not nn.Parameter or b is None or weight is None or weight.device != x.device:
            return None
        # `siblings` has no gradient for the weight.
        if self.original or self.merge_aware or self.use_dora or weight.requires_grad:
            return None
        factors = (a, b) if self.initial_A is None else self.factors()
        base = weight if self._quantized is None else self._quantized.with_bytes(weight)
        dropout = self.lora_dropout if self.training else 0.0
        return Sibling(base, inside.get("bias"), *factors, self.scaling), dropout

    @torch.no_grad()
    def merged_rows(self, panel: Tensor, rows: slice) -> Tensor:
        """What merging makes of these rows of the base, which come dense in float32 or float64."""
        merged = merging.adding(*self.factors(), self.scaling)(panel, rows)
        if self.lora_magnitude_vector is None:
            return merged
        gain = dora.gain(self.lora_magnitude_vector, self.row_norms())
        return merged * gain[rows, None].to(merged.dtype)

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if self.shared_input is not None:
            self.shared_input.join(self)

    def _apply(self, fn: Any, recurse: bool = True) -> QLoRALinear:
        self._norms = dora.Norms()
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._norms = dora.Norms()

    def extra_repr(self) -> str:
        flags = {"dora": self.use_dora, "merge_aware": self.merge_aware, "merged": self.merged}
        return (
            f"{super().extra_repr()}, r={self.r}, lora_alpha={self.lora_alpha}, "
            f"lora_dropout={self.lora_dropout}"
            + "".join(f", {name}=True" for name, on in flags.items() if on)
        )
