"""Numbers of ranks that do not fit a model or a machine: a sentence that says what works."""

import re
from types import SimpleNamespace

import pytest
import torch
from lmdeploy.messages import PytorchEngineConfig
from ray_cluster import GPUS, own_cluster
from waiting import HANG

from lmdeploy_vico.adapter.server.placement import parallel
from lmdeploy_vico.adapter.server.placement.parallel import require_parallelism
from lmdeploy_vico.options import OptionError

DENSE = SimpleNamespace(num_attention_heads=32, num_key_value_heads=8, vocab_size=151674)
MOE = SimpleNamespace(
    num_attention_heads=64, num_key_value_heads=4, vocab_size=151936, moe_intermediate_size=1536, num_experts=128
)


@pytest.fixture(autouse=True)
def _no_cluster(monkeypatch):
    """Whatever runs on this machine, no cluster places the ranks."""
    monkeypatch.setattr(parallel, 'joined_cluster', lambda engine, dist: None)


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
    with pytest.raises(OptionError, match=r'--tp 4 needs as many devices, and this server sees 2\.'):
        require_parallelism(DENSE, PytorchEngineConfig(tp=4))
    require_parallelism(DENSE, PytorchEngineConfig(tp=2))


def warnings(caplog):
    return [record.getMessage() for record in caplog.records if record.levelname == 'WARNING']


def warning(caplog):
    [said] = warnings(caplog)
    return said


@pytest.fixture
def on_ray(monkeypatch):
    """``on_ray(code, address)``: a cluster places the ranks; what asks it runs this code instead."""

    def place(code, address='head:6379'):
        monkeypatch.setattr(parallel, 'joined_cluster', lambda engine, dist: address)
        monkeypatch.setattr(parallel, 'ASK', code)

    return place


def test_a_cluster_may_have_more_devices_than_this_machine(on_ray, monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    on_ray('print("8 4")')
    require_parallelism(DENSE, PytorchEngineConfig(tp=4))
    assert not warnings(caplog)


def test_a_cluster_without_room_is_said_to_be(on_ray, caplog):
    on_ray('print("4 3.5")')
    require_parallelism(DENSE, PytorchEngineConfig(tp=4))
    assert 'needs 4 GPUs of the Ray cluster at head:6379, which has 4, of which 3.5 are free' in warning(caplog)


def test_a_cluster_that_cannot_be_joined_is_said_to_be(on_ray, caplog):
    on_ray('raise ConnectionError("nobody is there")')
    require_parallelism(DENSE, PytorchEngineConfig(tp=4))
    said = warning(caplog)
    assert 'Ray cluster at head:6379,' in said and said.endswith('ConnectionError: nobody is there')


def test_a_cluster_that_ends_who_asks_is_said_to(on_ray, caplog):
    on_ray('import os, sys; print("Check failed", file=sys.stderr, flush=True); os._exit(1)')
    require_parallelism(DENSE, PytorchEngineConfig(tp=4))
    assert warning(caplog).endswith('Ray says: Check failed')


def test_a_cluster_that_never_answers_is_not_waited_for(on_ray, monkeypatch, caplog):
    monkeypatch.setattr(parallel, 'PATIENCE', 0.5)
    on_ray(f'import time; time.sleep({HANG})')
    require_parallelism(DENSE, PytorchEngineConfig(tp=4))
    assert warning(caplog).endswith('no answer within 0.5 s')


@pytest.mark.parametrize(('joined', 'address'), [(True, 'head:6379'), (False, 'ray://head:10001')])
def test_who_is_in_a_cluster_or_its_client_asks_nobody(on_ray, monkeypatch, caplog, joined, address):
    monkeypatch.setattr(parallel, 'has_joined', lambda engine: joined)
    on_ray('print("0 0")', address)
    require_parallelism(DENSE, PytorchEngineConfig(tp=4))
    assert not warnings(caplog)


@pytest.mark.long
@pytest.mark.slow
def test_a_real_cluster(tmp_path, caplog, monkeypatch):
    with own_cluster(tmp_path) as address:
        monkeypatch.setenv('RAY_ADDRESS', address)
        parallel.say_what_room_there_is(address, GPUS)
        assert not warnings(caplog)
        parallel.say_what_room_there_is(address, GPUS + 1)
        assert f'which has {GPUS}, of which {GPUS} are free' in warning(caplog)
        caplog.clear()
        monkeypatch.setenv('RAY_AUTH_TOKEN', 'f' * 64)
        parallel.say_what_room_there_is(address, GPUS)
        assert 'cannot be joined' in warning(caplog)
