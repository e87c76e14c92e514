"""How the processes of a ViCO model's server end."""

import gc
import inspect
from types import SimpleNamespace

import pytest

from lmdeploy_vico.adapter.patches import lifecycle as patches
from lmdeploy_vico.adapter.server.lifecycle import state
from lmdeploy_vico.patching import Call


@pytest.fixture(autouse=True)
def unfrozen():
    yield
    gc.unfreeze()


def call_of(stopped, argument):
    """A call of LMDeploy's function with one argument, which a signal ends."""
    return Call(inspect.signature(stopped), stopped, None, ((argument,), {}))


def server(args):
    raise KeyboardInterrupt


def engine(model_path):
    raise KeyboardInterrupt


@pytest.mark.parametrize('vico', [False, True])
def test_a_server_of_a_vico_model_ends_without_a_last_collection(monkeypatch, vico):
    monkeypatch.setattr(state, 'lifecycle', lambda: SimpleNamespace() if vico else None)
    with pytest.raises(KeyboardInterrupt):
        patches.end_server_at_once(call_of(server, None))
    assert bool(gc.get_freeze_count()) is vico


@pytest.mark.parametrize('flash', [False, True])
def test_an_engine_of_a_vico_model_ends_without_a_last_collection(make_checkpoint, flash):
    with pytest.raises(KeyboardInterrupt):
        patches.end_engine_at_once(call_of(engine, str(make_checkpoint(flash=flash))))
    assert bool(gc.get_freeze_count()) is flash
