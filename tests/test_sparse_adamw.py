"""The step of packed AdamW, on every instruction set: the seven questions."""

import pytest
import torch
from close import assert_as_good
from hypothesis import given
from hypothesis import strategies as st

from peftkern import _native
from peftkern.sparse import Pattern, adamw

RATES = (1e-2, 0.9, 0.999, 1e-8, 1e-2)
NEVER = 2**31 - 1


def sample(rows, columns, density, dtype=torch.float32, kind=None, seed=0):
    """-> weight, its pattern, and values, gradient and moments of as many entries."""
    generator = torch.Generator().manual_seed(seed + 7 * rows + columns)
    mask = torch.rand(rows, columns, generator=generator) < density
    pattern = Pattern.from_mask(mask, kind)
    sums = torch.promote_types(dtype, torch.float32)
    weight = torch.randn(rows, columns, generator=generator).to(dtype)
    packed = torch.randn(4, pattern.nnz, generator=generator, dtype=sums)
    packed[3].abs_()
    return weight, pattern, *packed.unbind()


def call(tensors, born=(), step=3, rates=RATES, writes=True):
    """The op on several tensors, as `sample` makes them; -> what it has left in each of them."""
    tensors = [(w.clone(), p, *(t.clone() for t in rest)) for w, p, *rest in tensors]
    weights, patterns, values, grads, *moments = (
        list(column) for column in zip(*tensors, strict=True)
    )
    operands = [p.operand() for p in patterns]
    args = (
        weights if writes else [], values, grads, *moments, list(born),
        [t for found, _ in operands for t in found] if writes else [],
        [n for _, layout in operands for n in layout] if writes else [], step, *rates,
    )  # fmt: skip
    adamw.step_op(*args)
    return [(w, v, *m) for w, v, *m in zip(weights, values, *moments, strict=True)]


def placed(weight, pattern, values):
    rows, columns = pattern.indices().long()
    return weight.index_put((rows, columns), values.to(weight.dtype))


def after(index, age):
    """The reference's value, exp_avg or exp_avg_sq."""
    return lambda *packed: adamw.reference(*packed, age, *RATES)[index]


@pytest.mark.ops("sparse_adamw_")
@given(
    sizes=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 700)), min_size=1, max_size=4),
    density=st.sampled_from([0.0, 0.02, 0.3, 1.0]),
    kind=st.sampled_from(["csr", "bitmap"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    step=st.integers(1, 5000),
)
def test_a_step_is_the_reference(isa, sizes, density, kind, dtype, step):
    tensors = [sample(*size, density, dtype, kind, i) for i, size in enumerate(sizes)]
    for before, (weight, *found) in zip(tensors, call(tensors, step=step), strict=True):
        for index, result in enumerate(found):
            assert_as_good(result, after(index, step), *before[2:])
        assert torch.equal(weight, placed(before[0], before[1], found[0]))


@pytest.mark.ops("sparse_adamw_")
@given(
    count=st.integers(0, 1500), step=st.integers(1, 30000),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)  # fmt: skip
def test_each_entry_is_corrected_for_its_own_age(isa, count, step, dtype):
    before = sample(3, count, 0.5, dtype)
    pattern = before[1]
    generator = torch.Generator().manual_seed(step)
    born = torch.randint(step + 2, (pattern.nnz,), generator=generator, dtype=torch.int32)
    born[::5] = NEVER
    age = step - born.long()
    ((weight, *found),) = call([before], [born], step)
    for index, result in enumerate(found):
        assert_as_good(result, after(index, age), *before[2:])
        kept = before[(2, 4, 5)[index]]
        assert torch.equal(result[age < 1], kept[age < 1])
    assert torch.equal(weight, placed(before[0], pattern, found[0]))


def test_one_step_of_the_method_file(isa):
    """AdamW of v = [10, -1, 3] and dv = [12, 1, 0]: decay alone moves the last one."""
    weight = torch.tensor([[1.0, 0, -1], [2, 1, 0]])
    pattern = Pattern.from_indices(torch.tensor([0, 1, 1]), torch.tensor([1, 0, 2]), (2, 3))
    packed = torch.tensor([[10.0, -1, 3], [12, 1, 0], [0, 0, 0], [0, 0, 0]])
    ((weight, values, *_),) = call([(weight, pattern, *packed)], step=1)
    torch.testing.assert_close(values, torch.tensor([9.988999, -1.009900, 2.999700]))
    assert torch.equal(weight, torch.tensor([[1.0, values[0], -1], [values[1], 1, values[2]]]))


@pytest.mark.parametrize("shared", [False, True])
def test_late_entries_make_whole_steps(isa, shared):
    """A constant gradient and eps 0: an entry of its own age moves by lr, always. Corrected for the
    optimiser's age, which is old, it moves by up to six times as much."""
    lr, late = 1e-3, 100_000
    before = sample(1, 1, 1.0)
    packed = [torch.zeros(1), torch.full((1,), 3.0), torch.zeros(1), torch.zeros(1)]
    found = {}
    for age in range(1, 11):
        born = [] if shared else [torch.tensor([late], dtype=torch.int32)]
        previous = packed[0]
        rates = (lr, 0.9, 0.999, 0.0, 0.0)
        ((_, value, *moments),) = call([(*before[:2], *packed)], born, late + age, rates)
        packed = [value, packed[1], *moments]
        found[age] = float(previous - value) / lr
    wanted = {1: 3.1623, 5: 5.797, 10: 6.528} if shared else {1: 1.0, 5: 1.0, 10: 1.0}
    for age, ratio in wanted.items():
        assert found[age] == pytest.approx(ratio, rel=1e-3)


def test_without_weights_the_values_alone_move(isa):
    before = sample(5, 40, 0.3)
    ((weight, *found),) = call([before], writes=False)
    ((_, *wanted),) = call([before])
    assert torch.equal(weight, before[0])
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("kind", ["csr", "bitmap"])
def test_neither_threads_nor_instruction_sets_change_bits(kind):
    tensors = [sample(97, 301, 0.3, kind=kind), sample(1, 70000, 0.5, torch.bfloat16, kind)]
    born = [torch.arange(p.nnz, dtype=torch.int32) % 4 for _, p, *_ in tensors]
    wanted = [t for found in call(tensors, born) for t in found]
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for name in _native.available_isas() or ("none",):
                if name != "none":
                    _native.use_isa(name)
                found = [t for found in call(tensors, born) for t in found]
                assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    finally:
        torch.set_num_threads(before)
        if _native.loaded:
            _native.use_isa(_native.available_isas()[-1])


def test_the_op_is_well_registered():
    weight, pattern, *packed = sample(4, 9, 0.5)
    tensors, layout = pattern.operand()
    args = ([weight], *([t] for t in packed), [], tensors, layout, 3, *RATES)
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(adamw.step_op, args, test_utils=tests)


@pytest.mark.skipif(not _native.loaded, reason="the compiled library's own refusals")
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda a: a[2].clear(), "as long as values"),
        (lambda a: a[2].__setitem__(0, a[2][0][:-1]), "grads must have"),
        (lambda a: a[3].__setitem__(0, a[3][0].double()), "exp_avg has the wrong dtype"),
        (lambda a: a[5].append(torch.zeros(3)), "born must have"),
        (lambda a: a[7].__setitem__(3, 2), "places must have"),
        (lambda a: a[7].__setitem__(0, 2), "layout must be a kind"),
        (lambda a: a[6].pop(), "patterns and layouts"),
        (lambda a: a[6][1].fill_(9), "inside of the matrix and in order"),
        (lambda a: a[0].__setitem__(0, a[0][0][:-1]), "a weight must have"),
        (lambda a: a[0].__setitem__(0, a[0][0].double()), "values must be float32"),
    ],
)
def test_the_kernel_touches_no_memory_that_is_not_its_own(spoil, message):
    weight, pattern, *packed = sample(4, 9, 0.5, kind="csr")
    tensors, layout = pattern.operand()
    args = [[weight], *([t] for t in packed), [], tensors, layout]
    before = packed[0].clone()
    spoil(args)
    with pytest.raises(RuntimeError, match=message):
        adamw.step_op(*args, 3, *RATES)
    assert torch.equal(packed[0], before)
