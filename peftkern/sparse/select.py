"""Which entries of a model train: the rules of selection.

A rule takes named weights and gives each a Pattern, of which some may be empty. Magnitudes are
compared as numbers, over all dtypes alike; a NaN is never selected, and of equal ones those that
come first are: in the order of the weights, row by row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from peftkern import _check
from peftkern.sparse import picking, scores
from peftkern.sparse.pattern import Pattern, matrix_shape
from peftkern.sparse.scores import Weights

SIDES = ("<", "<=", ">", ">=")
SCOPES = ("global", "tensor")


@dataclass(frozen=True)
class Rule:
    """What is selected. Its fields say it in a file: numbers and strings alone."""

    name: ClassVar[str]

    def select(
        self, weights: Weights, group: dist.ProcessGroup | None = None
    ) -> dict[str, Pattern]:
        """A pattern for each weight, on its device; that of a convolution is `[out, rest]`.

        Args:
            weights: by their names; float, all on one device. Tied ones stand there once.
            group: of processes that hold a part of each weight, by its first axis and in the order
                of their ranks; None where each holds the whole.

        Raises:
            TypeError: a weight that is not float.
            ValueError: no weights, weights on several devices; nothing is selected, or more is
                asked for than there is.
        """
        scores.check(weights)
        found = self._select(weights, group)
        if group is None and not any(pattern.nnz for pattern in found.values()):
            raise ValueError(f"rule must select an entry of the weights, got {self} and none")
        return found

    def _select(self, weights: Weights, group: dist.ProcessGroup | None) -> dict[str, Pattern]:
        raise NotImplementedError

    def fields(self) -> dict[str, Any]:
        """As a file has it: `from_fields` makes the rule again."""
        return {"rule": self.name, **{f.name: getattr(self, f.name) for f in fields(self)}}


@dataclass(frozen=True)
class AbsThreshold(Rule):
    """|w| < threshold, one for the whole model; as SaRA (Hu et al., 2024) selects.

    Args:
        threshold: at least 0; compared in float32, in float64 of float64 weights.
        side: "<", "<=", ">" or ">=".

    Raises:
        ValueError: a threshold or a side that there is not.
    """

    name: ClassVar[str] = "AbsThreshold"
    threshold: float
    side: str = "<"

    def __post_init__(self) -> None:
        if not self.threshold >= 0:
            raise ValueError(f"threshold must be at least 0, got {self.threshold}")
        if self.side not in SIDES:
            raise ValueError(f"side must be <, <=, > or >=, got {self.side!r}")

    def _select(self, weights: Weights, group: dist.ProcessGroup | None) -> dict[str, Pattern]:
        # As they are compared, so that a float64 weight decides for itself alone.
        found: dict[str, Pattern] = {}
        for wide in (False, True):
            own = {n: w for n, w in weights.items() if (w.dtype == torch.float64) == wide}
            if own:
                every = scores.matrices(own)
                bits = picking.below(every, self.threshold, self.side)
                found.update(zip(own, picking.patterns(every, bits), strict=True))
        return {name: found[name] for name in weights}


@dataclass(frozen=True)
class Budget(Rule):
    """The `count` smallest |w| of the whole model.

    Args:
        count: at least 1.
        largest: takes the largest instead.

    Raises:
        ValueError: a count below 1.
    """

    name: ClassVar[str] = "Budget"
    count: int
    largest: bool = False

    def __post_init__(self) -> None:
        _count(self.count)

    def _select(self, weights: Weights, group: dist.ProcessGroup | None) -> dict[str, Pattern]:
        return scores.first(weights, self.count, self.largest, group)


@dataclass(frozen=True)
class SmallestFraction(Rule):
    """The smallest |w|: a fraction of the model, or of each tensor. NaN count as elements.

    Args:
        fraction: above 0 and at most 1; the count is rounded to the nearest.
        scope: "global" or "tensor".

    Raises:
        ValueError: a fraction or a scope that there is not.
    """

    name: ClassVar[str] = "SmallestFraction"
    fraction: float
    scope: str = "global"

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise ValueError(f"fraction must be above 0 and at most 1, got {self.fraction}")
        if self.scope not in SCOPES:
            raise ValueError(f"scope must be global or tensor, got {self.scope!r}")

    def _select(self, weights: Weights, group: dist.ProcessGroup | None) -> dict[str, Pattern]:
        if self.scope == "global":
            parts = [weights]
        else:
            parts = [{name: weight} for name, weight in weights.items()]
        found: dict[str, Pattern] = {}
        for part in parts:
            every = scores.matrices(part)
            count = round(self.fraction * scores.elements(every, group))
            picked = picking.first(every, count, False, group)
            found.update(zip(part, picking.patterns(every, picked), strict=True))
        return found


@dataclass(frozen=True)
class TopGrad(Rule):
    """The `count` largest |gradient| of the whole model.

    Args:
        count: at least 1.
        gradients: of each weight, by its name and in its shape; None takes the `.grad` that each
            has from a backward.

    Raises:
        ValueError: a count below 1.
    """

    name: ClassVar[str] = "TopGrad"
    count: int
    gradients: Weights | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        _count(self.count)

    def _select(self, weights: Weights, group: dist.ProcessGroup | None) -> dict[str, Pattern]:
        given = self.gradients
        found = {n: w.grad if given is None else given.get(n) for n, w in weights.items()}
        return scores.first(scores.of("gradients", found, weights), self.count, True, group)

    def fields(self) -> dict[str, Any]:
        return {"rule": self.name, "count": self.count}


@dataclass(frozen=True)
class TopScore(Rule):
    """The `count` largest |score| of the whole model, whatever the scores are.

    Args:
        count: at least 1.
        scores: of each weight, by its name and in its shape; float.
        largest: False takes the smallest.

    Raises:
        ValueError: a count below 1.
    """

    name: ClassVar[str] = "TopScore"
    count: int
    scores: Weights = field(repr=False, compare=False, default_factory=dict)
    largest: bool = True

    def __post_init__(self) -> None:
        _count(self.count)

    def _select(self, weights: Weights, group: dist.ProcessGroup | None) -> dict[str, Pattern]:
        found = {name: self.scores.get(name) for name in weights}
        return scores.first(scores.of("scores", found, weights), self.count, self.largest, group)

    def fields(self) -> dict[str, Any]:
        return {"rule": self.name, "count": self.count, "largest": self.largest}


@dataclass(frozen=True)
class Given(Rule):
    """What the caller names: for each weight a bool mask in its shape, a Pattern, or the indices
    (rows, columns) of its entries. A weight that is not named gets an empty pattern.

    Args:
        entries: by the weights' names.
    """

    name: ClassVar[str] = "Given"
    entries: Mapping[str, Tensor | Pattern | tuple[Tensor, Tensor]] = field(
        default_factory=dict, repr=False, compare=False
    )

    def _select(self, weights: Weights, group: dist.ProcessGroup | None) -> dict[str, Pattern]:
        unknown = self.entries.keys() - weights.keys()
        if unknown:
            raise ValueError(f"entries must name weights, got {', '.join(sorted(unknown))}")
        return {name: self._pattern(name, weight) for name, weight in weights.items()}

    def _pattern(self, name: str, weight: Tensor) -> Pattern:
        shape = matrix_shape(weight.shape)
        given = self.entries.get(name)
        if given is None:
            none = torch.empty(0, dtype=torch.int64, device=weight.device)
            return Pattern.from_indices(none, none, shape)
        if isinstance(given, Pattern):
            if given.shape != shape:
                raise ValueError(
                    f"entries[{name!r}] must have shape {list(shape)}, got {list(given.shape)}"
                )
            return given.to(weight.device)
        if isinstance(given, Tensor):
            _check.dtype(f"entries[{name!r}]", given, [torch.bool])
            _check.shape(f"entries[{name!r}]", given, list(weight.shape))
            return Pattern.from_mask(given.to(weight.device))
        rows, columns = (index.to(weight.device) for index in given)
        return Pattern.from_indices(rows, columns, shape)

    def fields(self) -> dict[str, Any]:
        return {"rule": self.name}


RULES: dict[str, type[Rule]] = {
    rule.name: rule for rule in (AbsThreshold, Budget, SmallestFraction, TopGrad, TopScore, Given)
}


def as_rule(rule: Rule | Mapping[str, Any]) -> Rule:
    """A mapping from names to masks, patterns or indices is a rule as well.

    Raises:
        TypeError: neither of them.
    """
    if isinstance(rule, Rule):
        return rule
    if isinstance(rule, Mapping):
        return Given(rule)
    raise TypeError(f"rule must be a Rule or a mapping of masks, got {type(rule).__name__}")


def from_fields(content: Mapping[str, Any]) -> Rule:
    """The reverse of `Rule.fields`; gradients, scores and entries are in no file.

    Raises:
        TypeError, ValueError: a rule, a field or a value that there is not.
    """
    name = content.get("rule")
    if name not in RULES:
        raise ValueError(f"rule must be one of {', '.join(RULES)}, got {name!r}")
    return RULES[name](**{key: value for key, value in content.items() if key != "rule"})


def _count(count: int) -> None:
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
