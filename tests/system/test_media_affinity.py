"""The script that tells HAProxy which picture a request is about, run by HAProxy itself."""

import base64
import json
import urllib.parse

import numpy as np
import pytest
from ports import free_port
from system.balancer import BODY_BYTES, DEPLOY, HaProxy, StandIn, asking, picture, post, reply

from lmdeploy_vico.adapter.server.forms.parts import _READERS, read_part
from lmdeploy_vico.media.sources import parse_data_url

pytestmark = pytest.mark.system

LARGE = 5 * 2**20 + 1  # bytes of a picture, so that its base64 has padding
CONFIG = """\
global
    tune.bufsize {bytes}
    lua-load-per-thread {script}
defaults
    mode http
    timeout client 60s
    timeout connect 60s
    timeout server 60s
frontend affinity
    bind 127.0.0.1:{port}
    http-request wait-for-body time 60s
    http-request lua.media_affinity
    http-response set-header X-Medium %[var(txn.medium)]
    default_backend servers
backend servers
    server one 127.0.0.1:{server}
"""


@pytest.fixture(scope='module')
def running(tmp_path_factory):
    """HAProxy with the script."""
    with StandIn(lambda handler: reply(handler, 200)) as server:
        port = free_port()
        script = DEPLOY / 'media_affinity.lua'
        text = CONFIG.format(bytes=BODY_BYTES, script=script, port=port, server=server.port)
        with HaProxy(text, port, tmp_path_factory.mktemp('haproxy')) as haproxy:
            yield haproxy


@pytest.fixture(scope='module')
def medium(running):
    """Send a body, of bytes or JSON, and get the hash of its medium; None if there is none."""

    def ask(body):
        status, headers, _ = post(running.url, body)
        assert status == 200
        return headers['X-Medium'] or None

    return ask


def made(seed, size=LARGE):
    """So many bytes that stand for a picture: HAProxy does not look into it."""
    return np.random.default_rng(seed).bytes(size)


def data_url(data, kind='image/png'):
    return f'data:{kind};base64,{base64.b64encode(data).decode()}'


PICTURE = made(1)
URL = data_url(PICTURE)
BASE64 = URL.partition(',')[2]
ITEMS = {
    'chat': picture(URL),
    'with other keys': picture(URL, detail='high', compression='all'),
    'bare URL': {'type': 'image_url', 'image_url': URL},
    'responses': {'type': 'input_image', 'image_url': URL, 'file_id': None},
    'responses, with an object': {'type': 'input_image', 'image_url': {'url': URL}},
    'Hugging Face': {'type': 'image', 'url': URL},
    'image': {'type': 'image', 'image': URL},
    'image_data': {'type': 'image_data', 'image_data': {'url': URL}},
    'file': {'type': 'file', 'file': {'file_data': URL, 'filename': 'a.png'}},
    'input_file': {'type': 'input_file', 'file_data': URL},
    'Anthropic': {'type': 'image', 'source': {'type': 'base64', 'media_type': 'image/png', 'data': BASE64}},
    'Anthropic, URL': {'type': 'image', 'source': {'type': 'url', 'url': URL}},
    'video_url': {'type': 'video_url', 'video_url': {'url': URL}},
    'video': {'type': 'video', 'video': URL},
    'another media type': picture(data_url(PICTURE, 'image/jpeg')),
    'capitals': picture(URL.replace('data:image/png;base64', 'DATA:image/PNG;charset=x;BASE64')),
    'no padding': picture(URL.rstrip('=')),
    'the alphabet of URLs': picture(URL.replace('+', '-').replace('/', '_').replace('image_png', 'image/png')),
    'percent-encoded': picture(
        URL.partition(',')[0] + ',' + urllib.parse.quote(BASE64[:3000], safe='') + BASE64[3000:].replace('+', '%2B')
    ),
    'lines': picture(URL.partition(',')[0] + ',' + base64.encodebytes(PICTURE).decode().replace('\n', '\r\n')),
}


@pytest.mark.parametrize('form', ITEMS)
def test_a_picture_is_the_same_in_every_form(medium, form):
    sent = read_part(ITEMS[form])  # as a server understands it
    assert parse_data_url(sent.value).decode(LARGE) == PICTURE
    assert medium(asking(ITEMS[form])) == medium(asking(picture(URL))) is not None


def test_every_type_of_an_item_is_among_them():
    assert {item['type'] for item in ITEMS.values()} == set(_READERS)


@pytest.mark.parametrize(
    'body',
    [
        {'prompt': 'What is this?', 'image_data': URL},
        {'prompt': 'What is this?', 'image_data': {'url': URL}},
        {'input_ids': list(range(100_000)), 'image_data': [URL, data_url(made(2, 100))]},
        {'input_ids': [[1, 2]], 'image_data': [{'url': URL}]},
        {'input': [{'role': 'user', 'content': [ITEMS['responses']]}]},
        {'input': [{'type': 'function_call_output', 'call_id': 'c', 'output': [ITEMS['responses']]}]},
        {
            'messages': [
                {
                    'role': 'user',
                    'content': [{'type': 'tool_result', 'tool_use_id': 't', 'content': [ITEMS['Anthropic']]}],
                }
            ]
        },
    ],
    ids=['generate', 'an object', 'a list', 'a list of objects', 'responses', 'tool output', 'tool result'],
)
def test_other_endpoints_have_it_elsewhere(medium, body):
    assert medium(body) == medium(asking(picture(URL)))


@pytest.mark.parametrize(
    'spelling',
    [
        lambda body: json.dumps(body, indent=4),
        lambda body: json.dumps(body, separators=(',', ':')),
        lambda body: json.dumps(body).replace('/', '\\/'),
        lambda body: json.dumps(body).replace('data:image', '\\u0064\\u0061ta:im\\u0061ge'),
        lambda body: json.dumps({'model': 'a "quoted\\" name\\\\', 'temperature': -1.5e-3, 'stop': None, **body}),
    ],
    ids=['spaces', 'none', 'slashes', 'escapes', 'before it'],
)
def test_json_has_many_spellings(medium, spelling):
    body = asking(picture(URL))
    assert json.loads(spelling(body)).items() >= body.items()
    assert medium(spelling(body).encode()) == medium(body)


def test_other_pictures_have_other_hashes(medium):
    half = len(BASE64) // 2
    others = [data_url(made(seed, 1000)) for seed in range(50)]
    others += [data_url(PICTURE[:-1]), data_url(PICTURE[1:]), URL, 'http://example.com/a', 'https://example.com/a']
    others += [f'data:image/png;base64,{BASE64[:half]}{"A" if BASE64[half] != "A" else "B"}{BASE64[half + 1 :]}']
    others += [f'data:image/png,{BASE64[:100]}', f'data:image/png;base64,{BASE64[:100]}B']
    hashes = {medium(asking(picture(url))) for url in others}
    assert len(hashes) == len(others) and None not in hashes


def test_the_first_picture_counts(medium):
    """A conversation stays where it is when pictures are added to it."""
    first, second = picture(data_url(made(1, 500))), picture(data_url(made(2, 500)))
    turns = asking(first)['messages']
    longer = [*turns, {'role': 'assistant', 'content': 'A cup.'}, *asking(second)['messages']]
    assert medium({'messages': longer}) == medium({'messages': turns}) != medium(asking(second, first))


@pytest.mark.parametrize('name', ['page 7', 'Seite "ü" \\ 7', 'page 🖼 7', 'data:x'])
def test_a_name_counts_more_than_what_it_names(medium, name):
    url = data_url(made(3, 500))
    named = {'type': 'image_url', 'image_url': None, 'uuid': name}
    forms = [
        picture(url) | {'uuid': name},
        {'uuid': name} | picture(url),
        picture(url, uuid=name),
        picture('https://example.com/other') | {'uuid': name},
        {'type': 'image', 'uuid': name},
        {'type': 'video', 'uuid': name},
    ]
    assert {medium(asking(form)) for form in forms} == {medium(asking(named))}
    assert medium(json.dumps(asking(named), ensure_ascii=False).encode()) == medium(asking(named))
    assert medium(asking(named)) not in {medium(asking(picture(url))), medium(asking(picture(name))), None}
    assert medium(asking(named)) != medium(asking(named | {'uuid': name + ' '}))


NONE = {
    'text': asking(),
    'a plain text': {'messages': [{'role': 'user', 'content': '{"type": "image_url", "image_url": "x"}'}]},
    'words of a picture': asking(text='"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}'),
    'nulls': asking({'type': 'image_url', 'image_url': None, 'uuid': None}),
    'a tool about pictures': {'tools': [{'function': {'parameters': {'image_url': {'type': 'string'}}}}]},
    'numbers': asking({'type': 'image_url', 'image_url': 5}, {'type': 7}, {'type': ['image']}, {'type': {}}),
    'a number as data': {'image_data': [[3]]},
    'empty': b'',
    'no JSON': b'image_url' * 1000,
    'cut': json.dumps(asking(picture(URL))).encode()[:1_000_000],
    'cut in an escape': b'{"type": "image_url", "image_url": "a\\u00',
    'a bad escape': b'[{"type": "image_url", "image_url": "a\\x"}]',
    'deep': b'[' * 1_000_000,
    'deep objects': b'{"a":' * 100_000,
    'many values': json.dumps(['a'] * 500_000).encode(),
    'many escapes': json.dumps('"' * 3_000_000).encode(),
    'bytes': made(4, 100_000),
    'nothing in it': b'[[], {}, [ ], { }, "", null, true, -1e5]',
    'a comma too many': b'{"messages": [,]}',
    'longer than the buffer': asking(picture(data_url(made(5, BODY_BYTES)))),
}


@pytest.mark.parametrize('body', NONE.values(), ids=NONE.keys())
def test_what_has_none_does_no_harm(medium, body):
    assert medium(body) is None
    assert medium(asking(picture(data_url(made(6, 100))))) is not None


def test_the_beginning_of_a_long_request_is_enough(medium):
    small = picture(data_url(made(7, 1000)))
    assert medium(asking(small, picture(data_url(made(8, BODY_BYTES))))) == medium(asking(small))


def in_base64(data):
    """A body with a picture whose base64 is given as it stands in the JSON."""
    return b'[{"type": "image_url", "image_url": "data:;base64,%s"}]' % data


FILLED = 15 * 2**20
HONEST = 3  # requests, of whose processor time the mean counts
DEAREST = 3  # times that of an honest picture of the same size: others wait so long, and HAProxy ends what takes 2 s
HOSTILE = {  # what fills a body
    'escaped letters': b'%41',
    'escaped slashes': b'%2F',
    'percent signs': b'%',
    'hyphens': b'-',
    'every other spelling': b'-_ \r\n\t',
    'backslashes': b'\\',
    'escaped quotes': b'\\"',
    'halves of characters': b'\xed\xa0\x80\xed\xb0\x80',
    'escaped halves': b'\\ud83d\\ude00',
}


@pytest.mark.parametrize('unit', HOSTILE.values(), ids=HOSTILE.keys())
def test_no_body_is_much_dearer_than_a_picture(running, medium, unit):
    honest = in_base64(base64.urlsafe_b64encode(made(9, FILLED * 3 // 4)))
    start = running.processor_seconds()
    assert len({medium(honest) for _ in range(HONEST)}) == 1
    of_honest = (running.processor_seconds() - start) / HONEST
    start = running.processor_seconds()
    medium(in_base64(b'\\n' + unit * (FILLED // len(unit))))
    assert running.processor_seconds() - start < DEAREST * of_honest


@pytest.mark.parametrize('unit', [b'%2F', b'_'])
def test_what_has_too_many_other_spellings_goes_by_its_own(medium, unit):
    """A picture of one colour that is not compressed, say."""
    one, other = (in_base64(unit * 2_000_000 + end) for end in (b'A', b'B'))
    assert medium(one) == medium(one.replace(b'"type"', b' "type"')) != medium(other)
    assert None not in {medium(one), medium(other)}
