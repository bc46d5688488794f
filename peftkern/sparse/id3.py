"""ID3: a budget of weights, of which each step lets in those that matter most by then."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from peftkern.sparse.candidates import Collector, Entries, Forward, best, score
from peftkern.sparse.optim import MOMENTS, PackedAdamW, check_rates, trained
from peftkern.sparse.pattern import Pattern, matrix_shape
from peftkern.sparse.support import Support, attach


def admitted(step: int, budget: int, max_steps: int) -> int:
    """How many entries a step from 1 on lets in: `budget` by `max_steps`, the odd ones first."""
    if step > max_steps:
        return 0
    return budget // max_steps + (step <= budget % max_steps)


class Id3AdamW(PackedAdamW):
    """AdamW on a growing selection of a whole model's weights, which never exceeds its budget.

        H = |gradient| / (|weight| + magnitude_eps)^exponent

    Agarwal et al. (2025). Each of the first `max_steps` steps lets in the entries of the greatest H
    among those that do not train yet, as many as the budget has for it; they move in that step, by
    its gradient. No gradient is ever whole: what may be let in is found while the gradients go by
    in backward. Where gradients are accumulated, what the last forward pass has brought decides;
    where a weight is used several times in one, each use by itself.

    Clipping does not reach the gradients of those that come in, nor does a GradScaler, which `step`
    therefore refuses. Where several processes train,
    `step` averages the gradients; do not wrap the model in DistributedDataParallel, whose buckets
    cannot grow. Each process then brings its own best entries.

    Args:
        model: its parameters that require a gradient are selected from.
        budget: how many entries train in the end.
        max_steps: when they all do.
        lr, betas, eps: as in `torch.optim.AdamW`.
        weight_decay: decoupled; pulls what trains to 0, and nothing else.
        exponent: 0 looks at gradients alone, more of it prefers small weights.
        magnitude_eps: at least 0; above it where the exponent is negative or weights may be 0.
        choose_all: names of parameters or modules that train whole from the start, at the budget's
            cost; fresh heads, for one.
        cohort_steps: corrects each entry for its own age; else for the optimiser's, as published,
            whereby late ones move by up to six times lr.

    Raises:
        ValueError: a number out of its range, a model without parameters, a name that there is not,
            or a budget that what is chosen exceeds, or that exceeds the model.
    """

    _step_supports_amp_scaling = True  # so that a GradScaler hands it the step

    grad_scale: Tensor | None

    def __init__(
        self, model: nn.Module, budget: int, max_steps: int, lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0.0,
        exponent: float = 1.0, magnitude_eps: float = 0.1, choose_all: Sequence[str] = (),
        cohort_steps: bool = True,
    ) -> None:  # fmt: skip
        if max_steps < 1:
            raise ValueError(f"max_steps must be positive, got {max_steps}")
        if not magnitude_eps >= 0:
            raise ValueError(f"magnitude_eps must not be negative, got {magnitude_eps}")
        defaults: dict[str, Any] = {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay,
        }  # fmt: skip
        check_rates(**defaults)
        parameters = trained(model)
        whole = _named(parameters, choose_all)
        charged = sum(parameters[name].numel() for name in whole)
        elements = sum(parameter.numel() for parameter in parameters.values())
        if not max(1, charged) <= budget <= elements:
            raise ValueError(
                f"budget must be at least {max(1, charged)}, which choose_all takes, and at most "
                f"{elements}, all elements, got {budget}"
            )
        self.budget, self.max_steps, self.cohort_steps = budget, max_steps, cohort_steps
        self._growth = budget - charged
        selection = {name: _start(p, name in whole) for name, p in parameters.items()}
        supports = attach(model, selection, "value")
        super().__init__(supports, defaults)
        self._collector = Collector(supports, exponent, magnitude_eps)
        model.register_forward_pre_hook(Forward(self._collector))
        self._collector.begin(self._next())

    @property
    def selected(self) -> int:
        """How many entries train now."""
        return sum(support.pattern.nnz for support in self.supports)

    def _next(self) -> int:
        """How many the next step lets in."""
        count = admitted(self.steps + 1, self._growth, self.max_steps)
        return max(0, min(count, self.budget - self.selected))

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        # A GradScaler tells of itself here, rather than unscale the gradients that it knows of.
        if vars(self).pop("found_inf", None) is not None:
            del self.grad_scale
            raise RuntimeError(
                "gradients must not be scaled, got them from a GradScaler, which does not reach "
                "those of the entries that come in: train in bfloat16"
            )
        loss = self._begin(closure)
        found = self._collector.found
        if _processes() > 1:
            self._share_gradients()
            found = self._share(found)
        if found is not None:
            for number, places, grads in _by_owner(found):
                self._admit(self.supports[number], places, grads)
        self._update()
        self._collector.begin(self._next())
        return loss

    def _admit(self, support: Support, places: Tensor, grads: Tensor) -> None:
        """Lets entries in, with their gradients and moments of zero."""
        old, values, state = support.pattern, support.values, self._state(support.values)
        before = torch.zeros_like(values) if values.grad is None else values.grad
        if self.cohort_steps and "born" not in state:
            state["born"] = torch.zeros(old.nnz, dtype=torch.int32, device=values.device)
        rows, columns = old.indices().long().unbind()
        every, order = torch.cat([rows * old.shape[1] + columns, places]).sort()
        at = torch.empty_like(order)  # of each old entry, and then of each new one
        at[order] = torch.arange(len(order), device=order.device)
        width = old.shape[1]
        support.replace(Pattern.from_indices(every // width, every % width, old.shape))
        for name in (*MOMENTS, "born"):
            if name in state:
                moved = state[name].new_zeros(len(order))
                moved[at[: old.nnz]] = state[name]
                state[name] = moved
        if self.cohort_steps:
            state["born"][at[old.nnz :]] = state["step"]
        values.grad = torch.cat([before, grads.to(before)])[order]

    def _state(self, values: Tensor) -> dict[str, Any]:
        fresh = not self.state[values]
        state = super()._state(values)
        if fresh and not self.cohort_steps:
            state["step"] = self.steps - 1
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._collector.begin(self._next())

    def _share_gradients(self) -> None:
        """Their mean over all processes, in one message."""
        supports = [support for support in self.supports if support.values.numel()]
        if not supports:
            return
        parts = [_gradient(support.values) for support in supports]
        every = torch.cat([part.to(parts[0].device, torch.float64) for part in parts])
        dist.all_reduce(every)
        every /= _processes()
        for support, part in zip(
            supports, torch.split(every, [len(p) for p in parts]), strict=True
        ):
            support.values.grad = part.to(support.values.device, support.values.dtype)

    def _share(self, found: Entries | None) -> Entries | None:
        """The best entries of all processes, the same in each: one that has not listed an entry
        adds nothing to its gradient."""
        count = self._collector.count
        if not count:
            return None
        device = self.supports[0].values.device
        names = torch.full((2, count), -1, dtype=torch.int64, device=device)
        grads = torch.zeros(count, dtype=torch.float64, device=device)
        if found is not None:
            size = len(found.places)
            names[:, :size] = torch.stack([found.owners, found.places])
            grads[:size] = found.grads
        all_names, all_grads = _gathered(names), _gathered(grads)
        there = all_names[0] >= 0
        if not there.any():
            return None
        (owners, places), which = torch.unique(all_names[:, there], dim=1, return_inverse=True)
        summed = torch.zeros(len(owners), dtype=torch.float64, device=device)
        summed.index_add_(0, which, all_grads[there] / _processes())
        scores = torch.empty_like(summed)
        for number in sorted(set(owners.tolist())):
            support, mine = self.supports[number], owners == number
            weight = support.weight.detach().reshape(-1)[places[mine].to(support.weight.device)]
            here = score(summed[mine].to(weight.device), weight, *self._collector.scale)
            scores[mine] = here.to(device)
        return best([Entries(scores, owners, places, summed)], count)


def _processes() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _gradient(values: Tensor) -> Tensor:
    return torch.zeros_like(values) if values.grad is None else values.grad


def _gathered(tensor: Tensor) -> Tensor:
    """All processes' side by side, along the last axis."""
    parts = [torch.empty_like(tensor) for _ in range(_processes())]
    dist.all_gather(parts, tensor)
    return torch.cat(parts, -1)


def _by_owner(found: Entries) -> Iterator[tuple[int, Tensor, Tensor]]:
    owners, counts = torch.unique_consecutive(found.owners, return_counts=True)
    sizes = counts.tolist()
    parts = zip(*(torch.split(t, sizes) for t in (found.places, found.grads)), strict=True)
    yield from ((number, *part) for number, part in zip(owners.tolist(), parts, strict=True))


def _named(parameters: dict[str, nn.Parameter], names: Sequence[str]) -> set[str]:
    found = set()
    for name in names:
        these = {n for n in parameters if n == name or n.startswith(f"{name}.")}
        if not these:
            raise ValueError(
                f"choose_all must name parameters that train, or modules of them, got {name!r}"
            )
        found |= these
    return found


def _start(weight: Tensor, whole: bool) -> Pattern:
    shape = matrix_shape(weight.shape)
    return Pattern.from_mask(torch.full(shape, whole, device=weight.device))
