"""What Triton's interpreter lets pass and a GPU does not: each launch's reads and writes, checked.

An element that no operand of the launch holds may lie on another page, or in another tensor. And
programs run in any order, so that what one writes no other may write or read in the same launch.
"""

from contextlib import contextmanager

import numpy as np
import torch
from triton.runtime import interpreter

NOBODY, SEVERAL = -1, -2  # instead of a program's number


class Operand:
    """Memory that one tensor reaches, and who has written and read each byte of it."""

    def __init__(self, tensor):
        sizes = zip(tensor.shape, tensor.stride(), strict=True)
        last = sum((size - 1) * stride for size, stride in sizes)
        self.begin = tensor.data_ptr()
        self.end = self.begin + (last + 1) * tensor.element_size() * (tensor.numel() > 0)
        self.writer = np.full(self.end - self.begin, NOBODY, np.int32)
        self.reader = self.writer.copy()

    def read(self, index, program):
        writer, reader = self.writer[index], self.reader[index]
        self.reader[index] = np.where((reader == NOBODY) | (reader == program), program, SEVERAL)
        return (writer == NOBODY) | (writer == program)

    def write(self, index, program):
        alone = [np.isin(who[index], (NOBODY, program)) for who in (self.writer, self.reader)]
        self.writer[index] = program
        return alone[0] & alone[1]


class Launch:
    """The operands of the kernel that runs now."""

    def __init__(self, tensors):
        self.operands = [Operand(t) for t in tensors]

    def check(self, verb, pointers, mask):
        places = pointers.data[np.broadcast_to(mask.data, pointers.data.shape).astype(bool)]
        size = pointers.get_element_ty().primitive_bitwidth // 8
        x, y, z = interpreter.interpreter_builder.grid_idx
        _, height, depth = interpreter.interpreter_builder.grid_dim
        program = (x * height + y) * depth + z
        for operand in self.operands:
            inside = (places >= operand.begin) & (places + np.uint64(size) <= operand.end)
            index = (places[inside] - np.uint64(operand.begin)).astype(np.int64)
            if not getattr(operand, verb)(index, program).all():
                raise AssertionError(f"program {program} {verb}s what another one writes or reads")
            places = places[~inside]
        if places.size:
            raise AssertionError(f"program {program} {verb}s {places.size} numbers of no operand")


def _tensors(args):
    for arg in args:
        if isinstance(arg, torch.Tensor):
            yield arg
        elif isinstance(arg, tuple):
            yield from _tensors(arg)


_launch = None


@contextmanager
def _of(args):
    global _launch
    _launch = Launch(_tensors(args))
    try:
        yield
    finally:
        _launch = None


def install():
    """From now on, in this process."""
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    run, load, store = executor.__call__, builder.create_masked_load, builder.create_masked_store

    def checked_run(self, *args, **kwargs):
        with _of([*args, *kwargs.values()]):
            return run(self, *args, **kwargs)

    def checked_load(self, pointers, mask, *rest, **kwargs):
        _launch.check("read", pointers, mask)
        return load(self, pointers, mask, *rest, **kwargs)

    def checked_store(self, pointers, value, mask, *rest, **kwargs):
        _launch.check("write", pointers, mask)
        return store(self, pointers, value, mask, *rest, **kwargs)

    executor.__call__ = checked_run
    builder.create_masked_load, builder.create_masked_store = checked_load, checked_store
