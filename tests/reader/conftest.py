"""The reader's shape and tokenizer, made once."""

import pytest

from lmdeploy_vico.reader.design import vico_config, write_all_but_weights
from lmdeploy_vico.training.data.tokens import load_tokenizer


@pytest.fixture(scope='session')
def reader_folder(tmp_path_factory):
    """Everything of the reader's plain checkpoint but the weights."""
    path = tmp_path_factory.mktemp('reader')
    write_all_but_weights(path)
    return path


@pytest.fixture(scope='session')
def reader_config(reader_folder):
    import json

    return vico_config(json.loads((reader_folder / 'config.json').read_text()))


@pytest.fixture(scope='session')
def reader_tokenizer(reader_folder):
    return load_tokenizer(reader_folder)
