"""Quantised language models: LMDeploy's own classes, built by our config and filled from checkpoints, on the CPU."""

import pickle
from types import SimpleNamespace

import pytest
import torch
from adapter.engine.quantised import make_quantised
from lmdeploy.pytorch.config import ModelConfig
from lmdeploy.pytorch.model_inputs import BuildModelContext
from lmdeploy.pytorch.models.patch import build_model_from_hf_config
from lmdeploy.pytorch.models.qwen3 import Qwen3ForCausalLM
from lmdeploy.pytorch.models.qwen3_moe import Qwen3MoeForCausalLM
from lmdeploy.pytorch.weight_loader.model_weight_loader import ModelWeightLoader
from safetensors.torch import save_file

from lmdeploy_vico.adapter.engine.quantisation import CheckpointQuantization
from lmdeploy_vico.adapter.hf_config import load_vico_config
from lmdeploy_vico.adapter.server.placement.weights import open_weights
from lmdeploy_vico.checkpoints.names import LANGUAGE_MODEL, VISION
from lmdeploy_vico.config import UnsupportedCheckpointError, VicoConfig
from lmdeploy_vico.options import Options
from lmdeploy_vico.vision.tile_encoder import TileEncoder

PACKED = {'qkv_proj': ('q_proj', 'k_proj', 'v_proj'), 'gate_up_proj': ('gate_proj', 'up_proj')}
VISION_MODULES = ['vision_model.encoder.layers.0.attn.qkv', 'vision_model.encoder.layers.0.mlp.fc1', 'mlp1.1', 'mlp2.4']
QKV = [f'language_model.model.layers.0.self_attn.{part}_proj' for part in 'qkv']
GATES = [f'language_model.model.layers.{layer}.mlp.gate' for layer in (0, 1)]
ATTENTION = [f'language_model.model.layers.{n}.self_attn.{part}_proj' for n in (0, 1) for part in 'qkvo']

# Method, kind of language model, projections that stay as they are, and how the checkpoint says so.
CASES = {
    'awq': ('awq', 'dense', (), None),
    'awq, vision by a word': ('awq', 'dense', (), ['visual', 'vision_model', 'mlp1', 'lm_head']),
    'awq, a whole layer': ('awq', 'dense', ('layers.1.',), ['vision_model', 'language_model.model.layers.1.']),
    'awq, named without the prefix': ('awq', 'dense', ('layers.1.self_attn',), ['model.layers.1.self_attn']),
    'fp8': ('fp8', 'dense', ('layers.0.self_attn.q', 'layers.0.self_attn.k', 'layers.0.self_attn.v'),
            [*VISION_MODULES, *QKV, 'language_model.lm_head']),
    'fp8, by a part of the name': ('fp8', 'dense', ('down_proj',), ['vision_model', 'mlp.down_proj']),
    'fp8 of experts': ('fp8', 'moe', (), [*VISION_MODULES, *GATES, 'language_model.lm_head']),
    'fp8, some experts': ('fp8', 'moe', ('layers.1.mlp.experts',),
                          [*GATES, 'language_model.model.layers.1.mlp.experts']),
    'compressed-tensors': ('compressed-tensors', 'moe', ('self_attn',),
                           [*VISION_MODULES, *GATES, *ATTENTION, 'language_model.lm_head']),
    'compressed-tensors by expressions': ('compressed-tensors', 'moe', ('self_attn',), [
        're:.*vision_model.*', r're:mlp\d.*', 're:.*mlp.gate$', r're:language_model\.model\.layers\.\d+\.self_attn\..*',
        're:.*lm_head']),
    'compressed-tensors of the language model alone': ('compressed-tensors', 'moe', ('self_attn',), [
        r're:^model\.layers\.\d+\.self_attn\..*_proj$', 're:.*gate$', 'lm_head']),
}  # fmt: skip


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


def build(path, **options):
    """The language model as an engine's worker builds it, where the config arrives pickled; on the CPU."""
    config = pickle.loads(pickle.dumps(ModelConfig.from_pretrained(str(path), **options)))
    context = BuildModelContext(quant_config=config.quant_config)
    model = build_model_from_hf_config(config.hf_config, config.dtype, torch.device('cpu'), build_model_ctx=context)
    return config, model


def projections(model):
    """The modules that LMDeploy may quantise, and the kinds of parameters that each of them has."""
    kinds = {}
    for name, _ in model.named_parameters():
        module, kind = name.rsplit('.', 1)
        if module.endswith(('_proj', 'experts.gate_up', 'experts.down', 'mlp.gate', 'lm_head')):
            kinds.setdefault(module, set()).add(kind)
    return kinds


def stored_as(module):
    """What the checkpoint calls the parts of one of LMDeploy's modules."""
    parent, _, name = module.rpartition('.')
    if parent.endswith('.experts'):
        return [f'{parent}.{n}.{part}' for n in range(4) for part in PACKED.get(f'{name}_proj', (f'{name}_proj',))]
    return [f'{parent}.{part}' if parent else part for part in PACKED.get(name, (name,))]


def test_each_layer_is_built_as_it_is_stored(case, tmp_path):
    tensors = make_quantised(tmp_path, *case)
    _, model = build(tmp_path)
    found = projections(model)
    assert len(found) >= 5
    for module, kinds in found.items():
        for part in stored_as(module):
            name = f'{LANGUAGE_MODEL}{part}.'
            assert kinds == {tensor.removeprefix(name) for tensor in tensors if tensor.startswith(name)}, module


def test_weights_are_loaded_into_them(case, tmp_path, monkeypatch):
    tensors = make_quantised(tmp_path, *case)
    _, model = build(tmp_path)
    for parameter in model.parameters():
        parameter.data.view(torch.uint8).fill_(0x55)
    received = []
    language_model = Qwen3MoeForCausalLM if case[1] == 'moe' else Qwen3ForCausalLM
    load = language_model.load_weights

    def record(self, weights):
        pairs = list(weights)
        received.extend((name, tuple(weight.shape)) for name, weight in pairs)
        load(self, pairs)

    monkeypatch.setattr(language_model, 'load_weights', record)
    ModelWeightLoader(str(tmp_path)).load_model_weights(model)

    language = {name.removeprefix(LANGUAGE_MODEL): t for name, t in tensors.items() if not name.startswith(VISION)}
    assert sorted(received) == sorted((name, tuple(tensor.shape)) for name, tensor in language.items())
    for name, parameter in model.named_parameters():
        module, kind = name.rsplit('.', 1)
        parts = [language[f'{part}.{kind}'] for part in stored_as(module)]
        if '.experts.' in module:
            per_expert = len(parts) // 4
            rows = [join(parts[start : start + per_expert], kind) for start in range(0, len(parts), per_expert)]
            assert same(parameter, torch.stack(rows)), name
        else:
            assert same(parameter, join(parts, kind)), name


def join(parts, kind):
    if kind == 'weight_shape':
        return torch.stack(parts) if len(parts) > 1 else parts[0]
    return torch.cat(parts, dim=1 if kind in ('qweight', 'qzeros', 'scales') else 0)


def same(parameter, expected):
    """AWQ computes in float16, whatever the rest of its checkpoint is stored in."""
    return torch.equal(parameter.data.view(torch.uint8), expected.to(parameter.dtype).view(torch.uint8))


@pytest.mark.parametrize('place', ['top', 'llm_config', 'both'])
@pytest.mark.parametrize('method', ['awq', 'fp8'])
def test_the_config_can_stand_in_either_place(tmp_path, method, place):
    make_quantised(tmp_path, method, 'dense', (), VISION_MODULES, place)
    config, model = build(tmp_path)
    assert config.quant_config.quant_method == method
    assert config.dtype == (torch.float16 if method == 'awq' else torch.bfloat16)
    assert 'weight' not in projections(model)['model.layers.0.mlp.down_proj'] or method == 'fp8'
    assert 'weight_scale_inv' in projections(model)['model.layers.0.mlp.down_proj'] or method == 'awq'


def test_two_different_configs_are_refused(tmp_path):
    make_quantised(tmp_path, 'fp8', 'dense', (), [], 'both')
    text = (tmp_path / 'config.json').read_text()
    (tmp_path / 'config.json').write_text(text.replace('"dynamic"', '"static"', 1))
    with pytest.raises(UnsupportedCheckpointError, match='one quantization_config and another one in llm_config'):
        load_vico_config(str(tmp_path))


def test_no_quantisation_can_be_said_with_null(make_checkpoint):
    config = load_vico_config(str(make_checkpoint()))
    assert not hasattr(config, 'quantization_config')
    changed = type(config).from_dict(config.to_dict() | {'quantization_config': None})
    assert not hasattr(changed, 'quantization_config') and not hasattr(changed.llm_config, 'quantization_config')


def test_overrides_reach_the_layers(tmp_path):
    make_quantised(tmp_path, 'fp8', 'dense', ('down_proj',), None)
    overrides = {'quantization_config': {'modules_to_not_convert': ['language_model.model.layers.1.mlp.down_proj']}}
    _, model = build(tmp_path, hf_overrides=overrides)
    down = [projections(model)[f'model.layers.{layer}.mlp.down_proj'] for layer in (0, 1)]
    assert down == [{'weight', 'weight_scale_inv'}, {'weight'}]


def test_plain_weights_are_quantised_by_lmdeploy_on_request(make_checkpoint):
    config, model = build(make_checkpoint(), model_format='fp8')
    assert config.quant_config.get('lmdeploy_patched')
    assert 'weight_scale_inv' in projections(model)['model.layers.0.self_attn.qkv_proj']


def test_renaming_twice_changes_nothing(tmp_path):
    make_quantised(tmp_path, 'fp8', 'dense', (), QKV)
    config = ModelConfig.from_pretrained(str(tmp_path)).quant_config
    once = CheckpointQuantization.of(config, PACKED)
    assert CheckpointQuantization.of(once, PACKED) is once
    assert config.ignored_layers == QKV
    copy = pickle.loads(pickle.dumps(once))
    layers = [f'model.layers.{layer}.self_attn.qkv_proj' for layer in (0, 1)]
    assert [copy.get_quant_method(layer) for layer in layers] == [None, 'fp8']


def start(path, overrides=None):
    config = load_vico_config(str(path))
    return open_weights(str(path), config, SimpleNamespace(model_format=None, hf_overrides=overrides), Options())


def test_served(case, tmp_path):
    make_quantised(tmp_path, *case)
    encoder = TileEncoder.load(start(tmp_path), VicoConfig.from_pretrained(tmp_path), device='cpu')
    assert all(weight.isfinite().all() for weight in encoder.tower.parameters())


@pytest.mark.parametrize(
    'method, llm, plain, skip_list, message',
    [
        ('compressed-tensors', 'dense', (), ['lm_head'],
         'layers.0.self_attn.qkv_proj is quantised as compressed-tensors, which .* not have for attention'),
        ('awq', 'moe', (), None, 'layers.0.mlp.experts is quantised as awq, which .* not have for experts'),
        ('fp8', 'dense', ('q_proj',), QKV[:1], 'q_proj is not quantised in the checkpoint and .*k_proj is'),
        ('fp8', 'dense', (), QKV, 'quantised tensors of the language model cannot be used: .*k_proj.weight is F8_E4M3'),
        ('awq', 'dense', (), QKV, 'k_proj.weight is stored as .*k_proj.qweight, .* Use a checkpoint in which they are'),
        ('compressed-tensors', 'moe', (), ['re:(', *ATTENTION], r"skips 're:\(', which is not a regular expression"),
        ('fp8', 'dense', (), 'lm_head', "lists skipped modules as 'lm_head', not by name"),
    ],
)  # fmt: skip
def test_refused_at_the_start(tmp_path, method, llm, plain, skip_list, message):
    make_quantised(tmp_path, method, llm, plain, skip_list)
    with pytest.raises(UnsupportedCheckpointError, match=message):
        start(tmp_path)


@pytest.mark.parametrize('method, llm', [('compressed-tensors', 'dense'), ('awq', 'moe')])
def test_what_is_refused_lmdeploy_cannot_build(tmp_path, method, llm):
    make_quantised(tmp_path, method, llm, (), None)
    with pytest.raises(RuntimeError, match=f'Unsupported quant method: {method}'):
        build(tmp_path)


@pytest.mark.parametrize('change', [{'quant_method': 'gptq'}, {'format': 'float-quantized'}], ids=str)
def test_other_methods_are_refused(tmp_path, change):
    make_quantised(tmp_path, 'compressed-tensors', 'moe', ('self_attn',), ATTENTION)
    with pytest.raises(UnsupportedCheckpointError, match='LMDeploy cannot serve the quantization_config'):
        start(tmp_path, {'quantization_config': change})


@pytest.mark.parametrize(
    'method, name',
    [
        ('fp8', 'model.norm.weight'),
        ('fp8', 'model.layers.1.mlp.gate.weight'),
        ('fp8', 'model.layers.1.mlp.experts.3.up_proj.weight'),
        ('fp8', 'model.layers.0.self_attn.o_proj.weight_scale_inv'),
        ('compressed-tensors', 'model.layers.0.self_attn.o_proj.weight'),
        ('compressed-tensors', 'model.layers.1.mlp.experts.3.down_proj.weight_packed'),
        ('compressed-tensors', 'model.layers.1.mlp.experts.0.gate_proj.weight_shape'),
        ('awq', 'lm_head.weight'),
        ('awq', 'model.layers.0.self_attn.k_proj.qzeros'),
        ('awq', 'model.layers.1.mlp.up_proj.scales'),
    ],
)
def test_what_is_missing_is_named(tmp_path, method, name):
    llm = 'dense' if method == 'awq' else 'moe'
    skipped = (('self_attn',), ['re:.*self_attn']) if method == 'compressed-tensors' else ((), None)
    tensors = make_quantised(tmp_path, method, llm, *skipped)
    del tensors[LANGUAGE_MODEL + name]
    save_file(tensors, tmp_path / 'model.safetensors')
    with pytest.raises(UnsupportedCheckpointError, match=f'missing tensors: {LANGUAGE_MODEL}{name}.'):
        start(tmp_path)


def test_scales_of_other_blocks_are_refused(tmp_path):
    tensors = make_quantised(tmp_path, 'fp8', 'dense', (), None)
    name = 'language_model.model.layers.0.mlp.up_proj.weight_scale_inv'
    tensors[name] = torch.ones(4, 4)
    save_file(tensors, tmp_path / 'model.safetensors')
    with pytest.raises(UnsupportedCheckpointError, match=rf'{name} is \[4, 4\], expected \[2, 2\]'):
        start(tmp_path)


def test_weights_that_lmdeploy_makes_fp8_of_need_no_scales(tmp_path):
    make_quantised(tmp_path, 'fp8', 'dense', ('down_proj',), None)
    start(tmp_path)
