"""From what the engine says of itself to the share of tiles that is compressed for it."""

import asyncio
import itertools
from types import SimpleNamespace

import pytest
from lmdeploy.metrics.metrics_processor import metrics_processor

from lmdeploy_vico.adapter.server.pressure import engine
from lmdeploy_vico.adapter.server.pressure.valve import (
    CALM,
    PERIOD,
    RELEASE,
    STALE,
    Reading,
    Valve,
    eased,
    extra_share,
    pressure,
)
from lmdeploy_vico.options import Options


@pytest.mark.parametrize(
    'waiting, kv_use, expected',
    [
        (0, 0, 0),
        (8, 0, 0),
        (12, 0, 0.5),
        (16, 0, 1),
        (500, 0, 1),
        (0, 0.85, 0),
        (0, 0.9, 0.5),
        (0, 1, 1),
        (12, 0.95, 1),
    ],
)
def test_pressure(waiting, kv_use, expected):
    assert pressure(Reading(waiting, kv_use), full_at=16) == pytest.approx(expected)


def test_one_prompt_may_be_pressure_enough():
    assert [pressure(Reading(waiting, 0.0), full_at=1) for waiting in (0, 1, 2)] == [0, 1, 1]


@pytest.mark.parametrize(
    'before, now, seconds, expected', [(0, 1, 0, 1), (1, 0, 5, 0.5), (1, 0.8, 5, 0.8), (0.2, 0, 60, 0)]
)
def test_pressure_rises_at_once_and_falls_slowly(before, now, seconds, expected):
    assert RELEASE == 10
    assert eased(before, now, seconds) == pytest.approx(expected)


@pytest.mark.parametrize('pressure, share', [(0, 0), (0.01, 0.125), (0.25, 0.125), (0.5, 0.25), (0.9, 0.5), (1, 0.5)])
def test_the_extra_share_has_steps_and_a_bound(pressure, share):
    assert extra_share(pressure, most=0.5) == share


class Engine:
    """Says what it is told to say."""

    def __init__(self):
        self.now, self.says, self.asked = 0.0, CALM, 0
        self.valve = Valve(0.5, 4, self.read, clock=lambda: self.now)

    async def read(self):
        self.asked += 1
        if isinstance(self.says, Exception):
            raise self.says
        return self.says

    async def decide(self, after=0.0):
        """What is decided for a request so many seconds later; then the engine has time to answer."""
        self.now += after
        share = self.valve.decide()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        return share


def run(story):
    return asyncio.run(story(Engine()))


def test_a_request_is_decided_by_the_last_answer():
    async def story(engine):
        engine.says = Reading(4, 0.0)
        assert await engine.decide() == 0  # nothing is known yet
        assert await engine.decide(PERIOD / 2) == 0.5
        assert engine.asked == 1
        engine.says = CALM
        assert await engine.decide(PERIOD) == 0.5
        assert engine.asked == 2
        return [await engine.decide(RELEASE / 4) for _ in range(5)]

    shares = run(story)
    assert shares == sorted(shares, reverse=True) and shares[-1] == 0
    assert all(before - after <= 0.125 for before, after in itertools.pairwise(shares))


def test_an_old_answer_says_nothing():
    async def story(engine):
        engine.says = Reading(9, 0.0)
        await engine.decide()
        engine.says = RuntimeError('no engine')
        return await engine.decide(STALE + 0.1)

    assert run(story) == 0


def test_an_engine_that_does_not_answer_is_asked_again_and_hinders_nobody():
    async def story(engine):
        engine.says = RuntimeError('no engine')
        shares = [await engine.decide(PERIOD * 2) for _ in range(3)]
        assert engine.asked == 3
        return shares

    assert run(story) == [0, 0, 0]


@pytest.mark.parametrize('caching, kv_use', [(False, 0.9), (True, 0.0)])
def test_what_lmdeploy_says(monkeypatch, caching, kv_use):
    """Prompts that wait in its scheduler or for a place; a cache that is full of what may be dropped is not full."""

    async def metrics():
        return SimpleNamespace(waiting_seqs=3, cache_usage=0.9)

    monkeypatch.setattr(metrics_processor.scheduler_stats, 'num_total_reqs', 7)
    monkeypatch.setattr(metrics_processor.scheduler_stats, 'num_succeeded_reqs', 1)
    monkeypatch.setattr(metrics_processor.scheduler_stats, 'num_api_routed_reqs', 4)
    config = SimpleNamespace(enable_prefix_caching=caching)
    one = SimpleNamespace(get_schedule_metrics=metrics, backend_config=config)
    assert asyncio.run(engine.read(one)) == Reading(5, kv_use)


def test_the_valve_is_off_by_default():
    assert engine.valve_of(None, Options()) is None
    assert engine.valve_of(None, Options(pressure_compression=0.25)) is not None
