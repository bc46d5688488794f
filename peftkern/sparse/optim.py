"""AdamW over the packed values of a model, which it writes into the weights as it goes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peftkern.sparse.adamw import step_op
from peftkern.sparse.pattern import Pattern
from peftkern.sparse.support import Support

NEVER = 2**31 - 1  # when an entry comes in that is not to move again
MOMENTS = ("exp_avg", "exp_avg_sq")


class _Call(NamedTuple):
    """What tensors must have in common for one call of the op."""

    device: torch.device
    step: int
    writes: bool
    has_born: bool


class PackedAdamW(torch.optim.Optimizer):
    """AdamW whose parameters are the values of supports; what its subclasses share.

    Args:
        supports: what trains; one at least.
        defaults: lr, betas, eps and weight_decay, as `check_rates` lets them pass.
    """

    def __init__(self, supports: Sequence[Support], defaults: dict[str, Any]) -> None:
        self.supports = list(supports)
        self.steps = 0
        super().__init__([support.values for support in supports], defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if getattr(self, "param_groups", None):
            raise ValueError(
                f"param_group must be another optimizer's: {type(self).__name__} trains the values "
                "of its model alone"
            )
        super().add_param_group(param_group)

    def _begin(self, closure: Callable[[], float] | None) -> float | None:
        """What every step starts with."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for support in self.supports:
            moments = self.state.get(support.values, {}).get(MOMENTS[0])
            if moments is not None and moments.shape != support.values.shape:
                raise RuntimeError(
                    f"{support.name} must train the entries that its moments belong to, "
                    f"{len(moments)}, got {len(support.values)}: load the optimizer's state as "
                    "well, or make a new one"
                )
        self.steps += 1
        return loss

    @torch.no_grad()
    def _update(self) -> None:
        """Moves all values that have a gradient, and writes them."""
        (group,) = self.param_groups
        calls: dict[_Call, list[Support]] = defaultdict(list)
        for support in self.supports:
            values = support.values
            if values.grad is None or not values.numel():
                continue
            state = self._state(values)
            state["step"] += 1
            # A convolution in channels_last is no matrix in memory.
            writes = support.weight.is_contiguous()
            call = _Call(values.device, state["step"], writes, "born" in state)
            calls[call].append(support)
        for call, found in calls.items():
            self._call(call, found, group)

    def _call(self, call: _Call, found: list[Support], group: dict[str, Any]) -> None:
        values = [support.values for support in found]
        states = [self.state[v] for v in values]
        grads = [v.grad.to(v.dtype).contiguous() for v in values if v.grad is not None]
        weights: list[Tensor] = [s.weight.detach() for s in found] if call.writes else []
        operands = [s.pattern.operand() for s in found] if call.writes else []
        step_op(
            weights, [v.detach() for v in values], grads,
            *([state[name] for state in states] for name in MOMENTS),
            [state["born"] for state in states] if call.has_born else [],
            [tensor for tensors, _ in operands for tensor in tensors],
            [number for _, layout in operands for number in layout],
            call.step, float(group["lr"]), *map(float, group["betas"]), float(group["eps"]),
            float(group["weight_decay"]),
        )  # fmt: skip
        # So that a graph that has kept what they were refuses to go backward.
        for support, value in zip(found, values, strict=True):
            torch.autograd.graph.increment_version(value)
            if call.writes:
                torch.autograd.graph.increment_version(support.weight)
                support.wrote()
            else:
                support.write()

    def _state(self, values: Tensor) -> dict[str, Any]:
        state: dict[str, Any] = self.state[values]
        if not state:
            state["step"] = 0
            state.update({name: torch.zeros_like(values) for name in MOMENTS})
        return state

    def state_dict(self) -> dict[str, Any]:
        """As torch's, and what the values are the values of."""
        found = super().state_dict()
        patterns = {s.name: _packed(s.pattern) for s in self.supports}
        return {**found, "sparse": {"steps": self.steps, "patterns": patterns}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes patterns and moments; the values themselves are the model's, and in its state.

        Raises:
            ValueError: the state of another kind of optimiser, or of another model.
        """
        own = state_dict.get("sparse")
        if own is None:
            raise ValueError(
                f"state_dict must be one of {type(self).__name__}, got the keys {list(state_dict)}"
            )
        patterns = {name: _unpacked(name, *packed) for name, packed in own["patterns"].items()}
        here = {support.name: list(support.pattern.shape) for support in self.supports}
        there = {name: list(pattern.shape) for name, pattern in patterns.items()}
        if here != there:
            odd = sorted(name for name in {*here, *there} if here.get(name) != there.get(name))
            raise ValueError(
                "state_dict must have the model's tensors, got others for " + ", ".join(odd[:5])
            )
        super().load_state_dict(state_dict)
        for support in self.supports:
            if (pattern := patterns[support.name]).hash != support.pattern.hash:
                support.replace(pattern)
        # torch has cast every tensor to the dtype of the parameter.
        saved = state_dict["state"]
        for number, support in enumerate(self.supports):
            if "born" in saved.get(number, {}):
                born = saved[number]["born"]
                self.state[support.values]["born"] = born.to(support.values.device, copy=True)
        self.steps = own["steps"]


def check_rates(lr: float, betas: tuple[float, float], eps: float, weight_decay: float) -> None:
    for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
        if not float(value) >= 0:
            raise ValueError(f"{name} must not be negative, got {value}")
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas must be two numbers in [0, 1), got {betas}")


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that an optimiser over a whole model takes: those that ask for a gradient.

    Raises:
        ValueError: there is none.
    """
    found = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not found:
        raise ValueError("model must have parameters that require a gradient, got none")
    return found


def _packed(pattern: Pattern) -> tuple[list[Tensor], list[int], str]:
    tensors, layout = pattern.operand()
    return tensors, layout, pattern.hash


def _unpacked(name: str, tensors: list[Tensor], layout: list[int], digest: str) -> Pattern:
    pattern = Pattern.of(tensors, layout)
    if pattern.hash != digest:
        raise ValueError(
            f"state_dict must have the pattern that was saved for {name}, whose hash is {digest}, "
            f"got {pattern.hash}"
        )
    return pattern
