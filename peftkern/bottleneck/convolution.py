"""A bottleneck over the channels of an image, beside or behind a module of a convolutional net."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from peftkern.bottleneck.ops import linear
from peftkern.bottleneck.reference import Norm, normalize


class ConvAdapter(nn.Module):
    """y = residual + scale * (D(act(down * N(x) + bias_down)) up^T + bias_up), at every pixel.

    The bottleneck of Mehta et al., Exploring Adapter Design Tradeoffs for Low Resource Music
    Generation (2025): `down * x` is a convolution over kernel x kernel pixels, zeros around; `up`
    is one of 1 x 1; N is a LayerNorm over channels, or nothing; D drops. Theirs has N behind `up`,
    whose bias is random at the start: N makes a constant of size 1 of it, however small it was.
    Here `up` and `bias_up` start at 0, and so does the branch.

    With a kernel of 1 x 1 it is our op on rows of channels, of which an image in
    `torch.channels_last` consists as it lies; else torch's convolution, and our op for the rest.

    Args:
        columns, rows: channels of x and of y.
        r: channels between, at least 1.
        like: whose device the parameters start on, at least in float32.
        kernel: pixels that `down` sees along each axis, at least 1.
        activation: as for `bottleneck.linear`.
        scale: of the branch; a parameter with `train_scale`.
        norm: whether N is there.
        dropout: share of what `up` reads that it does not see, in [0, 1].

    Shape:
        `[batch, columns, height, width]` -> `[batch, rows, height, width]`, in x's dtype and
        memory format.
    """

    scale: nn.Parameter | float
    identity: Tensor | None

    def __init__(
        self,
        columns: int,
        rows: int,
        r: int,
        like: Tensor,
        kernel: int = 1,
        activation: str = "gelu",
        scale: float = 1.0,
        train_scale: bool = False,
        norm: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        dtype = torch.promote_types(like.dtype, torch.float32)
        zeros = torch.zeros(0, device=like.device, dtype=dtype).new_zeros
        self.r, self.kernel, self.activation, self.dropout = r, kernel, activation, dropout
        self.norm = nn.LayerNorm(columns, device=like.device, dtype=dtype) if norm else None
        self.down = nn.Parameter(zeros(r, columns, kernel, kernel))
        self.bias_down = nn.Parameter(zeros(r))
        self.up = nn.Parameter(zeros(rows, r))
        self.bias_up = nn.Parameter(zeros(rows))
        self.scale = nn.Parameter(zeros(1).fill_(scale)) if train_scale else scale
        # What the convolution leaves goes through our op as it is, for all that is behind it.
        identity = torch.eye(r).to(self.up) if kernel > 1 else None
        self.register_buffer("identity", identity, persistent=False)
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if x.dim() != 4:
            raise ValueError(
                f"x must have shape [batch, channels, height, width], got {list(x.shape)}"
            )
        seen = _pixels(x)
        added = seen if residual is x else None if residual is None else _pixels(residual)
        norm = None
        if self.norm is not None:
            norm = Norm(self.norm.weight, self.norm.bias, self.norm.eps)
        down: Tensor = self.down.flatten(1)
        bias_down: Tensor | None = self.bias_down
        activation, dropout = self.activation, self.dropout if self.training else 0.0
        if self.identity is not None:
            hidden = seen if norm is None else normalize(seen, norm)
            weight = self.down.to(x.dtype), self.bias_down.to(x.dtype)
            hidden = functional.conv2d(hidden.permute(0, 3, 1, 2), *weight, padding="same")
            seen, down, bias_down, norm = _pixels(hidden).to(x.dtype), self.identity, None, None
        y = linear(
            seen, down, self.up, bias_down, self.bias_up, self.scale, activation, added, norm,
            dropout,
        ).permute(0, 3, 1, 2)  # fmt: skip
        return y if x.is_contiguous(memory_format=torch.channels_last) else y.contiguous()


def _pixels(image: Tensor) -> Tensor:
    """`[batch, height, width, channels]`, without a copy where it lies so."""
    return image.permute(0, 2, 3, 1).contiguous()
