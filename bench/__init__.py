"""Benchmarks, each of them a comparison whose contenders were checked first."""

from .check import Inputs
from .floors import Work
from .harness import Contender, measure
from .record import families, run
from .row import Row
from .table import show

__all__ = ["Contender", "Inputs", "Row", "Work", "families", "measure", "run", "show"]
