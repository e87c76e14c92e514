"""A stage on a stand-in encoder, and one whose device waits."""

import threading

import pytest
import torch
from stage.stand_in import StandInEncoder

from lmdeploy_vico.stage.stage import VisionStage


@pytest.fixture
def encoder():
    return StandInEncoder()


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
