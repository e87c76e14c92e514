"""The batches for CUDA devices, on a CPU with stand-ins for streams and events that do everything at once."""

import contextlib

import numpy as np
import pytest
import torch

from lmdeploy_vico.vision.batches import CpuBatches, CudaBatches
from lmdeploy_vico.vision.encoder import VisionEncoder


class Stream:
    def wait_stream(self, other):
        pass

    def wait_event(self, event):
        assert event.recorded

    def synchronize(self):
        pass


class Event:
    def __init__(self, enable_timing=False):
        self.recorded = False

    def record(self):
        self.recorded = True

    def synchronize(self):
        assert self.recorded

    def elapsed_time(self, other):
        return 12.5


@pytest.fixture
def stand_ins(monkeypatch):
    empty = torch.empty

    def unpinned(*args, pin_memory=False, **kwargs):
        return empty(*args, **kwargs)

    for name, value in {
        'Stream': Stream,
        'Event': Event,
        'current_stream': Stream,
        'synchronize': lambda: None,
        'device': lambda device: contextlib.nullcontext(),
        'stream': lambda stream: contextlib.nullcontext(),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch, 'empty', unpinned)


def test_two_batches_at_a_time(make_checkpoint, rng, stand_ins):
    encoder = VisionEncoder.from_pretrained(make_checkpoint())
    tiles = list(rng.integers(0, 256, (6, 448, 448, 3), dtype=np.uint8))
    groups = [tiles[:3], tiles[3:4], tiles[4:], tiles[:1]]
    with torch.inference_mode():
        expected = [CpuBatches(encoder.tower, 3).start(group).wait() for group in groups]
        cuda = CudaBatches(encoder.tower, 3, torch.device('cpu'), graph=False)
        running = cuda.start(groups[0])
        for index in range(len(groups)):
            following = cuda.start(groups[index + 1]) if index + 1 < len(groups) else None
            features = running.wait()
            assert running.seconds == 0.0125
            assert torch.equal(features.scores, expected[index].scores)
            assert len(features.patches) == len(groups[index])
            assert all(map(torch.equal, features.patches, expected[index].patches))
            running = following
