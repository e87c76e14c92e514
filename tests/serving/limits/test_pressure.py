"""The overload valve of a server: under pressure more is compressed, which answers and metrics say alike."""

import asyncio
import json

import openai
import pytest
from parity.conversations import on_the_wire
from serving.client import Client, post
from waiting import HANG

CLIENTS = 8
ROUNDS = 20  # two are enough; more only where the machine is slow to fall behind
AUTO = {'mm_processor_kwargs': {'image': {'compression': 'auto'}}}
PRESSED = 'pressure_compressed_tiles'


async def usage(client, model, messages, stream, **extra):
    """What an answer says of its prompt's images."""
    create = client.chat.completions.create
    options = {'model': model, 'messages': messages, 'max_tokens': 4, 'temperature': 0, 'extra_body': extra}
    if not stream:
        return (await create(**options)).usage.prompt_tokens_details.to_dict()
    chunks = await create(**options, stream=True, stream_options={'include_usage': True})
    [said] = [chunk.usage async for chunk in chunks if chunk.usage]
    return said.prompt_tokens_details.to_dict()


async def ask_together(server, model, messages):
    """What the answers of so many clients say: those that state their compression, and the others."""
    async with openai.AsyncOpenAI(base_url=f'{server.url}/v1', api_key='none', max_retries=0, timeout=HANG) as client:
        stating = [number % 4 == 0 for number in range(CLIENTS)]
        said = await asyncio.gather(
            *(
                usage(client, model, messages, stream=number % 2 == 1, **(AUTO if states else {}))
                for number, states in enumerate(stating)
            )
        )
    own = [one for one, states in zip(said, stating, strict=True) if states]
    return own, [one for one, states in zip(said, stating, strict=True) if not states]


@pytest.mark.long
def test_what_pressure_does(serve, make_checkpoint, prompts):
    """One place in the engine: whoever else asks meanwhile waits, and one prompt that waits is full pressure."""
    environment = {'LMDEPLOY_VICO_PRESSURE_COMPRESSION': '0.5', 'LMDEPLOY_VICO_PRESSURE_WAITING': '1'}
    server = serve(make_checkpoint(), '--max-batch-size', '1', LMDEPLOY_VICO_PAGE='1', **environment)
    client = Client(server)
    messages = on_the_wire(prompts['one photograph'])
    url = next(item for item in messages[0]['content'] if item['type'] == 'image_url')['image_url']['url']
    assert 'pressure_compression 0.5 breaks batch independence' in server.log_text()

    def routed():
        status, answer = post(client, '/vico/route', {'images': [url]})
        assert status == 200
        return answer['images']

    calm_route = routed()
    calm = client.openai.chat.completions.create(model=client.model, messages=messages, max_tokens=4)
    before = calm.usage.prompt_tokens_details.to_dict()
    tiles, compressed = before['image_tiles'], before['compressed_tiles']
    assert before[PRESSED] == 0 and 0 < compressed < tiles
    counted = []
    for _ in range(ROUNDS):
        own, others = asyncio.run(ask_together(server, client.model, messages))
        assert all((one[PRESSED], one['compressed_tiles']) == (0, compressed) for one in own)
        for one in others:
            assert one['compressed_tiles'] == compressed + one[PRESSED] <= compressed + tiles / 2
            assert one['image_tokens'] == 256 * tiles - 192 * one['compressed_tiles']
        counted += [one[PRESSED] for one in others]
        if max(one[PRESSED] for one in others) == min(tiles // 2, tiles - compressed):  # all of the bound
            break
    else:
        raise AssertionError(f'no pressure: {json.dumps(counted)}')
    assert routed() == calm_route  # under pressure still: it fades in seconds
    assert client.metric('vico:pressure_compressed_tiles_total') == sum(counted)
    assert client.metric('vico:pressure_prompts_total') == sum(number > 0 for number in counted)
