"""Selection: are exactly those picked that a stable sort of the whole model would pick?"""

import math

import pytest
import torch
from distributed import in_processes
from hypothesis import given
from hypothesis import strategies as st
from selections import DTYPES, scores, sorted_first

from peftkern import _native
from peftkern.sparse import Budget, Pattern, keys, picking, select
from peftkern.sparse import bits as bitmaps

SHAPES = st.lists(st.tuples(st.integers(1, 9), st.integers(0, 80)), min_size=1, max_size=4)
TESTS = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")


def assert_picked(found, masks):
    every, counts = found
    for bits, mask in zip(every, masks, strict=True):
        assert torch.equal(bits, bitmaps.pack(mask))  # and so zero behind the last column
    assert counts.tolist() == [int(mask.sum()) for mask in masks]


@pytest.mark.ops("sparse_histogram", "sparse_pick")
@pytest.mark.parametrize("largest", [False, True])
@given(
    shapes=SHAPES, dtypes=st.lists(st.sampled_from(DTYPES), min_size=1, max_size=3),
    share=st.floats(0, 1), levels=st.sampled_from([0, 1, 3]), sample=st.sampled_from([8, 2**15]),
)  # fmt: skip
def test_what_is_picked_is_what_a_stable_sort_would(
    isa, largest, monkeypatch, shapes, dtypes, share, levels, sample
):
    monkeypatch.setattr(picking, "_SAMPLE", sample)  # so that few scores are guessed about as well
    given_scores = scores(shapes, dtypes, levels=levels)
    total = sum(score.numel() for score in given_scores)
    for count in {round(share * total), total}:
        wanted = sorted_first(given_scores, count, largest)
        assert_picked(picking.first(given_scores, count, largest), wanted)


@pytest.mark.ops("sparse_histogram", "sparse_pick")
@pytest.mark.parametrize("band", [0, 200])
def test_a_sample_that_lies_costs_a_pass_and_nothing_else(isa, monkeypatch, band):
    """Every third score is large, and they are those that the sample sees."""
    monkeypatch.setattr(picking, "_SAMPLE", 700)
    monkeypatch.setattr(picking, "BAND", band)  # else a bin is as good as its key
    score = torch.rand(3, 701, generator=torch.Generator().manual_seed(0))
    score.view(-1)[::3] += 5
    asked = []

    def watched(scores, largest, low, shift, bins):
        asked.append((low, shift))
        return _native_histogram(scores, largest, low, shift, bins)

    _native_histogram = picking.histogram_op
    monkeypatch.setattr(picking, "histogram_op", watched)
    assert_picked(picking.first([score], 700), sorted_first([score], 700, False))
    assert asked[0][0] > 0 and asked[1] == (0, 19)
    assert len(asked) == (2 if band else 4)


@pytest.mark.ops("sparse_pick")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("side", select.SIDES)
@given(threshold=st.sampled_from([0.0, 2e-3, 0.5, 1.0, math.inf]), levels=st.sampled_from([0, 2]))
def test_a_threshold_compares_as_torch_does(isa, dtype, side, threshold, levels):
    (score,) = scores([(5, 67)], [dtype], levels=levels)
    sums = torch.promote_types(dtype, torch.float32)
    compare = {"<": torch.lt, "<=": torch.le, ">": torch.gt, ">=": torch.ge}[side]
    mask = compare(score.to(sums).abs(), torch.tensor(threshold, dtype=sums))
    assert_picked(picking.below([score], threshold, side), [mask])


@pytest.mark.ops("sparse_histogram")
@given(
    shapes=SHAPES, dtypes=st.lists(st.sampled_from(DTYPES), min_size=1, max_size=3),
    largest=st.booleans(), begin=st.floats(0, 1), shift=st.integers(0, 62),
    count=st.sampled_from([1, 7, picking.BINS]),
)  # fmt: skip
def test_every_number_is_counted_in_its_bin(isa, shapes, dtypes, largest, begin, shift, count):
    given_scores = scores(shapes, dtypes)
    end = keys.above_all(keys.compared(given_scores))
    width, _ = keys.width(given_scores)
    args = given_scores, largest, int(begin * (end - 1)), min(shift, width - 1), count
    counts = picking.histogram_op(*args)
    assert torch.equal(counts, keys.histogram(*args))
    numbers = sum(int((~score.isnan()).sum()) for score in given_scores)
    assert int(counts.sum()) == numbers


@pytest.mark.ops("sparse_pick")
@given(
    shapes=SHAPES, dtypes=st.lists(st.sampled_from(DTYPES), min_size=1, max_size=3),
    largest=st.booleans(), ends=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    count=st.integers(0, 60), levels=st.sampled_from([0, 2]),
)  # fmt: skip
def test_of_a_band_the_smallest_are_picked(isa, shapes, dtypes, largest, ends, count, levels):
    given_scores = scores(shapes, dtypes, levels=levels)
    last = keys.above_all(keys.compared(given_scores)) - 1
    low, high = sorted(int(end * last) for end in ends)
    args = given_scores, largest, low, high + 1, count
    found, wanted = picking.pick_op(*args), keys.pick(*args)
    assert torch.equal(found[1], wanted[1])
    assert all(torch.equal(a, b) for a, b in zip(found[0], wanted[0], strict=True))


@pytest.mark.ops("sparse_pick")
def test_equal_scores_are_picked_in_their_order_across_threads(isa):
    """Of 200000 equal ones in two tensors, some jobs end in the midst of a row."""
    ones = [torch.ones(3, 50_001), torch.full((1, 49_997), -1.0)]
    for count in (1, 65_537, 150_004):
        masks = [torch.arange(150_003) < count, torch.arange(49_997) < count - 150_003]
        shaped = [mask.view(one.shape) for mask, one in zip(masks, ones, strict=True)]
        assert_picked(picking.first(ones, count), shaped)


@pytest.mark.ops("sparse_tile_counts", "sparse_columns", "sparse_bits", "sparse_prefix_")
@given(
    rows=st.integers(0, 9), columns=st.integers(0, 300), density=st.sampled_from([0, 0.05, 0.5, 1])
)
def test_bits_become_columns_in_order_and_columns_bits(isa, rows, columns, density):
    generator = torch.Generator().manual_seed(rows)
    mask = torch.rand(rows, columns, generator=generator) < density
    bits = bitmaps.pack(mask)
    counts = bitmaps.tile_counts(bits)
    assert torch.equal(counts, bitmaps._tile_counts(bits))
    nnz = int(mask.sum())
    starts, found = bitmaps.csr_of(bits, columns, counts, nnz)
    assert torch.equal(found.int(), mask.nonzero()[:, 1].int())
    assert starts.tolist() == [0, *mask.sum(1).cumsum(0).tolist()]
    assert torch.equal(found, bitmaps._columns(bits, starts, columns, nnz))
    assert torch.equal(bitmaps.bits_of(starts, found, (rows, columns)), bits)
    flat = counts.flatten().clone()
    before = bitmaps.prefix(counts, nnz)
    assert before is counts and torch.equal(before.flatten(), (flat.cumsum(0) - flat).int())


def test_columns_of_a_wide_matrix_take_four_bytes(isa):
    mask = torch.zeros(2, 70_001, dtype=torch.bool)
    mask[0, 70_000] = mask[1, 0] = mask[1, 65_536] = True
    pattern = Pattern.from_mask(mask)
    assert pattern.tensors[1].dtype == torch.int32
    assert pattern.indices().tolist() == [[0, 1, 1], [70_000, 0, 65_536]]


@pytest.mark.ops("sparse_compact")
@given(
    rows=st.integers(1, 9), columns=st.integers(1, 90), density=st.sampled_from([0, 0.05, 0.5, 1]),
    kept=st.sampled_from([0, 0.1, 0.9, 1]), kind=st.sampled_from(["csr", "bitmap"]),
)  # fmt: skip
def test_what_is_kept_of_a_pattern_keeps_its_order(isa, rows, columns, density, kept, kind):
    generator = torch.Generator().manual_seed(rows)
    mask = torch.rand(rows, columns, generator=generator) < density
    pattern = Pattern.from_mask(mask, kind)
    stays = torch.rand(pattern.nnz, generator=generator) < kept
    dtypes = (torch.float32, torch.uint8, torch.int16, torch.float64)
    packed = [torch.arange(pattern.nnz).to(dtype) for dtype in dtypes]
    bits = bitmaps.pack(stays[None])[0]
    smaller, found = picking.subset(pattern, bits, int(stays.sum()), packed)
    mask[mask.clone()] = stays
    assert smaller.hash == Pattern.from_mask(mask).hash and smaller.nnz == int(stays.sum())
    for before, after in zip(packed, found, strict=True):
        assert torch.equal(after, before[stays])


def test_compaction_takes_many_steps_of_words(isa):
    """Row starts before, on and behind the ends of the words that a job takes."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(400, 701, generator=generator) < 0.4
    mask[5:9] = False
    pattern = Pattern.from_mask(mask, "csr")
    stays = torch.rand(pattern.nnz, generator=generator) < 0.3
    bits = bitmaps.pack(stays[None])[0]
    smaller, (places,) = picking.subset(
        pattern, bits, int(stays.sum()), [torch.arange(pattern.nnz)]
    )
    mask[mask.clone()] = stays
    assert torch.equal(smaller.mask(), mask) and torch.equal(places, stays.nonzero()[:, 0])


# Machinery


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_ops_are_well_registered(dtype):
    given_scores = scores([(4, 33), (2, 70)], [dtype])
    pattern = Pattern.from_mask(torch.ones(4, 33, dtype=torch.bool), "csr")
    kept = torch.full((5,), 1, dtype=torch.int32)
    bits = bitmaps.pack(torch.ones(4, 33, dtype=torch.bool))
    for name, args in {
        "sparse_histogram": (given_scores, False, 5, 3, 7),
        "sparse_pick": (given_scores, True, 5, 6, 3),
        "sparse_compact": ([torch.ones(132), *pattern.tensors[1:]], pattern.tensors[0], kept, 5),
        "sparse_tile_counts": (bits,),
        "sparse_columns": (bits, pattern.tensors[0], 33, 132),
        "sparse_bits": (*pattern.tensors, 33),
        "sparse_prefix_": (torch.ones(4, 3, dtype=torch.int32),),
    }.items():
        torch.library.opcheck(getattr(torch.ops.peftkern, name).default, args, test_utils=TESTS)


def picked(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        given_scores = scores([(130, 701), (1, 70_000), (3, 5)], [torch.float32, torch.bfloat16], 1)
        found = [picking.first(given_scores, 40_000, big) for big in (False, True)]
        counts = picking.histogram_op(given_scores, False, 0, 19, picking.BINS)
        return [counts, *(bits for every, counts in found for bits in (*every, counts))]
    finally:
        torch.set_num_threads(before)


@pytest.mark.ops("sparse_histogram", "sparse_pick")
def test_threads_do_not_change_bits(isa):
    once = picked(1)
    for threads in (2, 3, 1):
        assert all(torch.equal(a, b) for a, b in zip(once, picked(threads), strict=True))


def test_instruction_sets_do_not_change_bits():
    found = []
    for name in _native.available_isas():
        with _native.using_isa(name):
            found.append(picked(2))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def shards(rank, count):
    found = []
    for levels in (0, 1):
        weights = scores([(10, 40), (7, 33)], [torch.float32], levels=levels)
        parts = {str(i): w.tensor_split(count)[rank] for i, w in enumerate(weights)}
        patterns = Budget(150).select(parts, torch.distributed.group.WORLD)
        found.append([pattern.mask() for pattern in patterns.values()])
    return found


def test_two_shards_select_what_one_does(tmp_path):
    """Of each weight its first rows and its last: equal ones come in the order of the ranks."""
    parts = in_processes(2, shards, tmp_path / "two")
    for levels in (0, 1):
        weights = scores([(10, 40), (7, 33)], [torch.float32], levels=levels)
        ordered = [w.tensor_split(2)[rank] for rank in range(2) for w in weights]
        wanted = sorted_first(ordered, 150, False)
        found = [mask for rank in range(2) for mask in parts[rank][levels]]
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
