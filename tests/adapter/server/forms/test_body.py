"""Whole bodies: what LMDeploy would leave out is refused, and what is ours is read."""

import asyncio

import pytest
from fastapi.exceptions import RequestValidationError

from lmdeploy_vico.adapter.server.forms import body
from lmdeploy_vico.adapter.server.forms.body import cache_salt, checking_bodies, key_of
from lmdeploy_vico.adapter.server.served import ServedRequest, serving

URL = 'data:image/png;base64,AAAA'
SOURCE = {'type': 'base64', 'media_type': 'image/png', 'data': 'AAAA'}
IMAGE, TEXT = {'type': 'image', 'source': SOURCE}, {'type': 'text', 'text': 'x'}
CHECKS = ('chat', 'generate', 'completions', 'messages', 'count_tokens', 'responses')


def check(name, **sent):
    getattr(body, f'check_{name}')(sent)


# --- keys ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('key', ['image', 'images', 'image_url', 'multi_modal_data', 'video', 'videos', 'video_url'])
@pytest.mark.parametrize('name', CHECKS)
def test_pictures_at_the_top(name, key):
    check(name, **{key: None})
    with pytest.raises(ValueError, match=f"'{key}' is not a key of this request. Images and videos are read from"):
        check(name, **{key: URL})


@pytest.mark.parametrize('name', CHECKS)
def test_image_data_where_it_is_read(name):
    if name in ('chat', 'generate', 'messages'):
        check(name, image_data=URL)
    else:
        with pytest.raises(ValueError, match="'image_data' is not a key of this request"):
            check(name, image_data=URL)


@pytest.mark.parametrize('name', CHECKS)
@pytest.mark.parametrize('key', ['mm_processor_kwargs', 'media_io_kwargs'])
def test_options_where_they_are_read(name, key):
    check(name, **{key: None})
    if name in ('chat', 'generate'):
        check(name, **{key: {}})
    else:
        with pytest.raises(ValueError, match=f'{key} is read by /v1/chat/completions and /generate, not by this'):
            check(name, **{key: {}})


@pytest.mark.parametrize('key', ['chat_template', 'tokenize', 'messages', 'tools', 'return_dict'])
def test_templates_of_clients(key):
    check('chat', chat_template_kwargs={'enable_thinking': False, 'anything': 1})
    for nothing in (None, {}, 5):
        check('chat', chat_template_kwargs=nothing)
    with pytest.raises(ValueError, match=f"chat_template_kwargs are variables of the chat template; '{key}' is not"):
        check('chat', chat_template_kwargs={key: '{{ messages }}'})


# --- Anthropic's messages --------------------------------------------------------------------------------------------


def said(*content, role='user', name='messages', **sent):
    check(name, messages=[{'role': role, 'content': list(content)}], **sent)


@pytest.mark.parametrize('name', ['messages', 'count_tokens'])
def test_blocks_that_are_seen(name):
    result = {'type': 'tool_result', 'tool_use_id': 't', 'content': [TEXT, IMAGE]}
    url = {'type': 'image', 'source': {'type': 'url', 'url': URL}}
    said(TEXT, IMAGE, url, {**IMAGE, 'cache_control': {}, 'title': None}, result, name=name, system=[TEXT])
    said({'type': 'thinking', 'thinking': 'x'}, {'type': 'tool_use', 'input': {}}, role='assistant', name=name)
    check(name, messages=[{'role': 'user', 'content': 'x'}], system='x')


@pytest.mark.parametrize('name', ['messages', 'count_tokens'])
@pytest.mark.parametrize(
    'block, message',
    [
        ({'type': 'document', 'source': SOURCE}, "A message has no content of type 'document'"),
        ({'type': 'container_upload', 'file_id': 'x'}, "no content of type 'container_upload'"),
        ({'type': 'image_url', 'image_url': URL}, "no content of type 'image_url'"),
        ({'type': 'image'}, 'The "source" of an image must be'),
        ({'type': 'image', 'source': {'type': 'file', 'file_id': 'x'}}, 'The "source" of an image must be'),
        ({**IMAGE, 'uuid': 'x'}, "'uuid' is not a key of an image block"),
        ({'type': 'tool_result', 'content': [TEXT, {'type': 'document'}]}, "A tool result .* of type 'document'"),
        ({'type': 'tool_result', 'content': [{'type': 'image'}]}, 'The "source" of an image must be'),
        ({'type': None}, 'no content of type None'),
    ],
)
def test_blocks_that_would_be_left_out(name, block, message):
    with pytest.raises(ValueError, match=message):
        said(TEXT, block, name=name)


def test_images_where_only_texts_are_read():
    for role, block in (
        ('system', IMAGE),
        ('assistant', {'type': 'tool_result', 'content': [IMAGE]}),
    ):
        with pytest.raises(ValueError, match="no content of type 'image'"):
            said(block, role=role)
    with pytest.raises(ValueError, match="A system prompt has no content of type 'image'"):
        said(TEXT, system=[IMAGE])


# --- OpenAI's responses ----------------------------------------------------------------------------------------------


def test_input_items():
    texts = [{'type': 'input_text', 'text': 'x'}, {'type': 'output_text', 'text': 'x'}]
    image = {'type': 'input_image', 'image_url': URL}
    check('responses', input='x')
    check('responses', input=[{'role': 'developer', 'content': texts}, {'role': 'user', 'content': [image]}, 5])
    for role in ('system', 'developer'):
        with pytest.raises(ValueError, match=f"A {role} message has texts only, not parts of type 'input_image'"):
            check('responses', input=[{'role': role, 'content': [*texts, image]}])
    with pytest.raises(ValueError, match="'images' is not a key of an input item"):
        check('responses', input=[{'role': 'user', 'content': 'x', 'images': [URL]}])


# --- what is read ----------------------------------------------------------------------------------------------------


def test_salts():
    assert cache_salt({}) == cache_salt({'cache_salt': None}) == ''
    assert cache_salt({'cache_salt': 'ä' * 128}) == 'ä' * 128


@pytest.mark.parametrize('salt', ['', 'a' * 129, 5, ['a'], True, '\ud800', 'a\nb'])
def test_bad_salts(salt):
    with pytest.raises(ValueError, match='cache_salt must be a text of 1 to 128 characters, not '):
        cache_salt({'cache_salt': salt})


def test_keys_are_told_apart_and_not_told():
    names = {key_of({'authorization': f'Bearer {key}'}) for key in 'ab'} | {key_of({'x-api-key': 'c'}), key_of({})}
    assert len(names) == 4 and '' in names
    assert key_of({'authorization': 'Bearer a'}) == key_of({'authorization': 'bearer a ', 'x-api-key': 'c'})
    assert 'secret' not in key_of({'authorization': 'Bearer secret'})


class Request:
    """As much of Starlette's as is used."""

    def __init__(self, sent):
        self.sent, self.headers = sent, {'authorization': 'Bearer a'}

    async def body(self):
        return b'' if self.sent is None else b'{}'

    async def json(self):
        return self.sent


def depend(sent):
    """What the dependency notes of a request."""

    async def ask():
        request = ServedRequest()
        with serving(request):
            await checking_bodies(seen.append, body.check_completions)(Request(sent))
        return request

    seen = []
    noted = asyncio.run(ask())
    assert len(seen) == 1  # LMDeploy's own check comes first
    return noted


def test_what_is_noted_of_a_request():
    noted = depend({'cache_salt': 's'})
    assert (noted.cache_salt, noted.key) == ('s', key_of({'authorization': 'Bearer a'}))
    assert (depend({}).cache_salt, depend(None).key, depend([5]).key) == ('', '', '')


@pytest.mark.parametrize('sent', [{'cache_salt': 5}, {'image': URL}])
def test_what_is_answered_with_400(sent):
    with pytest.raises(RequestValidationError) as caught:
        depend(sent)
    [message] = caught.value.errors()
    assert message.startswith(('cache_salt must be a text', "'image' is not a key of this request"))
