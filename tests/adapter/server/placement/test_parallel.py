"""Numbers of ranks that do not fit a model or a machine: a sentence that says what works."""

import re
from types import SimpleNamespace

import pytest
import torch
from lmdeploy.messages import PytorchEngineConfig

from lmdeploy_vico.adapter.server.placement import parallel
from lmdeploy_vico.adapter.server.placement.parallel import require_parallelism
from lmdeploy_vico.options import OptionError
from lmdeploy_vico.stage.remote import cluster
from lmdeploy_vico.stage.remote.cluster import ClusterError

DENSE = SimpleNamespace(num_attention_heads=32, num_key_value_heads=8, vocab_size=151674)
MOE = SimpleNamespace(
    num_attention_heads=64, num_key_value_heads=4, vocab_size=151936, moe_intermediate_size=1536, num_experts=128
)


@pytest.mark.parametrize(
    'llm, engine',
    [
        (DENSE, {'tp': 1}), (DENSE, {'tp': 8}), (DENSE, {'tp': 16}), (MOE, {'tp': 8}), (MOE, {'tp': 4, 'ep': 4}),
        (MOE, {'tp': 1, 'dp': 2, 'ep': 2}),
    ],
)  # fmt: skip
def test_what_works(llm, engine):
    require_parallelism(llm, PytorchEngineConfig(**engine))


@pytest.mark.parametrize(
    'llm, engine, sentence',
    [
        (DENSE, {'tp': 3}, '--tp 3 does not work: 3 ranks cannot share 32 attention heads. 1, 2, 4, 8, 16, 32 do.'),
        (MOE, {'tp': 6}, '--tp 6 does not work: 6 ranks cannot share 64 attention heads. 1, 2, 4, 8, 16, 32, 64 do.'),
        (
            SimpleNamespace(**vars(DENSE) | {'num_key_value_heads': 6}),
            {'tp': 4},
            '--tp 4 does not work: 4 ranks cannot share 6 key-value heads. 1, 2 do.',
        ),
        (
            SimpleNamespace(**vars(MOE) | {'moe_intermediate_size': 1537}),
            {'tp': 2},
            '--tp 2 does not work: 2 ranks cannot share 1537 columns of an expert. 1, 29, 53 do.',
        ),
        (
            SimpleNamespace(**vars(MOE) | {'num_experts': 127}),
            {'tp': 1, 'ep': 2},
            '--ep 2 does not work: 2 ranks cannot share 127 experts.',
        ),
        (DENSE, {'tp': 3, 'dp': 2}, '--tp 3, --dp 2 and --ep 1 do not fit each other: '),
    ],
)
def test_what_does_not(llm, engine, sentence):
    with pytest.raises(OptionError, match=re.escape(sentence)):
        require_parallelism(llm, PytorchEngineConfig(**engine))


def test_more_ranks_than_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    monkeypatch.setattr(parallel, 'joined_cluster', lambda engine, dist: None)
    with pytest.raises(OptionError, match=r'--tp 4 needs as many devices, and this server sees 2\.'):
        require_parallelism(DENSE, PytorchEngineConfig(tp=4))
    require_parallelism(DENSE, PytorchEngineConfig(tp=2))


@pytest.fixture
def on_ray(monkeypatch):
    """``on_ray(address, gpus)``: the ranks are placed by a cluster, which has so many GPUs, and so many free."""
    asked = []

    def place(address, gpus=None):
        def look(address):
            asked.append(address)
            if gpus is None:
                raise ClusterError('Nobody is there.')
            return gpus

        monkeypatch.setattr(parallel, 'joined_cluster', lambda engine, dist: address)
        monkeypatch.setattr(cluster, 'cluster_gpus', look)
        return asked

    return place


def test_a_cluster_may_have_more_devices_than_this_machine(on_ray, monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    asked = on_ray('head:6379', gpus=(8, 4))
    require_parallelism(DENSE, PytorchEngineConfig(tp=4))
    assert asked == ['head:6379'] and not caplog.records


def test_a_cluster_without_room_is_said_to_be(on_ray, caplog):
    on_ray('head:6379', gpus=(4.0, 3.0))
    require_parallelism(DENSE, PytorchEngineConfig(tp=4))
    [record] = caplog.records
    assert record.levelname == 'WARNING'
    assert 'needs 4 GPUs of the Ray cluster at head:6379, which has 4, of which 3 are free' in record.getMessage()


def test_a_cluster_that_does_not_answer_is_refused(on_ray):
    on_ray('head:6379')
    with pytest.raises(OptionError, match=r'cannot join the Ray cluster of RAY_ADDRESS.* Nobody is there\.'):
        require_parallelism(DENSE, PytorchEngineConfig(tp=4))


def test_the_server_of_rays_clients_is_not_asked(on_ray, caplog):
    asked = on_ray('ray://head:10001')
    require_parallelism(DENSE, PytorchEngineConfig(tp=4))
    assert not asked and not caplog.records
