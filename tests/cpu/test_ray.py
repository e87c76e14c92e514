"""What the CPU backend gives Ray's executor: logical GPUs, workers without devices, collectives of uneven sizes."""

import os

import pytest
import ray
import torch.multiprocessing
from cpu import exchange

from lmdeploy_vico.cpu import cluster, ray_patches


@pytest.fixture
def started(monkeypatch):
    """The arguments with which Ray was started, and what the environment then said of devices."""
    calls = []

    def init(address, **arguments):
        calls.append((address, arguments, os.environ.get('CUDA_VISIBLE_DEVICES')))

    monkeypatch.setattr(ray, 'init', init)
    monkeypatch.setattr(ray, 'is_initialized', lambda: bool(calls))
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '')
    return calls


def test_a_cluster_has_a_logical_gpu_for_each_rank(started):
    cluster.start(3)
    cluster.start(3)  # the second time Ray runs already
    [(address, arguments, visible)] = started
    assert address is None and visible is None
    assert arguments['num_gpus'] == 3 and arguments['object_store_memory'] == cluster.OBJECT_STORE
    assert os.environ['CUDA_VISIBLE_DEVICES'] == ''


@pytest.mark.parametrize(('text', 'raised'), [('connecting to an existing cluster', False), ('no such address', True)])
def test_a_cluster_that_runs_is_joined(monkeypatch, text, raised):
    def init(address, **arguments):
        raise ValueError(text)

    monkeypatch.setattr(ray, 'init', init)
    if raised:
        with pytest.raises(ValueError, match=text):
            cluster.start(2)
    else:
        cluster.start(2)  # LMDeploy joins it, as it does anyway


def test_workers_see_no_device():
    environment = cluster.hide_devices({'env_vars': {'LMDEPLOY_LOG_PID': '1', 'CUDA_VISIBLE_DEVICES': '0'}})
    assert environment['env_vars'] == {'LMDEPLOY_LOG_PID': '1', **cluster.WORKER_ENVIRONMENT}
    assert cluster.WORKER_ENVIRONMENT['CUDA_VISIBLE_DEVICES'] == ''


@pytest.mark.parametrize(
    ('ranks', 'dp', 'asked', 'executor'),
    [(1, 1, None, 'uni'), (2, 1, None, 'mp'), (2, 2, None, 'ray'), (2, 1, 'ray', 'ray'), (2, 1, 'mp', 'mp')],
)
def test_ray_is_used_where_it_is_asked_for_or_needed(monkeypatch, ranks, dp, asked, executor):
    from lmdeploy.pytorch import envs
    from lmdeploy.pytorch.engine import executor as executors

    monkeypatch.setattr(envs, 'executor_backend', asked)
    assert executors.get_distributed_executor_backend(ranks, dp, 'cuda') == executor


def test_the_warm_up_that_ray_sends_to_workers_is_a_function_by_name():
    """A function that is wrapped would be sent by value, without what wraps it, and fail on a tensor on 'cuda'."""
    from lmdeploy.pytorch.engine.executor.ray_executor import RayWorkerWrapper

    assert RayWorkerWrapper.warmup_dist is ray_patches.skip_warm_up
    cloudpickle = pytest.importorskip('ray.cloudpickle')
    assert len(cloudpickle.dumps(RayWorkerWrapper.warmup_dist)) < 200


@pytest.mark.long
@pytest.mark.slow
def test_ranks_exchange_different_numbers_of_tokens(tmp_path):
    torch.multiprocessing.spawn(exchange.run, (str(tmp_path / 'store'),), nprocs=len(exchange.SIZES))
