"""``/v1/messages/count_tokens``: what it asks of the server."""

import asyncio
from types import SimpleNamespace

from lmdeploy.serve.anthropic.protocol import CountTokensRequest

from lmdeploy_vico.adapter.server.forms.count import _count
from lmdeploy_vico.adapter.server.served import ServedRequest, served_request, serving


def test_nothing_is_compressed_for_a_count_because_of_pressure():
    shares = []

    async def preprocess(messages, session, **options):
        shares.append(served_request().extra_share)
        return SimpleNamespace(inputs={}, input_token_len=len(messages))

    context = SimpleNamespace(
        async_engine=SimpleNamespace(preprocess=preprocess, model_name='model'),
        response_parser_cls=lambda request: SimpleNamespace(request=request),
        create_session=object,
        session_manager=SimpleNamespace(remove=lambda session: None),
    )
    request = CountTokensRequest(model='model', messages=[{'role': 'user', 'content': 'Hello.'}])

    async def count():
        with serving(ServedRequest()):
            return await _count(request, context, merge_inline_system=False)

    assert asyncio.run(count()) == 1
    assert shares == [0.0]  # decided: none
