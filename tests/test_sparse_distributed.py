"""Optimisers of sparse values in several processes, against one."""

import sparse_distributed
import torch
from distributed import in_processes
from sparse_models import assert_equal


def test_two_processes_train_as_one_before_and_behind_the_reselection(tmp_path):
    """In DistributedDataParallel parameters must keep their length, alone they become shorter."""
    alone = sparse_distributed.sara(0, 1)
    found = in_processes(2, sparse_distributed.sara, tmp_path / "sara")
    assert_equal(*found)
    for name, tensor in found[0].items():
        torch.testing.assert_close(tensor, alone[name], rtol=1e-9, atol=1e-10)


def test_processes_agree_on_what_comes_in(tmp_path):
    (first, patterns), (second, other) = in_processes(
        2, sparse_distributed.id3, tmp_path / "parts", False
    )
    assert_equal(first, second)
    assert patterns == other and sum(count for _, count, _ in patterns) == 103


def test_processes_with_the_same_data_select_as_one(tmp_path):
    alone, patterns = sparse_distributed.id3(0, 1, True)
    for weights, its in in_processes(2, sparse_distributed.id3, tmp_path / "alike", True):
        assert its == patterns
        for name, tensor in weights.items():
            torch.testing.assert_close(tensor, alone[name], rtol=1e-12, atol=1e-12)
