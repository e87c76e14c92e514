"""What TurboMind is not asked for, in sentences."""

from types import SimpleNamespace

import pytest
import torch
from lmdeploy.messages import TurbomindEngineConfig
from lmdeploy.vl.engine import _resolve_mm_feature_dtype

from lmdeploy_vico.adapter.hf_config import load_vico_config
from lmdeploy_vico.adapter.server.turbomind import checks
from lmdeploy_vico.config import UnsupportedCheckpointError
from lmdeploy_vico.options import OptionError, Options


def config(architecture='Qwen3ForCausalLM', **llm):
    return SimpleNamespace(llm_config=SimpleNamespace(architectures=[architecture], **llm))


@pytest.mark.parametrize('architecture', ['Qwen3ForCausalLM', 'Qwen3MoeForCausalLM'])
def test_the_language_models_of_published_checkpoints(architecture):
    checks.require_architecture(config(architecture))


def test_another_language_model():
    said = 'TurboMind does not have the language model PhiForCausalLM: set LMDEPLOY_VICO_LANGUAGE_ENGINE=pytorch.'
    with pytest.raises(UnsupportedCheckpointError, match=said):
        checks.require_architecture(config('PhiForCausalLM'))


PACKED = {'format': 'pack-quantized', 'weights': {'num_bits': 4, 'type': 'int', 'group_size': 32}}
SERVED = [
    None,
    {'quant_method': 'awq', 'version': 'gemm', 'group_size': 128},
    {'quant_method': 'gptq'},
    {'quant_method': 'gptq', 'bits': 4},
    {'quant_method': 'fp8', 'weight_block_size': [128, 128]},
    {'quant_method': 'mxfp4'},
    {'quant_method': 'compressed-tensors', 'config_groups': {'group_0': PACKED}},
]


@pytest.mark.parametrize('quantisation', SERVED, ids=str)
def test_quantised_language_models_that_turbomind_reads(quantisation):
    checks.require_quantisation(config(quantization_config=quantisation))
    checks.require_quantisation(config())


@pytest.mark.parametrize(
    'quantisation',
    [
        {'quant_method': 'smooth_quant'},
        {'quant_method': 'awq', 'version': 'gemv'},
        {'quant_method': 'awq', 'version': 'gemm', 'group_size': 64},
        {'quant_method': 'awq', 'version': 'gemm', 'bits': 8},
        {'quant_method': 'gptq', 'desc_act': True},
        {'quant_method': 'gptq', 'bits': 8},
        {'quant_method': 'fp8'},
        {'quant_method': 'compressed-tensors', 'config_groups': {'group_0': {**PACKED, 'format': 'float-quantized'}}},
        {'quant_method': 'compressed-tensors'},
    ],
    ids=str,
)
def test_those_that_it_does_not_are_named_with_what_works(quantisation):
    with pytest.raises(UnsupportedCheckpointError) as refusal:
        checks.require_quantisation(config(quantization_config=quantisation))
    assert f'this quantization_config ({quantisation["quant_method"]})' in str(refusal.value)
    assert all(name in str(refusal.value) for name in checks.QUANTISED)
    assert str(refusal.value).endswith('Otherwise set LMDEPLOY_VICO_LANGUAGE_ENGINE=pytorch.')


def test_float32_is_refused_before_lmdeploy_fails_at_it(make_checkpoint):
    engine = TurbomindEngineConfig()
    engine.dtype = 'float32'  # which LMDeploy itself looks at only when a config is made
    with pytest.raises(OptionError, match='TurboMind runs in float16 or bfloat16, not in float32'):
        _resolve_mm_feature_dtype(load_vico_config(str(make_checkpoint())), engine)
    with pytest.raises(KeyError):  # a model that is no ViCO checkpoint
        _resolve_mm_feature_dtype(SimpleNamespace(), engine)


@pytest.mark.parametrize(
    ('requested', 'stored', 'bf16', 'expected'),
    [
        ('auto', torch.bfloat16, True, torch.bfloat16),
        ('auto', torch.float16, True, torch.float16),
        ('auto', torch.float32, True, torch.bfloat16),
        ('auto', None, True, torch.bfloat16),
        ('float16', torch.bfloat16, True, torch.float16),
        ('bfloat16', torch.float16, True, torch.bfloat16),
        ('auto', torch.bfloat16, False, torch.float16),
        ('bfloat16', torch.bfloat16, False, torch.float16),
    ],
)
def test_the_data_type_that_turbomind_will_choose(monkeypatch, requested, stored, bf16, expected):
    monkeypatch.setattr(checks, 'is_bf16_supported', lambda: bf16)
    assert checks.likely_dtype(requested, config(dtype=stored)) == expected


@pytest.mark.parametrize(
    ('requested', 'stored', 'chosen'),
    [
        ('float16', torch.bfloat16, True),
        ('auto', torch.float16, True),
        ('auto', torch.bfloat16, False),
        ('auto', torch.float32, False),
        ('bfloat16', torch.float16, False),
    ],
)
def test_bfloat16_is_advised_only_where_it_was_not_asked_for(requested, stored, chosen):
    advice = checks.beyond_float16(requested, config(dtype=stored))
    assert ('--dtype bfloat16' in advice) == chosen
    assert ('LMDEPLOY_VICO_LANGUAGE_ENGINE=pytorch' in advice) == (not chosen)


def test_weights_are_not_made_up():
    checks.require_weights(Options())
    with pytest.raises(OptionError, match='dummy_weights are not available on TurboMind'):
        checks.require_weights(Options(dummy_weights=True))
