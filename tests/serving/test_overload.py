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
from parity.judge import TOKENS, Answer
from PIL import Image
from serving.conftest import Client

from lmdeploy_vico.testing.server import ApiServer

CLIENTS = 16
PATIENCE = 10  # the official client waits as it is told, and tries again
CONNECTIONS, ROUNDS, REQUESTS = 4, 6, 10  # at a time; of so many requests, one after the other on each
ATTEMPTS = 3  # a stage that is slow is slow in each; a neighbour that takes all cores for a second is not
IMAGES = 40  # of the request that keeps the stage busy
QUICK = 0.1  # seconds from sending a request to the last byte of its refusal, for 99 of 100, on an idle machine
DEADLINE = 60  # seconds
PREPARED = 'vico:encoder_preprocess_seconds_count'


@pytest.fixture(scope='module')
def server(serve, make_checkpoint) -> ApiServer:
    return serve(make_checkpoint(), LMDEPLOY_VICO_MAX_QUEUED_TILES='8')


async def ask(client: openai.AsyncOpenAI, model: str, messages: list) -> Answer | openai.APIStatusError:
    try:
        completion = await client.chat.completions.create(
            model=model,
            messages=messages,
            max_tokens=TOKENS,
            temperature=0,
            extra_body={'return_token_ids': True, 'ignore_eos': True},
        )
    except openai.APIStatusError as error:
        return error
    return Answer(tuple(completion.choices[0].model_extra['output_ids']), completion.usage.prompt_tokens)


async def ask_together(server: ApiServer, messages: list, count: int, max_retries: int = 0) -> list:
    client = openai.AsyncOpenAI(base_url=f'{server.url}/v1', api_key='none', max_retries=max_retries, timeout=120)
    model = (await client.models.list()).data[0].id
    return await asyncio.gather(*(ask(client, model, messages) for _ in range(count)))


def test_refused_and_recovered(server, prompts, judge):
    messages = on_the_wire(prompts['one photograph'])

    together = asyncio.run(ask_together(server, messages, CLIENTS))
    later = asyncio.run(ask_together(server, messages, 3, max_retries=PATIENCE))
    refused = [answer for answer in together if isinstance(answer, openai.APIStatusError)]
    answers = [answer for answer in together if isinstance(answer, Answer)]
    assert refused and answers and len(refused) + len(answers) == CLIENTS
    for error in refused:
        assert error.status_code == 503 and error.response.headers['Retry-After'] == '1'
        assert 'tiles are waiting' in error.message and 'Try again later' in error.message
    for answer in (*answers, *later):
        judge().check(prompts['one photograph'], answer)


def test_refusals_are_quick_and_decode_nothing(server, pictures, prompts, judge):
    client = Client(server)
    picture = data_url(pictures['page'], 'JPEG')
    damaged = picture[: picture.index(',') + 1 + 2000]  # its first 1500 bytes
    with contextlib.closing(connect(server)) as busy:
        prepared = keep_busy(client, busy)
        for _ in range(ATTEMPTS):
            answers, probes = refusals(server, client.model, [picture, damaged] * (CONNECTIONS // 2))
            # Whoever decodes a damaged picture answers 400.
            assert {(status, retry_after) for _, status, retry_after in answers} == {(503, '1')}
            # Whatever else keeps the cores busy, this process included, holds up the probes as well.
            slow, probe = np.quantile([seconds for seconds, _, _ in answers], 0.99), max(probes)
            if slow <= QUICK + probe:
                break
        assert client.metric(PREPARED) == prepared
    assert slow <= QUICK + probe, f'99 % within {slow:.3f} s, /health within {probe:.3f} s'
    [answer] = asyncio.run(ask_together(server, on_the_wire(prompts['one photograph']), 1, max_retries=PATIENCE))
    judge().check(prompts['one photograph'], answer)
    with contextlib.closing(connect(server)) as connection:
        assert ask_once(connection, client.model, damaged)[1:] == (400, None)


def keep_busy(client, connection):
    """Send so many images that encoding them takes long; returns how many have been prepared when these are."""
    goal = client.metric(PREPARED) + IMAGES
    noise = np.random.default_rng(5).integers(0, 256, (IMAGES, 30, 40, 3), dtype=np.uint8)
    send(connection, client.model, *(data_url(Image.fromarray(one)) for one in noise))
    deadline = time.monotonic() + DEADLINE
    while client.metric(PREPARED) < goal:
        assert time.monotonic() < deadline, 'the images are not prepared'
    return goal


def connect(server):
    connection = http.client.HTTPConnection('127.0.0.1', server.port, timeout=DEADLINE)
    connection.connect()
    return connection


def send(connection, model, *urls):
    content = [{'type': 'image_url', 'image_url': {'url': url}} for url in urls]
    options = {'max_tokens': 1, 'mm_processor_kwargs': {'image': {'compression': 'all'}}}
    body = json.dumps({'model': model, 'messages': [{'role': 'user', 'content': content}], **options})
    connection.request('POST', '/v1/chat/completions', body, {'Content-Type': 'application/json'})


def ask_once(connection, model, url):
    """Seconds until the whole answer was there, its status, and when to try again."""
    began = time.perf_counter()
    send(connection, model, url)
    response = connection.getresponse()
    response.read()
    return time.perf_counter() - began, response.status, response.getheader('Retry-After')


def probe_once(connection):
    """Seconds that an answer takes which costs the server nothing."""
    began = time.perf_counter()
    connection.request('GET', '/health')
    connection.getresponse().read()
    return time.perf_counter() - began


def refusals(server, model, urls):
    """What connections, one for each picture and kept alive, are told, and what /health took in turns with that.

    In turns, all together, so that no refusal holds up a probe.
    """
    together = threading.Barrier(len(urls), timeout=DEADLINE)

    def ask(url):
        answers, probes = [], []
        with contextlib.closing(connect(server)) as connection:
            for _ in range(ROUNDS):
                together.wait()
                probes += [probe_once(connection) for _ in range(REQUESTS)]
                together.wait()
                answers += [ask_once(connection, model, url) for _ in range(REQUESTS)]
        return answers, probes

    with ThreadPoolExecutor(len(urls)) as pool:
        answers, probes = zip(*pool.map(ask, urls), strict=True)
    return list(chain(*answers)), list(chain(*probes))


def test_metrics_tell_of_it(server):
    with urllib.request.urlopen(f'{server.url}/metrics') as response:
        text = response.read().decode()
    for name in ('vico:tiles_total{resolution="low"}', 'vico:visual_tokens_total', 'vico:encoder_tiles_per_batch_'):
        assert name in text
