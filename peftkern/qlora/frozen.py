"""A linear that does not train, as bitsandbytes stores it or dense: moved, saved and loaded."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from peftkern.qlora import bnb, merging
from peftkern.qlora.ops import linear
from peftkern.qlora.weight import QuantizedWeight, stored_as

Self = TypeVar("Self", bound="FrozenLinear")


class FrozenLinear(nn.Module):
    """y = x W^T + bias: what a layer with an adapter adds to, and what it is once that is gone.

    `weight` is a frozen Parameter, packed bytes or a dense `[out, in]`; scales stand beside it.

    Args:
        weight: `[out, in]`, quantised or dense. Its storage is shared, never copied or changed.
        bias: `[out]` or None.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, weight: QuantizedWeight | Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.original: merging.Original | None = None
        self.set_base(weight)
        self.bias = None if bias is None else _frozen(bias)

    def set_base(self, weight: QuantizedWeight | Tensor) -> None:
        """Takes a weight, and the very parameter where it is one."""
        self._quantized: QuantizedWeight | None = None
        if isinstance(weight, QuantizedWeight):
            self.weight = _frozen(weight.packed)
            self._quantized = weight.without_bytes()
        else:
            self.weight = _frozen(weight)

    @property
    def quantized_weight(self) -> QuantizedWeight | None:
        """The base as its producer stores it; None for a dense base."""
        # Made anew, and not kept: `fully_shard` puts other parameters in the place of `weight`,
        # and frees only what nobody holds on to.
        return None if self._quantized is None else self._quantized.with_bytes(self.weight)

    @property
    def base(self) -> QuantizedWeight | Tensor:
        """The weight that the forward takes; where it is merged, `original` is what it was."""
        return self.quantized_weight or self.weight

    @property
    def merged(self) -> bool:
        """Whether the adapter is in the weight."""
        return self.original is not None

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.base, self.bias)

    def _apply(self: Self, fn: Any, recurse: bool = True) -> Self:
        """The scales follow the packed bytes from device to device, and all keep their dtype.

        Bytes may be stored as floats, which `fn` would convert: it is shown them as bytes.
        """
        codes: list[Tensor] = [self.weight] if self._quantized is not None else []
        if self.original is not None and isinstance(self.original.weight, QuantizedWeight):
            codes.append(self.original.weight.packed)

        def bits_kept(tensor: Tensor) -> Tensor:
            if not tensor.is_floating_point() or all(tensor is not code for code in codes):
                return fn(tensor)  # type: ignore[no-any-return]
            return stored_as(fn(stored_as(tensor, torch.uint8)), tensor.dtype)

        super()._apply(bits_kept, recurse)  # type: ignore[no-untyped-call]
        if self._quantized is not None:
            self._quantized = self._quantized.scales_to(self.weight.device)
        if self.original is not None:
            self.original = self.original.moved(bits_kept)
        return self

    def _fqn_modifiers(self) -> dict[str, str]:
        """Asked by torch.distributed.checkpoint, which follows each key of a state dict from
        attribute to attribute: which it looks for in another one of this module.
        """
        names = ("weight", bnb.SCALES, bnb.ORDER) if self._quantized is not None else ()
        return dict.fromkeys(names, "_followed")

    @property
    def _followed(self) -> _Followed:
        return _Followed()

    def extra_repr(self) -> str:
        weight = self.quantized_weight
        base = weight.format.name if weight else "dense"
        if weight and weight.block_size:
            base += f", block_size={weight.block_size}"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, base={base}, "
            f"bias={self.bias is not None}"
        )

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.merged:  # what holds W + D must not hold D again
            for name in {*self._parameters, *self._buffers} - {"weight", "bias"}:
                destination.pop(f"{prefix}{name}", None)
        if (weight := self.quantized_weight) is not None:
            for name, tensor in bnb.statistics(weight).items():
                destination[prefix + name] = tensor

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, metadata: Any, strict: bool, missing: list[str],
        unexpected: list[str], errors: list[str],
    ) -> None:  # fmt: skip
        """Takes bitsandbytes' keys too; the weight must be of this layer's format and shape."""
        key, loaded = f"{prefix}weight", None
        if self.merged:
            errors.append(f"{key}: the layer must be unmerged before it loads, got a merged layer")
            return
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
        if loaded is not None:
            self._quantized = loaded.scales_to(self.weight.device).without_bytes()


class _Followed:
    """Has every public attribute, which has them too: `weight.quant_state.bitsandbytes__nf4`."""

    def __getattr__(self, name: str) -> _Followed:
        if name.startswith("_"):
            raise AttributeError(name)
        return self


def base_of(module: nn.Module) -> QuantizedWeight | Tensor:
    """The weight of a linear as it is stored: quantised, or the very parameter."""
    if isinstance(module, FrozenLinear):
        return module.base
    if bnb.is_quantized(module):
        return QuantizedWeight.from_bnb(module)
    return module.weight  # type: ignore[return-value]


def _frozen(tensor: Tensor) -> nn.Parameter:
    """The very parameter where it is one, so that tied weights stay tied."""
    if isinstance(tensor, nn.Parameter) and type(tensor) is nn.Parameter:
        tensor.requires_grad_(False)
        return tensor
    return nn.Parameter(tensor, requires_grad=False)
