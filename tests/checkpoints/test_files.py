"""Reading a checkpoint: what the headers say, types that are refused, files that are damaged."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lmdeploy_vico.checkpoints.files import Checkpoint, NoWeightsError
from lmdeploy_vico.checkpoints.safetensors_format import INDEX_FILE
from lmdeploy_vico.config import UnsupportedCheckpointError
from lmdeploy_vico.vision.tile_encoder import TileEncoder

LAYER = 'vision_model.encoder.layers.0.mlp.fc1'
ADVICE = 'Use a checkpoint in which they are float32, float16 or bfloat16.'


@pytest.fixture
def rewritten(make_checkpoint, tmp_path):
    """``rewritten(change)``: a checkpoint whose tensors ``change`` has replaced, added or removed."""

    def rewrite(change) -> Path:
        source, path = make_checkpoint(), tmp_path / 'rewritten'
        path.mkdir()
        (path / 'config.json').write_text((source / 'config.json').read_text())
        weight_map = {}
        for shard in sorted(source.glob('*.safetensors')):
            tensors = load_file(shard)
            change(tensors)
            save_file(tensors, path / shard.name)
            weight_map |= dict.fromkeys(tensors, shard.name)
        (path / INDEX_FILE).write_text(json.dumps({'weight_map': weight_map}))
        return path

    return rewrite


def cast(dtype, *names):
    """Store the tensors of these names in ``dtype``, and a scale beside each, as quantisers do."""

    def change(tensors):
        for name in names:
            if name in tensors:
                tensors[name] = tensors[name].to(dtype)
                tensors[f'{name}_scale'] = torch.ones(1)

    return change


@pytest.mark.parametrize(
    'dtype, stored',
    [
        (torch.float8_e4m3fn, 'F8_E4M3'),
        (torch.float8_e5m2, 'F8_E5M2'),
        (torch.int8, 'I8'),
        (torch.uint8, 'U8'),
        (torch.int32, 'I32'),
        (torch.float64, 'F64'),
    ],
    ids=str,
)
@pytest.mark.parametrize('name', [f'{LAYER}.weight', 'mlp2.1.weight', 'gating.gate.1.bias'])
def test_other_types_are_refused(rewritten, dtype, stored, name):
    with pytest.raises(UnsupportedCheckpointError) as caught:
        TileEncoder.from_pretrained(rewritten(cast(dtype, name)))
    assert f'quantised tensors of the vision side cannot be used: {name} is {stored}. {ADVICE}' in str(caught.value)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_floats_are_read(rewritten, dtype):
    path = rewritten(cast(dtype, f'{LAYER}.weight'))
    weight = dict(TileEncoder.from_pretrained(path, device='cpu').tower.named_parameters())[f'{LAYER}.weight']
    shards = [load_file(shard) for shard in path.glob('*.safetensors')]
    written = next(tensors[f'{LAYER}.weight'] for tensors in shards if f'{LAYER}.weight' in tensors)
    assert written.dtype == dtype and torch.equal(weight, written.float())


def pack(*kinds):
    """Store a layer's weight packed, eight values in an int32."""

    def change(tensors):
        weight = tensors.pop(f'{LAYER}.weight', None)
        if weight is not None:
            packed = torch.zeros(weight.shape[0], weight.shape[1] // 8, dtype=torch.int32)
            tensors.update({f'{LAYER}.{kind}': packed.clone() for kind in kinds})

    return change


@pytest.mark.parametrize(
    'kinds',
    [('qweight', 'qzeros', 'scales'), ('weight_packed', 'weight_scale', 'weight_shape')],
    ids=['awq', 'compressed-tensors'],
)
def test_a_packed_layer_is_not_called_missing(rewritten, kinds):
    with pytest.raises(UnsupportedCheckpointError) as caught:
        TileEncoder.from_pretrained(rewritten(pack(*kinds)))
    message = str(caught.value)
    assert f'cannot be used: {LAYER}.weight is stored as {LAYER}.{kinds[0]}. {ADVICE}' in message
    assert 'missing' not in message


def test_of_many_a_few_are_named(rewritten):
    names = [
        f'vision_model.encoder.layers.{layer}.{part}.weight' for layer in (0, 1) for part in ('mlp.fc1', 'mlp.fc2')
    ]
    names += [f'vision_model.encoder.layers.{layer}.attn.qkv.weight' for layer in (0, 1)]
    with pytest.raises(UnsupportedCheckpointError) as caught:
        TileEncoder.from_pretrained(rewritten(cast(torch.int8, *names)))
    message = str(caught.value)
    assert [name in message for name in sorted(names)] == [True] * 3 + [False] * 3
    assert 'and 3 more' in message


def test_types_and_sizes_are_those_of_the_files(make_checkpoint):
    checkpoint = Checkpoint(make_checkpoint(dtype='float32'))
    assert checkpoint.dtypes.keys() == checkpoint.shapes.keys()
    assert set(checkpoint.dtypes.values()) == {'F32'}
    stored: dict[str, torch.Tensor] = {}
    for file in make_checkpoint(dtype='float32').glob('*.safetensors'):
        stored |= load_file(file)
    assert checkpoint.sizes == {name: tensor.nbytes for name, tensor in stored.items()}
    assert checkpoint.shapes == {name: tuple(tensor.shape) for name, tensor in stored.items()}


DAMAGE = {
    'empty': (lambda data: b'', 'the file ends before its header does'),
    'cut in the header': (lambda data: data[:100], 'the file ends before its header does'),
    'cut in the tensors': (lambda data: data[:-1], r'has \d+ bytes, and its header describes \d+'),
    'too long': (lambda data: data + b'\0', r'has \d+ bytes, and its header describes \d+'),
    'not JSON': (lambda data: data[:8] + b'?' + data[9:], 'the header is damaged'),
    'a list': (lambda data: (2).to_bytes(8, 'little') + b'[]', 'the header is damaged'),
    'without offsets': (lambda data: (10).to_bytes(8, 'little') + b'{"a": {} }', 'the header is damaged'),
}


@pytest.mark.parametrize('kind', DAMAGE)
def test_a_damaged_file_is_named(rewritten, kind):
    damage, said = DAMAGE[kind]
    path = rewritten(lambda tensors: None)
    file = max(path.glob('*.safetensors'))
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(UnsupportedCheckpointError, match=f'{file.name} cannot be read: .*{said}'):
        Checkpoint(path)


def test_a_missing_file_is_named(rewritten):
    path = rewritten(lambda tensors: None)
    file = max(path.glob('*.safetensors'))
    file.unlink()
    with pytest.raises(UnsupportedCheckpointError, match=f'{file.name} cannot be read: .*No such file'):
        Checkpoint(path)


def test_a_checkpoint_of_one_file_needs_no_index(tmp_path):
    with pytest.raises(NoWeightsError, match='has neither model.safetensors.index.json nor model.safetensors'):
        Checkpoint(tmp_path)
    save_file({'mlp1.1.bias': torch.ones(3)}, tmp_path / 'model.safetensors')
    assert Checkpoint(tmp_path).sizes == {'mlp1.1.bias': 12}
