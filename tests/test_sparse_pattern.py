"""Is a pattern what it was made of, in either format, and does it refuse what is none?"""

import copy
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sparses import DENSITIES, KINDS, masked, pattern

from peftkern.sparse import Pattern

SHAPES = st.tuples(st.integers(0, 70), st.sampled_from([0, 1, 31, 32, 33, 127, 128, 129, 300]))


@given(shape=SHAPES, density=DENSITIES, kind=st.sampled_from([None, *KINDS]))
def test_a_pattern_is_the_mask_that_it_was_made_of(shape, density, kind):
    mask = masked(*shape, density)
    found = Pattern.from_mask(mask, kind)
    assert found.shape == shape and found.nnz == int(mask.sum())
    assert torch.equal(found.mask(), mask)
    assert torch.equal(found.indices(), mask.nonzero().t().int())
    assert kind in (None, found.kind)


@given(shape=SHAPES, density=DENSITIES)
def test_formats_turn_into_each_other_without_a_change(shape, density):
    one, other = (pattern(*shape, density, kind) for kind in KINDS)
    for found, wanted in ((one.bitmap(), other), (other.csr(), one)):
        assert found.kind == wanted.kind and found.nnz == wanted.nnz
        for a, b in zip(found.tensors, wanted.tensors, strict=True):
            assert a.dtype == b.dtype and torch.equal(a, b)
    assert one.csr() is one and other.bitmap() is other
    assert one.hash == other.hash


def test_the_formats_are_these():
    mask = torch.zeros(2, 300, dtype=torch.bool)
    mask[0, [0, 33, 128]] = mask[1, [31, 299]] = True
    csr, bitmap = (Pattern.from_mask(mask, kind) for kind in KINDS)
    assert csr.tensors[0].tolist() == [0, 3, 5] and csr.tensors[0].dtype == torch.int32
    assert csr.tensors[1].tolist() == [0, 33, 128, 31, 299]
    assert csr.tensors[1].dtype == torch.uint16
    assert bitmap.tensors[0].tolist() == [[1, 2, 0, 0, 1] + [0] * 5, [-(2**31)] + [0] * 8 + [2**11]]
    assert bitmap.tensors[1].tolist() == [[0, 2, 3], [3, 4, 4]]
    assert csr.operand()[1] == [0, 2, 300, 5] and bitmap.operand()[1] == [1, 2, 300, 5]
    for found in (csr, bitmap):
        again = Pattern.of(*found.operand())
        assert again.kind == found.kind and torch.equal(again.mask(), mask)


def test_the_smaller_format_is_taken():
    assert pattern(64, 512, 0.02).kind == "csr" and pattern(64, 512, 0.15).kind == "bitmap"
    for density in (0.02, 0.15):
        one, other = (pattern(64, 512, density, kind) for kind in KINDS)
        assert pattern(64, 512, density).nbytes == min(one.nbytes, other.nbytes)


def test_columns_that_16_bits_do_not_hold_take_32():
    columns = torch.tensor([0, 65535, 65536])
    for width, dtype in ((65536, torch.uint16), (65537, torch.int32)):
        some = columns[columns < width]
        found = Pattern.from_indices(torch.zeros_like(some), some, (1, width))
        assert found.tensors[1].dtype == dtype and found.indices()[1].tolist() == some.tolist()
        assert torch.equal(found.bitmap().indices(), found.indices())


@given(
    shape=SHAPES, density=DENSITIES, kind=st.sampled_from([None, *KINDS]), seed=st.integers(0, 9)
)
def test_indices_are_sorted_and_tell_their_order(shape, density, kind, seed):
    rows, columns = masked(*shape, density).nonzero().t()
    shuffled = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    found = Pattern.from_indices(rows[shuffled], columns[shuffled], shape, kind)
    assert torch.equal(found.indices(), torch.stack([rows, columns]).int())
    order = torch.arange(len(rows)) if found.order is None else found.order
    assert torch.equal(rows[shuffled][order], rows)
    assert torch.equal(columns[shuffled][order], columns)
    assert Pattern.from_indices(rows, columns, shape).order is None


@given(shape=SHAPES, density=DENSITIES, kind=st.sampled_from([None, *KINDS]))
def test_what_a_file_holds_is_the_pattern_again(shape, density, kind):
    csr = pattern(*shape, density, "csr")
    row_start, columns = csr.tensors
    for dtype in (columns.dtype, torch.int64):
        found = Pattern.from_csr(row_start.to(torch.int64), columns.to(dtype), shape, kind)
        assert found.hash == csr.hash and torch.equal(found.mask(), csr.mask())


def test_a_tensor_of_other_axes_is_a_matrix():
    mask = torch.zeros(4, 3, 2, 2, dtype=torch.bool)
    mask[1, 2, 0, 1] = True
    found = Pattern.from_mask(mask)
    assert found.shape == (4, 12) and found.indices().flatten().tolist() == [1, 9]
    assert Pattern.from_mask(mask[1, 2, 0]).shape == (1, 2)
    assert Pattern.from_mask(torch.tensor(True)).indices().flatten().tolist() == [0, 0]
    last = mask.contiguous(memory_format=torch.channels_last)
    assert Pattern.from_mask(last).hash == found.hash


def test_hashes_tell_patterns_apart():
    first = pattern(5, 40, 0.2)
    moved = first.mask().roll(1, 1)
    others = [Pattern.from_mask(m) for m in (moved, first.mask()[:, :39], first.mask()[:4])]
    taller = Pattern.from_mask(torch.cat([first.mask(), torch.zeros(1, 40, dtype=torch.bool)]))
    hashes = [p.hash for p in (first, *others, taller)]
    assert len(set(hashes)) == 5 and all(len(h) == 16 for h in hashes)
    assert first.hash == "8046ccfdb2627413"


def test_matrices_larger_than_memory_are_patterns_too():
    """Positions are never a row times the columns in 32 bits: rows and columns stay apart."""
    shape = (2**20, 2**21)
    rows, columns = torch.tensor([2**20 - 1, 0, 2**20 - 1]), torch.tensor([2**21 - 1, 7, 3])
    found = Pattern.from_indices(rows, columns, shape)
    assert found.kind == "csr" and found.nnz == 3 and found.tensors[1].dtype == torch.int32
    assert found.indices().tolist() == [[0, 2**20 - 1, 2**20 - 1], [7, 3, 2**21 - 1]]
    assert found.order.tolist() == [1, 2, 0]


def test_copies_and_pickles_are_the_same_pattern():
    for kind in KINDS:
        found = pattern(9, 70, 0.3, kind)
        for other in (copy.deepcopy(found), pickle.loads(pickle.dumps(found))):
            assert other.hash == found.hash and other.kind == kind
        assert found.to("cpu") is found
        there = found.to("meta")
        assert there.device.type == "meta" and there.nnz == found.nnz


ROW, COLUMN = torch.tensor([0, 1]), torch.tensor([2, 3])
START, COLUMNS = torch.tensor([0, 1, 2]), torch.tensor([2, 3])
BITS = torch.zeros(2, 2, dtype=torch.int32)


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: Pattern.from_mask(torch.ones(2, 2)), TypeError, "mask must be bool, got"),
        (
            lambda: Pattern.from_mask(torch.ones(2, 2).bool(), "coo"),
            ValueError, "kind must be csr, bitmap or None, got 'coo'",
        ),
        (lambda: Pattern.from_bits(BITS.long(), (2, 40)), TypeError, "bits must be int32"),
        (
            lambda: Pattern.from_bits(BITS, (2, 70)),
            ValueError, r"bits must have shape \[2, 3\], got \[2, 2\]",
        ),
        (
            lambda: Pattern.from_bits(BITS + 2**8, (2, 40)),
            ValueError, "bits must be zero behind column 40",
        ),
        (
            lambda: Pattern.from_bits(BITS - 2**31, (2, 40)),
            ValueError, "bits must be zero behind column 40",
        ),
        (
            lambda: Pattern.from_indices(ROW.float(), COLUMN, (2, 4)),
            TypeError, "rows must be int64 or int32 or uint16",
        ),
        (
            lambda: Pattern.from_indices(ROW, COLUMN, (2, 3)),
            IndexError, r"columns must lie in \[0, 3\), got 2 to 3",
        ),
        (
            lambda: Pattern.from_indices(ROW - 1, COLUMN, (2, 4)),
            IndexError, r"rows must lie in \[0, 2\), got -1 to 0",
        ),
        (
            lambda: Pattern.from_indices(ROW, COLUMN[:1], (2, 4)),
            ValueError, r"columns must have shape \[2\], got \[1\]",
        ),
        (
            lambda: Pattern.from_indices(ROW * 0, COLUMN * 0, (2, 4)),
            ValueError, "rows and columns must name each place once",
        ),
        (
            lambda: Pattern.from_indices(torch.tensor([1, 0, 1]), torch.tensor([1, 2, 1]), (2, 4)),
            ValueError, "rows and columns must name each place once",
        ),
        (
            lambda: Pattern.from_indices(ROW, COLUMN, (2, 4, 1)),
            ValueError, r"shape must be rows and columns, got \[2, 4, 1\]",
        ),
        (
            lambda: Pattern.from_indices(ROW, COLUMN, (2, 2**31)),
            ValueError, "shape must have axes that fit into 32 bits",
        ),
        (
            lambda: Pattern.from_csr(START[:2], COLUMNS, (2, 4)),
            ValueError, r"row_start must have shape \[3\], got \[2\]",
        ),
        (
            lambda: Pattern.from_csr(START + 1, COLUMNS, (2, 4)),
            ValueError, "row_start must rise from 0 to 2, got 1 to 3",
        ),
        (
            lambda: Pattern.from_csr(torch.tensor([0, 3, 2]), COLUMNS, (2, 4)),
            ValueError, "row_start must rise from 0 to 2",
        ),
        (
            lambda: Pattern.from_csr(torch.tensor([0, 2, 2]), COLUMNS.flip(0), (2, 4)),
            ValueError, "columns must rise within each row",
        ),
        (
            lambda: Pattern.from_csr(START, COLUMNS, (2, 3)),
            IndexError, r"columns must lie in \[0, 3\), got 2 to 3",
        ),
    ],
)  # fmt: skip
def test_what_is_no_pattern_is_refused(make, error, match):
    with pytest.raises(error, match=match):
        make()
