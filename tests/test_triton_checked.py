"""Does the check of every launch in Triton's interpreter find what it is there for?"""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("Triton does not interpret here", allow_module_level=True)
triton = pytest.importorskip("triton", reason="needs triton")
import triton.language as tl  # noqa: E402


@triton.jit
def copy_kernel(x_ptr, out_ptr, count, shift, step, BLOCK: tl.constexpr):
    i = tl.program_id(0) * step + tl.arange(0, BLOCK)
    tl.store(out_ptr + i, tl.load(x_ptr + i + shift, mask=i < count, other=0), mask=i < count)


def copy(x, out, count=24, shift=0, step=8):
    copy_kernel[(3,)](x, out, count, shift, step, BLOCK=8)


def test_a_kernel_that_keeps_to_its_operands_passes():
    x = torch.arange(24.0)
    out = torch.zeros(24)
    copy(x, out)
    assert torch.equal(x, out)
    copy(x[8:], out[8:], 16)


@pytest.mark.parametrize("given", [{"count": 25, "step": 9}, {"shift": 1}, {"shift": -1}])
def test_what_lies_beside_an_operand_is_not_read(given):
    with pytest.raises(Exception, match="reads 1 numbers of no operand"):
        copy(torch.zeros(26)[1:25], torch.zeros(99), **given)


def test_what_lies_beside_an_operand_is_not_written():
    with pytest.raises(Exception, match="writes 1 numbers of no operand"):
        copy(torch.zeros(24), torch.zeros(24)[:23])


def test_two_programs_do_not_write_the_same_element():
    with pytest.raises(Exception, match="program 1 writes what another one writes or reads"):
        copy(torch.zeros(24), torch.zeros(24), step=4)


@pytest.mark.parametrize(("first", "verb"), [(16, "write"), (0, "read")])
def test_no_program_reads_what_another_one_writes(first, verb):
    x = torch.zeros(48)
    with pytest.raises(Exception, match=f"program 1 {verb}s what another one writes or reads"):
        copy(x[first:], x[8:])
