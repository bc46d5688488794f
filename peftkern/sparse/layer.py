"""Linears and convolutions that train on a support: their gradient is made on it alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from peftkern import _inputs
from peftkern.sparse import swap
from peftkern.sparse.linear import conv2d, linear
from peftkern.sparse.state import SUFFIX, State, states


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


class _Product(swap.Sparse):
    """What computes by an op with the weight, its values and their pattern."""

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


class OfLinear(_Product):
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


class OfConv2d(_Product):
    """The convolution of an `nn.Conv2d` or an `nn.Conv1d`, or of a subclass with its forward."""

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
    parameters_read = ("bias", "weight")
    weight = swap.reader("weight")
    bias = swap.reader("bias")


class SparseConv2d(OfConv2d, nn.Conv2d):
    """The convolution of an `nn.Conv2d`, where the entries of a pattern train, as `SparseLinear`'s.

    Shape:
        `[batch, in, height, width]`, or without a batch, as `nn.Conv2d`.
    """

    parent = nn.Conv2d
    parameters_read = ("bias", "weight")
    weight = swap.reader("weight")
    bias = swap.reader("bias")


for _cls in (SparseLinear, SparseConv2d):
    swap.made[_cls.parent, _cls.parameters_read] = _cls
for _forward, _kind in (
    (nn.Linear.forward, OfLinear), (nn.Conv1d.forward, OfConv2d), (nn.Conv2d.forward, OfConv2d),
):  # fmt: skip
    swap.KINDS[_forward] = _kind
    swap.PRODUCTS.add(_kind)
