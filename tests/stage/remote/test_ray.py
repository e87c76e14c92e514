"""Encoders as actors of a real Ray cluster on this machine. (What does not need Ray is in test_fleet.py.)"""

import logging
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import ray
import torch
from PIL import Image
from ray.exceptions import RayActorError
from ray_cluster import own_cluster, started
from stage.remote.fake_cluster import wait_until
from waiting import HANG

from lmdeploy_vico.checkpoints.fingerprint import vision_fingerprint
from lmdeploy_vico.config import VicoConfig
from lmdeploy_vico.options import Options
from lmdeploy_vico.ports import hold_port
from lmdeploy_vico.stage.jobs import ImageJob
from lmdeploy_vico.stage.remote.cluster import (
    NAMESPACE,
    ClusterError,
    RayAnswer,
    RayChannel,
    RayCluster,
    names,
    require_listener,
    require_protected,
)
from lmdeploy_vico.stage.remote.command import Encoders, Plan, take_down
from lmdeploy_vico.vision.encoder import VisionEncoder
from lmdeploy_vico.vision.tile_encoder import TileEncoder
from lmdeploy_vico.vision.tiling import Tiling, cut_grid

pytestmark = pytest.mark.slow  # a cluster takes ten seconds; what takes minutes is marked ray

KINDS = ('auto', 'none', 'all', 0.5)
TILE = 448 * 448 * 3  # bytes
CLIENTS, SECONDS = 32, 180  # of the long test


@pytest.fixture(scope='module')
def cluster_address(tmp_path_factory):
    with own_cluster(tmp_path_factory.mktemp('token')) as address:
        yield address


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
    running = []

    def start(number):
        running.append(started(cluster_address, checkpoint, number))
        return running[-1]

    yield start
    for encoders in running:
        encoders.stop()
    namespaces = {entry['namespace'] for entry in ray.util.list_named_actors(all_namespaces=True)}
    assert not {one for one in namespaces if one.startswith(NAMESPACE)}


@pytest.fixture
def stage_on_ray(cluster_address, checkpoint, stage_on):
    config = VicoConfig.from_pretrained(checkpoint)
    return lambda encoders, **options: stage_on(
        RayCluster(cluster_address, encoders.fingerprint), config=config, fingerprint=encoders.fingerprint, **options
    )


def job(image, most=2):
    return ImageJob(image, Tiling(1, most).grid(image.size))


def random_picture(rng):
    """A picture that no test has shown, of one to three tiles."""
    width, height = rng.integers(200, 900, 2)
    return Image.fromarray(rng.integers(0, 256, (int(height), int(width), 3), np.uint8))


def encoded_here(here, image, compression):
    [tokens] = here._tiles.encode_tiles([cut_grid(image, job(image).grid)], compression)
    return tokens


def check(image, expected):
    assert image.tokens.tile_tokens == expected.tile_tokens and image.tokens.scores == expected.scores
    assert torch.equal(image.tokens.embeddings, expected.embeddings.to(torch.bfloat16))


@pytest.mark.parametrize(
    'batches', [pytest.param(10, marks=pytest.mark.long), pytest.param(200, marks=pytest.mark.ray)]
)
def test_bits_are_those_of_an_encoder_here(start_encoders, stage_on_ray, here, rng, batches):
    stage = stage_on_ray(start_encoders(2))
    for index in range(batches):
        pictures = [random_picture(rng) for _ in range(int(rng.integers(1, 3)))]
        futures = [stage.submit([job(one)], KINDS[index % 4]) for one in pictures]
        for picture, future in zip(pictures, futures, strict=True):
            [image] = future.result(HANG)
            check(image, encoded_here(here, picture, KINDS[index % 4]))


def kill(encoders, index):
    """Kill the process of an encoder, which Ray replaces; return whether there was one: it may be just starting."""
    name = sorted(encoders.ready)[index]
    actor = ray.get_actor(name, NAMESPACE + encoders.fingerprint)
    try:
        os.kill(ray.get(actor.__ray_call__.remote(lambda _: os.getpid())), signal.SIGKILL)
    except (RayActorError, ProcessLookupError):
        return False
    return True


@pytest.mark.long
def test_no_answer_is_lost_or_wrong_while_encoders_are_killed_added_and_removed(
    start_encoders, stage_on_ray, here, rng
):
    """Four clients, and after every so many answers something happens to the encoders."""
    encoders = start_encoders(2)
    stage = stage_on_ray(encoders)
    pictures = [random_picture(rng) for _ in range(40)]
    answered, happened = [], []

    def ask(index):
        [image] = stage.submit([job(pictures[index])], KINDS[index % 4]).result(HANG)
        answered.append(index)
        return image

    with ThreadPoolExecutor(4) as clients:
        answers = [clients.submit(ask, index) for index in range(len(pictures))]
        for index, happens in (
            (5, lambda: kill(encoders, 0)),
            (12, lambda: start_encoders(1)),
            (20, lambda: take_down(NAMESPACE + encoders.fingerprint, sorted(encoders.ready)[1:])),
            (30, lambda: kill(encoders, 0)),
        ):
            answers[index].result(HANG)
            happens()
            happened.append(len(answered))
        images = [answer.result(HANG) for answer in answers]
    for index, image in enumerate(images):
        check(image, encoded_here(here, pictures[index], KINDS[index % 4]))
    assert sorted(answered) == list(range(len(pictures))) and happened[0] < len(pictures)
    wait_until(lambda: len(stage._workers[0]._lanes) == 2)


@pytest.mark.long
def test_two_stages_share_two_encoders(start_encoders, stage_on_ray, here, rng):
    encoders = start_encoders(2)
    stages = [stage_on_ray(encoders) for _ in range(2)]
    for stage in stages:
        wait_until(lambda stage=stage: len(stage._workers[0]._lanes) == 2)
    pictures = [random_picture(rng) for _ in range(12)]
    futures = [stage.submit([job(one)], 'auto') for one in pictures for stage in stages]
    for index, future in enumerate(futures):
        [image] = future.result(HANG)
        check(image, encoded_here(here, pictures[index // 2], 'auto'))


def serialized(value):
    """Bytes of a value as Ray sends it."""
    return ray._private.worker.global_worker.get_serialization_context().serialize(value).total_bytes


@pytest.mark.long
def test_what_crosses_the_wire_is_what_docs_say(start_encoders, stage_on_ray, rng, monkeypatch):
    """A tile costs its pixels, and its tokens; besides these, less than 1 kB a tile."""
    sent, received, call, result = [], [], RayChannel.call, RayAnswer.result

    def count_call(channel, method, *arguments):
        if method != 'hello':
            sent.append(sum(map(serialized, arguments)))
        return call(channel, method, *arguments)

    def count_result(answer):
        value = result(answer)
        if not isinstance(value, dict):
            received.append(serialized(value))
        return value

    encoders = start_encoders(1)
    monkeypatch.setattr(RayChannel, 'call', count_call)
    monkeypatch.setattr(RayAnswer, 'result', count_result)
    stage = stage_on_ray(encoders, cache_bytes=2**24)
    picture = random_picture(rng)
    [image] = stage.submit([job(picture)], 'none').result(HANG)
    tiles, width = len(image.tokens.tile_tokens), image.tokens.embeddings.shape[1]
    tokens = tiles * 256 * width * 2
    assert tiles * TILE < sum(sent) < tiles * (TILE + 1024)
    assert tokens < sum(received) < tokens + tiles * 1024
    sent.clear(), received.clear()
    stage.submit([job(picture)], 'all').result(HANG)
    assert sum(sent) < 1024 + tiles * 64, 'a tile that is known crosses by its digest'
    assert tokens / 4 < sum(received) < tokens / 4 + tiles * 1024


@pytest.mark.long
def test_an_open_cluster_is_refused(cluster_address, monkeypatch):
    require_protected(cluster_address, insecure=False)
    monkeypatch.setenv('RAY_AUTH_MODE', 'disabled')
    with pytest.raises(ClusterError, match='without token authentication: whoever reaches it can run code on all'):
        require_protected(cluster_address, insecure=False)
    require_protected(cluster_address, insecure=True)


@pytest.mark.long
def test_more_encoders_than_there_is_room_for_are_refused(cluster_address, checkpoint):
    with pytest.raises(ClusterError, match='9 encoders need 9 CPUs of this machine, and Ray counts 8 on it'):
        Encoders(Plan(checkpoint, False, 9, cluster_address, False, Options()))


def test_a_cluster_that_is_not_there_is_named():
    with hold_port('127.0.0.1') as held:
        port = held.getsockname()[1]
    with pytest.raises(ClusterError, match=f"No Ray cluster answers at '127.0.0.1:{port}'"):
        require_listener(f'127.0.0.1:{port}')


@pytest.mark.long
def test_the_command_stays_until_it_is_told_to_end(cluster_address, checkpoint, tmp_path, stage_on_ray, here, rng):
    command = [sys.executable, '-m', 'lmdeploy_vico.cli', 'encoder', '--model', str(checkpoint), '--devices', 'cpu']
    log = tmp_path / 'log'
    with log.open('wb') as output:
        process = subprocess.Popen([*command, '--num', '2', '--address', cluster_address], stderr=output)
    try:
        config = VicoConfig.from_pretrained(checkpoint)
        fingerprint = vision_fingerprint(checkpoint, config)
        stage = stage_on_ray(SimpleNamespace(fingerprint=fingerprint))
        picture = random_picture(rng)
        [image] = stage.submit([job(picture)], 'auto').result(HANG)
        check(image, encoded_here(here, picture, 'auto'))
        process.send_signal(signal.SIGTERM)
        assert process.wait(HANG) == 0, log.read_text()
    finally:
        process.kill()
        process.wait()
    assert names(NAMESPACE + fingerprint) == []
    text = log.read_text()
    assert text.count('is taken down') == 2 and f'2 encoders of {checkpoint} (fingerprint {fingerprint}) start' in text


@pytest.mark.ray
def test_three_minutes_of_clients_and_of_encoders_that_come_and_go(start_encoders, stage_on_ray, here):
    """32 clients; meanwhile encoders are killed, added and removed at random. (Its end is the only thing timed.)"""
    encoders = start_encoders(3)
    stage = stage_on_ray(encoders, cache_bytes=2**22)
    draw = random.Random(7)
    pictures = [random_picture(np.random.default_rng(seed)) for seed in range(60)]
    expected = [[encoded_here(here, picture, kind) for kind in KINDS] for picture in pictures]
    over, counts, events = time.monotonic() + SECONDS, Counter(), Counter()

    def client(seed):
        choose = random.Random(seed)
        while time.monotonic() < over:
            index, kind = choose.randrange(len(pictures)), choose.randrange(4)
            [image] = stage.submit([job(pictures[index])], KINDS[kind]).result(HANG)
            check(image, expected[index][kind])
            counts[seed] += 1

    extra, namespace = [], NAMESPACE + encoders.fingerprint
    with ThreadPoolExecutor(CLIENTS) as clients:
        running = [clients.submit(client, seed) for seed in range(CLIENTS)]
        while time.monotonic() < over:
            what = draw.choice(('kill', 'kill', 'add', 'remove'))
            if what == 'kill' and kill(encoders, draw.randrange(3)):
                pass
            elif what == 'add' and len(extra) < 3:
                extra.append(start_encoders(1))
            elif what == 'remove' and extra:
                take_down(namespace, list(extra.pop().ready))
            else:
                continue
            events[what] += 1
            threading.Event().wait(draw.uniform(1, 6))
        for one in running:
            one.result(HANG)
    logging.getLogger('lmdeploy_vico').warning('%d answers, all right; %s', sum(counts.values()), dict(events))
    assert len(counts) == CLIENTS
