"""Who may control an engine."""

import inspect
from types import SimpleNamespace

import pytest
from lmdeploy.pytorch.engine.mp_engine.base import MPEngine
from lmdeploy.serve.core.async_engine import AsyncEngine
from lmdeploy.serve.core.exceptions import RequestError
from lmdeploy.serve.openai.endpoints import management

from lmdeploy_vico.adapter.server.generation.control import LIFE, WEIGHTS, close_control


class Engine(SimpleNamespace):
    """An engine in the program's own process."""


class Served(Engine, MPEngine):
    """An engine in a process of its own, as a server has it."""

    __init__ = Engine.__init__


def make(kind=Served, empty_init=False):
    methods = {name: lambda *args: 'done' for name in (*LIFE, *WEIGHTS)}
    config = SimpleNamespace(empty_init=empty_init)
    return SimpleNamespace(backend_config=config, engine=kind(**methods), **methods)


def test_a_server_refuses():
    served = make()
    close_control(served)
    for owner, names in ((served, LIFE), (served.engine, WEIGHTS)):
        for name in names:
            with pytest.raises(RequestError, match='option control_endpoints') as error:
                getattr(owner, name)('anything', level=1)
            assert error.value.status_code == 400


@pytest.mark.parametrize('config', [{'kind': Engine}, {'empty_init': True}], ids=str)
def test_engines_that_stay_open(config):
    kept = make(**config)
    close_control(kept)
    assert {getattr(kept.engine, name)() for name in WEIGHTS} | {getattr(kept, name)() for name in LIFE} == {'done'}


def test_they_are_all_that_lmdeploys_endpoints_call():
    source = inspect.getsource(management)
    assert all(hasattr(AsyncEngine, name) and f'async_engine.{name}(' in source for name in LIFE)
    assert all(hasattr(MPEngine, name) and f'engine.{name}(' in source for name in WEIGHTS)
    assert source.count('@router.post') == len(LIFE) + len(WEIGHTS) + 1, 'and /abort_request, which has its own flag'
