"""The fingerprint of a vision side: the same for the same bits, wherever they lie, and another for any others."""

import shutil
from dataclasses import replace

import pytest
from safetensors.torch import load_file, save_file

from lmdeploy_vico.checkpoints.files import Checkpoint
from lmdeploy_vico.checkpoints.fingerprint import vision_fingerprint
from lmdeploy_vico.config import UnsupportedCheckpointError, VicoConfig


@pytest.fixture
def copy(make_checkpoint, tmp_path):
    path = shutil.copytree(make_checkpoint(), tmp_path / 'copy')
    return path, VicoConfig.from_pretrained(path)


def change(path, name, edit):
    """Edit a tensor in whichever file has it."""
    for file in path.glob('*.safetensors'):
        tensors = load_file(file)
        if name in tensors:
            edit(tensors[name].view(-1))
            save_file(tensors, file)
            return
    raise AssertionError(name)


def flip(values):
    values[-1] = -values[-1] + 1


def test_a_copy_has_the_same(make_checkpoint, copy):
    path, config = copy
    assert vision_fingerprint(path, config) == vision_fingerprint(make_checkpoint(), config)


@pytest.mark.parametrize('part', ['vision_model.', 'pooling_before_gating.', 'gating.', 'mlp1.', 'mlp2.'])
def test_one_value_makes_a_difference(copy, part):
    path, config = copy
    before = vision_fingerprint(path, config)
    change(path, next(name for name in Checkpoint(path).shapes if name.startswith(part)), flip)
    assert vision_fingerprint(path, config) != before


def test_the_language_model_and_the_thresholds_make_none(copy):
    path, config = copy
    before = vision_fingerprint(path, config)
    change(path, 'language_model.model.norm.weight', flip)
    assert vision_fingerprint(path, replace(config, relative_threshold=0.9, max_tiles=3)) == before


def test_a_checkpoint_without_weights_is_named(tmp_path, copy):
    with pytest.raises(UnsupportedCheckpointError, match='holds no weights'):
        vision_fingerprint(tmp_path, copy[1])
