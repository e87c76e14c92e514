"""The shipped reader, written out once."""

import pytest

from lmdeploy_vico.reader.shipped import write_reader


@pytest.fixture(scope='session')
def reader(tmp_path_factory):
    path = tmp_path_factory.mktemp('shipped') / 'reader'
    write_reader(path)
    return path
