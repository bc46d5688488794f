"""A bottleneck as a layer: beside a module, behind it, or alone."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from peftkern._attached import AttachedAdapter
from peftkern._family import Explained
from peftkern.bottleneck.ops import linear
from peftkern.bottleneck.reference import Norm

if TYPE_CHECKING:
    from peftkern.bottleneck.config import BottleneckConfig


class Branch(AttachedAdapter):
    """What every kind of bottleneck is: a branch, by `scale`, on a residual."""

    method = "bottleneck"
    config: BottleneckConfig
    scale: nn.Parameter | float

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        out: Tensor = self(x if self.config.mode == "parallel" else y, y)
        return out.to(y.dtype)

    def take(self, config: BottleneckConfig) -> None:  # type: ignore[override]
        """A scale that does not train; one that does is a part."""
        if not isinstance(self.scale, nn.Parameter):
            self.scale = config.scale
            self.config = replace(self.config, scale=config.scale)


def behind(
    hidden: Tensor,
    up: Tensor,
    bias_up: Tensor,
    scale: Tensor | float,
    activation: str,
    residual: Tensor | None,
    dropout: float,
) -> Tensor:
    """residual + scale * (D(act(hidden)) up^T + bias_up), of what torch's convolution has given.

    Our op with the identity for its first product: activation, product, scale and sum in one pass.
    """
    identity = torch.eye(up.shape[1], device=up.device, dtype=up.dtype)
    rest = (None, bias_up, scale, activation, residual, None, dropout)
    return linear(hidden, identity, up, *rest)


class BottleneckAdapter(Branch):
    """y = residual + scale * (D(act(N(x) down^T + bias_down)) up^T + bias_up).

    Houlsby et al. (2019), behind a module; He et al. (2022), beside it. N is a LayerNorm with
    `norm="in"`, or nothing; with "out" it is one of what `scale` multiplies instead.

    At the start the branch is exactly 0, and two steps move every parameter: `up` and the biases
    are 0, `down` is uniform as `nn.Linear` draws it. Behind `up` a LayerNorm would make a branch of
    size 1 of whatever `up` holds after one step; so with "out" the norm's own weight is what starts
    at 0, and `up` is drawn like `down`.

    Args:
        columns, rows: of x and of y.
        config: rank, activation, scale, norm, dropout and mode.
        device: of the parameters.
        dtype: theirs; at least float32 serves training.

    Shape:
        `[..., columns]` -> `[..., rows]`, in x's dtype.

    Raises:
        ValueError: a rate that leaves no rank.
    """

    norm: nn.LayerNorm | None

    def __init__(
        self,
        columns: int,
        rows: int,
        config: BottleneckConfig,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        if (r := config.rank(columns)) < 1:
            raise ValueError(
                f"rate must leave a rank of at least 1 of {columns}, got {config.rate}"
            )
        self.config = config
        self.r, self.in_features, self.out_features = r, columns, rows

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.down, self.bias_down = parameter(r, columns), parameter(r)
        self.up, self.bias_up = parameter(rows, r), parameter(rows)
        self.scale = parameter(1) if config.train_scale else config.scale
        width = {"in": columns, "out": rows, None: None}[config.norm]
        self.norm = None if width is None else nn.LayerNorm(width, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))
        for bias in (self.bias_down, self.bias_up):
            nn.init.zeros_(bias)
        if isinstance(self.scale, nn.Parameter):
            nn.init.constant_(self.scale, self.config.scale)
        if self.norm is not None:
            nn.init.constant_(self.norm.weight, float(self.config.norm == "in"))
            nn.init.zeros_(self.norm.bias)
        if self.config.norm == "out":
            nn.init.kaiming_uniform_(self.up, a=math.sqrt(5))
        else:
            nn.init.zeros_(self.up)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        dropout = self.config.dropout if self.training else 0.0
        factors = (self.down, self.up, self.bias_down, self.bias_up)
        act, norm = self.config.activation, self.norm
        if norm is None or self.config.norm == "in":
            before = None if norm is None else Norm(norm.weight, norm.bias, norm.eps)
            return linear(x, *factors, self.scale, act, residual, before, dropout)
        branch = linear(x, *factors, activation=act, dropout=dropout)
        branch = self.scale * norm(branch.to(norm.weight.dtype))
        y: Tensor = branch if residual is None else residual + branch
        return y.to(x.dtype)

    def explained(self) -> Explained:
        dtype = str(self.down.dtype).removeprefix("torch.")
        norm = {"in": "a LayerNorm, ", "out": "", None: ""}[self.config.norm]
        behind = ", then a LayerNorm and the residual" * (self.config.norm == "out")
        residual = "" if behind else " and the residual"
        return Explained(
            holds=f"{self.in_features} to {self.r} to {self.out_features} in {dtype}",
            device=self.down.device.type,
            runs=f"peftkern.bottleneck, {norm}both products, {self.config.activation}{residual} "
            f"in one pass{behind}",
            ops={"forward": "bottleneck_linear", "backward": "bottleneck_linear_bwd"},
        )

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, r={self.r}, out_features={self.out_features}, "
            f"activation={self.config.activation}, mode={self.config.mode}"
        )
