"""From what the engine says of itself to the share of tiles that is compressed for it."""

import asyncio
import itertools
from types import SimpleNamespace

import pytest
from lmdeploy.messages import PytorchEngineConfig, TurbomindEngineConfig
from lmdeploy.pytorch import envs
from lmdeploy.pytorch.engine.mp_engine.zmq_rpc import RPCServerDeadError
from lmdeploy.pytorch.paging.scheduler import Scheduler
from lmdeploy.serve.managers.session_manager import Session, SessionManager

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


def test_an_engine_that_does_not_answer_is_no_pressure_and_hinders_nobody(caplog):
    async def story(engine):
        engine.says = Reading(9, 0.0)
        engine.valve.decide()
        await engine.pass_by(PERIOD)
        assert engine.valve.decide() == 0.5
        engine.says = RuntimeError('no engine')
        await engine.pass_by(RELEASE + 1)
        assert engine.valve.decide() == 0
        said.append(len(caplog.records))
        engine.says = CALM
        await engine.pass_by(PERIOD)
        engine.says = RuntimeError('again')
        engine.valve.decide()
        await engine.pass_by(IDLE)
        said.append(len(caplog.records))

    said = []
    run(story)
    assert said == [1, 2]  # once each time it begins
    assert [record.levelname for record in caplog.records] == ['WARNING'] * 2
    assert 'does not tell its load: RuntimeError' in caplog.text


def lmdeploys(config, waiting_seqs=3, cache_usage=0.9, places=1):
    """As much of LMDeploy's engine as says what it has to do."""

    async def metrics():
        return SimpleNamespace(waiting_seqs=waiting_seqs, cache_usage=cache_usage)

    sessions = SessionManager()
    sessions.build_request_handle_pool(SimpleNamespace(create_instance=object), places)
    return SimpleNamespace(get_schedule_metrics=metrics, backend_config=config, session_mgr=sessions)


@pytest.mark.parametrize(
    'config, counts_requests, kv_use',
    [
        (PytorchEngineConfig(), True, 0.9),
        (PytorchEngineConfig(), False, 0.9),
        (PytorchEngineConfig(enable_prefix_caching=True), True, 0.9),
        (PytorchEngineConfig(enable_prefix_caching=True), False, 0),
        (TurbomindEngineConfig(), True, 0.9),
        (TurbomindEngineConfig(enable_prefix_caching=True), True, 0),
    ],
)
def test_what_lmdeploy_says(monkeypatch, config, counts_requests, kv_use):
    """A cache that is full of what may be dropped is not full."""
    monkeypatch.setattr(envs, 'enable_request_cache_usage_metric', counts_requests)
    assert asyncio.run(engine.read(lmdeploys(config))) == Reading(3, kv_use)


def test_an_engine_that_has_ended_is_said_elsewhere():
    one = lmdeploys(PytorchEngineConfig())

    async def ended():
        raise RPCServerDeadError('ZMQ RPC client stopped.')

    one.get_schedule_metrics = ended
    assert asyncio.run(engine.read(one)) == CALM


def test_lmdeploy_counts_blocks_of_requests_unless_it_is_told_otherwise():
    """With prefix caching: what the reading above relies on."""
    scheduler = SimpleNamespace(
        block_manager=SimpleNamespace(num_gpu_blocks=10, get_num_free_gpu_blocks=lambda: 1),
        block_trie=SimpleNamespace(stats=SimpleNamespace(hit_rate=lambda: 0.0)),
        scheduler_tick=0,
        _get_request_cache_usage=lambda total: 2 / total,
        **dict.fromkeys(('num_running', 'num_waiting', 'num_ready', 'num_remote_loading'), lambda: 0),
    )
    assert envs.enable_request_cache_usage_metric
    assert Scheduler.schedule_metrics.fget(scheduler).cache_usage == 0.2


def test_who_waits_for_a_place_counts_until_its_client_leaves():
    one = lmdeploys(PytorchEngineConfig(), waiting_seqs=0)

    async def waiting():
        return (await engine.read(one)).waiting

    async def ask(leave):
        async with Session(0, one.session_mgr).request_handle():
            await leave.wait()

    async def story():
        counts, leave = [await waiting()], asyncio.Event()
        asked = []
        for _ in range(4):
            asked.append(asyncio.create_task(ask(leave)))
            await asyncio.sleep(0)
            counts.append(await waiting())
        for left in asked[1:3]:
            left.cancel()
            counts.append(await waiting())  # before it has noticed
        await asyncio.gather(*asked[1:3], return_exceptions=True)
        counts.append(await waiting())
        leave.set()
        await asyncio.gather(asked[0], asked[3])
        return [*counts, await waiting()]

    assert asyncio.run(story()) == [0, 0, 1, 2, 3, 2, 1, 1, 0]


def test_the_valve_is_off_by_default():
    assert engine.valve_of(None, Options()) is None
    assert engine.valve_of(lmdeploys(PytorchEngineConfig()), Options(pressure_compression=0.25)) is not None


@pytest.mark.parametrize('config, warned', [(TurbomindEngineConfig(dp=2), True), (TurbomindEngineConfig(), False)])
def test_turbomind_tells_of_one_data_parallel_rank(caplog, config, warned):
    engine.valve_of(lmdeploys(config), Options(pressure_compression=0.25))
    assert ('goes by the first of 2 data-parallel ranks' in caplog.text) == warned
    caplog.clear()
    engine.valve_of(lmdeploys(config), Options())
    assert not caplog.records
