"""From what the engine says of itself to the share of tiles that is compressed for it."""

import asyncio
import itertools
from types import SimpleNamespace

import pytest
from lmdeploy.metrics.metrics_processor import metrics_processor

from lmdeploy_vico.adapter.server.pressure import engine
from lmdeploy_vico.adapter.server.pressure.valve import (
    IDLE,
    PERIOD,
    RELEASE,
    Reading,
    Valve,
    eased,
    extra_share,
    pressure,
)
from lmdeploy_vico.options import Options

CALM = Reading(0, 0.0)


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
    """Says what it is told to say; its time passes in the valve's pauses."""

    def __init__(self):
        self.now, self.says, self.asked = 0.0, CALM, 0
        self.valve = Valve(0.5, 4, self.read, clock=lambda: self.now, pause=self.pause)
        self._go_on = asyncio.Event()

    async def read(self):
        self.asked += 1
        if isinstance(self.says, Exception):
            raise self.says
        return self.says

    async def pause(self, seconds):
        assert seconds == PERIOD
        await self._go_on.wait()
        self._go_on.clear()

    async def pass_by(self, seconds):
        """Let so many seconds pass, in which the valve asks if it does."""
        for _ in range(round(seconds / PERIOD)):
            self.now += PERIOD
            self._go_on.set()
            for _ in range(5):
                await asyncio.sleep(0)


def run(story):
    async def begin():
        return await story(Engine())

    return asyncio.run(begin())


def test_a_request_is_decided_by_what_the_engine_said_before():
    async def story(engine):
        engine.says = Reading(4, 0.0)
        assert engine.valve.decide() == 0  # nothing is known yet
        await engine.pass_by(PERIOD)
        assert engine.valve.decide() == 0.5
        engine.says = CALM
        shares = []
        for _ in range(12):
            shares.append(engine.valve.decide())
            await engine.pass_by(RELEASE / 10)
        return shares

    shares = run(story)
    assert shares[0] == 0.5 and shares == sorted(shares, reverse=True) and shares[-1] == 0
    assert all(before - after <= 0.125 for before, after in itertools.pairwise(shares))


def test_pressure_between_waves_of_requests_is_seen():
    """The engine is asked while the requests of a wave wait, not only when they come."""

    async def story(engine):
        engine.valve.decide()
        await engine.pass_by(PERIOD)
        engine.says = Reading(9, 0.0)
        await engine.pass_by(PERIOD)
        engine.says = CALM
        await engine.pass_by(PERIOD)
        return engine.valve.decide()

    assert run(story) == 0.5


def test_an_idle_server_asks_nothing():
    async def story(engine):
        engine.valve.decide()
        await engine.pass_by(IDLE + 1)
        asked = engine.asked
        await engine.pass_by(60)
        assert engine.asked == asked
        engine.valve.decide()
        await engine.pass_by(PERIOD)
        return engine.asked - asked

    assert run(story) > 0


def test_an_engine_that_does_not_answer_is_no_pressure_and_hinders_nobody():
    async def story(engine):
        engine.says = Reading(9, 0.0)
        engine.valve.decide()
        await engine.pass_by(PERIOD)
        assert engine.valve.decide() == 0.5
        engine.says = RuntimeError('no engine')
        await engine.pass_by(RELEASE + 1)
        return engine.valve.decide()

    assert run(story) == 0


@pytest.mark.parametrize('caching, kv_use', [(False, 0.9), (True, 0.0)])
def test_what_lmdeploy_says(monkeypatch, caching, kv_use):
    """Prompts that wait in its scheduler or for a place; a cache that is full of what may be dropped is not full."""

    async def metrics():
        return SimpleNamespace(waiting_seqs=3, cache_usage=0.9)

    counts = {'total': 7, 'succeeded': 1, 'cancelled': 0, 'aborted': 0, 'errored': 0, 'api_routed': 4}
    for kind, count in counts.items():  # other tests have left theirs
        monkeypatch.setattr(metrics_processor.scheduler_stats, f'num_{kind}_reqs', count)
    config = SimpleNamespace(enable_prefix_caching=caching)
    one = SimpleNamespace(get_schedule_metrics=metrics, backend_config=config)
    assert asyncio.run(engine.read(one)) == Reading(5, kv_use)


def test_the_valve_is_off_by_default():
    assert engine.valve_of(None, Options()) is None
    assert engine.valve_of(None, Options(pressure_compression=0.25)) is not None
