"""A server with API keys reads nothing of those who have none, and lets no body arrive for ever."""

import json
import socket
import urllib.request

from serving.configurations import KEYED, OTHER_KEY
from waiting import HANG

HEAD = b'POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 1000000\r\n'


@KEYED
def test_nothing_is_read_without_a_key(client):
    server, authorization = client.server, f'Bearer {OTHER_KEY}'
    for header in (b'', b'Authorization: Bearer invented\r\n'):
        with socket.create_connection(('127.0.0.1', server.port), timeout=HANG) as stalled:
            stalled.sendall(HEAD + header + b'\r\n' + b'{')  # and no more of the body
            assert stalled.recv(100).split()[1] == b'401'
    body = {'model': client.model, 'messages': [{'role': 'user', 'content': 'Hi'}], 'max_tokens': 2}
    request = urllib.request.Request(
        f'{server.url}/v1/chat/completions',
        json.dumps(body).encode(),
        {'Content-Type': 'application/json', 'Authorization': authorization},
    )
    with urllib.request.urlopen(request, timeout=HANG) as answer:
        assert answer.status == 200
    with socket.create_connection(('127.0.0.1', server.port), timeout=HANG) as stalled:
        stalled.sendall(HEAD + f'Authorization: {authorization}\r\n\r\n{{'.encode())
        assert stalled.recv(100).split()[1] == b'408'
