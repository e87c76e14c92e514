"""URLs: what they hold, and what of this machine they never show."""

import base64
import os
import urllib.parse

import pytest

from lmdeploy_vico.media.errors import MediaError
from lmdeploy_vico.media.sources import NO_FILE, decode_base64, is_data_url, is_web_url, parse_data_url, read_file

DATA = bytes(range(256)) * 3
TEXT = base64.b64encode(DATA).decode()
LIMIT = 10_000


def held(url, limit=LIMIT):
    return parse_data_url(url).decode(limit)


@pytest.mark.parametrize(
    'head',
    ['image/png;base64', ';base64', 'image/png;charset=utf-8;base64', 'image/png;name=a.png;base64', 'image/png;BASE64',
     'IMAGE/PNG;base64', 'image/svg+xml;base64', '/image/png;base64', 'image/png ;base64'],
)  # fmt: skip
def test_data_urls(head):
    assert held(f'data:{head},{TEXT}') == DATA
    assert held(f'DATA:{head},{TEXT}') == DATA


def test_percent_encoding():
    assert held('data:image/png;base64,' + urllib.parse.quote(TEXT, safe='')) == DATA
    assert held('data:image/png,' + urllib.parse.quote_from_bytes(DATA, safe='')) == DATA


@pytest.mark.parametrize('text', [TEXT.rstrip('='), '\n'.join([TEXT[:76], TEXT[76:]]), f'{TEXT}\r\n', f' {TEXT} '])
def test_base64_as_it_is_written(text):
    assert decode_base64(text, LIMIT) == DATA


def test_the_other_alphabet():
    text = base64.urlsafe_b64encode(DATA).decode()
    assert '-' in text and '_' in text
    assert decode_base64(text, LIMIT) == DATA


@pytest.mark.parametrize(
    'text, message',
    [
        (TEXT.replace('+', ' '), 'base64 of a data URL has spaces: a "+" was probably sent as one'),
        (TEXT.replace('+', '-'), 'base64 of a data URL mixes two alphabets'),
        ('€€€', 'base64 of a data URL is damaged or truncated'),
        (TEXT[:-3], 'base64 of a data URL is damaged or truncated'),
        ('!' * 8, 'base64 of a data URL is damaged or truncated'),
        ('AA=A', 'base64 of a data URL is damaged or truncated'),
    ],
)
def test_base64_that_is_none(text, message):
    with pytest.raises(MediaError) as caught:
        decode_base64(text, LIMIT)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    'url', ['data:', 'data:image/png;base64,', 'data:image/png;base64', f'data:{TEXT},', f'data:{TEXT},a']
)
def test_malformed_data_urls_are_not_repeated(url):
    with pytest.raises(MediaError, match='Invalid data URL') as caught:
        held(url)
    assert len(str(caught.value)) < 200


def test_size_is_known_before_anything_is_decoded():
    huge = 'A' * (4 * LIMIT)
    for url in (f'data:image/png;base64,{huge}', f'data:image/png,{huge}', f'data:video/jpeg;base64,{huge},{huge}'):
        with pytest.raises(MediaError, match=rf'more than {LIMIT} bytes \(option max_media_bytes\)'):
            parse_data_url(url).decode_parts(LIMIT) if 'video' in url else held(url)


def test_a_sequence():
    found = parse_data_url(f'data:video/jpeg;base64,{TEXT},{TEXT}')
    assert found.media_type == 'video/jpeg' and found.decode_parts(LIMIT) == [DATA, DATA]


def test_schemes_have_no_case():
    assert is_data_url('Data:x') and not is_data_url('file:///x') and not is_data_url('')
    assert (
        is_web_url('HTTPS://a') and is_web_url('http://a') and not is_web_url('ftp://a') and not is_web_url('/http://')
    )


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def root(tmp_path):
    allowed = tmp_path / 'allowed'
    allowed.mkdir()
    (allowed / 'a b.png').write_bytes(DATA)
    (tmp_path / 'secret').write_bytes(b'secret')
    os.symlink(tmp_path / 'secret', allowed / 'link')
    os.symlink(tmp_path, allowed / 'up')
    os.mkfifo(allowed / 'pipe')
    (allowed / 'folder').mkdir()
    return allowed


def test_files_below_the_root(root):
    path = root / 'a b.png'
    for url in (str(path), f'file://{path}', f'file://localhost{path}', 'FILE://' + urllib.parse.quote(str(path))):
        assert read_file(url, root, LIMIT) == DATA
        assert read_file(url, None, LIMIT) == DATA


def test_everything_else_is_the_same_sentence(root):
    paths = [
        'link',
        'up/secret',
        '../secret',
        'nothing',
        'pipe',
        'folder',
        'a b.png/x',
        '/etc/passwd',
        '/dev/zero',
        '/proc/self/environ',
    ]
    urls = [str(root / path) for path in paths] + [
        'ftp://host/a',
        'hello',
        '',
        'file://host/etc/passwd',
        'a\0b',
        'x' * 5000,
    ]
    for url in urls:
        with pytest.raises(MediaError) as caught:
            read_file(url, root, LIMIT)
        assert str(caught.value) == NO_FILE, url


@pytest.mark.parametrize('path', ['/dev/zero', '/proc/self/environ', '/dev/stdin'])
def test_what_is_no_regular_file_is_not_read(path, root):
    if path == '/proc/self/environ':
        with pytest.raises(MediaError):
            read_file(path, root, LIMIT)
        return
    with pytest.raises(MediaError, match=NO_FILE):
        read_file(path, None, LIMIT)


def test_a_pipe_waits_for_nobody(root):
    with pytest.raises(MediaError, match=NO_FILE):
        read_file(str(root / 'pipe'), None, LIMIT)


def test_a_large_file(root):
    with pytest.raises(MediaError, match='a file of more than 100 bytes'):
        read_file(str(root / 'a b.png'), root, 100)


@pytest.mark.parametrize(
    'url',
    ['data:,' + 'x' * 11, 'data:,' + '\U0001f600' * 3, 'data:;base64,' + 'eHh4' * 4],
    ids=['ascii', 'emoji', 'base64'],
)
def test_the_limit_is_that_of_the_decoded_bytes(url):
    with pytest.raises(MediaError, match='more than 10 bytes'):
        parse_data_url(url).decode(10)


def test_escapes_count_once():
    assert parse_data_url('data:;base64,' + '%65%48%68%34' * 3).decode(9) == b'xxx' * 3
