"""Where a closed form knows the answer, the simulation gives it within 2 %."""

from itertools import repeat
from math import ceil

import pytest

from lmdeploy_vico.planning.deployment import Deployment, Workload
from lmdeploy_vico.planning.gpus import GPUS
from lmdeploy_vico.planning.language import Piece
from lmdeploy_vico.planning.simulation import percentile, poisson, simulate
from lmdeploy_vico.planning.stages import HAND_OVER, LANGUAGE_MODEL, PREPARATION, VISION, Stages

WITHIN = 0.02


def stages(model='8B', gpu='H200', compression=0.0, images=True, text=64, **options):
    return Stages(Deployment(model, GPUS[gpu], **options), Workload(10, text, compression, images))


@pytest.mark.parametrize('tp', [1, 2])
@pytest.mark.parametrize('devices', [None, 1])
def test_a_request_alone_takes_the_sum_of_its_stages(devices, tp):
    one = stages(vision_devices=devices, tp=tp)
    batches = ceil(10 / one.tile_batch / (1 if devices else tp))
    step = one.deployment.language_model.step_seconds([Piece(0.0, one.work.tokens, last=True)])
    expected = one.prepare + batches * one.batch + one.send + one.receive + step
    assert simulate(one, iter([3.0, 8.0])) == pytest.approx([expected, expected], rel=1e-9)


def test_requests_that_never_meet_do_not_wait():
    one = stages()
    [alone] = simulate(one, iter([0.0]))
    apart = (10.0 * number for number in range(50))
    assert simulate(one, apart) == pytest.approx([alone] * 50)


SATURATED = [
    (LANGUAGE_MODEL, stages(vision_devices=4)),
    (LANGUAGE_MODEL, stages(images=False)),
    (LANGUAGE_MODEL, stages(images=False, text=20000)),
    (LANGUAGE_MODEL, stages('241B', tp=8, images=False, compression=0.75)),
    (LANGUAGE_MODEL, stages(dp=2, images=False)),
    (LANGUAGE_MODEL, stages()),
    (VISION, stages('38B', compression=0.75, vision_devices=2)),
    (VISION, stages('38B', compression=0.75)),
    (VISION, stages('241B', tp=8, compression=0.75)),
    (LANGUAGE_MODEL, stages('241B', tp=8)),
    (VISION, stages('30B-A3B', compression=0.75)),
    (HAND_OVER, stages(gpu='B200', tp=8, vision_devices=8)),
    (PREPARATION, stages(compression=0.75, tp=4, vision_devices=4, cores=1)),
    (PREPARATION, stages('1B', compression=0.75, vision_devices=4, cores=64)),
]


@pytest.mark.parametrize('bottleneck, many', SATURATED, ids=lambda value: value if isinstance(value, str) else '')
def test_a_full_queue_leaves_at_the_rate_of_the_slowest_stage(bottleneck, many):
    count = 600
    times = simulate(many, repeat(0.0, count))
    assert many.bottleneck == bottleneck
    half = sorted(times)[count // 2]  # by then all stages are busy
    after = sum(time > half for time in times)
    assert after / (max(times) - half) == pytest.approx(many.requests_per_second, rel=WITHIN)


@pytest.mark.parametrize('load', [0.3, 0.5])
def test_the_mean_wait_is_that_of_one_server_with_constant_service(load):
    """M/D/1: a step holds one prompt, and the mean wait is load / (2 (1 - load)) of its seconds."""
    one = stages(images=False, max_prefill_tokens=2637)
    service = one.prefill
    times = simulate(one, poisson(load / service, 150_000, seed=1))
    wait = sum(times) / len(times) - service
    assert min(times) == pytest.approx(service)
    assert wait == pytest.approx(service * load / (2 * (1 - load)), rel=WITHIN)


def test_prompts_that_wait_are_taken_together_as_far_as_a_step_holds_them():
    """The first is alone; of the four that come meanwhile, a step of 8192 tokens holds three of 2637."""
    one = stages(images=False)
    step = one.deployment.language_model.step_seconds
    alone, three = (step([Piece(0.0, 2637.0, last=True)] * count) for count in (1, 3))
    first, *others, last = simulate(one, iter([0.0, 0.01, 0.01, 0.01, 0.01]))
    assert first == pytest.approx(alone)
    assert others == pytest.approx([alone + three - 0.01] * 3)
    assert last == pytest.approx(alone + three + alone - 0.01)


def test_the_same_seed_gives_the_same_times():
    one = stages()
    first, again, other = (simulate(one, poisson(5, 200, seed)) for seed in (1, 1, 2))
    assert first == again != other
    moments = list(poisson(5, 20000))
    assert moments == sorted(moments) and len(moments) / moments[-1] == pytest.approx(5, rel=WITHIN)


def test_kv_cache_for_few_prompts_makes_steps_smaller():
    few = stages('241B', 'H100', tp=8, images=False, text=20000)
    assert 1 <= few.deployment.in_flight(few.work) < 8
    times = simulate(few, repeat(0.0, 20))
    assert 20 / max(times) == pytest.approx(few.requests_per_second, rel=WITHIN)


def test_percentiles_leave_out_the_first_tenth():
    values = [100.0] * 10 + [float(number) for number in range(1, 91)]
    assert percentile(values, 0.5) == 45
    assert percentile(values, 0.99) == 90
    assert percentile([7.0], 0.5) == 7
