"""Learned keys and values, which every query of an attention sees beside its own:

    y = softmax(scale * q [P_k; K]^T + mask) [P_v; V]
      = (1 - l) softmax(scale * q K^T + mask) V + l softmax(scale * q P_k^T) P_v

with l the share of the softmax's mass that falls on the prefix. The second line makes a prefix one
more adapter, gated by l, beside an attention that stays as it is (He et al., Towards a Unified View
of Parameter-Efficient Transfer Learning, 2022).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

DEVIATION = 0.02  # of the normal distribution that every weight starts from


class Heads(NamedTuple):
    """What an attention has keys and values for: heads of their own, and the width of each."""

    number: int
    key: int
    value: int


class Trunk(nn.Module):
    """tanh(E down^T + bias) `[length, hidden]`: what the prefixes of several layers are made of.

    Args:
        length: of the prefix.
        width: of the embedding E `[length, width]`.
        hidden: between the two layers of the reparameterisation.
        like: whose device they start on, at least in float32.
    """

    def __init__(self, length: int, width: int, hidden: int, like: Tensor) -> None:
        super().__init__()
        self.embedding = _drawn(like, length, width)
        self.down = _drawn(like, hidden, width)
        self.bias = nn.Parameter(self.down.new_zeros(hidden))

    def forward(self) -> Tensor:
        return torch.tanh(nn.functional.linear(self.embedding, self.down, self.bias))


class Prefix(nn.Module):
    """Keys and values of one attention, in front of those that its input gives.

    Li and Liang (Prefix-Tuning, 2021), for one layer. The keys take no rotation, as they stand at
    no position. Parameters are `keys` `[heads, length, key]` and `values` `[heads, length, value]`,
    normal with deviation 0.02; or, with a trunk, `up` `[heads * (key + value), hidden]` and `bias`,
    of which

        [keys, values] = tanh(E down^T + bias_down) up^T + bias

    is made at every call, which trains more evenly and is worth nothing after: `fold` leaves the
    keys and values alone.

    Args:
        heads: of the attention; with grouped queries those of its keys.
        length: keys and values a head; 0 leaves the attention as it is.
        like: whose device the parameters start on, at least in float32, as small steps ask.
        trunk: what they are made of, shared with other layers; None for parameters of their own.

    Shape:
        key `[batch, heads, tokens, key]`, value `[batch, heads, tokens, value]` -> the same with
        `length + tokens`, in their dtype.
    """

    keys: nn.Parameter | None
    values: nn.Parameter | None

    def __init__(self, heads: Heads, length: int, like: Tensor, trunk: Trunk | None = None) -> None:
        super().__init__()
        self.heads, self.length, self.trunk = heads, length, trunk
        if trunk is None:
            self.keys = _drawn(like, heads.number, length, heads.key)
            self.values = _drawn(like, heads.number, length, heads.value)
        else:
            self.up = _drawn(like, heads.number * (heads.key + heads.value), len(trunk.down))
            self.bias = nn.Parameter(self.up.new_zeros(len(self.up)))

    def made(self) -> tuple[Tensor, Tensor]:
        """The keys and values as they are now."""
        if self.trunk is None:
            assert self.keys is not None and self.values is not None
            return self.keys, self.values
        number, key, value = self.heads
        made = nn.functional.linear(self.trunk(), self.up, self.bias)
        keys, values = made[:, : number * key], made[:, number * key :]
        return (
            keys.reshape(self.length, number, key).transpose(0, 1),
            values.reshape(self.length, number, value).transpose(0, 1),
        )

    def forward(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = self.made()
        return _in_front(keys, key), _in_front(values, value)

    @torch.no_grad()
    def fold(self) -> None:
        """Keeps the keys and values as they are now, and lets go of what they were made of."""
        if self.trunk is None:
            return
        keys, values = (part.contiguous() for part in self.made())
        self.trunk = None
        del self.up, self.bias
        self.keys, self.values = nn.Parameter(keys), nn.Parameter(values)

    def extra_repr(self) -> str:
        return f"length={self.length}, heads={tuple(self.heads)}"


def _in_front(prefix: Tensor, own: Tensor) -> Tensor:
    return torch.cat([prefix.to(own.dtype).expand(len(own), -1, -1, -1), own], 2)


def _drawn(like: Tensor, *shape: int) -> nn.Parameter:
    dtype = torch.promote_types(like.dtype, torch.float32)
    return nn.Parameter(torch.randn(*shape, device=like.device, dtype=dtype) * DEVIATION)
