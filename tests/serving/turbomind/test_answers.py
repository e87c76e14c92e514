"""The unmodified ``lmdeploy serve api_server`` on a stand-in for TurboMind's binding: right answers to every prompt.

The stand-in computes with ``transformers`` from what C++ would be given: weights, ids, one matrix of embeddings and the
ranges where its rows go. It refuses what TurboMind would not serve, or would serve wrongly.
"""

import random
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from parity.conversations import data_url, on_the_wire
from parity.judge import GAP, Answer
from parity.prompts import Picture
from parity.videos import moving_crops, read_video, write_video
from serving.client import CONCURRENCY, check_alone_and_together, generate, send, stream
from serving.configurations import ON_STAND_IN
from waiting import HANG

pytestmark = ON_STAND_IN

LONG = 4000  # tokens, of which no client waits for the last


def test_alone_and_among_others(client, prompts, judge):
    check_alone_and_together(client, prompts, judge().check)


@pytest.mark.parametrize('compression', ['none', 'all', 0.25])
def test_compression_of_a_request(client, prompts, judge, compression):
    name = 'images in the history'
    answer = client.chat(prompts[name], mm_processor_kwargs={'image': {'compression': compression}})
    judge().check(prompts[name], answer, compression, name=name)


def test_images_without_a_token_between_them(client, pictures, judge):
    """Two ranges, the second of which begins where the first ends."""
    image, other = judge().reference.image_token, 7
    urls = [data_url(pictures[name]) for name in ('coffee', 'chelsea')]
    status, body = generate(client, input_ids=[other, image, image, other], image_data=urls)
    assert status == 200, body
    word = judge().reference.tokenizer.decode([other])
    pair = [Picture(pictures[name], wrapped=False) for name in ('coffee', 'chelsea')]
    judgement = judge().reference.judge([word, *pair, word], body['output_ids'])
    assert body['meta_info']['prompt_tokens'] == judgement.prompt_tokens
    assert judgement.gap <= GAP


def test_videos_and_images_in_several_turns(client, pictures, judge, tmp_path):
    file = write_video(tmp_path / 'cup.mp4', moving_crops(pictures['coffee'], 20))
    clip = {'url': file, 'frames': read_video(file, 5), 'num_frames': 5}
    image = {'type': 'image_url', 'image_url': {'url': pictures['page']}}
    messages = [
        {
            'role': 'user',
            'content': [{'type': 'video_url', 'video_url': clip}, {'type': 'text', 'text': 'What is it?'}],
        },
        {'role': 'assistant', 'content': 'A cup.'},
        {'role': 'user', 'content': [image, {'type': 'text', 'text': 'And this?'}]},
    ]
    judge().check(messages, client.chat(messages))


def canceled(client):
    return client.server.log_text().count('canceled after')


def test_clients_that_leave_take_their_requests_along(client, prompts, judge):
    """They are served side by side with those that stay, whose answers do not change."""
    before, leaving = canceled(client), ('one photograph', 'text only', 'a scanned page')
    sockets = []
    for name in leaving:
        body = {'model': client.model, 'messages': on_the_wire(prompts[name]), 'max_tokens': LONG, 'ignore_eos': True}
        sockets.append(send(client, '/v1/chat/completions', {**body, 'stream': True, 'temperature': 0}))
    with ThreadPoolExecutor(CONCURRENCY) as pool:
        staying = random.Random(3).choices(list(prompts), k=CONCURRENCY)
        asked = [pool.submit(client.chat, prompts[name]) for name in staying]
        for one in sockets:
            while b'data: ' not in one.recv(4096):  # it is being answered
                pass
            one.close()
        for name, answer in zip(staying, asked, strict=True):
            judge().check(prompts[name], answer.result(), name=name)
    deadline = time.monotonic() + HANG
    while canceled(client) < before + len(leaving):
        assert time.monotonic() < deadline, 'they are still being answered'
    judge().check(prompts['very tall'], client.chat(prompts['very tall']), name='very tall')


def test_streamed(client, prompts, judge):
    body = {'model': client.model, 'messages': on_the_wire(prompts['very wide']), 'max_tokens': 12, 'temperature': 0}
    body |= {'ignore_eos': True, 'return_token_ids': True, 'stream_options': {'include_usage': True}}
    *events, last = stream(client, '/v1/chat/completions', body)
    ids = [token for event in events for choice in event['choices'] for token in choice.get('output_ids') or []]
    judge().check(prompts['very wide'], Answer(tuple(ids), last['usage']['prompt_tokens']), name='very wide')


def test_the_start_says_what_runs_and_what_it_lacks(client):
    log = client.server.log_text()
    assert 'language model on TurboMind, as LMDEPLOY_VICO_LANGUAGE_ENGINE=turbomind says: EXPERIMENTAL' in log
    assert 'a stand-in serves in the place of TurboMind, in torch.bfloat16' in log
    assert 'TurboMind runs in bfloat16' in log
    for lack in ('neither use nor fill the prefix cache', 'no LoRA adapters', 'no logit_bias', 'of greedy answers'):
        assert log.count(lack) == 1
    assert '--enable-prefix-caching helps prompts without images only' in log
    assert 'Prefix caching is disabled' not in log
    assert 'invalid request' not in log and 'Traceback' not in log
