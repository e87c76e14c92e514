"""A picture is seen in every form that is understood, on every endpoint; in any other the request is refused."""

import json

import pytest
from parity.conversations import data_url
from parity.judge import TOKENS
from PIL import Image
from serving.client import chat, generate, image_item, post
from serving.configurations import LIMITED, PROMPT_IMAGES, PROMPT_TILES, PROMPT_VIDEOS

pytestmark = LIMITED

QUESTION = 'What is this?'
TEXT = {'type': 'text', 'text': QUESTION}
SMALL = data_url(Image.new('RGB', (64, 48), (200, 30, 30)))
SMALL_TILES = 13


@pytest.fixture(scope='module')
def url(pictures):
    """A picture whose answers differ from those without it."""
    return data_url(pictures['page'].crop((0, 0, 320, 150)))


@pytest.fixture(scope='module')
def seen():
    return {}


def expected(client, seen, url):
    """The answer to the commonest form of a question about the picture, and its number of visual tokens."""
    if not seen:
        status, body = chat(client, image_item(url), text=QUESTION)
        assert status == 200, body
        seen['ids'] = body['choices'][0]['output_ids']
        seen['image tokens'] = body['usage']['prompt_tokens_details']['image_tokens']
        seen['prompt tokens'] = body['usage']['prompt_tokens']
        assert seen['image tokens'] > 64
    return seen


def messages_body(client, *content, role='user', **extra):
    return {'model': client.model, 'max_tokens': 4, 'messages': [{'role': role, 'content': list(content)}], **extra}


def responses_body(client, *content, role='user'):
    return {'model': client.model, 'max_output_tokens': 4, 'input': [{'role': role, 'content': list(content)}]}


def refused(answer, *words):
    """A sentence of the endpoint's own protocol, which repeats no picture."""
    status, body = answer
    assert status == 400, body
    said = body['error']['message'] if 'error' in body else body['message']
    assert len(json.dumps(body)) < 1000
    assert all(word in said for word in words), said


# --- chat ------------------------------------------------------------------------------------------------------------


FORMS = {
    'input_image': lambda url: {'type': 'input_image', 'image_url': url},
    'file': lambda url: {'type': 'file', 'file': {'file_data': url, 'filename': 'a.png'}},
    'of Hugging Face': lambda url: {'type': 'image', 'url': url},
    'of Anthropic': lambda url: {'type': 'image', 'source': source(url)},
    'hints': lambda url: {**image_item(url, format='image/png'), 'cache_control': {'type': 'ephemeral'}},
}


def source(url):
    return {'type': 'base64', 'media_type': 'image/png', 'data': url.partition(',')[2]}


@pytest.mark.parametrize('form', FORMS.values(), ids=FORMS.keys())
def test_forms_of_chat(client, seen, url, form):
    status, body = chat(client, form(url), text=QUESTION)
    assert status == 200, body
    assert body['choices'][0]['output_ids'] == expected(client, seen, url)['ids']


@pytest.mark.parametrize(
    'item, word',
    [
        ({'type': 'image_pil', 'image_pil': SMALL}, "'image_pil' are not supported"),
        ({'image_url': {'url': SMALL}}, 'must have a "type"'),
        ({'type': 'input_audio', 'input_audio': {'data': 'AAAA', 'format': 'wav'}}, "'input_audio' are not supported"),
        ({'type': 'file', 'file': {'file_id': 'file-1'}}, 'if it is a picture'),
        ({'type': 'image_url', 'image_url': [SMALL]}, 'must have a string "url"'),
        ({'type': 'text', 'text': 'x', 'image_url': SMALL}, "has no 'image_url'"),
        (image_item(SMALL, detial='low'), "'detial' is not a key of an image item"),
        ({**image_item(SMALL), 'compresion': 'all'}, "'compresion' is not a key of an image item"),
        ({'type': 'image_url', 'uuid': 'never sent'}, "No image or video is kept as uuid 'never sent'"),
    ],
    ids=lambda value: value if isinstance(value, str) else '',
)
def test_nothing_is_left_out_of_chat(client, item, word):
    refused(chat(client, item), word)


def test_pictures_beside_the_content(client):
    refused(chat(client, images=[SMALL]), "'images' is not a key of this request")
    body = {'model': client.model, 'messages': [{'role': 'user', 'content': 'x', 'images': [SMALL]}], 'max_tokens': 4}
    refused(post(client, '/v1/chat/completions', body), "'images' is not a key of a message")


@pytest.mark.parametrize('message', [{}, {'role': 3, 'content': 'x'}, {'role': 'user', 'content': None}, {'role': 'x'}])
def test_messages_that_are_none(client, message):
    body = {'model': client.model, 'messages': [message], 'max_tokens': 4}
    refused(post(client, '/v1/chat/completions', body), 'message must be')


def test_a_refusal_in_the_history_with_and_without_a_picture(client, url):
    def ask(*items):
        history = [
            {'role': 'user', 'content': [TEXT, *items]},
            {'role': 'assistant', 'content': [{'type': 'refusal', 'refusal': 'I cannot tell.'}]},
            {'role': 'user', 'content': 'Why?'},
        ]
        body = {'model': client.model, 'messages': history, 'max_tokens': 4}
        status, answer = post(client, '/v1/chat/completions', body)
        assert status == 200, answer
        usage = answer['usage']
        return usage['prompt_tokens'] - usage['prompt_tokens_details']['image_tokens']

    around = 3  # <img>, </img> and a line break
    assert ask(image_item(url)) == ask() + around


def test_an_image_is_sent_once_and_named_later(client, seen, url):
    def ask(item, key):
        body = {'model': client.model, 'messages': [{'role': 'user', 'content': [TEXT, item]}], 'max_tokens': 4}
        return post(client, '/v1/chat/completions', body, Authorization=f'Bearer {key}')

    assert ask({**image_item(url), 'uuid': 'page'}, 'one')[0] == 200
    status, body = ask({'type': 'image_url', 'image_url': None, 'uuid': 'page'}, 'one')
    assert status == 200, body
    assert body['usage']['prompt_tokens'] == expected(client, seen, url)['prompt tokens']
    refused(ask({'type': 'image_url', 'uuid': 'page'}, 'another'), "kept as uuid 'page', or no longer")


def test_options(client, seen, url):
    status, body = chat(client, image_item(url), text=QUESTION, mm_processor_kwargs={'max_dynamic_patch': 1})
    assert status == 200
    assert body['usage']['prompt_tokens_details']['image_tokens'] < expected(client, seen, url)['image tokens']
    for items in ([image_item(SMALL)], []):
        refused(chat(client, *items, mm_processor_kwargs={'images': {}}), 'mm_processor_kwargs has the keys')
        refused(chat(client, *items, media_io_kwargs={'image': 'x'}), 'media_io_kwargs["image"] must be an object')
        refused(chat(client, *items, media_io_kwargs={'video': {'fps': 0}}), 'must be a number above 0')


# --- raw prompts -----------------------------------------------------------------------------------------------------


def test_ids_with_an_image_in_chat(client, judge, url):
    token = judge().reference.image_token
    asked = {'input_ids': [40, token, 41], 'image_data': url}
    _, raw = generate(client, **asked)
    body = {'model': client.model, 'messages': [], 'max_tokens': TOKENS, 'temperature': 0, 'ignore_eos': True}
    status, answer = post(client, '/v1/chat/completions', {**body, **asked, 'return_token_ids': True})
    assert status == 200, answer
    assert answer['choices'][0]['output_ids'] == raw['output_ids']
    status, answer = post(client, '/v1/chat/completions', {**body, **asked, 'n': 2, 'return_token_ids': True})
    assert [choice['output_ids'] for choice in answer['choices']] == [raw['output_ids']] * 2
    body = {'model': client.model, 'max_tokens': TOKENS, 'temperature': 0, 'return_token_ids': True, **asked}
    status, answer = post(client, '/v1/messages', body)
    assert status == 200 and answer['usage']['input_tokens'] == raw['meta_info']['prompt_tokens']


def test_completions_and_generate(client):
    completion = {'model': client.model, 'prompt': 'x', 'max_tokens': 4}
    for key in ('image_data', 'images', 'multi_modal_data'):
        refused(post(client, '/v1/completions', {**completion, key: SMALL}), f"'{key}' is not a key of this request")
    refused(generate(client, prompt='x', images=[SMALL]), "'images' is not a key of this request")
    refused(generate(client, prompt='x', image_data=image_item(SMALL)), 'An image item must have')
    refused(generate(client, prompt='x', mm_processor_kwargs={'a': 1}), 'mm_processor_kwargs has the keys')
    refused(generate(client, input_ids=[5], media_io_kwargs={'a': 1}), 'media_io_kwargs has the keys')
    assert generate(client, input_ids=[5, 6], image_data=[])[1]['meta_info']['prompt_tokens'] == 2


# --- Anthropic's messages --------------------------------------------------------------------------------------------


def test_messages(client, seen, url):
    image = {'type': 'image', 'source': source(url)}
    result = {'type': 'tool_result', 'tool_use_id': 't', 'content': [TEXT, {'type': 'image', 'source': source(url)}]}
    for content in ([TEXT, image], [result], [TEXT, {'type': 'image', 'source': {'type': 'url', 'url': url}}]):
        status, body = post(client, '/v1/messages', messages_body(client, *content))
        assert status == 200, body
        assert body['usage']['input_tokens'] > expected(client, seen, url)['image tokens']


@pytest.mark.parametrize('path', ['/v1/messages', '/v1/messages/count_tokens'])
def test_nothing_is_left_out_of_messages(client, path):
    image = {'type': 'image', 'source': source(SMALL)}

    def ask(*content, **extra):
        return post(client, path, messages_body(client, *content, **extra))

    refused(ask(TEXT, {'type': 'image', 'source': {'type': 'file', 'file_id': 'x'}}), 'this server keeps no files')
    refused(ask(TEXT, {'type': 'document', 'source': source(SMALL)}), "no content of type 'document'")
    refused(ask(TEXT, image, role='assistant'), "not in 'assistant' messages")
    refused(ask(TEXT, system=[image]), 'A system prompt has no content')
    refused(ask(TEXT, images=[SMALL]), "'images' is not a key of this request")
    refused(ask(TEXT, mm_processor_kwargs={'image': {}}), 'mm_processor_kwargs is read by')


def test_counted_tokens_are_those_that_are_billed(client, url):
    image = {'type': 'image', 'source': source(url)}
    for content in ([TEXT], [TEXT, image], [image, TEXT, image]):
        body = messages_body(client, *content)
        _, counted = post(client, '/v1/messages/count_tokens', body)
        _, billed = post(client, '/v1/messages', body)
        assert counted == {'input_tokens': billed['usage']['input_tokens']}
    refused(post(client, '/v1/messages/count_tokens', messages_body(client, *[image] * (PROMPT_IMAGES + 1))), 'images')
    status, body = post(client, '/v1/messages/count_tokens', {**messages_body(client, TEXT), 'model': 'x' * 9000})
    assert status == 404 and len(json.dumps(body)) < 500


# --- OpenAI's responses ----------------------------------------------------------------------------------------------


def test_responses(client, seen, url):
    text, image = {'type': 'input_text', 'text': QUESTION}, {'type': 'input_image', 'image_url': url}
    for picture in (image, {**image, 'detail': 'auto'}, {'type': 'input_file', 'file_data': url, 'filename': 'a.png'}):
        status, body = post(client, '/v1/responses', responses_body(client, text, picture))
        assert status == 200, body
        assert body['usage']['input_tokens'] == expected(client, seen, url)['prompt tokens']
    call = {'type': 'function_call', 'call_id': 'c', 'name': 'look', 'arguments': '{}'}
    output = {'type': 'function_call_output', 'call_id': 'c', 'output': [text, image]}
    body = {'model': client.model, 'max_output_tokens': 4, 'input': [{'role': 'user', 'content': 'x'}, call, output]}
    status, body = post(client, '/v1/responses', body)
    assert status == 200, body
    assert body['usage']['input_tokens'] > expected(client, seen, url)['image tokens']


def test_every_key_of_an_input_image_is_read(client):
    def ask(**keys):
        image = {'type': 'input_image', 'image_url': SMALL, 'detail': 'auto', **keys}
        return post(client, '/v1/responses', responses_body(client, image))

    [none, compressed] = [ask(compression=value)[1]['usage']['input_tokens'] for value in ('none', 'all')]
    assert none == compressed + SMALL_TILES * 192
    refused(ask(compresion='all'), "'compresion' is not a key of an image item")
    refused(ask(file_id='file-1'), 'This server keeps no files')


@pytest.mark.parametrize('role', ['system', 'developer', 'assistant'])
def test_images_where_responses_have_texts(client, role):
    image = {'type': 'input_image', 'image_url': SMALL}
    refused(post(client, '/v1/responses', responses_body(client, image, role=role)), role)


# --- errors and limits -----------------------------------------------------------------------------------------------


def test_errors_name_no_classes(client):
    wrong = {'input': [5]}, {'input': 'x', 'tool_choice': {'type': 'x'}}, {'input': 'x', 'text': 5}
    for sent in wrong:
        status, body = post(client, '/v1/responses', {'model': client.model, **sent})
        assert status == 400
        assert not {'Param', 'union', '['} & set(body['error']['message']), body


def test_long_values_are_not_repeated(client):
    long = SMALL * 20
    refused(chat(client, {'type': 'image', 'source': {'type': 'x', 'data': long}}), '"source" of an image')
    refused(chat(client, {'type': long}), 'are not supported')
    refused(chat(client, image_item(SMALL, detail=long)), 'detail must be')
    refused(chat(client, mm_processor_kwargs={'image': {'compression': [long]}}), 'must be "auto"')
    refused(chat(client, logit_bias={long: 'x'}), 'logit_bias')
    status, body = post(client, '/v1/chat/completions', {'model': long, 'messages': [{'role': 'user', 'content': 'x'}]})
    assert status == 404 and len(json.dumps(body)) < 1500 < len(long)


def test_more_than_a_prompt_may_have(client):
    refused(chat(client, *[image_item(SMALL)] * (PROMPT_IMAGES + 1)), f'takes {PROMPT_IMAGES} (option max_images)')
    video = {'type': 'video_url', 'video_url': {'url': 'https://example.com/x.mp4'}}
    refused(chat(client, *[video] * (PROMPT_VIDEOS + 1)), f'this server takes {PROMPT_VIDEOS} (option max_videos)')
    before = client.encoded_tiles()
    tiles = f'at least {32 * SMALL_TILES} tiles; this server takes {PROMPT_TILES} in a prompt (option max_prompt_tiles)'
    refused(chat(client, *[image_item(data_url(Image.new('RGB', (64, 48), (5, 6, 7))))] * 32), tiles)
    assert client.encoded_tiles() == before


def test_templates_of_clients(client):
    for template in ('', '{{ messages[0].__class__ }}'):
        refused(chat(client, chat_template_kwargs={'chat_template': template}), 'The template is that of the server')
    assert chat(client, chat_template_kwargs={'enable_thinking': False})[0] == 200


@pytest.mark.parametrize('salt', ['', 'a' * 129, 5, {'a': 1}])
def test_bad_salts(client, salt):
    refused(chat(client, cache_salt=salt), 'cache_salt must be a text of 1 to 128 characters')
    refused(post(client, '/v1/responses', {'model': client.model, 'input': 'x', 'cache_salt': salt}), 'cache_salt')


def test_an_image_is_not_found_in_the_cache_under_another_salt(client, url):
    def encoded(**extra):
        before = client.encoded_tiles()
        assert chat(client, image_item(url), **extra)[0] == 200
        return client.encoded_tiles() - before

    encoded()
    tiles = encoded(cache_salt='of one client')
    assert tiles > 0
    assert encoded(cache_salt='of one client') == encoded() == 0
    assert encoded(cache_salt='of another') == tiles
