"""Random weights of published shapes: every tensor, both sides load it, the same bytes for a seed, no surprise."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import Qwen3Config, Qwen3ForCausalLM

from lmdeploy_vico import cli
from lmdeploy_vico.adapter.hf_config import load_vico_config
from lmdeploy_vico.bench.servers import without_router
from lmdeploy_vico.checkpoints.files import Checkpoint, NoWeightsError
from lmdeploy_vico.checkpoints.language_model import language_model_shapes
from lmdeploy_vico.checkpoints.random import make_checkpoint_with_weights, published, shards
from lmdeploy_vico.checkpoints.random.configuration import SIZES
from lmdeploy_vico.checkpoints.random.published import Model, NoSpaceError, WeightsExistError, tensor_shapes
from lmdeploy_vico.vision.encoder import VisionEncoder
from lmdeploy_vico.vision.tile_encoder import TileEncoder

INDEX = 'model.safetensors.index.json'
KINDS = [('dense', 'layer_norm'), ('moe', 'rms_norm')]


def small(llm: str = 'dense', vit: str = 'layer_norm') -> Model:
    return Model(SIZES['tiny'], llm, vit, vocab_size=2048)


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory) -> Path:
    return make_checkpoint_with_weights(tmp_path_factory.mktemp('weights'), small())


def files_of(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


@pytest.mark.parametrize(('llm', 'vit'), KINDS)
def test_tensors_are_those_of_a_tiny_checkpoint(tmp_path, make_checkpoint, llm, vit):
    """Which are written down a second time, from the published layout."""
    path = make_checkpoint_with_weights(tmp_path / 'new', small(llm, vit))
    found, expected = (Checkpoint(p).shapes for p in (path, make_checkpoint(llm=llm, vit=vit)))
    vocabulary = {'language_model.model.embed_tokens.weight', 'language_model.lm_head.weight'}
    assert found.keys() == expected.keys()
    assert {name: found[name] for name in found.keys() - vocabulary} == {
        name: expected[name] for name in found.keys() - vocabulary
    }
    assert {found[name] for name in vocabulary} == {(2048, 128)}


def test_both_sides_find_what_they_need(checkpoint, pictures):
    config = load_vico_config(str(checkpoint))
    Checkpoint(checkpoint).require(language_model_shapes(config.llm_config, config))
    encoder = TileEncoder.from_pretrained(checkpoint, device='cpu')
    [tokens] = VisionEncoder(encoder).encode([pictures['coffee']], 'auto')
    assert tokens.embeddings.isfinite().all() and tokens.embeddings.std() > 0.1
    assert len(set(tokens.scores)) == len(tokens.scores)
    # Of 7 tiles, those above the median are compressed, whatever the scores are.
    assert sorted(tokens.tile_tokens) == [64] * 3 + [256] * 4


def test_transformers_reads_it_and_activations_stay_finite(tmp_path):
    """As deep as the deepest published model."""
    size = replace(SIZES['tiny'], layers=94, vit_layers=45)
    path = make_checkpoint_with_weights(tmp_path / 'deep', Model(size, vocab_size=1024))
    tensors: dict[str, torch.Tensor] = {}
    for file in path.glob('*.safetensors'):
        tensors |= load_file(file)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    config = Qwen3Config(**json.loads((path / 'config.json').read_text())['llm_config'])
    model = Qwen3ForCausalLM(config).bfloat16().eval()
    prefix = 'language_model.'
    model.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
    with torch.inference_mode():
        states = model(torch.arange(40)[None], output_hidden_states=True)
    assert states.logits.float().std() == pytest.approx(1, rel=0.2)
    assert max(state.std() for state in states.hidden_states) < 20
    tiles = np.random.default_rng(0).integers(0, 256, (1, 448, 448, 3), dtype=np.uint8)
    [patches] = TileEncoder.from_pretrained(path, device='cpu').features(tiles).patches
    assert patches.isfinite().all() and 0.1 < patches.std() < 20


def test_values(checkpoint):
    shapes = tensor_shapes(small())
    tensors = {}
    for file in checkpoint.glob('*.safetensors'):
        with safe_open(file, framework='pt') as shard:
            tensors |= {name: shard.get_tensor(name).float() for name in shard.keys()}  # noqa: SIM118
    layer = 'vision_model.encoder.layers.0'
    assert (tensors[f'{layer}.ls1'] == torch.tensor(0.1).bfloat16().float()).all()
    assert (tensors[f'{layer}.norm1.weight'] == 1).all() and (tensors[f'{layer}.norm1.bias'] == 0).all()
    for name, fan_in in ((f'{layer}.mlp.fc2.weight', 128), ('mlp2.1.weight', 1024), ('gating.block4.3.weight', 256)):
        assert tensors[name].std() * fan_in**0.5 == pytest.approx(1, rel=0.05)
        assert len(tensors[name].unique(dim=0)) == shapes[name][0], 'no two rows are equal'
    patches = tensors['vision_model.embeddings.patch_embedding.weight']
    assert patches.std() * 588**0.5 == pytest.approx(1, rel=0.05)
    assert tensors['language_model.model.embed_tokens.weight'].std() == pytest.approx(1, rel=0.05)


def test_a_seed_says_every_byte(checkpoint, tmp_path):
    again, other = (make_checkpoint_with_weights(tmp_path / str(seed), small(), seed) for seed in (0, 1))
    assert files_of(again) == files_of(checkpoint)
    differing = [name for name, data in files_of(other).items() if data != files_of(checkpoint)[name]]
    assert sorted(differing) == ['model-00001-of-00002.safetensors', 'model-00002-of-00002.safetensors',
                                 'tiny_checkpoint.json']  # fmt: skip


def test_shards_have_a_limit_and_the_language_model_its_own(tmp_path):
    shapes = tensor_shapes(small())
    planned = shards.plan(shapes, limit=200_000)
    assert len(planned) > 4
    assert [name for shard in planned.values() for name in shard] == list(shapes)
    sides = [{name.startswith('language_model.') for name in shard} for shard in planned.values()]
    assert all(len(side) == 1 for side in sides)
    large = [len(shard) for shard in planned.values() if shards.nbytes(shard) > 200_000]
    assert set(large) <= {1}, 'only a tensor that is larger itself'
    told = []
    shards.write(tmp_path, planned, 0, told.append)
    assert sum(told) == shards.nbytes(shapes)
    written = sum(file.stat().st_size for file in tmp_path.iterdir())
    assert written == shards.space_needed(planned)
    assert Checkpoint(tmp_path).shapes == shapes


def test_a_baseline_without_the_router_copies_the_vision_side_only(checkpoint, tmp_path):
    copy = without_router(checkpoint, tmp_path / 'copy')
    first, second = sorted(copy.glob('*.safetensors'))
    assert not first.is_symlink() and second.is_symlink()
    left = Checkpoint(copy).shapes
    assert left.keys() == {n for n in tensor_shapes(small()) if not n.startswith(('mlp2', 'gating', 'pooling'))}


def test_pieces_of_a_large_tensor_come_from_other_places(monkeypatch):
    monkeypatch.setattr(shards, 'PIECE', 1000)
    [*pieces] = shards.Values(0).pieces('mlp1.1.weight', (50, 55))
    assert [len(piece) for piece in pieces] == [2000, 2000, 1500]
    assert len({bytes(piece[:100]) for piece in pieces}) == 3


def test_a_published_model_is_as_large_as_it_says():
    assert published.weight_bytes('8B') / 1e9 == pytest.approx(17.6, abs=0.05)
    for name, model in published.MODELS.items():
        planned = shards.plan(tensor_shapes(model))
        assert max(map(shards.nbytes, planned.values())) <= shards.SHARD, name


def test_too_small_a_disk_is_said_before_anything_is_written(tmp_path, monkeypatch, capsys):
    free = SimpleNamespace(free=3_200_000_000)
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: free)
    path = tmp_path / 'a' / 'b'
    assert cli.main(['tiny', str(path), '--like', '8B', '--weights']) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == f'lmdeploy-vico: the weights need 17.6 GB, and the disk of {path} has 3.2 GB free'
    assert not (tmp_path / 'a').exists()
    free.free = shards.space_needed(shards.plan(tensor_shapes(small()))) - 1
    with pytest.raises(NoSpaceError):
        make_checkpoint_with_weights(path, small())


class BrokenOffError(Exception):
    pass


def test_a_run_that_breaks_off_is_seen_and_can_be_repeated(tmp_path, checkpoint, monkeypatch):
    def break_off(size: int) -> None:
        raise BrokenOffError

    path = tmp_path / 'new'
    with pytest.raises(BrokenOffError):
        make_checkpoint_with_weights(path, small(), done=break_off)
    assert (path / 'model-00001-of-00002.safetensors').exists() and not (path / INDEX).exists()
    with pytest.raises(NoWeightsError):
        Checkpoint(path)
    with pytest.raises(WeightsExistError):  # another model's files would stay behind
        make_checkpoint_with_weights(path, small('moe'))
    # What is there already needs no room.
    needed = shards.space_needed(shards.plan(tensor_shapes(small())))
    there = (path / 'model-00001-of-00002.safetensors').stat().st_size
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: SimpleNamespace(free=needed - there))
    assert files_of(make_checkpoint_with_weights(path, small())) == files_of(checkpoint)


def test_weights_that_are_there_stay(checkpoint, capsys):
    before = files_of(checkpoint)
    with pytest.raises(WeightsExistError, match='holds weights already'):
        make_checkpoint_with_weights(checkpoint, small(), force=True)
    assert cli.main(['tiny', str(checkpoint), '--like', '1B', '--weights', '--force']) == 1
    assert files_of(checkpoint) == before
    assert capsys.readouterr().err.endswith('holds weights already: choose another directory\n')


def test_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(published.MODELS, '8B', small())
    path = tmp_path / 'new'
    assert cli.main(['tiny', str(path), '--like', '8B', '--weights', '--seed', '3']) == 0
    out, err = capsys.readouterr()
    assert out == f'{path}\n', 'a script reads the path alone'
    assert 'Writing weights' in err and f'lmdeploy serve api_server {path}' in err
    assert (
        files_of(path)['model-00002-of-00002.safetensors']
        == (files_of(make_checkpoint_with_weights(tmp_path / 'same', small(), 3))['model-00002-of-00002.safetensors'])
    )
    if os.getuid():
        (tmp_path / 'closed').mkdir(mode=0o500)
        assert cli.main(['tiny', str(tmp_path / 'closed' / 'x'), '--like', '8B', '--weights']) == 1
        assert 'cannot be written' in capsys.readouterr().err


@pytest.mark.parametrize(
    ('options', 'said'),
    [
        (['--weights'], '--weights goes with --like MODEL'),
        (['--weights', '--like', '8B', '--vit', 'rms_norm', '--seed', '1'], 'the whole shape: leave out --vit.'),
        (['--like', '8B', '--seed', '1'], 'whole shape: leave out --seed (or add --weights).'),
    ],
)
def test_options_that_do_not_go_together(tmp_path, capsys, options, said):
    assert cli.main(['tiny', str(tmp_path / 'x'), *options]) == 1
    assert said in capsys.readouterr().err
    assert not (tmp_path / 'x').exists()
