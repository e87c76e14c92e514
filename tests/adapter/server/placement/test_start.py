"""The start of a server's vision side: what has begun ends if a later step fails."""

import threading

import pytest
from lmdeploy.messages import PytorchEngineConfig
from waiting import HANG

from lmdeploy_vico.adapter.hf_config import load_vico_config
from lmdeploy_vico.adapter.server.placement import language, start
from lmdeploy_vico.adapter.server.placement.language import PytorchLanguage
from lmdeploy_vico.cpu import selection

pytestmark = pytest.mark.busy


@pytest.mark.parametrize('step', ['log_settings', 'report_kv_cache', 'Rules', 'media_loader'])
def test_a_late_failure_leaves_no_thread(make_checkpoint, monkeypatch, step):
    def fail(*arguments, **options):
        assert begun(), 'the stage has not started yet'
        raise KeyError('trouble')

    def begun():
        return [one for one in set(threading.enumerate()) - before if one.name.startswith('vico-')]

    monkeypatch.setattr(selection, 'has_cuda', lambda: False)  # which is asked once, perhaps by a test that fakes CUDA
    before = set(threading.enumerate())
    monkeypatch.setattr(language if step == 'report_kv_cache' else start, step, fail)
    path = str(make_checkpoint())
    engine = PytorchLanguage(load_vico_config(path), PytorchEngineConfig(enable_mp_engine=True))
    with pytest.raises(KeyError, match='trouble'):
        start.start_vision_side(path, engine)
    for thread in begun():
        thread.join(HANG)
    assert not begun()
