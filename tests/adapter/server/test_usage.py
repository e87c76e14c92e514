"""The fields of LMDeploy's usage that count visual tokens and tiles; in a process of its own, as it changes classes."""

import json
import subprocess
import sys

from waiting import HANG

CODE = """
import asyncio
from lmdeploy.serve.openai import protocol
from lmdeploy_vico.adapter.server.body import Bounds
from lmdeploy_vico.adapter.server.disconnect import DisconnectMiddleware
from lmdeploy_vico.adapter.server.usage import count_tiles
from lmdeploy_vico.media.memory import MemoryBudget
from lmdeploy_vico.patching import Trigger, register
from lmdeploy_vico.stage.jobs import EncodedImage
from lmdeploy_vico.vision.projection import VisualTokens

def answers():
    usage = protocol.UsageInfo.build(prompt_tokens=9, completion_tokens=2, cached_tokens=4)
    fixed = dict(id='i', created=1, model='m', choices=[], usage=usage)
    whole = protocol.ChatCompletionResponse(**fixed).model_dump_json()
    streamed = protocol.ChatCompletionStreamResponse(**fixed).model_dump_json(exclude_none=True)
    print(whole, streamed, protocol.CompletionResponse(**{**fixed, 'usage': protocol.UsageInfo()}).model_dump_json())

def client():
    body = [{'type': 'http.request', 'body': b''}]

    async def receive():
        return body.pop() if body else await asyncio.Event().wait()

    return receive

async def app(scope, receive, send):
    async def choice():
        count_tiles([EncodedImage(VisualTokens(None, tokens, []), []) for tokens in ([64, 256, 64], [64])], 2)
    await asyncio.gather(choice(), choice())  # of one prompt
    answers()

def serve():
    bounds = Bounds(MemoryBudget(None), 1)
    asyncio.run(DisconnectMiddleware(app, bounds)({'type': 'http', 'headers': []}, client(), None))

answers()
serve()
for _ in range(2):
    register.apply(Trigger.MODEL)
    answers()
    serve()
"""


def test_image_tokens_where_a_vico_model_is_served():
    done = subprocess.run(
        [sys.executable, '-c', CODE], cwd='/', capture_output=True, text=True, timeout=HANG, check=True
    )
    lines = done.stdout.splitlines()
    before, served_before, *after = lines
    assert before == served_before and 'image_tokens' not in before

    def with_fields(*counts):
        names = 'image_tokens', 'image_tiles', 'compressed_tiles', 'image_tokens_saved', 'pressure_compressed_tiles'
        fields = ''.join(f',"{name}":{count}' for name, count in zip(names, counts, strict=True))
        return before.replace('{"cached_tokens":4}', f'{{"cached_tokens":4{fields}}}')

    assert after == [with_fields(0, 0, 0, 0, 0), with_fields(448, 4, 3, 576, 2)] * 2
    assert all(json.loads(part)['model'] == 'm' for part in before.split())
