"""More images than the vision stage accepts: 503 for some, right answers for the others, and recovery."""

import asyncio
import urllib.request

import openai
import pytest
from parity.conversations import on_the_wire
from parity.judge import TOKENS, Answer

from lmdeploy_vico.testing.server import ApiServer

CLIENTS = 16


@pytest.fixture(scope='module')
def server(serve, make_checkpoint) -> ApiServer:
    return serve(make_checkpoint(), LMDEPLOY_VICO_MAX_QUEUED_TILES='8')


async def ask(client: openai.AsyncOpenAI, model: str, messages: list) -> Answer | openai.APIStatusError:
    try:
        completion = await client.chat.completions.create(
            model=model,
            messages=messages,
            max_tokens=TOKENS,
            temperature=0,
            extra_body={'return_token_ids': True, 'ignore_eos': True},
        )
    except openai.APIStatusError as error:
        return error
    return Answer(tuple(completion.choices[0].model_extra['output_ids']), completion.usage.prompt_tokens)


def test_refused_and_recovered(server, prompts, judge):
    messages = on_the_wire(prompts['one photograph'])

    async def run():
        client = openai.AsyncOpenAI(base_url=f'{server.url}/v1', api_key='none', max_retries=0, timeout=120)
        model = (await client.models.list()).data[0].id
        together = await asyncio.gather(*(ask(client, model, messages) for _ in range(CLIENTS)))
        # The official client waits as it is told, and tries again.
        patient = client.with_options(max_retries=10)
        later = await asyncio.gather(*(ask(patient, model, messages) for _ in range(3)))
        return together, later

    together, later = asyncio.run(run())
    refused = [answer for answer in together if isinstance(answer, openai.APIStatusError)]
    answers = [answer for answer in together if isinstance(answer, Answer)]
    assert refused and answers and len(refused) + len(answers) == CLIENTS
    for error in refused:
        assert error.status_code == 503 and error.response.headers['Retry-After'] == '1'
        assert 'tiles are waiting' in error.message and 'Try again later' in error.message
    for answer in (*answers, *later):
        judge().check(prompts['one photograph'], answer)


def test_metrics_tell_of_it(server):
    with urllib.request.urlopen(f'{server.url}/metrics') as response:
        text = response.read().decode()
    for name in ('vico:tiles_total{resolution="low"}', 'vico:visual_tokens_total', 'vico:encoder_tiles_per_batch_'):
        assert name in text
