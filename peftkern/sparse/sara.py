"""SaRA: the smallest weights of a model train, in two stages."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from peftkern.sparse import bits, picking
from peftkern.sparse.optim import MOMENTS, NEVER, PackedAdamW, check_rates, trained
from peftkern.sparse.rank import nuclear
from peftkern.sparse.select import AbsThreshold
from peftkern.sparse.support import Support, attach

RANK_MIN = 64  # a matrix has a rank loss where its shorter side is longer than this


class SaraAdamW(PackedAdamW):
    """AdamW on those weights of a whole model that are smaller than a threshold.

    Hu et al. (2024). In place of `torch.optim.AdamW(model.parameters())`; the model keeps its
    modules, and every parameter but the packed values freezes. A step adds the gradient of the rank
    loss, moves the values and writes them into the weights, and then selects again if it is time
    to. Clip, scale and average gradients as of any parameters.

    Args:
        model: its parameters that require a gradient are selected from: linears, convolutions,
            embeddings, norms, biases, loose ones.
        threshold: a weight trains where its absolute value is smaller.
        lr: 1e-3 * exp(-350 * threshold) where None.
        betas, eps: as in `torch.optim.AdamW`.
        weight_decay: decoupled; pulls the values that train to 0, and nothing else.
        lambda_rank: what the nuclear norm of one matrix's trained values is weighted by; each step
            draws another matrix, the same in all processes.
        progressive_iter: after so many steps those values that have grown past the threshold
            stay as they are, and the others train on. None never does.
        reset_on_reselect: forgets the moments then.
        compat: as published: moments are forgotten then, and that step moves nothing.

    Raises:
        ValueError: a rate out of its range, a model without parameters, or none of them below the
            threshold.
    """

    def __init__(
        self, model: nn.Module, threshold: float, lr: float | None = None,
        betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 1e-2,
        lambda_rank: float = 0.0, progressive_iter: int | None = None,
        reset_on_reselect: bool = False, compat: bool = False,
    ) -> None:  # fmt: skip
        if not threshold > 0:
            raise ValueError(f"threshold must be positive, got {threshold}")
        if not lambda_rank >= 0:
            raise ValueError(f"lambda_rank must not be negative, got {lambda_rank}")
        if progressive_iter is not None and progressive_iter < 1:
            raise ValueError(f"progressive_iter must be None or positive, got {progressive_iter}")
        self.threshold, self.lambda_rank = threshold, lambda_rank
        self.progressive_iter, self.compat = progressive_iter, compat
        self.reset_on_reselect = reset_on_reselect or compat
        parameters = trained(model)
        found = AbsThreshold(threshold).select(parameters)
        selection = {name: pattern for name, pattern in found.items() if pattern.nnz}
        lr = 1e-3 * math.exp(-350 * threshold) if lr is None else lr
        defaults: dict[str, Any] = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
        }
        check_rates(**defaults)
        supports = attach(model, selection, "value", AbsThreshold(threshold).fields())
        for parameter in parameters.values():
            parameter.requires_grad_(False)
        super().__init__(supports, defaults)
        self._holds: list[RemovableHandle] = []  # hooks of what stays in its place

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = self._begin(closure)
        due = self.steps == self.progressive_iter
        if not (due and self.compat):
            self._add_rank_gradient()
            self._update()
        if due:
            self.reselect()
        return loss

    def reselect(self) -> None:
        """Of the values that train, those train on that are still below the threshold.

        Where several processes train, a parameter must keep its length, since
        DistributedDataParallel has laid out its buckets by it: the others then stay as they are in
        their places, with a gradient of zero.
        """
        for support in self.supports:
            values = support.values
            if self.reset_on_reselect:
                self.state.pop(values, None)
            (picked,), counts = picking.below([values.detach()[None]], self.threshold, "<")
            if (count := int(counts)) == len(values):
                continue
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                self._hold(support, bits.unpack(picked, len(values))[0])
                continue
            state = self.state[values]
            names = [name for name in MOMENTS if name in state]
            packed = [values.detach(), *(state[name] for name in names)]
            pattern, (left, *moments) = picking.subset(support.pattern, picked[0], count, packed)
            support.replace(pattern, left)
            state.update(zip(names, moments, strict=True))

    def _hold(self, support: Support, stays: Tensor) -> None:
        born = torch.zeros(stays.shape, dtype=torch.int32, device=stays.device)
        self._state(support.values)["born"] = born.masked_fill_(~stays, NEVER)
        self._hold_gradient(support)

    def _hold_gradient(self, support: Support) -> None:
        held = self.state[support.values]["born"] == NEVER
        self._holds.append(support.values.register_hook(lambda grad: grad.masked_fill(held, 0)))  # type: ignore[no-untyped-call]
        if support.values.grad is not None:
            support.values.grad.masked_fill_(held, 0)

    def _add_rank_gradient(self) -> None:
        """That of lambda_rank * nuclear norm, of one matrix."""
        if not self.lambda_rank:
            return
        matrices = [s for s in self.supports if s.weight.dim() == 2]
        matrices = [s for s in matrices if min(s.weight.shape) > RANK_MIN and s.pattern.nnz]
        if not matrices:
            return
        # Of the step alone, so that processes and a resumed run draw the same.
        generator = torch.Generator().manual_seed(self.steps)
        support = matrices[int(torch.randint(len(matrices), (1,), generator=generator))]
        values, state = support.values, self.state.get(support.values, {})
        if values.grad is None:
            values.grad = torch.zeros_like(values)
        live = state["born"] != NEVER if "born" in state else torch.ones_like(values)
        _, slope = nuclear(values.detach() * live, support.pattern)
        values.grad.add_(slope * live, alpha=self.lambda_rank)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        for hold in self._holds:
            hold.remove()
        self._holds.clear()
        for support in self.supports:
            if "born" in self.state.get(support.values, {}):
                self._hold_gradient(support)
