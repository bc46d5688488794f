"""Linears and convolutions that train on a support: their gradient is made on it alone."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from peftkern import _inputs
from peftkern.qlora.frozen import base_of
from peftkern.sparse import swap
from peftkern.sparse.linear import conv2d, exact, linear
from peftkern.sparse.ops import sddmm
from peftkern.sparse.pattern import Pattern
from peftkern.sparse.select import as_rule
from peftkern.sparse.state import SUFFIX, State, states
from peftkern.sparse.support import attach


class _Watched(torch.autograd.Function):
    """y; who watches is shown what it was made of and its gradient."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, tell: Any) -> Tensor:
        ctx.save_for_backward(x)
        ctx.tell = tell
        return y.view_as(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        ctx.tell(ctx.saved_tensors[0], grad)
        return grad, None, None


class Product(swap.Sparse):
    """What computes by an op with the weight, its values and their pattern."""

    sampled = "sparse_sddmm"  # the op that gives the gradient of the values

    def way(self) -> str:
        own = "weight" in states(self)
        return "peftkern.sparse, the gradient on the support alone" if own else super().way()

    def ops(self, form: str) -> dict[str, str]:
        if "weight" not in states(self):
            return super().ops(form)
        forward = {"forward": "sparse_matmul"} if form == "delta" else {}
        return forward | {"backward": self.sampled}

    def operands(self) -> tuple[State, Tensor, Tensor] | None:
        """State, weight and values; None where the module's own forward does it."""
        if (state := states(self).get("weight")) is None:
            return None
        if state.merged:
            self.refuse_training()
            return None
        weight, values = self._parameters["weight"], self._parameters["weight" + SUFFIX]
        assert weight is not None and values is not None
        state.write(weight, values)
        return state, weight, values


class OfLinear(Product):
    """y = x W'^T + bias of an `nn.Linear`, or of a subclass with its forward."""

    def forward(self, x: Tensor) -> Tensor:
        if (operands := self.operands()) is None:
            return super().forward(x)  # type: ignore[no-any-return]
        state, weight, values = operands
        y = linear(x, weight, values, state.pattern, self.read("bias"), state.form)
        if state.watcher is None or not y.requires_grad:
            return y
        return _Watched.apply(y, _inputs.autocast(x), _of_rows(state.watcher))  # type: ignore[no-any-return, no-untyped-call]


def _of_rows(watcher: Any) -> Any:
    def tell(x: Tensor, grad: Tensor) -> None:
        watcher.product(x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1]))

    return tell


class OfConv2d(Product):
    """The convolution of an `nn.Conv2d` or an `nn.Conv1d`, or of a subclass with its forward."""

    sampled = "sparse_conv2d_sddmm"

    def ops(self, form: str) -> dict[str, str]:  # a delta is added to a copy of the weight
        return super().ops("value")

    def forward(self, x: Tensor) -> Tensor:
        if (operands := self.operands()) is None:
            return super().forward(x)  # type: ignore[no-any-return]
        state, weight, values = operands
        module: Any = self
        padding = module.padding
        if module.padding_mode != "zeros" or isinstance(padding, str):
            mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
            x = functional.pad(x, module._reversed_padding_repeated_twice, mode)
            padding = (0,) * (weight.dim() - 2)
        sizes = [module.stride, padding, module.dilation]
        alone = x.dim() < weight.dim()
        x = x[None] if alone else x
        flat = weight.dim() == 3
        if flat:  # an image of one row
            x, weight = x[:, :, None], weight[:, :, None]
            sizes = [(n, *size) for n, size in zip((1, 0, 1), sizes, strict=True)]
        rest = (state.pattern, self.read("bias"), *sizes, module.groups, state.form)
        y: Tensor = conv2d(x, weight, values, *rest)
        if state.watcher is not None and y.requires_grad:
            window = [*weight.shape[2:], *sizes[0], *sizes[1], *sizes[2], module.groups]
            y = _Watched.apply(y, _inputs.autocast(x), _of_images(state.watcher, window))  # type: ignore[no-untyped-call]
        y = y[:, :, 0] if flat else y
        return y[0] if alone else y


class _Transposed(torch.autograd.Function):
    """y = x W + bias, where W holds the values."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, values: Tensor, pattern: Pattern, bias: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.pattern, ctx.dtype = pattern, values.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        y = x @ weight.to(x.dtype)
        return y if bias is None else y.add_(bias.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        x_trains, _, values_train, _, bias_trains = ctx.needs_input_grad
        grad_x = grad_values = grad_bias = None
        with exact(grad.device):
            grad_x = grad @ weight.t().to(grad.dtype) if x_trains else None
        if values_train:  # rows are x's features here
            grad_values = sddmm(grad, x, ctx.pattern).to(ctx.dtype)
        if bias_trains:
            wide = torch.promote_types(grad.dtype, torch.float32)
            grad_bias = (
                (grad.flatten(0, -2) if grad.dim() > 1 else grad[None])
                .sum(0, dtype=wide)
                .to(ctx.bias_dtype)
            )
        return grad_x, None, grad_values, None, grad_bias


class OfTransposed(Product):
    """transformers' `Conv1D`: y = x W' + bias, of a weight `[in, out]`."""

    def forward(self, x: Tensor) -> Tensor:
        if (operands := self.operands()) is None:
            return super().forward(x)  # type: ignore[no-any-return]
        state, weight, values = operands
        x = _inputs.autocast(x)
        y: Tensor = _Transposed.apply(x, weight, values, state.pattern, self.read("bias"))  # type: ignore[no-untyped-call]
        if state.watcher is None or not y.requires_grad:
            return y
        tell = _of_rows(state.watcher)
        return _Watched.apply(y, x, lambda x, grad: tell(grad, x))  # type: ignore[no-any-return, no-untyped-call]


def _of_images(watcher: Any, window: list[int]) -> Any:
    return lambda x, grad: watcher.convolution(x, grad, window)


class SparseLinear(OfLinear, nn.Linear):
    """y = x W'^T + bias, where W' is W on all entries but those of a pattern, which train.

    Its values are the parameter `weight_sparse` `[nnz]`; W and bias are frozen. In the "value" form
    they stand in W too, rounded to its dtype; in the "delta" form they are added to W's.

    Shape:
        `[..., in]` -> `[..., out]`, in the input's dtype.
    """

    parent = nn.Linear

    @classmethod
    def from_linear(cls, linear: nn.Module, rule: Any, form: str = "value", **options: Any) -> Any:
        """A layer in the place of a linear, whose weight and bias it shares.

        Args:
            linear: an `nn.Linear`, or one that is quantised, as `adapt` takes them.
            rule, form: as in `SparseConfig`; masks and patterns by the name "weight".
            options: of a base to quantise: `base`, `block_size`, `nested` and `quant_storage`.

        Returns:
            A `SparseLinear`, or of a quantised base a `SparseQuantizedLinear`.
        """
        from peftkern.sparse.config import SparseConfig  # which needs this module
        from peftkern.sparse.quantized import SparseQuantizedLinear

        config = SparseConfig(rule, form, **options)
        base = base_of(linear)
        if isinstance(base, Tensor) and config.base is None:
            return _beside(linear, rule, form)
        weight = base if isinstance(base, Tensor) else base.dequantize()
        pattern = as_rule(rule).select({"weight": weight})["weight"]
        return SparseQuantizedLinear.from_config(linear, config, pattern)

    parameters_read = ("bias", "weight")
    weight = swap.reader("weight")
    bias = swap.reader("bias")


class SparseConv2d(OfConv2d, nn.Conv2d):
    """The convolution of an `nn.Conv2d`, where the entries of a pattern train, as `SparseLinear`'s.

    Shape:
        `[batch, in, height, width]`, or without a batch, as `nn.Conv2d`.
    """

    parent = nn.Conv2d

    @classmethod
    def from_conv2d(cls, conv: nn.Conv2d, rule: Any, form: str = "value") -> SparseConv2d:
        """A layer in the place of a convolution, whose weight and bias it shares.

        Args:
            conv: what it replaces.
            rule, form: as in `SparseConfig`; masks and patterns by the name "weight".
        """
        return _beside(conv, rule, form)  # type: ignore[no-any-return]

    parameters_read = ("bias", "weight")
    weight = swap.reader("weight")
    bias = swap.reader("bias")


def _beside(module: nn.Module, rule: Any, form: str) -> Any:
    """A twin that shares the parameters, with a support."""
    rule = as_rule(rule)
    twin = copy.copy(module)
    for held in ("_parameters", "_buffers", "_modules"):
        vars(twin)[held] = dict(vars(module)[held])
    weight = twin._parameters["weight"]
    assert weight is not None
    attach(twin, rule.select({"weight": weight}), form, rule.fields())
    for parameter in (weight, twin._parameters["bias"]):
        if parameter is not None:
            parameter.requires_grad_(False)
    return twin


for _cls in (SparseLinear, SparseConv2d):
    swap.made[_cls.parent, _cls.parameters_read] = _cls
swap.TRANSPOSED.append(OfTransposed)
for _forward, _kind in (
    (nn.Linear.forward, OfLinear), (nn.Conv1d.forward, OfConv2d), (nn.Conv2d.forward, OfConv2d),
):  # fmt: skip
    swap.KINDS[_forward] = _kind
    swap.PRODUCTS.add(_kind)
