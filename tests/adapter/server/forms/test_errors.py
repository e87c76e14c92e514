"""What clients are told of an invalid request: their own keys, and no class of the server."""

import pytest

from lmdeploy_vico.adapter.server.forms.errors import plain_location


@pytest.mark.parametrize(
    'loc, plain',
    [
        (('body', 'messages', 0, 'role'), ('body', 'messages', 0, 'role')),
        (('body', 'input', 'list[union[EasyInputMessageParam,Message]]', 3), ('body', 'input', 3)),
        (('body', 'tool_choice', 'AllowedToolChoice', 'type'), ('body', 'tool_choice', 'type')),
        (('body', 'prompt', 'str'), ('body', 'prompt')),
        (('body', 'stop', 'list[str]', 0), ('body', 'stop', 0)),
        (('body', 'logit_bias', 'A' * 10**6), ('body', 'logit_bias')),
    ],
)
def test_places(loc, plain):
    assert plain_location({'loc': loc, 'msg': 'No.', 'input': 'A' * 10**6}) == {'loc': plain, 'msg': 'No.'}


def test_messages():
    assert plain_location('A sentence.') == 'A sentence.'
    assert len(plain_location({'loc': (), 'msg': 'A' * 10**6})['msg']) < 1100
    assert plain_location({}) == {'loc': (), 'msg': ''}
