"""The convolution module of a Conformer block, as an adapter beside a sublayer."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from peftkern.bottleneck.ops import linear


class ConformerAdapter(nn.Module):
    """y = residual + scale * (D(silu(B(C(glu(N(x) down^T + bias_down)))) up^T + bias_up).

    Cappellazzo et al., Parameter-Efficient Transfer Learning of Audio Spectrogram Transformers
    (2023), after Gulati et al., Conformer (2020). N is a LayerNorm; glu(a, b) = a * sigmoid(b) over
    the halves of the channels; C convolves each channel along the tokens, with zeros around, so
    that there are as many after it; B is a BatchNorm over all tokens, padding among them, and its
    running statistics belong to the adapter; D drops. It starts at 0, since `up` and `bias_up` do.

    Their program computes N(x) and then reads x: without `prenorm`, so does this, and has no
    parameters for N, while theirs are there and never move.

    Args:
        width: of x and y.
        r: channels between, at least 1.
        kernel: the tokens that C sees, at least 1.
        scale: of the branch; a parameter with `train_scale`.
        dropout: share of what `up` reads that it does not see, in [0, 1].
        like: whose device the parameters start on, at least in float32.

    Shape:
        `[..., tokens, width]` -> the same, in x's dtype.
    """

    scale: nn.Parameter | float
    identity: Tensor

    def __init__(
        self,
        width: int,
        r: int,
        like: Tensor,
        kernel: int = 31,
        scale: float = 1.0,
        train_scale: bool = False,
        prenorm: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        dtype = torch.promote_types(like.dtype, torch.float32)
        empty = torch.empty(0, device=like.device, dtype=dtype).new_empty
        self.r, self.kernel, self.dropout = r, kernel, dropout
        self.norm = nn.LayerNorm(width, device=like.device, dtype=dtype) if prenorm else None
        self.down = nn.Parameter(empty(2 * r, width))
        self.bias_down = nn.Parameter(torch.zeros_like(self.down[:, 0]))
        self.taps = nn.Parameter(empty(r, 1, kernel))
        self.bias_taps = nn.Parameter(torch.zeros_like(self.taps[:, 0, 0]))
        self.batch_norm = nn.BatchNorm1d(r, device=like.device, dtype=dtype)
        self.up = nn.Parameter(empty(width, r).zero_())
        self.bias_up = nn.Parameter(torch.zeros_like(self.up[:, 0]))
        self.scale = nn.Parameter(empty(1).fill_(scale)) if train_scale else scale
        # What the convolution leaves goes through our op as it is, for all that is behind it.
        self.register_buffer("identity", torch.eye(r).to(self.up), persistent=False)
        for weight in (self.down, self.taps):
            nn.init.kaiming_uniform_(weight, a=math.sqrt(5))

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if x.dim() < 2:
            raise ValueError(f"x must have shape [..., tokens, width], got {list(x.shape)}")
        seen = x.reshape(-1, *x.shape[-2:])
        if (norm := self.norm) is not None:
            parameters = norm.weight.to(x.dtype), norm.bias.to(x.dtype)
            seen = functional.layer_norm(seen, norm.normalized_shape, *parameters, norm.eps)
        hidden = functional.linear(seen, self.down.to(x.dtype), self.bias_down.to(x.dtype))
        hidden = functional.glu(hidden).transpose(1, 2)
        taps = self.taps.to(hidden.dtype), self.bias_taps.to(hidden.dtype)
        hidden = functional.conv1d(hidden, *taps, padding="same", groups=self.r)
        hidden = self.batch_norm(hidden).transpose(1, 2).to(x.dtype)
        return linear(
            hidden.reshape(*x.shape[:-1], self.r), self.identity, self.up, None, self.bias_up,
            self.scale, "silu", residual, None, self.dropout if self.training else 0.0,
        )  # fmt: skip
