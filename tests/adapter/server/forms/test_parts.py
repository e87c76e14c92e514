"""Every form of a part: understood as what it certainly means, or refused by name."""

import pytest
from PIL import Image

from lmdeploy_vico.adapter.server.forms.parts import read_part

URL = 'data:image/png;base64,AAAA'
PICTURE = Image.new('RGB', (8, 8))
SOURCE = {'type': 'base64', 'media_type': 'image/png', 'data': 'AAAA'}


def read(**sent):
    part = read_part(sent)
    return part.kind, part.value, part.params


# --- texts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('kind', ['text', 'input_text', 'output_text'])
def test_texts(kind):
    assert read(type=kind, text='x', annotations=[], cache_control={}, image_url=None) == ('text', 'x', {})


def test_refusals_and_thoughts():
    assert read(type='refusal', refusal='No.') == ('text', 'No.', {})
    assert read(type='thinking', thinking='hm', signature='s') == ('thought', 'hm', {})
    assert read(type='reasoning', reasoning='hm') == ('thought', 'hm', {})


@pytest.mark.parametrize('key', ['image', 'image_url', 'images', 'video_url', 'image_data', 'input_image'])
def test_a_text_that_brings_a_picture(key):
    with pytest.raises(ValueError, match=f"of type 'text' has no '{key}': send an image as an item of its own"):
        read(type='text', text='x', **{key: URL})


# --- images and videos -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'sent',
    [
        {'type': 'image_url', 'image_url': {'url': URL}},
        {'type': 'image_url', 'image_url': URL},
        {'type': 'image', 'image': URL},
        {'type': 'image', 'image': {'url': URL}},
        {'type': 'image', 'url': URL},  # of Hugging Face's chat templates
        {'type': 'image', 'source': SOURCE},  # Anthropic's
        {'type': 'image', 'source': {'type': 'url', 'url': URL}},
        {'type': 'image_data', 'image_data': {'url': URL}},
        {'type': 'input_image', 'image_url': URL},
        {'type': 'input_image', 'image_url': URL, 'file_id': None},
        {'type': 'input_image', 'image_url': {'url': URL}},
        {'type': 'file', 'file': {'file_data': URL, 'filename': 'a.png'}},
        {'type': 'input_file', 'file_data': URL, 'filename': 'a.png'},
    ],
)
@pytest.mark.parametrize('hints', [{}, {'cache_control': {'type': 'ephemeral'}, 'format': 'image/png'}])
def test_images(sent, hints):
    assert read(**sent, **hints) == ('image', URL, {})


@pytest.mark.parametrize(
    'sent',
    [
        {'type': 'video_url', 'video_url': {'url': URL}},
        {'type': 'video_url', 'video_url': URL},
        {'type': 'video', 'video': URL},
        {'type': 'video', 'url': URL},
    ],
)
def test_videos(sent):
    assert read(**sent) == ('video', URL, {})


@pytest.mark.parametrize('kind', ['image', 'image_url', 'image_data'])
@pytest.mark.parametrize('key', ['url', 'data', None])
def test_decoded_pictures_of_a_pipeline(kind, key):
    assert read(type=kind, **{kind: PICTURE if key is None else {key: PICTURE}}) == ('image', PICTURE, {})


@pytest.mark.parametrize(
    'sent',
    [
        {'type': 'image_url', 'image_url': {'url': URL, 'detail': 'low', 'format': 'png'}},
        {'type': 'image_url', 'image_url': {'url': URL}, 'detail': 'low', 'uuid': None},
        {'type': 'image_url', 'image_url': URL, 'detail': 'low'},
        {'type': 'image', 'url': URL, 'detail': 'low'},
        {'type': 'image', 'source': SOURCE, 'detail': 'low'},
        {'type': 'input_image', 'image_url': URL, 'detail': 'low'},
        {'type': 'input_file', 'file_data': URL, 'detail': 'low'},
    ],
)
def test_keys_inside_and_beside(sent):
    assert read(**sent) == ('image', URL, {'detail': 'low'})


def test_no_other_key_is_left_out():
    assert read(type='image_url', image_url={'url': URL, 'a': 1}, b=2)[2] == {'a': 1, 'b': 2}
    assert read(type='input_image', image_url=URL, c=3)[2] == {'c': 3}
    assert read(type='file', file={'file_data': URL, 'd': 4})[2] == {'d': 4}


def test_a_key_inside_and_beside():
    with pytest.raises(ValueError, match="'detail' stands in the item and in its 'image_url'; one of them is enough"):
        read(type='image_url', image_url={'url': URL, 'detail': 'low'}, detail='high')


@pytest.mark.parametrize('source', [URL, PICTURE])
def test_an_image_in_two_places(source):
    for sent in (
        {'type': 'image', 'image': source, 'source': SOURCE},
        {'type': 'image', 'source': SOURCE, 'url': URL},
        {'type': 'image', 'image': source, 'url': URL},
    ):
        with pytest.raises(ValueError, match='An image item must have either "url" or "data", not both'):
            read(**sent)


@pytest.mark.parametrize('data', ['AAAA', 5, [1]])
def test_data_that_is_no_decoded_picture(data):
    with pytest.raises(ValueError, match='"data" is for the decoded pictures of a pipeline'):
        read(type='image_data', image_data={'data': data})


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('kind', ['image_pil', 'image_embeds', 'audio', 'input_audio', 'audio_url', 'document', 'zip'])
def test_other_types(kind):
    with pytest.raises(ValueError, match=f"Content items of type '{kind}' are not supported; text, image_url and"):
        read(type=kind, **{kind: URL})


@pytest.mark.parametrize('sent', [{'image_url': {'url': URL}}, {'type': None, 'image': URL}, {}])
def test_no_type(sent):
    with pytest.raises(ValueError, match='A content item must have a "type": "text", "image_url" or "video_url"'):
        read_part(sent)


@pytest.mark.parametrize(
    'file',
    [
        {'file_id': 'file-1'},
        {'file_url': 'https://example.com/a.png'},
        {'file_data': 'data:application/pdf;base64,AAAA'},
        {'file_data': 'AAAA', 'filename': 'a.png'},
        {'file_data': 5},
        {},
    ],
)
def test_files_that_are_no_pictures(file):
    for sent in ({'type': 'file', 'file': file}, {'type': 'input_file', **file}, {'type': 'file', 'file': URL}):
        with pytest.raises(ValueError, match='A file is accepted if it is a picture: "file_data" must be a data URL'):
            read_part(sent)


def test_files_that_the_server_was_never_given():
    with pytest.raises(ValueError, match='This server keeps no files: send the image as "image_url"'):
        read(type='input_image', file_id='file-1')


@pytest.mark.parametrize(
    'source',
    [
        {'type': 'file', 'file_id': 'x'},
        {'type': 'base64', 'data': ''},
        {'type': 'base64', 'data': ['AAAA']},
        {'type': 'base64', 'data': 'AAAA', 'media_type': 5},
        {'type': 'url'},
        {'type': 'url', 'url': ''},
        {'type': ['url']},
        {},
    ],
)
def test_sources_of_anthropic_that_are_none(source):
    with pytest.raises(ValueError, match='The "source" of an image must be .* this server keeps no files'):
        read(type='image', source=source)


@pytest.mark.parametrize(
    'sent',
    [
        {'type': 'image', 'source': {'type': 'file', 'data': 'A' * 10**6}},
        {'type': 'A' * 10**6},
        {'type': ['A' * 10**6]},
        ['A' * 10**6],
        'A' * 10**6,
        {'type': 'text', 'image' + 'A' * 10**6: 5, 'image': 'A' * 10**6},
        {'type': 'file', 'file': 'A' * 10**6},
    ],
)
def test_no_message_repeats_a_picture(sent):
    with pytest.raises(ValueError) as caught:
        read_part(sent)
    assert len(str(caught.value)) < 500
