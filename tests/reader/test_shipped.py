"""The checkpoint that comes with the package: small, whole, and written out as it is served."""

import pytest

from lmdeploy_vico.checkpoints.random.limits import TINY_SERVER, server_arguments
from lmdeploy_vico.checkpoints.shapes import checkpoint_shapes
from lmdeploy_vico.cli import main
from lmdeploy_vico.config import VicoConfig
from lmdeploy_vico.reader.shipped import FOLDER
from lmdeploy_vico.training.model.weights import Tensors
from lmdeploy_vico.training.stages.initialise import read_config

LARGEST = 10 << 20  # bytes


def test_it_is_small():
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) <= LARGEST


def test_the_command_writes_a_checkpoint(tmp_path, capsys):
    path = tmp_path / 'reader'
    assert main(['reader', str(path)]) == 0
    assert capsys.readouterr().out.strip() == str(path)
    VicoConfig.from_pretrained(path)
    tensors = Tensors(path)
    tensors.require(checkpoint_shapes(read_config(path)))
    assert tensors.read('mlp2.7.weight').isfinite().all()
    assert server_arguments(path) == TINY_SERVER
    assert main(['reader', str(path)]) == 1
    assert 'exists and is not an empty folder: choose another' in capsys.readouterr().err


@pytest.mark.parametrize(
    'options, sentence',
    [(['--seed', '3'], '--seed goes with --train'), (['--train', '--seed', '-1'], '--seed must be 0 or more.')],
)
def test_seeds(tmp_path, capsys, options, sentence):
    assert main(['reader', str(tmp_path / 'reader'), *options]) == 1
    assert sentence in capsys.readouterr().err and not (tmp_path / 'reader').exists()


def test_it_has_the_shape_that_is_trained(reader_config):
    """The shipped config is that of the code, but for what training has chosen."""
    chosen = {'flash_relative_threshold', 'flash_absolute_threshold'}
    shipped = read_config(FOLDER)
    assert {key: shipped[key] for key in reader_config if key not in chosen} == {
        key: value for key, value in reader_config.items() if key not in chosen
    }


@pytest.mark.parametrize('file', ['tokenizer.json', 'chat_template.jinja'])
def test_it_has_the_tokenizer_that_is_trained(reader_folder, file):
    assert (FOLDER / file).read_text() == (reader_folder / file).read_text()
