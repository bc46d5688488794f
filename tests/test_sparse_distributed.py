"""Optimisers of sparse values in several processes, against one."""

import pytest
import sparse_distributed
import torch
from distributed import in_processes
from sparse_models import assert_equal


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Of two processes: what SaraAdamW has trained, and Id3AdamW on parts and on all data."""
    folder = tmp_path_factory.mktemp("processes") / "found"
    return list(zip(*in_processes(2, sparse_distributed.everything, folder), strict=True))


def test_two_processes_train_as_one_before_and_behind_the_reselection(found):
    """In DistributedDataParallel parameters must keep their length, alone they become shorter."""
    alone = sparse_distributed.sara(0, 1)
    assert_equal(*found[0])
    for name, tensor in found[0][0].items():
        torch.testing.assert_close(tensor, alone[name], rtol=1e-9, atol=1e-10)


def test_processes_agree_on_what_comes_in(found):
    (first, patterns), (second, other) = found[1]
    assert_equal(first, second)
    assert patterns == other and sum(count for _, count, _ in patterns) == 103


def test_processes_with_the_same_data_select_as_one(found):
    alone, patterns = sparse_distributed.id3(0, 1, alike=True)
    for weights, its in found[2]:
        assert its == patterns
        for name, tensor in weights.items():
            torch.testing.assert_close(tensor, alone[name], rtol=1e-12, atol=1e-12)
