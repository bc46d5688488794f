"""Fine-tunes a small language model on this machine, and shows what came of it."""

from peftkern.demo.options import METHODS, DemoFailed, Options

__all__ = ["METHODS", "DemoFailed", "Options"]
