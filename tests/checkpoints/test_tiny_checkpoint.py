"""The tiny checkpoint has the published layout, the same bytes every time, and respects what is in its directory."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from lmdeploy_vico.checkpoints.random import is_tiny_checkpoint, make_tiny_checkpoint
from lmdeploy_vico.checkpoints.random.tokenizer import SPECIAL_TOKENS

D, HIDDEN, MLP = 64, 128, 128
# The table of tensors in the published layout, for the tiny size; {} is the layer or the step.
VISION = {
    'vision_model.embeddings.class_embedding': (1, 1, D),
    'vision_model.embeddings.position_embedding': (1, 1025, D),
    'vision_model.embeddings.patch_embedding.weight': (D, 3, 14, 14),
    'vision_model.embeddings.patch_embedding.bias': (D,),
    'mlp1.0.weight': (4 * D,),
    'mlp1.1.weight': (HIDDEN, 4 * D),
    'mlp1.3.weight': (HIDDEN, HIDDEN),
}
LAYER = {
    'norm1.weight': (D,),
    'norm2.weight': (D,),
    'attn.qkv.weight': (3 * D, D),
    'attn.proj.weight': (D, D),
    'attn.proj.bias': (D,),
    'mlp.fc1.weight': (MLP, D),
    'mlp.fc2.weight': (D, MLP),
    'ls1': (D,),
    'ls2': (D,),
}
FLASH = {
    'mlp2.0.weight': (16 * D,),
    'mlp2.1.weight': (2 * HIDDEN, 16 * D),
    'mlp2.4.weight': (2 * HIDDEN, 2 * HIDDEN),
    'mlp2.7.weight': (HIDDEN, 2 * HIDDEN),
    'pooling_before_gating.query_token': (1, D),
    'gating.gate.0.weight': (D,),
    'gating.gate.1.weight': (2, D),
}
STEP = {
    'pooling_before_gating.attn{}.in_proj_weight': (3 * D, D),
    'pooling_before_gating.attn{}.in_proj_bias': (3 * D,),
    'pooling_before_gating.attn{}.out_proj.weight': (D, D),
    'pooling_before_gating.norm{}.bias': (D,),
    'gating.block{}.0.weight': (4 * D, D),
    'gating.block{}.3.weight': (D, 4 * D),
    'gating.block{}.5.weight': (D,),
}


def tensors(path: Path) -> dict[str, torch.Tensor]:
    out = {}
    for file in sorted(path.glob('*.safetensors')):
        with safe_open(file, framework='pt') as shard:
            out.update({name: shard.get_tensor(name) for name in shard.keys()})  # noqa: SIM118
    return out


def config_of(path: Path) -> dict:
    return json.loads((path / 'config.json').read_text())


def test_flash_layout(make_checkpoint):
    path = make_checkpoint()
    found = tensors(path)
    expected = VISION | FLASH
    expected |= {f'vision_model.encoder.layers.{i}.{name}': shape for i in range(2) for name, shape in LAYER.items()}
    expected |= {name.format(i): shape for i in range(1, 5) for name, shape in STEP.items()}
    assert {name: tuple(found[name].shape) for name in expected} == expected
    assert {t.dtype for t in found.values()} == {torch.bfloat16}
    assert all(t.isfinite().all() for t in found.values())
    index = json.loads((path / 'model.safetensors.index.json').read_text())
    assert set(index['weight_map']) == set(found)
    assert len(set(index['weight_map'].values())) == 2
    config = config_of(path)
    assert config['architectures'] == ['InternVLChatModel']
    assert config['flash_mode'] is True
    assert config['llm_config']['architectures'] == ['Qwen3ForCausalLM']
    assert [file.name for file in path.glob('*.py')] == ['configuration_internvl_chat.py']


def test_internvit_6b_layout_with_experts(make_checkpoint):
    path = make_checkpoint(llm='moe', vit='rms_norm')
    found, config = tensors(path), config_of(path)
    layer = 'vision_model.encoder.layers.1'
    assert f'{layer}.attn.q_norm.weight' in found
    assert f'{layer}.attn.qkv.bias' not in found
    assert f'{layer}.norm1.bias' not in found
    assert config['vision_config']['qk_normalization'] is True
    assert config['llm_config']['architectures'] == ['Qwen3MoeForCausalLM']
    assert 'language_model.model.layers.1.mlp.experts.7.down_proj.weight' in found


def test_plain_checkpoint_has_no_trace_of_flash(make_checkpoint):
    path = make_checkpoint(flash=False)
    assert not [key for key in config_of(path) if 'flash' in key]
    assert not [name for name in tensors(path) if name.startswith(('mlp2', 'gating', 'pooling'))]


def test_same_arguments_same_bytes(make_checkpoint, tmp_path):
    first, second = make_checkpoint(), make_tiny_checkpoint(tmp_path / 'again')
    files = sorted(f.name for f in first.iterdir())
    assert files == sorted(f.name for f in second.iterdir())
    assert [f for f in files if (first / f).read_bytes() != (second / f).read_bytes()] == []


@pytest.mark.slow
def test_float32_has_the_same_values_and_seeds_differ(make_checkpoint, tmp_path):
    stored = tensors(make_checkpoint())
    wide = tensors(make_tiny_checkpoint(tmp_path / 'wide', dtype='float32'))
    assert config_of(tmp_path / 'wide')['llm_config']['dtype'] == 'float32'
    assert all(torch.equal(wide[name], stored[name].float()) for name in stored)
    other = tensors(make_tiny_checkpoint(tmp_path / 'other', seed=1))
    assert not torch.equal(other['mlp1.1.weight'], stored['mlp1.1.weight'])


def test_tokenizer(make_checkpoint):
    from tokenizers import Tokenizer

    path = make_checkpoint()
    tokenizer = Tokenizer.from_file(str(path / 'tokenizer.json'))
    ids = [tokenizer.token_to_id(token) for token in SPECIAL_TOKENS]
    assert ids == list(range(ids[0], ids[0] + len(ids)))
    assert tokenizer.encode('a<IMG_CONTEXT>b').tokens == ['a', '<IMG_CONTEXT>', 'b']
    text = 'Naïve café, 世界\n\n  two  spaces 😀 <think>'
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text
    assert len(tokenizer.encode('Describe this image in detail.').ids) < 12
    assert config_of(path)['llm_config']['vocab_size'] > max(ids)


def test_special_tokens_are_never_the_best(make_checkpoint):
    path = make_checkpoint()
    head = tensors(path)['language_model.lm_head.weight']
    first_special = json.loads((path / 'added_tokens.json').read_text())['<|endoftext|>']
    assert not head[first_special:].any()
    assert head[:first_special].any(dim=1).all()


def test_only_its_own_directories_are_overwritten(tmp_path):
    (tmp_path / 'notes.txt').write_text('mine')
    with pytest.raises(FileExistsError, match='not a tiny checkpoint'):
        make_tiny_checkpoint(tmp_path)
    assert [f.name for f in tmp_path.iterdir()] == ['notes.txt']
    make_tiny_checkpoint(tmp_path, force=True)
    assert is_tiny_checkpoint(tmp_path)
    make_tiny_checkpoint(tmp_path, flash=False)
    assert (tmp_path / 'notes.txt').read_text() == 'mine'
    assert 'flash_mode' not in config_of(tmp_path)


@pytest.mark.parametrize('choice', [{'llm': 'big'}, {'vit': 'swin'}, {'size': 'huge'}, {'dtype': 'int8'}])
def test_unknown_choices_are_named(tmp_path, choice):
    with pytest.raises(ValueError, match='is one of'):
        make_tiny_checkpoint(tmp_path / 'x', **choice)
    assert not (tmp_path / 'x').exists()
