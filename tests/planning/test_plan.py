"""What is answered: speed-ups, times, and how many GPUs."""

import math

import pytest

from lmdeploy_vico.planning import PlanningError
from lmdeploy_vico.planning.deployment import Deployment, Workload
from lmdeploy_vico.planning.gpus import GPUS
from lmdeploy_vico.planning.plan import FULL_LOAD, USUAL_LOAD, Target, cell, cells, gpus_for
from lmdeploy_vico.planning.simulation import percentile, poisson, simulate
from lmdeploy_vico.planning.stages import LANGUAGE_MODEL, VISION, Stages

H200 = GPUS['H200']
QUICK = Target(requests=300)


def test_without_images_the_speedup_is_the_language_models():
    found = cells(Deployment('8B', H200), 10, [64], [0.0, 0.75], QUICK, images=False)
    assert [one.speedup for one in found] == pytest.approx([one.language_model_speedup for one in found])
    assert found[1].speedup == pytest.approx(3.77, abs=0.01)


def test_speedups_are_against_no_compression_that_was_not_asked_for():
    [alone] = cells(Deployment('8B', H200), 10, [64], [0.75], QUICK)
    both = cells(Deployment('8B', H200), 10, [64], [0.0, 0.75], QUICK)
    assert alone == both[1]
    assert both[0].speedup == 1
    assert 1 < alone.speedup < alone.language_model_speedup, 'images have to be encoded, compressed or not'


def test_the_241b_waits_for_its_encoders_where_compression_is_high():
    shared = cells(Deployment('241B', H200, tp=8), 10, [64], [0.0, 0.75], QUICK)
    apart = cells(Deployment('241B', H200, tp=8, vision_devices=16), 10, [64], [0.0, 0.75], QUICK)
    assert [one.bottleneck for one in shared] == [LANGUAGE_MODEL, VISION]
    assert [one.bottleneck for one in apart] == [LANGUAGE_MODEL, LANGUAGE_MODEL]
    assert apart[1].speedup == pytest.approx(apart[1].language_model_speedup)


def test_the_usual_load_is_the_same_for_all_compressions():
    found = cells(Deployment('8B', H200), 10, [64], [0.0, 0.5], QUICK)
    assert {one.rate for one in found} == {USUAL_LOAD * found[0].requests_per_second}
    assert found[1].ttft_p50_ms < found[0].ttft_p50_ms < found[0].ttft_p99_ms
    assert found[0].gpus is None


def test_more_than_can_be_answered_has_no_times():
    found = cells(Deployment('8B', H200), 10, [64], [0.0, 0.75], Target(rate=15, requests=300))
    assert found[0].requests_per_second < 15 < found[1].requests_per_second
    assert (found[0].ttft_p50_ms, found[0].ttft_p99_ms) == (None, None)
    assert found[1].ttft_p99_ms is not None
    assert found[0].gpus > found[1].gpus == 1


def test_two_servers_answer_twice_as_much_and_hold_twice_as_many():
    one, two = (cell(Deployment('8B', H200, dp=dp), Workload(10, 64, 0.5), QUICK) for dp in (1, 2))
    assert two.requests_per_second == pytest.approx(2 * one.requests_per_second)
    assert two.requests_in_flight == 2 * one.requests_in_flight
    assert two.kv_bytes_per_request == one.kv_bytes_per_request


@pytest.mark.parametrize('devices, per_server', [(None, 8), (4, 12)])
def test_gpus_are_the_fewest_that_have_a_tenth_to_spare(devices, per_server):
    deployment, work = Deployment('241B', H200, tp=8, vision_devices=devices), Workload(10, 64, 0.5)
    alone = Stages(deployment, work).requests_per_second
    for servers in (1, 2, 5):
        enough = FULL_LOAD * alone * servers
        assert gpus_for(deployment, work, Target(rate=0.999 * enough)) == servers * per_server
        assert gpus_for(deployment, work, Target(rate=1.001 * enough)) == (servers + 1) * per_server


def test_a_limit_of_the_time_needs_more_and_is_kept():
    deployment, work = Deployment('8B', H200), Workload(10, 64, 0.5)
    without = gpus_for(deployment, work, Target(rate=40))
    target = Target(rate=40, ttft_p99_ms=300, requests=1000)
    needed = gpus_for(deployment, work, target)
    assert needed > without

    def p99(servers):
        return 1e3 * percentile(simulate(Stages(deployment, work), poisson(40 / servers, 1000)), 0.99)

    assert p99(needed) <= 300 < p99(needed - 1)
    tight = gpus_for(deployment, work, Target(rate=400, ttft_p99_ms=200, requests=300))
    assert tight > 2 * math.ceil(10 * without), 'found by halving, far above the fewest that answer the rate'


def test_a_limit_that_no_number_of_servers_keeps():
    with pytest.raises(PlanningError, match=r'--ttft-p99 10 cannot be kept at 50% .* alone takes 1\d\d ms'):
        gpus_for(Deployment('8B', H200), Workload(10, 64, 0.5), Target(rate=40, ttft_p99_ms=10))


@pytest.mark.parametrize('number', [0, -1, float('nan'), float('inf')])
def test_rate_and_limit_are_positive(number):
    with pytest.raises(PlanningError, match='--rate takes requests a second, more than 0'):
        Target(rate=number)
    with pytest.raises(PlanningError, match='--ttft-p99 takes milliseconds, more than 0'):
        Target(rate=1, ttft_p99_ms=number)


def test_a_limit_goes_with_a_rate():
    with pytest.raises(PlanningError, match='add --rate'):
        Target(ttft_p99_ms=300)
