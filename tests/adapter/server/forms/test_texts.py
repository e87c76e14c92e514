"""Texts that cannot fit are refused before they are tokenized; what is tokenized holds nobody up."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.testclient import TestClient
from lmdeploy.serve.openai.protocol import EncodeRequest
from waiting import HANG

from lmdeploy_vico.adapter.server.forms.texts import TextBound, encode_in_threads, in_thread

TOKENS = {'a': 0, 'four': 1, 'Ġ': 2}


@pytest.mark.parametrize(
    'characters, session_len, fits', [(39, 10, True), (40, 10, False), (10**9, None, True), (0, 1, True)]
)
def test_no_text_that_could_fit_is_refused(characters, session_len, fits):
    bound = TextBound(TOKENS)
    if fits:
        bound.require_room(characters, session_len)
        return
    with pytest.raises(ValueError, match=r'has 40 characters and so at least 10 tokens, more than .* \(10\) allows'):
        bound.require_room(characters, session_len)


@pytest.mark.busy
def test_others_go_on_while_a_thread_works():
    async def work():
        assert others_went_on.wait(HANG)
        return threading.current_thread().name

    async def run():
        with ThreadPoolExecutor(1, thread_name_prefix='here') as executor:
            working = asyncio.ensure_future(in_thread(executor, work))
            await asyncio.sleep(0)
            others_went_on.set()
            return await working

    others_went_on = threading.Event()
    assert asyncio.run(run()).startswith('here')


def test_errors_pass_and_waiting_is_one():
    async def fail():
        raise KeyError('x')

    async def wait():
        await asyncio.Future(loop=asyncio.new_event_loop())

    async def run(work):
        with ThreadPoolExecutor(1) as executor:
            await in_thread(executor, work)

    with pytest.raises(KeyError):
        asyncio.run(run(fail))
    with pytest.raises(RuntimeError, match='waits'):
        asyncio.run(run(wait))


def test_the_endpoint_is_answered_by_a_thread():
    def checked(request: Request):
        seen.append('checked')

    router, seen = APIRouter(), []

    @router.post('/v1/encode', dependencies=[Depends(checked)])
    async def encode(request: EncodeRequest, raw_request: Request = None):
        seen.append(threading.current_thread())
        return {'length': len(request.input), 'path': raw_request.url.path}

    for _ in range(2):  # the second time changes nothing
        encode_in_threads(router)
    assert [route.path for route in router.routes] == ['/v1/encode']
    app = FastAPI()
    app.include_router(router)
    with TestClient(app) as client:
        loop = client.portal.call(threading.current_thread)
        answer = client.post('/v1/encode', json={'input': 'abc'})
    assert answer.json() == {'length': 3, 'path': '/v1/encode'}
    assert seen[0] == 'checked' and seen[1] is not loop
