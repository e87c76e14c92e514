"""Which engine runs the language model, and why."""

import logging

import pytest
from lmdeploy import turbomind
from lmdeploy.archs import autoget_backend
from lmdeploy.messages import PytorchEngineConfig, TurbomindEngineConfig
from lmdeploy.turbomind.supported_models import is_supported

from lmdeploy_vico.adapter.hf_config import load_vico_config
from lmdeploy_vico.adapter.server.placement.language import PytorchLanguage
from lmdeploy_vico.adapter.server.turbomind import choice
from lmdeploy_vico.config import UnsupportedCheckpointError
from lmdeploy_vico.cpu import selection
from lmdeploy_vico.options import OptionError

VARIABLE = 'LMDEPLOY_VICO_LANGUAGE_ENGINE'


@pytest.fixture
def cuda_and_turbomind(monkeypatch):
    """As on a machine where LMDeploy chooses TurboMind."""
    monkeypatch.setattr(turbomind, 'is_available', lambda: True)
    monkeypatch.setattr(selection, 'has_cuda', lambda: True)
    monkeypatch.delenv(VARIABLE, raising=False)


@pytest.fixture
def config(make_checkpoint):
    return load_vico_config(str(make_checkpoint()))


@pytest.mark.usefixtures('cuda_and_turbomind')
def test_the_default_stays_on_the_pytorch_engine(make_checkpoint, monkeypatch, config, caplog):
    assert autoget_backend(str(make_checkpoint())) == 'pytorch'
    assert autoget_backend(str(make_checkpoint(flash=False)), trust_remote_code=True) == 'turbomind'  # not ours
    monkeypatch.setenv(VARIABLE, 'pytorch')
    assert autoget_backend(str(make_checkpoint())) == 'pytorch'
    with caplog.at_level(logging.INFO):
        assert isinstance(choice.language_engine(config, PytorchEngineConfig()), PytorchLanguage)
    assert f'language model on the PyTorch engine, the default ({VARIABLE})' in caplog.text


@pytest.mark.usefixtures('cuda_and_turbomind')
def test_the_environment_asks_for_turbomind(make_checkpoint, monkeypatch):
    monkeypatch.setenv(VARIABLE, 'turbomind')
    assert autoget_backend(str(make_checkpoint())) == 'turbomind'
    assert autoget_backend(str(make_checkpoint(llm='moe'))) == 'turbomind'


@pytest.mark.usefixtures('cuda_and_turbomind')
def test_without_cuda(make_checkpoint, monkeypatch):
    monkeypatch.setattr(selection, 'has_cuda', lambda: False)
    assert not is_supported(str(make_checkpoint()))
    monkeypatch.setenv(VARIABLE, 'turbomind')
    with pytest.raises(OptionError, match=f'{VARIABLE}=turbomind needs a CUDA device, and there is none'):
        is_supported(str(make_checkpoint()))
    assert not is_supported(str(make_checkpoint(flash=False)), trust_remote_code=True)


def test_turbomind_that_is_not_there(monkeypatch, config):
    """``autoget_backend`` falls back to the PyTorch engine without asking for more."""
    monkeypatch.setenv(VARIABLE, 'turbomind')
    monkeypatch.setattr(turbomind, 'is_available', lambda: False)
    monkeypatch.setattr(turbomind, '_import_error', OSError('libcuda.so.1: cannot open'))
    with pytest.raises(OptionError, match=r'TurboMind cannot be loaded \(libcuda.so.1: cannot open\)'):
        choice.language_engine(config, PytorchEngineConfig())


@pytest.mark.usefixtures('cuda_and_turbomind')
def test_the_other_engine_is_asked_for_too(monkeypatch, config):
    monkeypatch.setenv(VARIABLE, 'turbomind')
    with pytest.raises(OptionError, match='--backend pytorch, or a PytorchEngineConfig, asks for the other engine'):
        choice.language_engine(config, PytorchEngineConfig())


@pytest.mark.usefixtures('cuda_and_turbomind')
def test_turbomind_comes_only_where_it_is_asked_for(config):
    with pytest.raises(UnsupportedCheckpointError, match=f'served on TurboMind only where {VARIABLE}=turbomind asks'):
        choice.language_engine(config, TurbomindEngineConfig())


@pytest.mark.parametrize('engine', [PytorchEngineConfig, TurbomindEngineConfig])
def test_overrides_come_too_late_to_choose(config, engine):
    with pytest.raises(OptionError, match=f'is set by the environment variable {VARIABLE} only, as LMDeploy chooses'):
        choice.language_engine(config, engine(hf_overrides={'vico': {'language_engine': 'turbomind'}}))
