"""The convolution module of a Conformer block, as an adapter beside a sublayer."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from peftkern._family import Explained
from peftkern.bottleneck.layer import Branch, behind
from peftkern.bottleneck.reference import Norm, normalize

if TYPE_CHECKING:
    from peftkern.bottleneck.config import BottleneckConfig

KERNEL = 31  # the tokens that a convolution sees, in the paper


class ConformerAdapter(Branch):
    """y = residual + scale * (D(silu(B(C(glu(N(x) down^T + bias_down))))) up^T + bias_up).

    Cappellazzo et al., Parameter-Efficient Transfer Learning of Audio Spectrogram Transformers
    (2023), after Gulati et al., Conformer (2020). N is a LayerNorm; glu(a, b) = a * sigmoid(b) over
    the halves of the channels; C convolves each channel along the tokens, with zeros around, so
    that there are as many after it; B is a BatchNorm over all tokens, padding among them, and its
    running statistics belong to the adapter; D drops. It starts at 0, since `up` and `bias_up` do.
    In training B takes off again what `bias_taps` adds, so that trains in eval mode alone.

    Their program computes N(x) and then reads x. So does this without `prenorm`, and has no
    parameters for N, while theirs are there and never move.

    Args:
        columns, rows: of x and of y.
        config: rank, kernel, scale, dropout, prenorm and mode.
        device: of the parameters.
        dtype: theirs; at least float32 serves training.

    Shape:
        `[..., tokens, columns]` -> `[..., tokens, rows]`, in x's dtype.
    """

    def __init__(
        self,
        columns: int,
        rows: int,
        config: BottleneckConfig,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.config = config
        self.r, self.in_features, self.out_features = config.rank(columns), columns, rows
        self.kernel = config.kernel or KERNEL

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        norm = nn.LayerNorm(columns, device=device, dtype=dtype) if config.prenorm else None
        self.norm = norm
        self.down, self.bias_down = parameter(2 * self.r, columns), parameter(2 * self.r)
        self.taps, self.bias_taps = parameter(self.r, 1, self.kernel), parameter(self.r)
        self.batch_norm = nn.BatchNorm1d(self.r, device=device, dtype=dtype)
        self.up, self.bias_up = parameter(rows, self.r), parameter(rows)
        self.scale = parameter(1) if config.train_scale else config.scale
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for weight in (self.down, self.taps):
            nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
        for zero in (self.bias_down, self.bias_taps, self.up, self.bias_up):
            nn.init.zeros_(zero)
        if isinstance(self.scale, nn.Parameter):
            nn.init.constant_(self.scale, self.config.scale)
        if self.norm is not None:
            self.norm.reset_parameters()
        for name, start in self.batch_norm.state_dict().items():
            nn.init.constant_(start, float(name in ("weight", "running_var")))

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if x.dim() < 2:
            raise ValueError(f"x must have shape [..., tokens, columns], got {list(x.shape)}")
        seen = x.reshape(-1, *x.shape[-2:])
        if (norm := self.norm) is not None:
            seen = normalize(seen, Norm(norm.weight, norm.bias, norm.eps))
        hidden = functional.linear(seen, self.down.to(x.dtype), self.bias_down.to(x.dtype))
        hidden = functional.glu(hidden).transpose(1, 2)
        taps = self.taps.to(hidden.dtype), self.bias_taps.to(hidden.dtype)
        hidden = functional.conv1d(hidden, *taps, padding="same", groups=self.r)
        if hidden.dtype == torch.float64:  # torch's takes none that is wider than its weight
            hidden = hidden.to(self.taps.dtype)
        hidden = self.batch_norm(hidden).transpose(1, 2)
        hidden = hidden.reshape(*x.shape[:-1], self.r).to(x.dtype)
        dropout = self.config.dropout if self.training else 0.0
        return behind(hidden, self.up, self.bias_up, self.scale, "silu", residual, dropout)

    def explained(self) -> Explained:
        dtype = str(self.down.dtype).removeprefix("torch.")
        return Explained(
            holds=f"{self.in_features} to {self.r} to {self.out_features} in {dtype}, "
            f"{self.kernel} tokens at once",
            device=self.down.device.type,
            runs="torch's convolution, then peftkern.bottleneck: silu, the last product and the "
            "residual in one pass",
            ops={"forward": "bottleneck_linear", "backward": "bottleneck_linear_bwd"},
        )

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, r={self.r}, out_features={self.out_features}, "
            f"kernel={self.kernel}, mode={self.config.mode}"
        )
