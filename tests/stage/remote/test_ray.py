"""Encoders as actors of a real Ray cluster on this machine. (What does not need Ray is in test_fleet.py.)"""

import os
import random
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import ray
import torch
from PIL import Image
from ray._private.authentication_test_utils import reset_auth_token_state
from stage.remote.fake_cluster import wait_until
from waiting import HANG

from lmdeploy_vico.config import VicoConfig
from lmdeploy_vico.options import Options
from lmdeploy_vico.stage.errors import DeviceStartError
from lmdeploy_vico.stage.jobs import ImageJob
from lmdeploy_vico.stage.remote import fleet
from lmdeploy_vico.stage.remote.cluster import NAMESPACE, ClusterError, RayCluster, names, require_protected
from lmdeploy_vico.stage.remote.command import Encoders, Plan
from lmdeploy_vico.stage.remote.fleet import Quest
from lmdeploy_vico.stage.stage import VisionStage
from lmdeploy_vico.vision.encoder import VisionEncoder
from lmdeploy_vico.vision.tile_encoder import TileEncoder
from lmdeploy_vico.vision.tiling import Tiling

pytestmark = pytest.mark.ray

OPTIONS = Options(cache_bytes=2**26)
TILE = 448 * 448 * 3


@pytest.fixture(scope='module')
def cluster_address(tmp_path_factory):
    """A cluster of its own, with a token. No test uses one that happens to run here."""
    home = tmp_path_factory.mktemp('token')
    (home / 'token').write_text('0' * 64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('RAY_AUTH_MODE', 'token')
        patch.setenv('RAY_AUTH_TOKEN_PATH', str(home / 'token'))
        patch.delenv('RAY_ADDRESS', raising=False)
        reset_auth_token_state()
        ray.init(
            address='local', num_cpus=8, include_dashboard=False, object_store_memory=2**28, log_to_driver=False,
            configure_logging=False,
        )  # fmt: skip
        yield ray.get_runtime_context().gcs_address
        ray.shutdown()
    reset_auth_token_state()


@pytest.fixture(scope='module')
def checkpoint(make_checkpoint):
    return make_checkpoint()


@pytest.fixture(scope='module')
def here(checkpoint):
    """What the stage's tokens are compared with."""
    return VisionEncoder(TileEncoder.from_pretrained(checkpoint, device='cpu'))


@pytest.fixture
def start_encoders(cluster_address, checkpoint):
    """``start_encoders(n)``: encoders that are ready; all are taken down at the end."""
    started = []

    def start(number, **options):
        plan = Plan(checkpoint, False, number, cluster_address, False, Options(cache_bytes=2**26, **options))
        encoders = Encoders(plan)
        started.append(encoders)
        encoders.start()
        stop = Ready(encoders, number)
        encoders.watch(stop)
        return encoders

    yield start
    for encoders in started:
        encoders.stop()
    namespaces = {entry['namespace'] for entry in ray.util.list_named_actors(all_namespaces=True)}
    assert not {one for one in namespaces if one.startswith(NAMESPACE)}


class Ready(threading.Event):
    """Ends a watch when all encoders are ready."""

    def __init__(self, encoders, number):
        super().__init__()
        self._encoders, self._number = encoders, number

    def wait(self, timeout=None):
        if len(self._encoders.ready) == self._number:
            self.set()
        return super().wait(timeout)


@pytest.fixture
def stage_on_ray(cluster_address, checkpoint, stage_on):
    def make(encoders, **options):
        cluster = RayCluster(cluster_address, encoders.fingerprint)
        quest = Quest(cluster, encoders.fingerprint, VicoConfig.from_pretrained(checkpoint), 600.0)
        return VisionStage([], torch.bfloat16, threads=2, quest=quest, **options)

    return make


def job(image, most=2):
    return ImageJob(image, Tiling(1, most).grid(image.size))


def random_picture(rng):
    """A picture that no test has shown, of one to three tiles."""
    width, height = rng.integers(200, 900, 2)
    return Image.fromarray(rng.integers(0, 256, (int(height), int(width), 3), np.uint8))


def encoded_here(here, image, compression):
    tiles = here._tiles
    from lmdeploy_vico.vision.tiling import cut_grid

    [tokens] = tiles.encode_tiles([cut_grid(image, job(image).grid)], compression)
    return tokens


def check(image, expected):
    assert image.tokens.tile_tokens == expected.tile_tokens and image.tokens.scores == expected.scores
    assert torch.equal(image.tokens.embeddings, expected.embeddings.to(torch.bfloat16))


@pytest.mark.parametrize('batches', [10, pytest.param(200, marks=pytest.mark.slow)])
def test_bits_are_those_of_an_encoder_here(start_encoders, stage_on_ray, here, rng, batches):
    stage = stage_on_ray(start_encoders(2))
    kinds = ('auto', 'none', 'all', 0.5)
    for index in range(batches):
        pictures = [random_picture(rng) for _ in range(int(rng.integers(1, 3)))]
        futures = [stage.submit([job(one)], kinds[index % 4]) for one in pictures]
        for picture, future in zip(pictures, futures, strict=True):
            [image] = future.result(HANG)
            check(image, encoded_here(here, picture, kinds[index % 4]))
    stage.close()
