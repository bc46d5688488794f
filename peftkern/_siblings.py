"""Which linears of a model read one and the same input, as its code has it: q, k and v, say.

The code is read, never changed or run: the children of a module that its `forward` calls as
`self.child(name)`, with one `name` that is not assigned anew in between. Cross attention, whose
queries read something else than its keys and values, falls into two groups so.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

from torch import nn

from peftkern import _attached
from peftkern.qlora.sharing import SharedInput


def connect(model: nn.Module) -> None:
    """Has layers that read one input computed together: `SharedInput` tells when.

    Args:
        model: holds the layers, adapted or optimized: those with `operands`.
    """
    for group in groups(model, lambda module: hasattr(type(module), "operands")):
        shared = SharedInput()
        for layer in group:
            shared.join(layer)  # type: ignore[arg-type]
            layer.shared_input = shared  # type: ignore[assignment]


def groups(model: nn.Module, takes_part: Callable[[nn.Module], bool]) -> Iterator[list[nn.Module]]:
    """Children of one module that share an input, at least two of them, in the order of the calls.

    Args:
        model: is searched whole.
        takes_part: which modules may be grouped.
    """
    for parent in model.modules():
        for names in _calls_in(_attached.original(type(parent)).forward):
            children = [parent._modules.get(name) for name in names]
            group = [c for c in dict.fromkeys(children) if c is not None and takes_part(c)]
            if len(group) > 1 and len({layer.in_features for layer in group}) == 1:
                yield group


@cache
def _calls_in(forward: Callable[..., Any]) -> list[list[str]]:
    """The children that it calls, by what they are called with."""
    try:
        source = textwrap.dedent(inspect.getsource(inspect.unwrap(forward)))
        function = ast.parse(source).body[0]
    except (OSError, TypeError, SyntaxError):
        return []  # no source to read: written in C, or made at run time
    if not isinstance(function, ast.FunctionDef) or not function.args.args:
        return []
    reader = _Calls(function.args.args[0].arg)
    for statement in function.body:
        reader.visit(statement)
    return list(reader.found.values())


class _Calls(ast.NodeVisitor):
    """Visits a function's nodes as Python evaluates them, values before the names they get."""

    def __init__(self, self_name: str) -> None:
        self.self_name = self_name
        self.found: dict[tuple[str, int, int], list[str]] = defaultdict(list)
        self._branch = self._branches = 0  # what runs in one of two branches may not run in both
        self._assigned: dict[str, int] = defaultdict(int)

    def visit_Call(self, node: ast.Call) -> None:
        self.generic_visit(node)
        child, argument = node.func, node.args[0] if len(node.args) == 1 else None
        if (
            isinstance(child, ast.Attribute)
            and isinstance(child.value, ast.Name)
            and child.value.id == self.self_name
            and isinstance(argument, ast.Name)
            and not node.keywords
        ):
            self.found[argument.id, self._assigned[argument.id], self._branch].append(child.attr)

    def visit_Assign(self, node: ast.Assign) -> None:
        self.visit(node.value)
        for target in node.targets:
            self.visit(target)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.visit(node.value)
        self.visit(node.target)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        self.visit(node.value)
        self.visit(node.target)

    def visit_For(self, node: ast.For) -> None:
        self.visit(node.iter)
        self.visit(node.target)
        for statement in (*node.body, *node.orelse):
            self.visit(statement)

    def visit_If(self, node: ast.If) -> None:
        self.visit(node.test)
        outside = self._branch
        for branch in (node.body, node.orelse):
            self._branches += 1
            self._branch = self._branches
            for statement in branch:
                self.visit(statement)
        self._branch = outside

    def visit_NamedExpr(self, node: ast.NamedExpr) -> None:
        self.visit(node.value)
        self.visit(node.target)

    def visit_Name(self, node: ast.Name) -> None:
        if isinstance(node.ctx, ast.Store):
            self._assigned[node.id] += 1
