"""The end of an engine's process whose loop has failed."""

import asyncio
import logging
import threading

import pytest
from waiting import HANG

from lmdeploy_vico.adapter.engine import ending


async def fails(error):
    raise error


def test_a_loop_that_fails_ends_the_process(ended, caplog):
    with pytest.raises(RuntimeError, match='lost'), caplog.at_level(logging.CRITICAL):
        asyncio.run(ending.run_engine_loop(fails(RuntimeError('lost'))))
    assert ended == [1]
    assert "the engine's loop has failed (RuntimeError): the engine cannot go on" in caplog.text


def test_a_loop_that_is_stopped_does_not(ended):
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(ending.run_engine_loop(fails(asyncio.CancelledError())))
    assert not ended


def test_the_loop_of_a_pipeline_leaves_its_program_alone(ended, monkeypatch):
    monkeypatch.setattr(ending, '_started_by_lmdeploy', [])
    with pytest.raises(RuntimeError):
        asyncio.run(ending.run_engine_loop(fails(RuntimeError())))
    assert not ended


def test_last_acts_are_bounded(ended, monkeypatch):
    monkeypatch.setattr(ending, 'LAST_ACTS', 0.01)
    release = threading.Event()
    ending.end_engine('a test', before=lambda: release.wait(HANG))
    assert ended == [1] and not release.is_set()
    release.set()
