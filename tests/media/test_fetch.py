"""Fetching: from the public internet only, within bounds, and over when nobody waits."""

import asyncio
import gzip
import socket
import time
import zlib

import pytest
from aiohttp import web
from media.internet import ADDRESS, Internet
from waiting import HANG

from lmdeploy_vico.media.errors import MediaBusyError, MediaError
from lmdeploy_vico.media.fetch import AT_ONCE, Fetcher

LIMIT = 1 << 20
DATA = bytes(range(256)) * 100


async def whole(request):
    return web.Response(body=DATA)


async def redirect(request):
    return web.Response(status=302, headers={'Location': '/whole'})


async def around(request):
    return web.Response(status=302, headers={'Location': '/around'})


async def inside(request):
    return web.Response(status=302, headers={'Location': 'http://127.0.0.1:1/secret'})


async def to_a_file(request):
    return web.Response(status=302, headers={'Location': 'file:///etc/passwd'})


def encoded(encoding, body):
    async def answer(request):
        response = web.StreamResponse(headers={'Content-Encoding': encoding, 'Content-Length': str(len(body))})
        await response.prepare(request)
        await response.write(body)
        return response

    return answer


async def endless(request):
    response = web.StreamResponse()
    await response.prepare(request)
    while True:
        await response.write(bytes(1 << 16))


async def announced(request):
    response = web.StreamResponse(headers={'Content-Length': str(LIMIT + 1)})
    await response.prepare(request)
    return response


async def dripping(request):
    response = web.StreamResponse(headers={'Content-Length': '1000000'})
    await response.prepare(request)
    while True:
        await response.write(b'x')
        await asyncio.sleep(0.01)


async def cut(request):
    response = web.StreamResponse(headers={'Content-Length': '1000'})
    await response.prepare(request)
    await response.write(b'x' * 10)
    request.transport.close()
    return response


PAGES = {
    'whole': whole, 'redirect': redirect, 'around': around, 'inside': inside, 'to_a_file': to_a_file,
    'gzip': encoded('gzip', gzip.compress(DATA)), 'deflate': encoded('deflate', zlib.compress(DATA)),
    'trailing': encoded('gzip', gzip.compress(DATA) + b'x' * 1000),
    'zeros': encoded('gzip', gzip.compress(bytes(LIMIT))),
    'bomb': encoded('gzip', gzip.compress(bytes(200 << 20))), 'brotli': encoded('br', b'xx'),
    'bad gzip': encoded('gzip', b'hello'), 'endless': endless, 'announced': announced, 'dripping': dripping, 'cut': cut,
}  # fmt: skip


@pytest.fixture
def internet(monkeypatch):
    there = Internet(PAGES)
    monkeypatch.setenv('HTTP_PROXY', there.proxy)
    monkeypatch.setenv('http_proxy', there.proxy)
    for name in ('NO_PROXY', 'no_proxy'):
        monkeypatch.setenv(name, '127.0.0.1')
    yield there
    there.stop()


def fetch(url, limit=LIMIT, seconds=HANG, **options):
    async def run():
        fetcher = Fetcher(limit, seconds)
        try:
            return await fetcher.fetch(url, **options)
        finally:
            fetcher.close()

    return asyncio.run(run())


@pytest.mark.parametrize('name', ['whole', 'redirect', 'gzip', 'deflate'])
def test_fetched(internet, name):
    assert fetch(internet.url(name)) == DATA


def test_what_is_compressed_comes_whole(internet):
    assert fetch(internet.url('zeros')) == bytes(LIMIT)
    assert fetch(internet.url('trailing')) == DATA


@pytest.mark.parametrize(
    'name, reason',
    [
        ('nothing', 'status 404.$'),
        ('around', 'there are too many redirects'),
        ('brotli', 'the host compresses it, which was not asked for'),
        ('bad%20gzip', 'it ended before it was complete'),
        ('cut', 'it ended before it was complete'),
    ],
)
def test_what_cannot_be_fetched(internet, name, reason):
    with pytest.raises(MediaError, match=f'An image or video could not be fetched: {reason}') as caught:
        fetch(internet.url(name))
    assert '10.0.0.7' not in str(caught.value) and '127.0.0.1' not in str(caught.value)


@pytest.mark.parametrize('name', ['inside', 'to_a_file'])
def test_a_redirect_to_where_nothing_is_fetched_from(internet, name):
    with pytest.raises(MediaError, match='URL is blocked for security reasons'):
        fetch(internet.url(name))
    assert len(internet.asked) == 1


@pytest.mark.parametrize(
    'host',
    ['127.0.0.1', '10.1.2.3', '192.168.0.1', '169.254.169.254', '0.0.0.0', '224.0.0.1', '[::1]', '[fe80::1]', '[::]',
     '[::ffff:10.0.0.1]', '[::ffff:127.0.0.1]', '[2002:7f00:1::]', '[64:ff9b::a00:1]',
     '[64:ff9b::7f00:1]', '100.64.0.1', '2130706433', '0x7f.1', 'localhost'],
)  # fmt: skip
def test_hosts_that_are_not_public(internet, host):
    with pytest.raises(MediaError, match='URL is blocked for security reasons: the host is not|resolution failed'):
        fetch(f'http://{host}/whole')
    assert internet.asked == []


@pytest.mark.parametrize(
    'url', ['http:///whole', 'http://', f'ftp://{ADDRESS}/', 'http://[bad/', f'http://{ADDRESS}:x/']
)
def test_malformed_urls(url):
    with pytest.raises(MediaError):
        fetch(url)


def test_a_name_cannot_change_what_it_stands_for(monkeypatch):
    """The address is looked up again to connect: what is connected to is checked as well."""
    answers = iter([ADDRESS, '127.0.0.1'])

    def getaddrinfo(host, port, **options):
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, '', (next(answers), port))]

    monkeypatch.setattr('lmdeploy_vico.media.resolver.socket.getaddrinfo', getaddrinfo)
    monkeypatch.setattr('urllib.request.getproxies', dict)
    with pytest.raises(MediaError, match='the host is not on the public internet'):
        fetch('http://example.com/whole')
    assert next(answers, None) is None


def test_allowed_hosts(internet):
    assert fetch(internet.url('whole'), allowed_hosts=['Example.com', ADDRESS]) == DATA
    with pytest.raises(MediaError, match='must be from one of the allowed domains: example.com.$'):
        fetch(internet.url('whole'), allowed_hosts=['Example.com'])


@pytest.mark.parametrize('name', ['bomb', 'endless', 'announced'])
def test_bytes_are_bounded_after_decompression(internet, name):
    received = []
    with pytest.raises(MediaError, match=rf'a file of more than {LIMIT} bytes \(option max_media_bytes\)'):
        fetch(internet.url(name), received=received.append)
    assert sum(received) <= LIMIT


def test_a_receiver_ends_a_fetch(internet):
    def received(size):
        raise MediaBusyError('no room')

    with pytest.raises(MediaBusyError):
        fetch(internet.url('endless'), received=received)


@pytest.mark.busy
def test_a_deadline_holds_for_all_of_a_fetch(internet):
    """However steadily a byte comes now and then."""
    with pytest.raises(MediaError, match='it takes longer than 0.5 seconds'):
        fetch(internet.url('dripping'), seconds=0.5)


@pytest.mark.busy
def test_a_fetch_ends_when_nobody_waits(internet):
    async def run():
        fetcher = Fetcher(LIMIT, HANG)
        fetches = [asyncio.ensure_future(fetcher.fetch(internet.url('dripping'), 'a')) for _ in range(AT_ONCE + 4)]
        await until(lambda: internet.open == AT_ONCE)  # of one client no more at a time
        assert await fetcher.fetch(internet.url('whole'), 'b') == DATA  # and they hold nobody else up
        for one in fetches:
            one.cancel()
        await asyncio.gather(*fetches, return_exceptions=True)
        await until(lambda: internet.open == 0)
        assert fetcher._turns == {}
        fetcher.close()

    asyncio.run(run())


async def until(true):
    deadline = time.monotonic() + HANG
    while not true():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


def test_others_have_their_turns_while_a_file_is_inflated(internet):
    """A small compressed piece becomes many parts."""
    turns, seen = 0, []

    async def run():
        nonlocal turns
        fetcher = Fetcher(LIMIT, HANG)
        task = asyncio.ensure_future(fetcher.fetch(internet.url('zeros'), received=lambda size: seen.append(turns)))
        while not task.done():
            turns += 1
            await asyncio.sleep(0)
        data = await task
        fetcher.close()
        return data

    assert asyncio.run(run()) == bytes(LIMIT)
    assert len(seen) >= 4 and len(set(seen)) == len(seen)


def test_no_connection_outlives_the_fetches(internet):
    async def run():
        fetcher = Fetcher(LIMIT, HANG)
        await asyncio.gather(*(fetcher.fetch(internet.url('whole')) for _ in range(4)))
        dripping = asyncio.ensure_future(fetcher.fetch(internet.url('dripping')))
        while not internet.open:
            await asyncio.sleep(0)
        assert await fetcher.fetch(internet.url('whole')) == DATA
        [session] = fetcher._sessions.values()
        assert not session.closed
        dripping.cancel()
        await asyncio.gather(dripping, return_exceptions=True)
        assert session.closed and not fetcher._sessions
        fetcher.close()

    asyncio.run(run())
