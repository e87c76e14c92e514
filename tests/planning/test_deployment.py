"""What fits and what does not."""

from dataclasses import replace

import pytest

from lmdeploy_vico.checkpoints.sizes import MODELS
from lmdeploy_vico.host_memory import GIB
from lmdeploy_vico.planning import PlanningError
from lmdeploy_vico.planning.deployment import Deployment, Workload
from lmdeploy_vico.planning.gpus import GPUS, gpu_of
from lmdeploy_vico.planning.memory import working_tp

H100, H200 = GPUS['H100'], GPUS['H200']


# The estimates that a server logs at its start: tests/adapter/server/placement/test_kv_memory.py.
@pytest.mark.parametrize(
    'gpu, vision_devices, gib', [(H100, None, 3.8), (H100, 1, 14.5), (H200, None, 52), (H200, 8, 63)]
)
def test_the_kv_cache_of_the_241b_is_what_a_server_estimates(gpu, vision_devices, gib):
    memory = Deployment('241B', gpu, tp=8, vision_devices=vision_devices).memory
    assert memory.kv_blocks * memory.cache.block / GIB == pytest.approx(gib, abs=0.5)


def test_kv_bytes_by_hand():
    """A prompt of 2637 tokens has 42 blocks of 64; 94 layers, keys and values, 128 channels of two bytes.

    At TP 8 there are two copies of each of the four heads.
    """
    work = Workload(10, 64, 0.0)
    token = 94 * 2 * 128 * 2
    assert work.tokens == 2637
    assert Deployment('241B', H200, tp=4).kv_bytes(work) == 42 * 64 * token * 4
    assert Deployment('241B', H200, tp=8).kv_bytes(work) == 42 * 64 * token * 8
    assert Deployment('241B', H200, tp=4, vision_devices=1).in_flight(work) > 0


def test_compression_shortens_the_prompt():
    assert [Workload(10, 512, share).tokens for share in (0, 0.25, 0.5, 0.75)] == [3085, 2445, 1805, 1165]


@pytest.mark.parametrize('share', [-0.1, 0.76, float('nan')])
def test_a_compression_that_there_is_not(share):
    with pytest.raises(PlanningError, match=r'--compression takes shares .* from 0 to 0\.75'):
        Workload(10, 64, share)


def test_which_tp_works():
    assert working_tp('241B') == [1, 2, 4, 8, 16, 32, 64]
    assert working_tp('14B') == [1, 2, 4, 8, 40], 'forty heads, eight key-value heads'
    with pytest.raises(
        PlanningError, match=r'64 heads and 4 key-value heads, .* --tp 3: 1, 2, 4, 8, 16, 32, 64 work\.'
    ):
        Deployment('241B', H200, tp=3)


def test_gpus_are_found_in_any_case_and_named():
    assert gpu_of('h200') is H200
    with pytest.raises(PlanningError, match='--gpu V100 is not known: it takes A100-80G, H100, H200, B200'):
        gpu_of('V100')


def test_a_model_that_does_not_fit_says_by_how_much_and_what_would():
    with pytest.raises(PlanningError) as raised:
        Deployment('241B', H100, tp=4)
    assert str(raised.value) == (
        'The 241B does not fit 4 x H100: each GPU is 49.6 GiB short of 79.1. '
        'It would fit with --tp 8, or with --gpu H200 or B200.'
    )
    Deployment('241B', H100, tp=8)
    Deployment('241B', H200, tp=4)
    with pytest.raises(PlanningError, match='with --vision-devices 1'):
        Deployment('38B', replace(H100, memory=int(76 * GIB)))
    Deployment('38B', replace(H100, memory=int(76 * GIB)), vision_devices=1)


def test_a_prompt_that_does_not_fit_names_what_would_hold_it():
    with pytest.raises(PlanningError, match=r'A prompt of 2560077 tokens needs 40002 KV blocks.* with --tp 4\.'):
        Deployment('8B', H200).in_flight(Workload(10000, 64, 0.0))
    Deployment('8B', H200, tp=4).in_flight(Workload(10000, 64, 0.0))


@pytest.mark.parametrize('name', MODELS)
def test_every_published_model_fits_eight_of_every_gpu(name):
    for gpu in GPUS.values():
        assert Deployment(name, gpu, tp=8).in_flight(Workload(10, 64, 0.0)) >= 1


def test_gpus_are_counted():
    assert Deployment('8B', H200, tp=2, dp=3).gpus == 6
    assert Deployment('8B', H200, tp=2, dp=3, vision_devices=4).gpus == 10
