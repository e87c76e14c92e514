"""Fetches images and videos from the public internet, within bounds of bytes and of time.

The addresses of a host are checked, and connected to: what a name stands for cannot change in between. A client that
leaves takes its fetches with it, as they are cancelled.
"""

import asyncio
import ipaddress
import socket
import urllib.request
import zlib
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Iterator
from contextlib import asynccontextmanager
from urllib.parse import urljoin, urlsplit

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult

from lmdeploy_vico.media.errors import MediaError
from lmdeploy_vico.media.sources import is_web_url, too_large

REDIRECTS = 3
PIECE = 1 << 18  # bytes
AT_ONCE = 8  # of a client
PORTS = {'http': 80, 'https': 443}
NAT64 = ipaddress.IPv6Network('64:ff9b::/96')
# Some hosts answer programs that do not look like a browser with 403.
HEADERS = {
    'User-Agent': 'Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/120.0 Safari/537.36',
    'Accept-Encoding': 'identity',
}
BLOCKED = 'URL is blocked for security reasons: '


class Fetcher:
    """Fetches for one server. Sessions belong to the event loop that used it first.

    Args:
        limit: bytes of a file, as it is after decompression.
        seconds: for all of a fetch, redirects included.
    """

    def __init__(self, limit: int, seconds: float) -> None:
        self._limit, self._seconds = limit, seconds
        self._turns: dict[str, tuple[asyncio.Semaphore, int]] = {}
        self._sessions: dict[bool, aiohttp.ClientSession] = {}

    async def fetch(
        self,
        url: str,
        client: str = '',
        allowed_hosts: Collection[str] | None = None,
        received: Callable[[int], None] = lambda size: None,
    ) -> bytes:
        """Fetch a file.

        Args:
            url: http or https.
            client: who wants it; each has at most eight fetches at a time.
            allowed_hosts: the only ones that are fetched from; None for all.
            received: called with the size of every piece; what it raises ends the fetch.

        Raises:
            MediaError: it cannot be fetched, is too large, or takes too long. The text says nothing of the network.
        """
        allowed = {host.lower() for host in allowed_hosts} if allowed_hosts else None
        async with self._turn(client):
            try:
                return await asyncio.wait_for(self._follow(url, allowed, received), self._seconds)
            except asyncio.TimeoutError:  # Python 3.10 has another of that name
                raise MediaError(
                    f'An image or video could not be fetched: it takes longer than {self._seconds:g} seconds.'
                ) from None
            except (aiohttp.ClientError, OSError, ValueError, zlib.error) as error:
                if isinstance(error, MediaError):
                    raise
                raise MediaError(f'An image or video could not be fetched: {_reason(error)}.') from None

    @asynccontextmanager
    async def _turn(self, client: str) -> AsyncIterator[None]:
        turn, users = self._turns.get(client) or (asyncio.Semaphore(AT_ONCE), 0)
        self._turns[client] = turn, users + 1
        try:
            async with turn:
                yield
        finally:
            turn, users = self._turns.pop(client)
            if users > 1:
                self._turns[client] = turn, users - 1

    async def _follow(self, url: str, allowed: Collection[str] | None, received: Callable[[int], None]) -> bytes:
        for _ in range(REDIRECTS + 1):
            proxy = await _check(url, allowed)
            session = self._session(proxied=proxy is not None)
            async with session.get(url, headers=HEADERS, proxy=proxy, allow_redirects=False) as response:
                if response.status in (301, 302, 303, 307, 308):
                    url = urljoin(url, response.headers.get('Location', ''))
                    continue
                if response.status >= 400:
                    raise MediaError(f'An image or video could not be fetched: status {response.status}.')
                return await self._read(response, received)
        raise MediaError('An image or video could not be fetched: there are too many redirects.')

    def _session(self, proxied: bool) -> aiohttp.ClientSession:
        """The session for direct connections, which connects to public addresses only, or that for proxies."""
        session = self._sessions.get(proxied)
        if session is None or session.closed:
            connector = aiohttp.TCPConnector(limit=0, resolver=None if proxied else _PublicResolver())
            # One deadline holds for all of a fetch; aiohttp's own would begin anew with every redirect.
            timeout = aiohttp.ClientTimeout(total=None, sock_connect=self._seconds)
            session = self._sessions[proxied] = aiohttp.ClientSession(
                connector=connector, timeout=timeout, auto_decompress=False, cookie_jar=aiohttp.DummyCookieJar()
            )
        return session

    async def _read(self, response: aiohttp.ClientResponse, received: Callable[[int], None]) -> bytes:
        if response.content_length is not None and response.content_length > self._limit:
            raise too_large(self._limit)
        decoded = _decoder(response.headers.get('Content-Encoding', '').strip().lower())
        data = bytearray()
        async for piece in response.content.iter_chunked(PIECE):
            for part in decoded(piece):
                if len(data) + len(part) > self._limit:
                    raise too_large(self._limit)
                received(len(part))
                data += part
        return bytes(data)

    async def close(self) -> None:
        """Close all connections."""
        for session in self._sessions.values():
            await session.close()


async def _check(url: str, allowed: Collection[str] | None) -> str | None:
    """Refuse what must not be fetched; returns the proxy that the environment names for it, if there is one."""
    parts = urlsplit(url)
    if not is_web_url(url):
        raise MediaError(f'{BLOCKED}the scheme is neither http nor https.')
    host = (parts.hostname or '').lower()
    if not host:
        raise MediaError(f'{BLOCKED}it names no host.')
    if allowed is not None and host not in allowed:
        raise MediaError(f'The URL must be from one of the allowed domains: {", ".join(sorted(allowed))}.')
    await _public_addresses(host, parts.port or PORTS[parts.scheme.lower()])
    if urllib.request.proxy_bypass(host):
        return None
    return urllib.request.getproxies().get(parts.scheme.lower())


class _PublicResolver(AbstractResolver):
    """Resolves hosts to public addresses, or not at all."""

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        return [
            ResolveResult(hostname=host, host=address, port=port, family=kind, proto=0, flags=socket.AI_NUMERICHOST)
            for kind, address in await _public_addresses(host, port)
            if family in (socket.AF_UNSPEC, kind)
        ]

    async def close(self) -> None:
        """Nothing is kept."""


async def _public_addresses(host: str, port: int) -> list[tuple[socket.AddressFamily, str]]:
    """The addresses of a host; raises MediaError unless all of them are public."""
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise MediaError(f'{BLOCKED}Hostname resolution failed') from None
    addresses: list[tuple[socket.AddressFamily, str]] = [(kind, str(address[0])) for kind, _, _, _, address in found]
    for _, address in addresses:
        if not _is_public(ipaddress.ip_address(address.partition('%')[0])):
            raise MediaError(f'{BLOCKED}the host is not on the public internet.')
    return addresses


def _is_public(ip: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    if not ip.is_global or ip.is_multicast:
        return False
    if isinstance(ip, ipaddress.IPv4Address):
        return True
    # Addresses of the other kind that stand in this one, and are what is connected to in the end.
    inner = [ip.ipv4_mapped, ip.sixtofour, *(ip.teredo or ())]
    if ip in NAT64:
        inner.append(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF))
    return all(one is None or _is_public(one) for one in inner)


def _decoder(encoding: str) -> Callable[[bytes], Iterable[bytes]]:
    """What undoes a Content-Encoding, a bounded piece at a time."""
    if encoding in ('', 'identity'):
        return lambda piece: [piece]
    if encoding not in ('gzip', 'x-gzip', 'deflate'):
        raise MediaError('An image or video could not be fetched: the host compresses it, which was not asked for.')
    inflate = zlib.decompressobj(wbits=zlib.MAX_WBITS | 32)

    def inflated(piece: bytes) -> Iterator[bytes]:
        while not inflate.eof:  # what follows the end is nothing of ours
            part = inflate.decompress(piece, PIECE)
            yield part
            piece = inflate.unconsumed_tail
            if not piece and len(part) < PIECE:
                return

    return inflated


def _reason(error: BaseException) -> str:
    """What went wrong, without what was connected to."""
    if isinstance(error, aiohttp.InvalidURL):
        return 'the URL is malformed'
    if isinstance(error, aiohttp.ClientConnectorError):
        return 'there is no connection'
    if isinstance(error, aiohttp.ClientPayloadError | zlib.error):
        return 'it ended before it was complete'
    return 'the connection was lost'
