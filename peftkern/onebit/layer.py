"""1-bit adapters: in a linear's place, and beside whatever reads the same stream."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from peftkern._attached import AttachedAdapter
from peftkern.onebit import check
from peftkern.onebit.config import OneBitConfig
from peftkern.onebit.described import Described
from peftkern.qlora import merging
from peftkern.qlora.adapter import LinearAdapter
from peftkern.qlora.config import quantized_base
from peftkern.qlora.format import Format
from peftkern.qlora.frozen import base_of
from peftkern.qlora.ops import linear
from peftkern.qlora.weight import QuantizedWeight


class OneBitLinear(Described, LinearAdapter):
    """y = x W^T + bias + scale * D(x Down^T) Up^T; W and bias are frozen, `down` and `up` train.

    Bi-LoRA (Jie, Wang and Deng, 2023). `Pair` says how the two start and turn into bits. The base
    is one op, the adapter with its quantiser another, which adds to what the first has made.

    Args:
        weight: `[out, in]`, quantised or dense. Its storage is shared, never copied or changed.
        bias: `[out]` or None.
        config: r, scale, bits and dropout; its placement and base do not matter here.

    Shape:
        `[..., in]` -> `[..., out]`, in the input's dtype.
    """

    activation = "identity"

    def __init__(
        self, weight: QuantizedWeight | Tensor, bias: Tensor | None, config: OneBitConfig
    ) -> None:
        super().__init__(weight, bias)
        self.start(self.in_features, self.out_features, config, self.weight.device)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        r: int = 32,
        scale: float = 1.0,
        bits: int = 1,
        dropout: float = 0.0,
        base: str | Format | None = None,
        **options: Any,
    ) -> OneBitLinear:
        """A layer in the place of an `nn.Linear` or of a linear of bitsandbytes.

        Args:
            linear: what it replaces; its weight and bias are shared where they need no quantising.
            base: a format to quantise a float weight to; None keeps the weight as it is.
            options: further fields of `OneBitConfig`.
        """
        config = OneBitConfig(r, scale, bits, "lora", dropout, base=base, **options)
        return cls.from_config(linear, config)

    @classmethod
    def from_config(cls, linear: nn.Module, config: OneBitConfig) -> OneBitLinear:
        """As `from_linear`, of a config."""
        base = base_of(linear)
        if isinstance(base, Tensor):
            if config.base is not None:
                base = quantized_base(base, config.of_base())
            elif not base.is_contiguous():
                base = base.detach().contiguous()
        return cls(base, linear.bias, config).train(linear.training)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        y = linear(x, self.base, self.bias)
        if self.merged:
            merging.refuse_training(self)
            return y
        return self.branch(x, y)

    @torch.no_grad()
    def merged_rows(self, panel: Tensor, rows: slice) -> Tensor:
        """What merging makes of these rows of the base, which come dense in float32 or float64."""
        return merging.adding(*self.dense(), self.scale)(panel, rows)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.facts()}" + ", merged=True" * self.merged


class OneBitAdapter(Described, AttachedAdapter):
    """y = residual + scale * D(act(x Down^T)) Up^T: the branch of Bi-AdaptFormer, in one op.

    `Pair` says how `down` and `up` start, train and turn into bits.

    Args:
        in_features, out_features: of the branch; None for as many as come in.
        r: width of the bottleneck.
        scale: a number.
        bits: 1, 2 or 4.
        activation: as `onebit.adapter` has them.
        dropout: share of the r features that `up` does not see in training.

    Shape:
        x `[..., in]`, residual `[..., out]` or None -> `[..., out]`, in the dtype of x, or the
        wider of both.

    Raises:
        TypeError, ValueError: a value out of range.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int | None = None,
        r: int = 32,
        scale: float = 1.0,
        bits: int = 1,
        activation: str = "relu",
        dropout: float = 0.0,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        config = OneBitConfig(r, scale, bits, "adaptformer", dropout)
        out_features = in_features if out_features is None else out_features
        check.branch(in_features, out_features, activation)
        self.activation = activation
        self.start(in_features, out_features, config, device)

    @classmethod
    def from_config(
        cls, widths: tuple[int, int], config: OneBitConfig, device: torch.device | None = None
    ) -> OneBitAdapter:
        """The branch of a block, of a config."""
        layer = cls(*widths, config.r, config.scale, config.bits, "relu", config.dropout, device)
        layer.config = config
        return layer

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return self.branch(x, residual)

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        return self.branch(x, y)

    def merge_obstacle(self) -> str:
        if self.activation == "identity":
            return "no weight stands beside it that reads the same input"
        return (
            f"its {self.activation} is not linear, and it reads what no weight of the model reads"
        )

    def extra_repr(self) -> str:
        sizes = f"in_features={self.down.shape[1]}, out_features={self.up.shape[0]}"
        return f"{sizes}, activation={self.activation}, {self.facts()}"
