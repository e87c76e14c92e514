"""More images than the vision stage accepts: 503 for some, right answers for the others, and recovery."""

import asyncio
import contextlib
import http.client
import json
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from itertools import chain

import numpy as np
import openai
import pytest
from parity.conversations import data_url, on_the_wire
from parity.judge import Answer
from PIL import Image
from serving.client import ask_together
from waiting import HANG

CLIENTS = 16
PATIENCE = 10  # the official client waits as it is told, and tries again
CONNECTIONS, REQUESTS = 4, 5  # at a time; one after the other on each
ATTEMPTS = 3  # to ask while the stage is busy; nobody says how long a neighbour takes all cores
IMAGES, TILES = 40, 13  # of the request that keeps the stage busy, and of each of these
PREPARED, DECODED = 'vico:encoder_preprocess_seconds_count', 'vico:encoder_decode_seconds_count'


pytestmark = pytest.mark.served(LMDEPLOY_VICO_MAX_QUEUED_TILES='8')


@pytest.mark.busy
def test_refused_and_recovered(client, prompts, judge):
    messages = on_the_wire(prompts['one photograph'])

    for _ in range(ATTEMPTS):
        with contextlib.closing(connect(client.server)) as busy:
            keep_busy(client, busy)
            together = asyncio.run(ask_together(client.server, messages, CLIENTS))
        refused = [answer for answer in together if isinstance(answer, openai.APIStatusError)]
        if refused:
            break
    later = asyncio.run(ask_together(client.server, messages, 3, max_retries=PATIENCE))
    answers = [answer for answer in together if isinstance(answer, Answer)]
    assert refused and len(refused) + len(answers) == CLIENTS
    for error in refused:
        assert error.status_code == 503 and error.response.headers['Retry-After'] == '1'
        assert 'tiles are waiting' in error.message and 'Try again later' in error.message
    for answer in (*answers, *later):
        judge().check(prompts['one photograph'], answer)


@pytest.mark.busy
def test_refusals_wait_for_nothing_and_decode_nothing(client, pictures, prompts, judge):
    server = client.server
    picture = data_url(pictures['page'], 'JPEG')
    damaged = picture[: picture.index(',') + 1 + 2000]  # its first 1500 bytes
    for _ in range(ATTEMPTS):
        with contextlib.closing(connect(server)) as busy:
            prepared, tiles = keep_busy(client, busy)
            decoded = client.metric(DECODED)
            answers = refusals(server, client.model, [picture, damaged] * (CONNECTIONS // 2))
            counts = client.metric(PREPARED), client.metric(DECODED)
            still_busy = client.encoded_tiles() < tiles
        if still_busy:
            break
    # Who waits for the stage is answered when it has encoded what keeps it busy, in every attempt.
    assert still_busy
    # Whoever decodes a damaged picture answers 400.
    assert set(answers) == {(503, '1')}
    assert counts == (prepared, decoded)
    [answer] = asyncio.run(ask_together(client.server, on_the_wire(prompts['one photograph']), 1, max_retries=PATIENCE))
    judge().check(prompts['one photograph'], answer)
    with contextlib.closing(connect(server)) as connection:
        assert ask_once(connection, client.model, damaged) == (400, None)


def keep_busy(client, connection):
    """Send so many images that encoding them takes long, and wait until they are prepared.

    Returns how many images have been prepared then, and how many tiles will have been encoded when these are.
    """
    tiles = client.encoded_tiles() + IMAGES * TILES
    goal = client.metric(PREPARED) + IMAGES
    rng = np.random.default_rng(int(goal))  # pictures that nobody has sent before
    noise = rng.integers(0, 256, (IMAGES, 30, 40, 3), dtype=np.uint8)
    send(connection, client.model, *(data_url(Image.fromarray(one)) for one in noise))
    deadline = time.monotonic() + HANG
    while client.metric(PREPARED) < goal:
        assert time.monotonic() < deadline, 'the images are not prepared'
    return goal, tiles


def connect(server):
    connection = http.client.HTTPConnection('127.0.0.1', server.port, timeout=HANG)
    connection.connect()
    return connection


def send(connection, model, *urls):
    content = [{'type': 'image_url', 'image_url': {'url': url}} for url in urls]
    options = {'max_tokens': 1, 'mm_processor_kwargs': {'image': {'compression': 'all'}}}
    body = json.dumps({'model': model, 'messages': [{'role': 'user', 'content': content}], **options})
    connection.request('POST', '/v1/chat/completions', body, {'Content-Type': 'application/json'})


def ask_once(connection, model, url):
    """The status of the answer, and when to try again."""
    send(connection, model, url)
    response = connection.getresponse()
    response.read()
    return response.status, response.getheader('Retry-After')


def refusals(server, model, urls):
    """What connections, one for each picture and kept alive, are told, all asking together."""
    together = threading.Barrier(len(urls), timeout=HANG)

    def ask(url):
        with contextlib.closing(connect(server)) as connection:
            together.wait()
            return [ask_once(connection, model, url) for _ in range(REQUESTS)]

    with ThreadPoolExecutor(len(urls)) as pool:
        return list(chain(*pool.map(ask, urls)))


def test_metrics_tell_of_it(client):
    with urllib.request.urlopen(f'{client.server.url}/metrics') as response:
        text = response.read().decode()
    for name in (
        'vico:tiles_total{resolution="compressed"}',
        'vico:visual_tokens_total',
        'vico:encoder_tiles_per_batch_',
    ):
        assert name in text
