"""Fetches images and videos from the public internet, within bounds of bytes and of time.

The addresses of a host are checked, and connected to: what a name stands for cannot change in between. A client that
leaves takes its fetches with it, as they are cancelled.
"""

import asyncio
import io
import ipaddress
import socket
import urllib.request
import zlib
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager
from contextvars import ContextVar
from urllib.parse import urljoin, urlsplit

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult

from lmdeploy_vico.media.errors import MediaError
from lmdeploy_vico.media.resolver import Address, Resolver
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
_client: ContextVar[str] = ContextVar('client', default='')  # for whom this task fetches; aiohttp resolves by itself


class Fetcher:
    """Fetches for one server, in one event loop at a time. Connections are shared by fetches that overlap.

    Args:
        limit: bytes of a file, as it is after decompression.
        seconds: for all of a fetch, redirects included.
    """

    def __init__(self, limit: int, seconds: float) -> None:
        self._limit, self._seconds = limit, seconds
        self._turns: dict[str, tuple[asyncio.Semaphore, int]] = {}
        self._sessions: dict[bool, aiohttp.ClientSession] = {}
        self._fetches = 0  # under way
        self._names = _PublicNames(Resolver())

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
        _client.set(client)
        async with self._turn(client), self._connections():
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
            proxy = await self._check(url, allowed)
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
        if session is None:
            connector = aiohttp.TCPConnector(limit=0, resolver=None if proxied else self._names)
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
        data = io.BytesIO()  # whose bytes are had without another copy, unlike a bytearray's
        async for piece in response.content.iter_chunked(PIECE):
            for part in decoded(piece):
                if data.tell() + len(part) > self._limit:
                    raise too_large(self._limit)
                received(len(part))
                data.write(part)
                await asyncio.sleep(0)  # a small piece may become very many parts: others have their turns in between
        return data.getvalue()

    async def _check(self, url: str, allowed: Collection[str] | None) -> str | None:
        """Refuse what must not be fetched; returns the proxy that the environment names for it, if there is one."""
        parts = urlsplit(url)
        if not is_web_url(url):
            raise MediaError(f'{BLOCKED}the scheme is neither http nor https.')
        host = (parts.hostname or '').lower()
        if not host:
            raise MediaError(f'{BLOCKED}it names no host.')
        if allowed is not None and host not in allowed:
            raise MediaError(f'The URL must be from one of the allowed domains: {", ".join(sorted(allowed))}.')
        await self._names.addresses(host, parts.port or PORTS[parts.scheme.lower()])
        if urllib.request.proxy_bypass(host):
            return None
        return urllib.request.getproxies().get(parts.scheme.lower())

    @asynccontextmanager
    async def _connections(self) -> AsyncIterator[None]:
        """Close all connections when the last fetch has ended: nobody else could, in their event loop."""
        self._fetches += 1
        try:
            yield
        finally:
            self._fetches -= 1
            if not self._fetches:
                sessions, self._sessions = self._sessions, {}
                for session in sessions.values():
                    await session.close()

    def close(self) -> None:
        """Look up nothing any more."""
        self._names.end()


class _PublicNames(AbstractResolver):
    """Resolves hosts to public addresses, or not at all."""

    def __init__(self, resolver: Resolver) -> None:
        self._resolver = resolver

    async def addresses(self, host: str, port: int) -> Sequence[Address]:
        """The addresses of a host; raises MediaError unless all of them are public."""
        try:
            addresses = await self._resolver.addresses(host, port, _client.get())
        except (OSError, UnicodeError):
            raise MediaError(f'{BLOCKED}Hostname resolution failed') from None
        for _, address in addresses:
            if not _is_public(ipaddress.ip_address(address.partition('%')[0])):
                raise MediaError(f'{BLOCKED}the host is not on the public internet.')
        return addresses

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        return [
            ResolveResult(hostname=host, host=address, port=port, family=kind, proto=0, flags=socket.AI_NUMERICHOST)
            for kind, address in await self.addresses(host, port)
            if family in (socket.AF_UNSPEC, kind)
        ]

    async def close(self) -> None:
        """Nothing: a session that is closed leaves the threads to the next one."""

    def end(self) -> None:
        """Look up nothing any more."""
        self._resolver.close()


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
