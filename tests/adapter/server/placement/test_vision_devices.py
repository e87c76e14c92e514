"""Which devices the vision side runs on: those that are named, or those that the engine will use."""

import pytest
import torch
from lmdeploy.messages import PytorchEngineConfig
from ray._private import services

from lmdeploy_vico.adapter.server.placement.devices import UnknownDevicesError, engine_devices, vision_devices
from lmdeploy_vico.cpu import selection
from lmdeploy_vico.options import OptionError

CLUSTER = '10.0.0.7:6379'


def have(monkeypatch, *names):
    """Have PyTorch see CUDA devices of these names, and no Ray cluster run."""
    monkeypatch.delenv('RAY_ADDRESS', raising=False)
    monkeypatch.delenv('LMDEPLOY_EXECUTOR_BACKEND', raising=False)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: bool(names))
    monkeypatch.setattr(selection, 'has_cuda', lambda: bool(names))
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: len(names))
    monkeypatch.setattr(torch.cuda, 'current_device', lambda: 0)
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device: names[device.index or 0])
    monkeypatch.setattr(services, 'find_gcs_addresses', set)
    monkeypatch.setattr(services, 'find_bootstrap_address', lambda directory: None)


@pytest.fixture
def eight_devices(monkeypatch):
    have(monkeypatch, *['H200'] * 8)


@pytest.fixture
def three_devices(monkeypatch):
    have(monkeypatch, 'H200', 'H200', 'L40S')


def engine(**arguments):
    """The engine's config as ``lmdeploy serve api_server`` makes it."""
    return PytorchEngineConfig(**{'enable_mp_engine': True} | arguments)


def cuda(*indices):
    return [torch.device('cuda', index) for index in indices]


@pytest.mark.parametrize(
    'option, devices',
    [
        ('auto', cuda(0)),
        ('cpu', [torch.device('cpu')]),
        ('cuda:1', cuda(1)),
        ('cuda', cuda(0)),
        ('cuda:0, cuda:1', cuda(0, 1)),
    ],
)
def test_named(three_devices, option, devices):
    assert vision_devices(option, engine()) == devices


@pytest.mark.parametrize(
    'option, message',
    [
        ('cuda:3', "'cuda:3' is not a device of this machine"),
        ('gpu', "'gpu' is not a device of this machine"),
        ('', "'' is not a device of this machine"),
        ('meta', "'meta' is not a device of this machine"),
        ('cuda:0,cuda:2', 'several devices must be of one kind, not H200, L40S; set it to some of one kind'),
        ('cuda:0,cpu', 'several devices must be of one kind, not H200, cpu'),
        ('cuda,cuda:0', 'names a device twice'),
        ('cpu,cpu', 'names a device twice'),
    ],
)
def test_refused(three_devices, option, message):
    with pytest.raises(OptionError, match=message):
        vision_devices(option, engine())


@pytest.mark.parametrize(
    'arguments, ranks',
    [
        ({'tp': 1}, 1),
        ({'tp': 2}, 2),
        ({'tp': 8}, 8),
        ({'tp': 8, 'distributed_executor_backend': 'mp'}, 8),
        ({'tp': 1, 'distributed_executor_backend': 'ray'}, 1),
        ({'ep': 8}, 8),
        ({'tp': 8, 'enable_mp_engine': False}, 8),
    ],
)
def test_auto_is_each_device_of_the_engine(eight_devices, arguments, ranks):
    assert vision_devices('auto', engine(**arguments)) == cuda(*range(ranks))


@pytest.mark.parametrize(
    'arguments, ranks',
    [
        ({'tp': 8, 'dp': 2, 'dp_rank': 1}, 4),
        ({'tp': 8, 'dp': 8, 'dp_rank': 7}, 1),
        ({'ep': 8, 'dp': 8, 'dp_rank': 3}, 1),
        ({'ep': 8, 'tp': 4, 'dp': 2, 'dp_rank': 1}, 4),
    ],
)
def test_with_dp_it_is_those_of_the_server(monkeypatch, arguments, ranks):
    have(monkeypatch, *['H200'] * ranks)  # LMDeploy sets CUDA_VISIBLE_DEVICES for each server that it starts
    assert vision_devices('auto', engine(**arguments)) == cuda(*range(ranks))


def test_dp_that_lmdeploy_drops(eight_devices):
    assert vision_devices('auto', engine(dp=2)) == cuda(0)


def test_an_engine_in_this_process_is_where_the_program_is(eight_devices, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'current_device', lambda: 5)
    assert vision_devices('auto', engine(enable_mp_engine=False)) == cuda(5)
    assert vision_devices('auto', engine()) == cuda(0)
    assert vision_devices('auto', engine(enable_mp_engine=False, distributed_executor_backend='ray')) == cuda(0)


def test_without_cuda_it_is_the_processor(monkeypatch):
    have(monkeypatch)
    assert vision_devices('auto', engine(tp=2)) == [torch.device('cpu')]


def test_auto_is_refused_for_devices_of_several_kinds(three_devices):
    assert vision_devices('auto', engine(tp=2)) == cuda(0, 1)
    with pytest.raises(OptionError, match="'auto': several devices must be of one kind, not H200, L40S; set it to"):
        vision_devices('auto', engine(tp=3))


def test_more_ranks_than_devices(three_devices):
    with pytest.raises(OptionError, match='the engine needs 8 devices, of which this machine has 3: set vision_device'):
        vision_devices('auto', engine(tp=8))
    assert vision_devices('cuda:0,cuda:1', engine(tp=8)) == cuda(0, 1)


def ray_address(monkeypatch):
    monkeypatch.setenv('RAY_ADDRESS', CLUSTER)


def ray_started_here(monkeypatch):
    monkeypatch.setattr(services, 'find_bootstrap_address', lambda directory: CLUSTER)


def ray_joined_by_this_program(monkeypatch):
    import ray

    class Context:
        gcs_address = CLUSTER

    monkeypatch.setattr(ray, 'is_initialized', lambda: True)
    monkeypatch.setattr(ray, 'get_runtime_context', Context)


@pytest.mark.parametrize('cluster', [ray_address, ray_started_here])
@pytest.mark.parametrize('arguments', [{'tp': 8}, {'tp': 8, 'dp': 8}, {'tp': 1, 'distributed_executor_backend': 'ray'}])
def test_a_ray_cluster_that_runs_already(eight_devices, monkeypatch, cluster, arguments):
    cluster(monkeypatch)
    with pytest.raises(OptionError) as refusal:
        vision_devices('auto', engine(**arguments))
    assert str(refusal.value) == (
        'vision_device "auto" means the devices of the engine, and the engine is going to run where the Ray cluster at '
        f'{CLUSTER} has room for it: set vision_device to devices of this machine, all of one kind, for example '
        'LMDEPLOY_VICO_VISION_DEVICE=cuda:0,cuda:1.'
    )
    assert vision_devices('cuda:6,cuda:7', engine(**arguments)) == cuda(6, 7)


def test_a_ray_cluster_that_is_meant_and_does_not_run(eight_devices, monkeypatch):
    monkeypatch.setenv('RAY_ADDRESS', 'auto')
    with pytest.raises(OptionError, match=r'is to join a Ray cluster that runs here \(RAY_ADDRESS\): Could not find'):
        engine_devices(engine(tp=8, distributed_executor_backend='ray'))


def test_a_ray_cluster_that_the_engine_does_not_join(eight_devices, monkeypatch):
    ray_address(monkeypatch)
    assert vision_devices('auto', engine()) == cuda(0)
    assert vision_devices('auto', engine(tp=2, distributed_executor_backend='mp')) == cuda(0, 1)
    monkeypatch.setenv('RAY_ADDRESS', 'local')
    assert vision_devices('auto', engine(tp=2)) == cuda(0, 1)


def test_a_ray_cluster_that_the_program_has_joined(eight_devices, monkeypatch):
    ray_joined_by_this_program(monkeypatch)
    with pytest.raises(UnknownDevicesError, match=CLUSTER):
        engine_devices(engine(tp=8, enable_mp_engine=False))
    with pytest.raises(UnknownDevicesError, match=CLUSTER):
        engine_devices(engine(mp_engine_backend='ray'))
    assert engine_devices(engine(tp=8)) == cuda(*range(8))  # of its own, the engine's process starts its own cluster
