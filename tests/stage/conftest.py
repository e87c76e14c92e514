"""A stage on the CPU, and one whose device waits."""

import threading

import pytest
import torch

from lmdeploy_vico.stage.stage import VisionStage
from lmdeploy_vico.vision.encoder import VisionEncoder


@pytest.fixture(scope='module')
def encoder(make_checkpoint):
    return VisionEncoder.from_pretrained(make_checkpoint())


@pytest.fixture
def stage(encoder):
    stage = VisionStage([encoder], torch.bfloat16, threads=2, capacity=200)
    yield stage
    stage.close()


@pytest.fixture
def held(encoder, monkeypatch):
    """``(entered, release)``: the device is held in its first batch until released."""
    entered, release = threading.Event(), threading.Event()

    def start(tiles):
        entered.set()
        release.wait()
        return encode(tiles)

    encode = encoder.start
    monkeypatch.setattr(encoder, 'start', start)
    yield entered, release
    release.set()
