"""Learned keys and values, which every query of an attention sees beside its own:

    y = softmax(scale * q [P_k; K]^T + mask) [P_v; V]
      = (1 - l) softmax(scale * q K^T + mask) V + l softmax(scale * q P_k^T) P_v

with l the share of the softmax's mass that falls on the prefix. The second line makes a prefix one
more adapter, gated by l, beside an attention that stays as it is (He et al., Towards a Unified View
of Parameter-Efficient Transfer Learning, 2022).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peftkern import _family, _sharded
from peftkern._family import Config, Explained, Parts, Wanted

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
        return _hidden(self.embedding, self.down, self.bias)


class Prefix(_family.Adapter):
    """Keys and values of one attention, in front of those that its input gives.

    Li and Liang (Prefix-Tuning, 2021), for one layer. The keys take no rotation, as they stand at
    no position. Parameters are `keys` `[heads, length, key]` and `values` `[heads, length, value]`,
    normal with deviation 0.02; or, with a trunk, `up` `[heads * (key + value), hidden]` and `bias`,
    of which

        [keys, values] = tanh(E down^T + bias_down) up^T + bias

    is made at every call: what trains is another thing, what it comes to, and what is saved, not.

    Args:
        heads: of the attention; with grouped queries those of its keys.
        length: keys and values a head; 0 leaves the attention as it is.
        like: whose device the parameters start on, at least in float32, as small steps ask.
        trunk: what they are made of; None for parameters of their own.
        shared: whether the trunk is another prefix's child, and not this one's.

    Shape:
        key `[batch, heads, tokens, key]`, value `[batch, heads, tokens, value]` -> the same with
        `length + tokens`, in their dtype.
    """

    method = "prefix"
    trunk: Trunk | None

    def __init__(
        self,
        heads: Heads,
        length: int,
        like: Tensor,
        trunk: Trunk | None = None,
        shared: bool = False,
    ) -> None:
        super().__init__()
        self.heads, self.length = heads, length
        if shared:
            vars(self)["trunk"] = trunk
        else:
            self.trunk = trunk
        if trunk is None:
            self.keys = _drawn(like, heads.number, length, heads.key)
            self.values = _drawn(like, heads.number, length, heads.value)
        else:
            self.up = _drawn(like, heads.number * (heads.key + heads.value), len(trunk.down))
            self.bias = nn.Parameter(torch.zeros_like(self.up[:, 0]))

    def made(self) -> tuple[Tensor, Tensor]:
        """The keys and values as they are now."""
        if self.trunk is None:
            return self.keys, self.values
        return self._split(nn.functional.linear(self.trunk(), self.up, self.bias))

    def _split(self, made: Tensor) -> tuple[Tensor, Tensor]:
        """By heads, of `[length, heads * (key + value)]`."""
        number, key, value = self.heads
        keys, values = made[:, : number * key], made[:, number * key :]
        return (
            keys.reshape(self.length, number, key).transpose(0, 1),
            values.reshape(self.length, number, value).transpose(0, 1),
        )

    def forward(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = self.made()
        return _in_front(keys, key), _in_front(values, value)

    def parts(self) -> Parts:
        made = self.made() if self.trunk is None else self._made_of_whole(self.trunk)
        keys, values = (part.detach().contiguous() for part in made)
        return {"keys": keys, "values": values}

    @torch.no_grad()
    def _made_of_whole(self, trunk: Trunk) -> tuple[Tensor, Tensor]:
        """Where processes hold a shard each of what they are made of, each makes all of them."""
        hidden = _hidden(*map(_sharded.whole, (trunk.embedding, trunk.down, trunk.bias)))
        up, bias = map(_sharded.whole, (self.up, self.bias))
        return self._split(nn.functional.linear(hidden, up, bias))

    def fill(self, parts: Parts) -> None:
        for part, stored in zip(self.made(), (parts["keys"], parts["values"]), strict=True):
            _sharded.fill(part, stored)

    def wanted(self) -> Wanted:
        number, key, value = self.heads
        keys, values = ([number, self.length, width] for width in (key, value))
        return {"keys": (keys, True), "values": (values, True)}

    def fields(self) -> dict[str, Any]:
        return {"length": self.length}

    def misfit(self, config: Config) -> str | None:
        if self.trunk is not None:
            return "an MLP makes its keys and values here, which a file cannot tell"
        return super().misfit(config)

    def merge_obstacle(self) -> str | None:
        return "keys and values are part of no weight"

    def explained(self) -> Explained:
        number, key, value = self.heads
        return Explained(
            holds=f"{self.length} keys and values in each of {number} heads",
            device=next(self.parameters()).device.type,
            runs="transformers' attention function, with the prefix in front of what it is given",
            ops={},
        )

    def extra_repr(self) -> str:
        return f"length={self.length}, heads={tuple(self.heads)}"


def _hidden(embedding: Tensor, down: Tensor, bias: Tensor) -> Tensor:
    return torch.tanh(nn.functional.linear(embedding, down, bias))


def _in_front(prefix: Tensor, own: Tensor) -> Tensor:
    return torch.cat([prefix.to(own.dtype).expand(len(own), -1, -1, -1), own], 2)


def _drawn(like: Tensor, *shape: int) -> nn.Parameter:
    dtype = torch.promote_types(like.dtype, torch.float32)
    return nn.Parameter(torch.randn(*shape, device=like.device, dtype=dtype) * DEVIATION)
