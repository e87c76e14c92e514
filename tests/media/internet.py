"""Stands in for the internet: a server that is asked as a proxy, so that any public address leads to it."""

import asyncio
import threading
from collections.abc import Awaitable, Callable, Mapping

from aiohttp import web
from waiting import HANG

ADDRESS = '93.184.216.34'
Page = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Internet:
    """What ``http://93.184.216.34/NAME`` answers to whoever asks through this proxy.

    Attributes:
        asked: the URLs so far.
        open: connections whose page has not ended.
    """

    def __init__(self, pages: Mapping[str, Page]) -> None:
        self.asked: list[str] = []
        self.open = 0
        self._pages = pages
        self._loop, self._ready = asyncio.new_event_loop(), threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()
        assert self._ready.wait(HANG)

    def url(self, name: str) -> str:
        """Of a page."""
        return f'http://{ADDRESS}/{name}'

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._start())
        self._ready.set()
        self._loop.run_forever()

    async def _start(self) -> None:
        server = web.Server(self._answer, handler_cancellation=True)
        self._runner = web.ServerRunner(server, shutdown_timeout=0)
        await self._runner.setup()
        site = web.TCPSite(self._runner, '127.0.0.1', 0)
        await site.start()
        self.proxy = f'http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}'

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        self.asked.append(str(request.url))
        self.open += 1
        try:
            page = self._pages.get(request.path.rsplit('/', 1)[-1])
            return await page(request) if page else web.Response(status=404, text='10.0.0.7 has no such page')
        finally:
            self.open -= 1

    def stop(self) -> None:
        """End the server."""
        asyncio.run_coroutine_threadsafe(self._runner.cleanup(), self._loop).result(HANG)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(HANG)
