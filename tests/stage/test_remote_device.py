"""A device elsewhere fits the workers' protocol: the stage and its threads are used as they are.

Messages are pickled both ways, so that the device shares no memory with the stage. Pixels leave once, features and
scores come back, prompts are routed at home, and visual tokens come back once.
"""

import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from stage.stand_in import StandInEncoder, job
from waiting import HANG

from lmdeploy_vico.stage.stage import VisionStage
from lmdeploy_vico.vision.batches import TileFeatures

pytestmark = pytest.mark.busy


class Elsewhere:
    """Encodes and projects in a thread of its own; knows nothing of prompts, routing and compression."""

    def __init__(self):
        self._encoder, self._thread = StandInEncoder(tile_batch=2), ThreadPoolExecutor(1)
        self.requests = []

    def send(self, kind, *message):
        """A future of the pickled answer."""
        return self._thread.submit(self._answer, pickle.dumps((kind, *message)))

    def _answer(self, message):
        kind, *arguments = pickle.loads(message)
        self.requests.append(kind)
        return pickle.dumps(getattr(self, kind)(*arguments))

    def encode(self, tiles):
        features = self._encoder.start(tiles).wait()
        return features.patches, features.scores

    def project(self, patches, compressed):
        return self._encoder.project_all(patches, compressed)


class SentBatch:
    seconds = 0.001

    def __init__(self, answer):
        self._answer = answer

    def wait(self):
        return TileFeatures(*pickle.loads(self._answer.result(HANG)))


class RemoteEncoder(StandInEncoder):
    """What the stage has of a device elsewhere."""

    def __init__(self, elsewhere):
        super().__init__(tile_batch=2)
        self._elsewhere = elsewhere

    def start(self, tiles):
        return SentBatch(self._elsewhere.send('encode', tiles))

    def project_all(self, patches, compressed):
        return pickle.loads(self._elsewhere.send('project', patches, compressed).result(HANG))


def test_a_prompt_is_encoded_and_projected_elsewhere_and_routed_at_home(pictures):
    elsewhere = Elsewhere()
    stage = VisionStage([RemoteEncoder(elsewhere)], torch.bfloat16, threads=2, cache_bytes=2**24)
    for compression in ('auto', 'all', 0.5):
        [image] = stage.submit([job(pictures['coffee'])], compression).result(HANG)
        [expected] = StandInEncoder().encode([pictures['coffee']], compression)
        assert image.tokens.tile_tokens == expected.tile_tokens
        assert torch.equal(image.tokens.embeddings, expected.embeddings.to(torch.bfloat16))
    stage.close()
    # Three tiles take two batches; the cache has them afterwards.
    assert elsewhere.requests == ['encode', 'encode', 'project', 'project', 'project']


def test_a_device_here_does_the_work_of_one_elsewhere_that_fails(pictures):
    elsewhere, here, retired = Elsewhere(), StandInEncoder(), threading.Event()
    remote, encode = RemoteEncoder(elsewhere), here.start

    def fail(tiles):
        raise RuntimeError('connection lost')

    def start(tiles):
        assert retired.wait(HANG)  # so that the one elsewhere takes a tile
        return encode(tiles)

    elsewhere.encode, remote.usable, here.start = fail, lambda: False, start
    stage = VisionStage([here, remote], torch.float32, threads=2)
    retire = stage._queue.retire
    stage._queue.retire = lambda device: retire(device) and not retired.set()
    [image] = stage.submit([job(pictures['coffee'])], 'auto').result(HANG)
    [expected] = StandInEncoder().encode([pictures['coffee']])
    assert torch.equal(image.tokens.embeddings, expected.embeddings)
    assert not stage._work.serves(1) and stage._work.serves(0)
    stage.close()
