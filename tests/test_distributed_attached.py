"""Bottlenecks and prefixes in several processes: do they train and load as in one?"""

from functools import cache

import distributed
import distributed_attached
import pytest
import torch
import torch.distributed as dist
from close import assert_as_good_as
from distributed import in_processes
from distributed_attached import CONFIGS, PROJECTED, WAYS, adapted, plain

import peftkern

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs torch's gloo")

RUNS = [(name, way) for name in CONFIGS for way in WAYS]
RUNS += [("projected", "ddp"), ("projected", "fsdp2")]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of what was saved, and what each of two processes has found."""
    folder = tmp_path_factory.mktemp("attached")
    for name, config in CONFIGS.items():
        peftkern.save_adapter(adapted(config, seed=5), folder / f"single {name}")
    task = distributed_attached.train_and_save
    return folder, in_processes(2, task, folder / "run", folder)


@cache
def trained_alone(name):
    """An adapter as it starts, and losses and adapter of one process in float32 and float64."""
    config = CONFIGS.get(name, PROJECTED)
    start = flat(peftkern.adapter_state_dict(adapted(config)))
    return start, *(distributed.train(m) for m in (adapted(config), adapted(config).double()))


def flat(state):
    """All as one: a scale has one element, which one process may have exactly by luck."""
    return torch.cat([tensor.flatten() for tensor in state.values()])


@pytest.mark.parametrize(("name", "way"), RUNS)
def test_processes_train_what_one_trains(run, name, way):
    start, (losses, single), (true_losses, truth) = trained_alone(name)
    found = [trained[name, way] for trained, _ in run[1]]
    assert_as_good_as(torch.stack([f[0] for f in found]).mean(0), losses, true_losses)
    for _, state in found:
        assert state.keys() == single.keys()
        assert_as_good_as(flat(state), flat(single), flat(truth))
        assert (flat(state) - start).abs().max() > 1e-3, "or nothing was trained"


@pytest.mark.parametrize(("name", "way"), RUNS)
def test_what_processes_have_saved_one_loads(run, name, way):
    folder, found = run
    model = peftkern.load_adapter(plain(), folder / f"{name} in {way}")
    state = distributed.state(model)
    for trained, _ in found:
        wanted = trained[name, way][1]
        assert state.keys() == wanted.keys()
        assert all(torch.equal(state[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize("way", ["ddp", "fsdp2", "fsdp2, one unit"])
@pytest.mark.parametrize("name", CONFIGS)
def test_what_one_has_saved_processes_load(run, name, way):
    with torch.no_grad():
        wanted = adapted(CONFIGS[name], seed=5)(distributed.batches()[0, 0])
    for _, logits in run[1]:
        torch.testing.assert_close(logits[name, way], wanted)
