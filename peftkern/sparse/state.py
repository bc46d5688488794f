"""What an adapted tensor is beside its parameters, and how packed values reach a weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from peftkern._seen import Seen
from peftkern.sparse.ops import gather, scatter_
from peftkern.sparse.pattern import Pattern

SUFFIX = "_sparse"  # of a module's parameter of values, behind the name of the adapted one


class Watcher(Protocol):
    """Is shown what the whole gradient of a tensor is made of, in every backward."""

    def product(self, x: Tensor, grad: Tensor) -> None:
        """Of a linear: it is grad^T x, of x `[M, columns]` and grad `[M, rows]`."""

    def convolution(self, x: Tensor, grad: Tensor, window: list[int]) -> None:
        """Of a convolution, whose window is as `sparse_conv2d_sddmm` takes it."""

    def dense(self, grad: Tensor) -> None:
        """Of anything else: the gradient itself, in the tensor's shape."""


class State:
    """One object for all modules that share a weight.

    Args:
        pattern: the entries that train.
        form: "value" or "delta".
        base: what the weight held on them, `[nnz]` in its dtype; None of the delta form, whose
            weight holds it still.
    """

    def __init__(self, pattern: Pattern, form: str, base: Tensor | None) -> None:
        self.pattern, self.form = pattern, form
        # All entries that have ever trained: those that no longer do keep what they have learned.
        self.origin, self.base = pattern, base
        self.merged = False
        # What `origin` has learned, while the weight holds its base instead.
        self.learned: Tensor | None = None
        self.rule: dict[str, Any] | None = None  # by which the entries were selected, for files
        self.watcher: Watcher | None = None
        self.seen = Seen()

    def write(self, weight: Tensor, values: Tensor) -> None:
        """Puts the values into the weight, where either was written to since the last time."""
        if self.form == "delta" or self.merged:
            return
        if self.learned is not None:
            put(weight, self.origin, self.learned)
            self.learned, self.seen = None, Seen()
        if torch.compiler.is_compiling():  # a graph would keep what is seen now
            put(weight, self.pattern, values)
        elif not self.seen.is_of([weight, values]):
            put(weight, self.pattern, values)
            self.seen = Seen([weight, values])

    def load(self, pattern: Pattern, origin: Pattern, base: Tensor | None) -> None:
        """Becomes what another one was, whose weight and values are loaded next."""
        self.pattern, self.origin, self.base = pattern, origin, base
        self.learned, self.seen = None, Seen()

    def moved(self, device: torch.device, fn: Callable[[Tensor], Tensor]) -> None:
        """Follows the weight, to which a module's `_apply` has done `fn`."""
        same = self.origin is self.pattern
        self.pattern = self.pattern.to(device)
        self.origin = self.pattern if same else self.origin.to(device)
        self.base = None if self.base is None else fn(self.base)
        self.learned = None if self.learned is None else fn(self.learned)

    def __getstate__(self) -> dict[str, Any]:
        # A copy has other tensors to look at, and nobody watches it.
        return {**vars(self), "seen": Seen(), "watcher": None}


def states(module: nn.Module) -> dict[str, State]:
    """The adapted parameters of a module, by their names there."""
    found: dict[str, State] = vars(module).get("_sparse_states", {})
    return found


@torch.no_grad()
def take(weight: Tensor, pattern: Pattern) -> Tensor:
    """The weight's entries on a pattern, in its dtype."""
    return gather(weight.detach(), pattern).to(weight.dtype)


@torch.no_grad()
def put(weight: Tensor, pattern: Pattern, values: Tensor) -> None:
    """The reverse; rounds to nearest."""
    if pattern.nnz:
        scatter_(weight.detach(), values.detach(), pattern)


@torch.no_grad()
def restart(
    state: State, weight: Tensor, held: nn.Parameter, pattern: Pattern, values: Tensor
) -> None:
    """Trains these values from now on, on the weight as it was before any training."""
    pattern = pattern.to(weight.device)
    if state.base is not None:
        put(weight, state.origin, state.base)
        state.base = take(weight, pattern)
    state.pattern = state.origin = pattern
    state.learned, state.seen = None, Seen()
    resize(held, pattern.nnz)
    held.copy_(values)
    state.write(weight, held)


def resize(values: nn.Parameter, count: int) -> None:
    """Another length for the same object, without its grad."""
    wide = values.dtype
    # The node that adds up its gradients knows the length, and lives as long as any older graph
    # does. torch lets go of it where the dtype changes.
    values.data = torch.empty(0, dtype=torch.bfloat16, device=values.device)
    values.data, values.grad = torch.zeros(count, dtype=wide, device=values.device), None


def common(first: Pattern, second: Pattern) -> tuple[Tensor, Tensor]:
    """Where the entries that both have lie in each: two rising int64 tensors of one length."""
    if first is second or not first.nnz or not second.nnz:
        every = torch.arange(first.nnz if first is second else 0, device=first.device)
        return every, every
    mine, theirs = _flat(first), _flat(second)
    places = torch.searchsorted(theirs, mine).clamp_(max=second.nnz - 1)
    both = theirs[places] == mine
    return both.nonzero().flatten(), places[both]


def union(first: Pattern, second: Pattern) -> Pattern:
    places = torch.cat([_flat(first), _flat(second)]).unique()  # type: ignore[no-untyped-call]
    columns = first.shape[1]
    return Pattern.from_indices(places // columns, places % columns, first.shape)


def _flat(pattern: Pattern) -> Tensor:
    """int64 `[nnz]`, rising: the place of each entry in the flat matrix."""
    rows, columns = pattern.indices().long().unbind()
    return rows * pattern.shape[1] + columns
