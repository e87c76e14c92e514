"""In which type visual tokens reach the engine, against LMDeploy's own decision."""

from types import SimpleNamespace

import pytest
import torch
from adapter.engine.quantised import make_quantised
from lmdeploy.messages import PytorchEngineConfig
from lmdeploy.pytorch.config import ModelConfig

from lmdeploy_vico.adapter.hf_config import load_vico_config
from lmdeploy_vico.adapter.server.placement.precision import engine_dtype
from lmdeploy_vico.cpu import selection


@pytest.fixture
def device(monkeypatch):
    """``device(major)``: this machine has a CUDA device of that compute capability, or none at all."""

    def set_device(major):
        monkeypatch.setattr(selection, 'has_cuda', lambda: major is not None)
        monkeypatch.setattr(torch.version, 'cuda', '13.0')
        monkeypatch.setattr(torch.cuda, 'current_device', lambda: 0)
        monkeypatch.setattr(torch.cuda, 'get_device_properties', lambda _: SimpleNamespace(major=major))

    return set_device


@pytest.fixture
def checkpoint(make_checkpoint, tmp_path):
    """``checkpoint(kind)``: one written in that type, or quantised."""

    def get(kind):
        if kind == 'awq':
            make_quantised(tmp_path, 'awq', 'dense', (), None)
            return tmp_path
        return make_checkpoint(dtype=kind)

    return get


@pytest.mark.parametrize(
    'kind, option, major, expected',
    [
        ('bfloat16', 'auto', 9, torch.bfloat16),
        ('bfloat16', 'auto', 7, torch.float16),
        ('bfloat16', 'float16', 9, torch.float16),
        ('bfloat16', 'auto', None, torch.bfloat16),
        ('float32', 'auto', 9, torch.float16),
        ('float32', 'bfloat16', 9, torch.bfloat16),
        ('float32', 'auto', None, torch.float32),
        ('awq', 'auto', 9, torch.float16),
        ('awq', 'bfloat16', 9, torch.float16),
    ],
)
def test_visual_tokens_have_the_engines_type(checkpoint, device, kind, option, major, expected):
    device(major)
    path = checkpoint(kind)
    config = load_vico_config(str(path))
    before = str(config.to_dict())
    assert engine_dtype(config, PytorchEngineConfig(dtype=option)) == expected
    assert ModelConfig.from_pretrained(str(path), dtype=option, device_type='cuda').dtype == expected
    assert str(config.to_dict()) == before
