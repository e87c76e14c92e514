"""The page at ``/vico``: public, empty of data, and behind the API key in all that it asks."""

import base64
import io
import json
import re
import urllib.error
import urllib.request

import numpy as np
import pytest
from PIL import Image
from serving.configurations import DEFAULT, DOMAIN, KEY, KEYED
from waiting import HANG


def png(size, seed=0):
    file = io.BytesIO()
    width, height = size
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)).save(file, 'PNG')
    return file.getvalue()


def url_of(data):
    return f'data:image/png;base64,{base64.b64encode(data).decode()}'


def fetch(url, body=None, key=None):
    """Status, headers and body."""
    request = urllib.request.Request(url, None if body is None else json.dumps(body).encode())
    request.add_header('Content-Type', 'application/json')
    if key:
        request.add_header('Authorization', f'Bearer {key}')
    try:
        with urllib.request.urlopen(request, timeout=HANG) as response:
            return response.status, response.headers, response.read()
    except urllib.error.HTTPError as error:
        return error.code, error.headers, error.read()


@DEFAULT
def test_there_is_none_unless_it_is_asked_for(client):
    assert fetch(f'{client.server.url}/vico')[0] == 404
    assert fetch(f'{client.server.url}/vico/route', {'images': [url_of(png((60, 40)))]})[0] == 404


@KEYED
def test_the_page_and_what_it_asks(client, judge):
    server = client.server
    page, route = f'{server.url}/vico', f'{server.url}/vico/route'
    _is_public_and_alone(*fetch(page))
    pictures = [png((900, 440), 1), png((448, 448), 2)]
    asked = {'images': [url_of(one) for one in pictures]}
    small = {'images': [url_of(png((60, 40)))]}  # a refused body is not read: a large one could not be sent
    for path in ('/vico/route', '/vico/', '/vico/x', '/v1/models', '/metrics'):
        assert fetch(server.url + path, small if path.endswith('route') else None)[0] == 401, path
    assert fetch(route, small, 'wrong')[0] == 401
    for compression in (None, 'none', 0.5):
        status, _, said = fetch(route, asked | ({} if compression is None else {'compression': compression}), KEY)
        assert status == 200
        _is_what_the_reference_says(json.loads(said), pictures, compression or 'auto', judge().reference)
    _refuses(route)


def _is_public_and_alone(status, headers, html):
    """It holds all that it needs, and may load nothing from anywhere else."""
    text = html.decode()
    assert status == 200 and headers['Content-Type'] == 'text/html; charset=utf-8'
    policy = dict(part.split(' ', 1) for part in headers['Content-Security-Policy'].split('; '))
    assert policy['default-src'] == "'none'" and policy['frame-ancestors'] == "'none'"
    assert policy['script-src'].startswith("'sha256-") and 'unsafe' not in headers['Content-Security-Policy']
    assert not re.search(r'https?://|\b(?:src|href)=|\bon\w+="|innerHTML|document\.write|eval\(', text)
    assert KEY not in text


def _is_what_the_reference_says(said, pictures, compression, reference):
    images = [Image.open(io.BytesIO(data)) for data in pictures]
    for one, other, grid in zip(said['images'], reference.encode(images, compression), ([2, 1], [1, 1]), strict=True):
        assert one['grid'] == grid
        assert [tile['tokens'] for tile in one['tiles']] == other.tile_tokens
        assert np.allclose([tile['score'] for tile in one['tiles']], other.scores, atol=1e-4)
        assert one['tokens'] == sum(other.tile_tokens) and one['tokens_full'] == 256 * len(other.tile_tokens)
    thresholds = said['relative_threshold'], said['absolute_threshold'], said['routing_scope']
    config = reference.config
    assert thresholds == (config['flash_relative_threshold'], config['flash_absolute_threshold'], 'prompt')


def _refuses(route):
    good = url_of(png((60, 40)))
    for body, sentence in (
        ({}, 'The body must be {"images": [...]}'),
        ([good], 'The body must be {"images": [...]}'),
        ({'images': []}, 'The body must be {"images": [...]}'),
        ({'images': [good], 'model': 'x'}, 'The body has the keys images, compression, max_dynamic_patch, and not'),
        ({'images': [good], 'compression': 2}, 'must be "auto", "none", "all"'),
        ({'images': ['data:image/png;base64,AAAA']}, 'image'),
        ({'images': [7]}, 'image_url'),
        ({'images': ['http://elsewhere.test/x.png']}, f'one of the allowed domains: {DOMAIN}'),
        ({'images': [{'url': good, 'detail': 'tiny'}]}, 'detail'),
    ):
        status, _, said = fetch(route, body, KEY)
        assert status == 400 and sentence in json.loads(said)['message'], (body, said)
    request = urllib.request.Request(route, b'{"images": ', {'Authorization': f'Bearer {KEY}'})
    with pytest.raises(urllib.error.HTTPError, match='400'):
        urllib.request.urlopen(request, timeout=HANG)
