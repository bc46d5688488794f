"""Do several processes compute what one computes, and read what others have written?"""

import distributed
import pytest
import torch
import torch.distributed as dist
from close import assert_as_good_as
from distributed import adapted, in_processes
from models import assert_unchanged, snapshot, toy
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.parallel import DistributedDataParallel

import peftkern
from peftkern import LoraConfig
from peftkern._family import adapters

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs torch's gloo")

COUNTS = [2, 4]


@pytest.fixture(scope="module", params=COUNTS, ids=lambda count: f"{count} processes")
def count(request):
    return request.param


@pytest.fixture
def alone(tmp_path):
    """A group of one process."""
    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1
    )  # fmt: skip
    yield
    dist.destroy_process_group()


def trained_alone(**options):
    """Losses and adapter of one process, and the truth of both in float64."""
    single, exact = adapted(**options), adapted(**options).double()
    return distributed.train(single), distributed.train(exact)


def assert_trained_as_alone(found, **options):
    """`found` has the losses and the adapter of every process."""
    (losses, single), (true_losses, truth) = trained_alone(**options)
    start = peftkern.adapter_state_dict(adapted(**options))
    assert_as_good_as(torch.stack([f[0] for f in found]).mean(0), losses, true_losses)
    for _, state in found:
        assert state.keys() == single.keys()
        for key, tensor in state.items():
            assert_as_good_as(tensor, single[key], truth[key])
            assert (tensor - start[key]).abs().max() > 1e-3, "or nothing was trained"


@pytest.fixture(scope="module")
def in_ddp(count, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp") / "run"
    return in_processes(count, distributed.train_in_ddp, folder)


@pytest.mark.parametrize("way", distributed.DDP)
def test_ddp_trains_what_one_process_trains(way, in_ddp):
    assert_trained_as_alone([found[way] for found in in_ddp])


@pytest.fixture(scope="module")
def in_fsdp2(count, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fsdp2") / "run"
    return in_processes(count, distributed.train_in_fsdp2, folder)


@pytest.mark.parametrize("way", distributed.FSDP2)
def test_fully_sharded_models_train_what_one_process_trains(way, in_fsdp2):
    config = distributed.BASES.get(way, distributed.CONFIG)
    assert_trained_as_alone([found[way] for found in in_fsdp2], config=config)


def test_mixed_precision_casts_what_trains_and_no_packed_byte(tmp_path):
    found = in_processes(2, distributed.step_in_16_bits, tmp_path / "run")
    single, exact = adapted().bfloat16(), adapted().double()
    tokens, targets = distributed.batches()[0]
    for model in (single, exact):
        distributed.loss_of(model, tokens, targets).backward()
    for rank, (dtype, share, logits, grads) in enumerate(found):
        assert (dtype, share) == (torch.uint8, 0.5)
        part = tokens.chunk(2)[rank]
        assert logits.dtype == torch.bfloat16
        assert_as_good_as(logits, single(part).detach(), exact(part).detach())
        for name, grad in grads.items():
            plain, truth = (m.get_parameter(name).grad for m in (single, exact))
            assert grad.dtype == torch.float32
            assert_as_good_as(grad, plain.float(), truth)


def test_sharding_frees_the_whole_bytes(alone):
    model = adapted()
    str(peftkern.report(model))
    model(distributed.batches()[0, 0])
    layers = adapters(model).values()
    whole = [StorageWeakRef(layer.weight.untyped_storage()) for layer in layers]
    distributed.sharded(model)
    assert all(storage.expired() for storage in whole)


# What one way of training has written, every other reads.


def same(state, other):
    return state.keys() == other.keys() and all(torch.equal(state[k], other[k]) for k in state)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder of adapters, and what they hold by their names."""
    folder = tmp_path_factory.mktemp("saved")
    of_processes = in_processes(2, distributed.save, folder / "run", folder)
    assert all(same(*(found[name] for found in of_processes)) for name in of_processes[0])
    single = adapted()
    peftkern.save_adapter(single, folder / "single")
    return folder, of_processes[0] | {"single": distributed.state(single)}


@pytest.fixture(scope="module")
def loaded(saved, tmp_path_factory):
    folder, states = saved
    run = tmp_path_factory.mktemp("loaded") / "run"
    return in_processes(4, distributed.load, run, folder, list(states))


@pytest.mark.parametrize("name", ["single", "ddp", "fsdp2"])
def test_what_processes_have_saved_one_process_loads(name, saved):
    folder, states = saved
    for model in (toy(), adapted(seed=5)):
        assert same(distributed.state(peftkern.load_adapter(model, folder / name)), states[name])


def test_replicas_of_shards_are_saved_once(tmp_path):
    found = in_processes(4, distributed.save_replicas, tmp_path / "run", tmp_path)
    assert [path.name for path in tmp_path.glob("of process *")] == ["of process 0"]
    model = peftkern.load_adapter(toy(), tmp_path / "of process 0")
    assert all(same(state, distributed.state(model)) for state in found)


@pytest.mark.parametrize("way", ["ddp", "fsdp2", "one unit"])
@pytest.mark.parametrize("name", ["single", "ddp", "fsdp2"])
def test_what_was_saved_more_processes_load(name, way, saved, loaded):
    folder, states = saved
    alone = peftkern.load_adapter(adapted(seed=5), folder / name)
    with torch.no_grad():
        wanted = alone(distributed.batches()[0, 0])
    for found in loaded:
        state, logits = found[f"{name} in {way}"]
        assert same(state, states[name])
        torch.testing.assert_close(logits, wanted)


def test_torchs_distributed_checkpoints_take_the_adapter_and_the_whole_state(saved, tmp_path):
    folder, states = saved
    of_processes = in_processes(4, distributed.load_dcp, tmp_path / "run", folder)
    for found in [*of_processes, distributed.load_dcp_alone(folder)]:
        assert all(same(state, states["fsdp2"]) for state in found)


def test_blocks_wrapped_one_by_one_keep_the_names_of_the_model(tmp_path):
    model = adapted()
    want = distributed.state(model)
    model.layers[0] = checkpoint_wrapper(torch.compile(model.layers[0]))
    model.layers[1] = torch.compile(model.layers[1])
    assert same(distributed.state(model), want)
    peftkern.save_adapter(model, tmp_path)
    assert same(distributed.state(peftkern.load_adapter(toy(), tmp_path)), want)
    peftkern.save_adapter(adapted(seed=5), tmp_path)
    peftkern.load_adapter(model, tmp_path)
    assert same(distributed.state(model), distributed.state(adapted(seed=5)))


# What can only go wrong later is refused now.


def test_a_model_in_ddp_gets_no_adapter_that_ddp_does_not_know(alone, tmp_path):
    peftkern.save_adapter(adapted(), tmp_path / "adapter")
    model = toy()
    wrapped, before = DistributedDataParallel(model), snapshot(model)
    for call in (
        lambda: peftkern.adapt(wrapped, LoraConfig()),
        lambda: peftkern.load_adapter(wrapped, tmp_path / "adapter"),
    ):
        with pytest.raises(ValueError, match="^model must be adapted before DistributedData"):
            call()
        assert_unchanged(model, before)


def test_a_sharded_model_gets_no_adapter(alone, tmp_path):
    peftkern.save_adapter(adapted(), tmp_path / "adapter")
    model = distributed.sharded(toy())
    for call in (
        lambda: peftkern.adapt(model, LoraConfig()),
        lambda: peftkern.load_adapter(model, tmp_path / "adapter"),
    ):
        with pytest.raises(ValueError, match="its weight is a DTensor, not a plain tensor"):
            call()
        assert not any(isinstance(m, peftkern.QLoRALinear) for m in model.modules())


def test_bytes_that_were_cast_are_refused():
    model = adapted()
    layer = model.layers[0].q_proj
    layer.weight = nn.Parameter(layer.weight.float(), requires_grad=False)
    with pytest.raises(TypeError, match=r"^weight must be torch.uint8, got torch.float32$"):
        model(distributed.batches()[0, 0])


def test_the_older_fsdp_is_refused_where_it_would_save_flat_pieces(alone, tmp_path):
    peftkern.save_adapter(adapted(), tmp_path / "adapter")
    model = FullyShardedDataParallel(
        adapted(config=LoraConfig()), use_orig_params=True, device_id=torch.device("cpu")
    )
    for call in (
        lambda: peftkern.save_adapter(model, tmp_path / "new"),
        lambda: peftkern.load_adapter(model, tmp_path / "adapter"),
        lambda: peftkern.adapter_state_dict(model),
    ):
        with pytest.raises(ValueError, match="^model must be sharded by torch.*fully_shard, got"):
            call()
    assert not (tmp_path / "new").exists()


def test_a_failed_save_of_shards_leaves_nobody_waiting(alone, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError):
        peftkern.save_adapter(distributed.sharded(adapted()), tmp_path / "file")
