"""``X-Request-Id`` of a server: in answers of every kind."""

import json
import urllib.error
import urllib.request

import pytest
from serving.configurations import LIMITED
from waiting import HANG

pytestmark = LIMITED

ASK = {'messages': [{'role': 'user', 'content': 'Hello!'}], 'max_tokens': 2}


def answered(client, body, **headers):
    """Status and id of the answer to a chat request."""
    data = json.dumps({'model': client.model, **body}).encode()
    address = f'{client.server.url}/v1/chat/completions'
    request = urllib.request.Request(address, data, {'Content-Type': 'application/json', **headers})
    try:
        with urllib.request.urlopen(request, timeout=HANG) as response:
            response.read()
            return response.status, response.headers.get_all('X-Request-Id')
    except urllib.error.HTTPError as error:
        return error.code, error.headers.get_all('X-Request-Id')


@pytest.mark.parametrize(
    'body, status',
    [
        (ASK, 200),
        (ASK | {'stream': True}, 200),
        (ASK | {'messages': []}, 400),
        (ASK | {'mm_processor_kwargs': {'image': {'compression': 'most'}}}, 400),
    ],
)
def test_an_answer_has_the_id_of_its_request(client, body, status):
    assert answered(client, body, **{'X-Request-Id': 'trace-7'}) == (status, ['trace-7'])
    got, [made_up] = answered(client, body)
    assert got == status and len(made_up) == 32
