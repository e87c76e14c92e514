"""Whatever a client sends, it gets an answer that says what is wrong, and the next good request is answered right."""

import asyncio
import base64
import re

import openai
import pytest
from parity.conversations import data_url, on_the_wire
from parity.judge import TOKENS
from PIL import Image
from serving.client import PeakMemory, ask_together, chat, generate, image_item, post
from serving.configurations import LIMITED, MEMORY

GOOD = 'one photograph'


pytestmark = LIMITED


@pytest.fixture(autouse=True)
def still_right_afterwards(client, prompts, judge):
    yield
    judge().check(prompts[GOOD], client.chat(prompts[GOOD]), name=GOOD)


def png(data=b''):
    return 'data:image/png;base64,' + base64.b64encode(data).decode()


SMALL = data_url(Image.new('RGB', (64, 48), (200, 30, 30)))

BAD_IMAGES = {
    'not an image': (image_item(png(b'hello, this is text')), 'not an image in a format that can be read'),
    'zero bytes': (image_item(png()), 'Invalid data URL'),
    'base64 cut in the middle': (image_item(SMALL[: len(SMALL) * 2 // 3]), 'damaged or truncated'),
    'not base64': (image_item('data:image/png;base64,€€€'), 'base64 of a data URL is damaged or truncated'),
    'a million tiles': (
        image_item(SMALL, max_dynamic_patch=10**6),
        'max_dynamic_patch must be an integer from 1 to 40',
    ),
    'tiles as text': (image_item(SMALL, max_dynamic_patch='12'), 'max_dynamic_patch must be an integer'),
    'extra data': (image_item(SMALL, data='iVBOR'), 'either "url" or "data", not both'),
    'extra type': (image_item(SMALL, type='audio'), 'no "type" of its own'),
    'type text': (image_item(SMALL, type='text'), 'no "type" of its own'),
    'ids in an image item': (image_item(SMALL, type='text', text=[5, 6]), 'no "type" of its own'),
    'unknown compression': (image_item(SMALL, compression='most'), 'must be "auto", "none", "all"'),
    'compression too large': (image_item(SMALL, compression=64), 'must be "auto", "none", "all"'),
}


@pytest.mark.parametrize('item, message', BAD_IMAGES.values(), ids=BAD_IMAGES.keys())
def test_bad_image_items(client, item, message):
    status, body = chat(client, item)
    assert status == 400, body
    assert message in body['message']


@pytest.mark.parametrize('ids', [['a', 924], [5, 924, 10**6], [5, 924]])
def test_ids_in_a_chat_message(client, ids):
    content = [{'type': 'text', 'text': ids}, image_item(SMALL)]
    body = {'model': client.model, 'messages': [{'role': 'user', 'content': content}], 'max_tokens': 4}
    status, answer = post(client, '/v1/chat/completions', body)
    assert status == 400
    assert 'must have a string "text"' in answer['message']


def test_bad_compression_of_the_request(client):
    status, body = chat(client, image_item(SMALL), mm_processor_kwargs={'image': {'compression': 'some'}})
    assert status == 400
    assert 'mm_processor_kwargs["image"]["compression"] must be "auto"' in body['message']


def test_other_modalities(client):
    for item in ({'type': 'nonsense'}, {'type': 'audio_url', 'audio_url': {'url': 'data:audio/wav;base64,AAAA'}}):
        status, body = chat(client, item, image_item(SMALL))
        assert status == 400
        assert 'are not supported; text, image_url and video_url are' in body['message']


def large_picture(side):
    """Black, in a small file."""
    return image_item(data_url(Image.new('1', (side, side))), max_dynamic_patch=1)


@pytest.mark.busy
def test_many_large_pictures_in_small_files(client):
    memory = PeakMemory(client)
    status, body = chat(client, *[large_picture(4000)] * 200)  # 64 MB of pixels each
    assert status == 400, body
    assert re.search(
        r'takes at least \d+ bytes of memory, more than the limit of \d+ \(option max_decod', body['message']
    )
    assert f'the limit of {MEMORY} ' in body['message']
    assert memory.growth() < 3 * MEMORY


@pytest.mark.busy
def test_large_pictures_of_many_requests(client, judge):
    messages = [{'role': 'user', 'content': [large_picture(4500)]}]  # one has room, two do not
    memory = PeakMemory(client)
    answers = asyncio.run(ask_together(client.server, messages, 8))
    refused = [answer for answer in answers if isinstance(answer, openai.APIStatusError)]
    assert refused and len(refused) < len(answers)
    for error in refused:
        assert error.status_code == 503 and error.response.headers['Retry-After'] == '1'
        assert 'bytes of memory' in error.message and 'Try again later' in error.message
    answers += asyncio.run(ask_together(client.server, messages, 2, max_retries=20))
    shown = [{'role': 'user', 'content': [image_item(Image.new('RGB', (4500, 4500)), max_dynamic_patch=1)]}]
    for answer in answers:
        if answer not in refused:
            judge().check(shown, answer)
    assert memory.growth() < 3 * MEMORY


def test_prompt_longer_than_the_session(client, pictures):
    def refused(count, **params):
        status, body = chat(client, *[image_item(data_url(pictures['text']), **params)] * count, text='word ' * 15000)
        assert status == 400
        return body['message']

    # Refused before any encoding, and after it.
    assert 'at least 19200 visual tokens' in refused(3, max_dynamic_patch=40, compression='none')
    assert 'must be smaller than the model context length (16384)' in refused(1, max_dynamic_patch=40)


@pytest.mark.parametrize('size', [(1, 1), (20000, 20), (20, 20000)])
def test_extreme_images_are_answered(client, judge, size):
    image = Image.new('RGB', size, (10, 200, 90))
    messages = [{'role': 'user', 'content': [{'type': 'text', 'text': 'Colour?'}, image_item(image)]}]
    judge().check(messages, client.chat(messages), name=str(size))


@pytest.mark.parametrize('text', ['<IMG_CONTEXT>', 'a <IMG_CONTEXT><IMG_CONTEXT> b <img></img>'])
def test_image_token_typed_in_a_text_only_prompt(client, judge, text):
    messages = [{'role': 'user', 'content': text}]
    judge().check(messages, client.chat(messages), name=text)


def test_image_token_typed_in_an_image_prompt(client, judge, pictures):
    content = [
        {'type': 'text', 'text': 'before <IMG_CONTEXT> '},
        {'type': 'image_url', 'image_url': {'url': pictures['page']}},
        {'type': 'text', 'text': '<IMG_CONTEXT><IMG_CONTEXT> after'},
    ]
    messages = [{'role': 'user', 'content': content}]
    judge().check(messages, client.chat(messages), name='typed around an image')


def image_token(judge):
    return judge().reference.image_token


def tokens(judge, text):
    return judge().reference.tokenizer.encode(text, add_special_tokens=False).ids


def test_image_token_as_an_id_without_images(client, judge):
    ids = [*tokens(judge, 'look at'), image_token(judge), image_token(judge), *tokens(judge, ' so')]
    status, body = generate(client, input_ids=ids)
    assert status == 200 and len(body['output_ids']) == TOKENS
    judgement = judge().reference.judge(['look at<IMG_CONTEXT><IMG_CONTEXT> so'], body['output_ids'])
    assert judgement.prompt_tokens == len(ids) and judgement.gap <= 0.05


def test_generate_with_ids_and_an_image(client, judge, pictures):
    reference = judge().reference
    before, after = tokens(judge, 'Picture: <img>'), tokens(judge, '</img> so')
    status, body = generate(
        client, input_ids=[*before, image_token(judge), *after], image_data=data_url(pictures['page'])
    )
    assert status == 200
    judgement = reference.judge(['Picture: ', pictures['page'], ' so'], body['output_ids'])
    assert judgement.prompt_tokens == body['meta_info']['prompt_tokens'] and judgement.gap <= 0.05


def test_generate_with_a_prompt_and_an_image(client, judge, pictures):
    image = {'url': data_url(pictures['page']), 'compression': 'all'}
    status, body = generate(client, prompt='Read this: ', image_data=image)
    assert status == 200
    judgement = judge().reference.judge(['Read this: ', pictures['page'], '\n'], body['output_ids'], 'all')
    assert judgement.prompt_tokens == body['meta_info']['prompt_tokens'] and judgement.gap <= 0.05


@pytest.mark.parametrize('marks', [0, 2, 300])
def test_generate_with_another_number_of_image_tokens(client, judge, marks):
    status, body = generate(client, input_ids=[40, *[image_token(judge)] * marks, 41], image_data=SMALL)
    assert status == 400
    assert f'{marks} image tokens' in body['message']


@pytest.mark.parametrize('bad', [10**6, -1])
@pytest.mark.parametrize('images', [{}, {'image_data': SMALL}], ids=['text only', 'image'])
def test_generate_with_ids_outside_the_vocabulary(client, judge, bad, images):
    status, body = generate(client, input_ids=[40, image_token(judge), bad], **images)
    assert status == 400
    assert 'input_ids must be integers from 0 to' in body['message']


def test_choices_are_the_same_prompt(client, prompts):
    messages = on_the_wire(prompts['a scanned page'])
    options = {'model': client.model, 'messages': messages, 'max_tokens': TOKENS, 'temperature': 0}
    one = client.openai.chat.completions.create(**options)
    two = client.openai.chat.completions.create(**options, n=2)
    assert [choice.message.content for choice in two.choices] == [one.choices[0].message.content] * 2
    assert two.usage.prompt_tokens == one.usage.prompt_tokens


def test_anthropic_endpoint_with_an_image(client, prompts, pictures):
    media, _, data = data_url(pictures['coffee']).removeprefix('data:').partition(';base64,')
    source = {'type': 'base64', 'media_type': media, 'data': data}
    content = [{'type': 'text', 'text': 'What is in this picture?'}, {'type': 'image', 'source': source}]
    status, body = post(
        client,
        '/v1/messages',
        {'model': client.model, 'max_tokens': 4, 'messages': [{'role': 'user', 'content': content}]},
    )
    assert status == 200, body
    assert body['usage']['input_tokens'] == client.chat(prompts[GOOD]).prompt_tokens


def test_streaming(client, pictures):
    messages = on_the_wire([{'role': 'user', 'content': [image_item(pictures['page'])]}])
    options = {'model': client.model, 'messages': messages, 'max_tokens': TOKENS, 'temperature': 0}
    whole = client.openai.chat.completions.create(**options)
    stream = client.openai.chat.completions.create(**options, stream=True, stream_options={'include_usage': True})
    text, usage = '', None
    for chunk in stream:
        usage = chunk.usage or usage
        text += ''.join(choice.delta.content or '' for choice in chunk.choices)
    assert text == whole.choices[0].message.content
    assert usage.prompt_tokens == whole.usage.prompt_tokens
