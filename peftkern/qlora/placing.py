"""Adapters in a linear's place: which linears a config names, and which of them can take one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from peftkern import _attached, _check, _family, _select
from peftkern._family import Places, Undo, Wanted
from peftkern.qlora import bnb
from peftkern.qlora.format import Format, formats
from peftkern.qlora.frozen import FrozenLinear, base_of
from peftkern.qlora.weight import QuantizedWeight

Self = TypeVar("Self", bound="LinearConfig")

HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called",
    "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_backward_hooks",
    "_backward_pre_hooks", "_is_full_backward_hook",
)  # fmt: skip


class LinearConfig(_family.Config):
    """A config whose layers stand in the place of linears, on their weights."""

    target_modules: str | tuple[str, ...] | list[str]
    exclude_modules: str | tuple[str, ...] | list[str]
    base: str | Format | None

    def build(self, linear: nn.Module, start: Any, shared: Any) -> nn.Module:
        """The layer in the place of a linear, or of one seen as `as_linear` sees it."""
        raise NotImplementedError

    def wanted(self, rows: int, columns: int, bias: bool) -> Wanted:
        """What files hold of that layer."""
        raise NotImplementedError

    def unquantised(self: Self) -> Self:
        """For a weight that stays as it is."""
        raise NotImplementedError

    def unfit(self, module: nn.Module, quantized: bool) -> str | None:
        """Why it cannot be had on this linear, which may be quantised already."""
        return None

    def targets(self, model: nn.Module) -> Iterator[_family.Target]:
        owners = _select.owners(model)
        special = _select.heads_and_routers(model) if self.target_modules == "all-linear" else {}
        for module, names in _select.names(model).items():
            if any(_select.named(module, name, self) for name in names):
                weight = module._parameters.get("weight")
                tied = [other for other in owners.get(id(weight), ()) if other != names[0]]
                own = self.unquantised() if tied else self
                yield LinearTarget(
                    module, names, own.of_module(names[0]), tied, self.base, special.get(module)
                )

    def nothing(self, model: nn.Module) -> str:
        linears = ", ".join(_select.linears(_select.names(model))) or "none"
        return (
            "target_modules must name a linear that can take an adapter, got "
            f"{self.target_modules!r}; linears there: {linears}"
        )


class LinearTarget(_family.Target):
    """A linear that gives way.

    Args:
        module, names: the linear, and every name it has.
        config: of this linear.
        tied: other modules that hold its weight.
        base: what its config has for those that are not tied.
        special: why "all-linear" leaves it alone.
    """

    config: LinearConfig

    def __init__(
        self,
        module: nn.Module,
        names: list[str],
        config: LinearConfig,
        tied: Sequence[str] = (),
        base: object = None,
        special: str | None = None,
    ) -> None:
        super().__init__(module, names, config)
        self.tied, self.base, self.special = tied, base, special

    @property
    def final(self) -> bool:  # type: ignore[override]
        """Whether the layer in its place has a weight of its own."""
        if isinstance(base_of(self.module), QuantizedWeight):
            return False
        return self.config.base is not None or is_transposed(self.module)

    @property
    def order(self) -> int:  # type: ignore[override]
        """Those that share their weight first: as long as none is given up, all can be undone."""
        return int(self.final)

    def obstacle(self, model: nn.Module) -> str | None:
        return self.special or obstacle(model, self.module, self.names, self.config, self.tied)

    def remark(self) -> str | None:
        if not self.tied or self.base is None:
            return None
        return f"its base is not quantised, since its weight is tied to {self.tied[0]}"

    def wanted(self) -> Wanted:
        return self.config.wanted(*features(self.module), self.module.bias is not None)

    def put(self, model: nn.Module, places: Places) -> Iterator[Undo]:
        layer = self.config.build(as_linear(self.module), self.start, self.shared)
        keep_hooks(self.module, layer)
        for parent, attribute in places[id(self.module)]:
            yield partial(parent._modules.__setitem__, attribute, self.module)
            parent._modules[attribute] = layer


def obstacle(
    model: nn.Module,
    module: nn.Module,
    places: list[str],
    config: LinearConfig,
    tied: Sequence[str] = (),
) -> str | None:
    """Why this module cannot give way to an adapter; None where it can.

    Args:
        model: in which the module stands at `places`.
        config: the module's own.
        tied: other modules that hold its weight.
    """
    kind = type(module).__name__
    if isinstance(module, (_family.Adapter, _attached.Attached)):
        return "has an adapter already"
    if reason := _select.closed(model, places):
        return reason
    if "forward" in vars(module):
        return "its forward is replaced on the instance, as hooks of accelerate do"
    weight = module._parameters.get("weight")
    if type(module) is FrozenLinear:
        return config.unfit(module, True)
    if _select.is_a(module, "bitsandbytes", "Linear4bit"):
        state = getattr(weight, "quant_state", None)
        return obstacle_4bit(state) or config.unfit(module, True)
    if _select.is_a(module, "bitsandbytes", "Linear8bitLt"):
        return obstacle_8bit(module) or config.unfit(module, True)
    transposed = _select.is_a(module, "transformers", "Conv1D")
    if not transposed and getattr(type(module), "forward", None) is not nn.Linear.forward:
        return f"{kind} is none of nn.Linear, Conv1D, Linear4bit and Linear8bitLt"
    if weight is None:
        return "its weight is computed, not stored"
    if type(weight) is not nn.Parameter or type(weight.data) is not Tensor:
        return f"its weight is a {type(weight.data).__name__}, not a plain tensor"
    if weight.is_meta:
        return "its weight is on the meta device"
    if weight.dtype not in _check.FLOATS:
        return f"its weight is {weight.dtype}, not float"
    if weight.numel() == 0:
        return "its weight is empty"
    if tied and is_transposed(module):
        return f"its weight is stored transposed and tied to {tied[0]}, which a copy would part"
    return config.unfit(module, False)


def is_transposed(module: nn.Module) -> bool:
    """A dense weight that the kernels, which read rows, can only take as a copy."""
    if _select.is_a(module, "transformers", "Conv1D"):
        return True
    weight = module.weight
    assert isinstance(weight, Tensor)
    return not weight.is_contiguous()


def features(module: nn.Module) -> tuple[int, int]:
    """out and in of a linear of any kind that takes an adapter."""
    if _select.is_a(module, "transformers", "Conv1D"):
        rows, columns = module._parameters["weight"].shape  # type: ignore[union-attr]
        return columns, rows
    return module.out_features, module.in_features  # type: ignore[return-value]


NOT_YET = "not quantised yet: bitsandbytes does it when the model moves to its device"


def obstacle_4bit(state: Any) -> str | None:
    """Why our kernels cannot read a 4-bit weight of bitsandbytes, by its `quant_state`."""
    if state is None:
        return NOT_YET
    if state.quant_type not in formats:
        return f"its format {state.quant_type} is none of {', '.join(formats)}"
    # Its state_dict takes the mark away and puts the bytes back, but not the scales.
    scales = [state.absmax.dim() == 1, not state.nested or state.offset.dtype == torch.float32]
    if getattr(state, "packing_format_for_cpu", False) or not all(scales):
        return "bitsandbytes has repacked it at an eval forward, with other scales"
    return None


def obstacle_8bit(module: nn.Module) -> str | None:
    """Why our kernels cannot stand in for a `Linear8bitLt`."""
    state: Any = module.state
    if state.has_fp16_weights:
        return "its weight is kept in float, and quantised at every forward"
    if state.threshold > 0:
        return (
            f"its threshold is {state.threshold:g}: activations beyond it take a way of their own, "
            "which peftkern lacks"
        )
    return None if bnb.is_quantized(module) else NOT_YET


def as_linear(module: nn.Module) -> nn.Module:
    """The module, or of a `Conv1D` one whose weight is the same seen the other way round."""
    if not _select.is_a(module, "transformers", "Conv1D"):
        return module
    assert isinstance(module.weight, Tensor)
    linear = nn.Module()
    linear.weight = nn.Parameter(module.weight.detach().t(), requires_grad=False)
    linear.bias = module.bias
    linear.training = module.training
    return linear


def keep_hooks(module: nn.Module, instead: nn.Module) -> None:
    """The dictionaries themselves, which the handles of the hooks refer to."""
    for hooks in HOOKS:
        setattr(instead, hooks, getattr(module, hooks))
