"""Two pictures, questions about them, and a tiny float32 checkpoint, of which policy and reference are made."""

import json

import pytest
import torch
from training.made import Made, write_data

from lmdeploy_vico.kernels import implementation


@pytest.fixture(autouse=True)
def plain_torch():
    """Training switches the Triton kernels off for its process; other tests of this one find them as they were."""
    before = implementation.requested()
    yield
    implementation.use(before)


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
