"""A bottleneck over the channels of an image, beside or behind a module of a convolutional net."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from peftkern._family import Explained
from peftkern.bottleneck.layer import Branch, behind
from peftkern.bottleneck.ops import linear
from peftkern.bottleneck.reference import Norm, normalize

if TYPE_CHECKING:
    from peftkern.bottleneck.config import BottleneckConfig


class ConvBlock(nn.Module):
    """residual + scale * (D(act(down * N(x) + bias_down)) up^T + bias_up), at every pixel.

    `down * x` is a convolution over kernel x kernel pixels, zeros around, N a LayerNorm over
    channels, or nothing. With a kernel of 1 x 1 it is our op on rows of channels, of which an image
    in `torch.channels_last` consists as it lies; else torch's convolution, and our op for the rest.

    Shape:
        `[batch, columns, height, width]` -> `[batch, rows, height, width]`, in x's dtype and
        memory format.
    """

    def __init__(
        self,
        columns: int,
        rows: int,
        config: BottleneckConfig,
        device: torch.device | None,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.config, self.r, self.kernel = config, config.rank(columns), config.kernel or 1

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.down = parameter(self.r, columns, self.kernel, self.kernel)
        self.bias_down = parameter(self.r)
        self.up, self.bias_up = parameter(rows, self.r), parameter(rows)
        norm = nn.LayerNorm(columns, device=device, dtype=dtype) if config.norm == "in" else None
        self.norm = norm

    def reset_parameters(self) -> None:
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))
        for zero in (self.bias_down, self.up, self.bias_up):
            nn.init.zeros_(zero)
        if self.norm is not None:
            self.norm.reset_parameters()

    def forward(self, x: Tensor, residual: Tensor | None, scale: Tensor | float) -> Tensor:
        if x.dim() != 4:
            raise ValueError(
                f"x must have shape [batch, channels, height, width], got {list(x.shape)}"
            )
        seen = _pixels(x)
        added = seen if residual is x else None if residual is None else _pixels(residual)
        norm = None
        if self.norm is not None:
            norm = Norm(self.norm.weight, self.norm.bias, self.norm.eps)
        activation, dropout = self.config.activation, self.config.dropout if self.training else 0.0
        if self.kernel == 1:
            factors = (self.down.flatten(1), self.up, self.bias_down, self.bias_up)
            y = linear(seen, *factors, scale, activation, added, norm, dropout)
        else:
            hidden = seen if norm is None else normalize(seen, norm)
            down = self.down.to(x.dtype), self.bias_down.to(x.dtype)
            hidden = functional.conv2d(hidden.permute(0, 3, 1, 2), *down, padding="same")
            hidden = _pixels(hidden).to(x.dtype)
            y = behind(hidden, self.up, self.bias_up, scale, activation, added, dropout)
        image = y.permute(0, 3, 1, 2)
        return image if x.is_contiguous(memory_format=torch.channels_last) else image.contiguous()


class ConvAdapter(Branch):
    """y becomes y + scale * block(y), block after block; in parallel y + scale * block(x), of one.

    The bottleneck of Mehta et al., Exploring Adapter Design Tradeoffs for Low Resource Music
    Generation (2025); `ConvBlock` has the equation. Theirs has its LayerNorm behind `up`, whose
    bias is random at the start, and a LayerNorm makes a constant of size 1 of it, however small it
    was. Here the norm stands before `down`, and the branch starts at 0, since `up` and its bias do.

    Args:
        columns, rows: channels of x and of y.
        config: rank, kernel, activation, scale, norm, dropout, repeat and mode.
        device: of the parameters.
        dtype: theirs; at least float32 serves training.

    Shape:
        `[batch, columns, height, width]` -> `[batch, rows, height, width]`, in x's dtype and
        memory format.
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
        self.config, self.in_features, self.out_features = config, columns, rows
        self.blocks = nn.ModuleList(
            ConvBlock(columns, rows, config, device, dtype) for _ in range(config.repeat)
        )
        gate = nn.Parameter(torch.empty(1, device=device, dtype=dtype))
        self.scale = gate if config.train_scale else config.scale
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for block in self.blocks:
            block.reset_parameters()  # type: ignore[operator]
        if isinstance(self.scale, nn.Parameter):
            nn.init.constant_(self.scale, self.config.scale)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y: Tensor = self.blocks[0](x, residual, self.scale)
        for block in self.blocks[1:]:
            y = block(y, y, self.scale)
        return y

    def explained(self) -> Explained:
        (first, *rest), dtype = self.blocks, next(self.parameters()).dtype
        once = "" if not rest else f", {len(self.blocks)} one behind the other"
        runs = "peftkern.bottleneck on rows of channels, all in one pass"
        if first.kernel != 1:
            runs = "torch's convolution, then peftkern.bottleneck: all else in one pass"
        return Explained(
            holds=f"{self.in_features} to {first.r} to {self.out_features} channels in "
            f"{str(dtype).removeprefix('torch.')}, {first.kernel} x {first.kernel} pixels{once}",
            device=next(self.parameters()).device.type,
            runs=runs,
            ops={"forward": "bottleneck_linear", "backward": "bottleneck_linear_bwd"},
        )

    def extra_repr(self) -> str:
        config = self.config
        return f"activation={config.activation}, repeat={config.repeat}, mode={config.mode}"


def _pixels(image: Tensor) -> Tensor:
    """`[batch, height, width, channels]`, without a copy where it lies so."""
    return image.permute(0, 2, 3, 1).contiguous()
