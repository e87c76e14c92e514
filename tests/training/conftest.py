"""Two pictures, questions about them, and a tiny float32 checkpoint, of which policy and reference are made."""

import json

import pytest
import torch
from PIL import ImageFile
from training.made import SAMPLES, Made, write_data, write_lines

from lmdeploy_vico.kernels import implementation
from lmdeploy_vico.training.stages.initialise import initialise


@pytest.fixture(autouse=True)
def plain_torch():
    """Training switches the Triton kernels off for its process; other tests of this one find them as they were."""
    before = implementation.requested()
    yield
    implementation.use(before)


@pytest.fixture(autouse=True)
def as_in_a_process_of_its_own(monkeypatch):
    """Importing LMDeploy, as other tests of this process do, has Pillow accept pictures that are cut off."""
    monkeypatch.setattr(ImageFile, 'LOAD_TRUNCATED_IMAGES', False)


@pytest.fixture(scope='session')
def data(tmp_path_factory, pictures):
    """A JSONL file of four samples: of one tile, of three tiles, of two pictures, without any."""
    return write_data(tmp_path_factory.mktemp('data'), pictures)


@pytest.fixture(params=['dense', 'moe'])
def made(request, make_checkpoint, data):
    """A policy that is the reference, and the data as samples."""
    return Made(make_checkpoint(llm=request.param, dtype='float32'), data)


@pytest.fixture
def dense(make_checkpoint, data):
    return Made(make_checkpoint(dtype='float32'), data)


@pytest.fixture
def config(make_checkpoint):
    return json.loads((make_checkpoint(dtype='float32') / 'config.json').read_text())


@pytest.fixture
def cpu():
    return torch.device('cpu')


@pytest.fixture(scope='session')
def plain(make_checkpoint):
    """The reference: a plain checkpoint."""
    return make_checkpoint(flash=False, dtype='float32')


@pytest.fixture(scope='session')
def start(plain, tmp_path_factory):
    """The same with what ``init`` adds."""
    path = tmp_path_factory.mktemp('start') / 'start'
    initialise(plain, path)
    return path


@pytest.fixture(scope='session')
def few(data):
    """A file of two samples, of one tile and without any."""
    return write_lines(data.parent / 'few.jsonl', [SAMPLES[0], SAMPLES[3]])
