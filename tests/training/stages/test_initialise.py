"""What init adds to a plain checkpoint."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from training.made import CPU
from training.runs import weights_of

from lmdeploy_vico import cli
from lmdeploy_vico.checkpoints.names import FLASH
from lmdeploy_vico.checkpoints.shapes import checkpoint_shapes
from lmdeploy_vico.config import VicoConfig
from lmdeploy_vico.training import TrainingError
from lmdeploy_vico.training.model.build import fill, outline, outline_router
from lmdeploy_vico.training.stages.initialise import initialise
from lmdeploy_vico.vision.routing import route


def config_of(path):
    return json.loads((path / 'config.json').read_text())


def test_all_published_tensors_are_there(plain, start):
    config, weights, before = config_of(start), weights_of(start), weights_of(plain)
    assert {name: tuple(value.shape) for name, value in weights.items()} == checkpoint_shapes(config)
    assert {name for name in weights if not name.startswith(FLASH)} == set(before)
    for name, value in before.items():
        assert torch.equal(weights[name], value), name
    assert {value.dtype for value in weights.values()} == {torch.float32}


def test_the_rest_of_the_checkpoint_is_copied(plain, start):
    assert {path.name for path in plain.iterdir()} == {path.name for path in start.iterdir()}
    config = config_of(start)
    added = {'flash_mode', 'flash_relative_threshold', 'flash_absolute_threshold'}
    assert {key: value for key, value in config.items() if key not in added} == config_of(plain)
    VicoConfig.from_dict(config)


def test_an_untrained_router_compresses_nothing(start, dense):
    config = config_of(start)
    model = fill(outline_router(config), [start], CPU)
    with torch.no_grad():
        scores = model(torch.from_numpy(dense.samples[1].tiles)).softmax(-1)[:, 0]
    thresholds = config['flash_relative_threshold'], config['flash_absolute_threshold']
    assert not route(scores, 'auto', *thresholds).any()


def test_visual_tokens_of_a_fresh_projector_are_about_as_large(start, dense):
    model = fill(outline(config_of(start)), [start], CPU)
    tiles = torch.from_numpy(dense.samples[0].tiles)
    with torch.no_grad():
        full, _ = model.visual_tokens(tiles, torch.tensor([False]))
        compressed, _ = model.visual_tokens(tiles, torch.tensor([True]))
    assert 0.1 < compressed.std() / full.std() < 10


def test_the_seed_decides(plain, start, tmp_path):
    initialise(plain, tmp_path / 'same')
    initialise(plain, tmp_path / 'other', seed=1)
    ours, same, other = map(weights_of, (start, tmp_path / 'same', tmp_path / 'other'))
    assert all(torch.equal(value, same[name]) for name, value in ours.items())
    assert not torch.equal(ours['mlp2.1.weight'], other['mlp2.1.weight'])


def test_what_is_refused(start, plain, tmp_path, capsys):
    with pytest.raises(TrainingError, match='is a ViCO checkpoint already'):
        initialise(start, tmp_path / 'new')
    with pytest.raises(TrainingError, match='not an empty folder'):
        initialise(plain, start)
    assert cli.main(['train', 'init', str(tmp_path), str(tmp_path / 'new')]) == 1
    assert 'is not a checkpoint: its config.json cannot be read' in capsys.readouterr().err


def test_a_package_that_is_missing_is_named(tmp_path):
    """By either way to it, in a process that has not imported it."""
    lines = [['train', 'init', str(tmp_path), str(tmp_path / 'new')], ['train', 'consistency', '--dry-run']]
    program = 'import sys; sys.modules["peft"] = None; from lmdeploy_vico import cli; '
    program += f'sys.exit(sum(cli.main(line) for line in {lines}))'
    done = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == 2 * 'lmdeploy-vico: peft is missing; in a checkout of the plugin: pip install ".[train]"\n'


@pytest.mark.parametrize(
    'change, said',
    [
        ({'tie_word_embeddings': True}, 'models without a head of their own'),
        ({'tie_word_embeddings': None, 'architectures': None}, 'has no'),
    ],
)
def test_language_models_that_cannot_be_trained(plain, tmp_path, change, said):
    source = tmp_path / 'source'
    shutil.copytree(plain, source)
    config = config_of(source)
    config['llm_config'] = {name: value for name, value in (config['llm_config'] | change).items() if value is not None}
    (source / 'config.json').write_text(json.dumps(config))
    with pytest.raises(TrainingError, match=said):
        initialise(source, tmp_path / 'new')
    (source / 'config.json').write_text('[]')
    with pytest.raises(TrainingError, match='is not an object'):
        initialise(source, tmp_path / 'new')
