"""A request is parsed once: what it asks for, how many tiles it will have, and whether they fit."""

import pytest
from PIL import Image

from lmdeploy_vico.adapter.server.items import ImageItem, Rules, TextItem, VideoItem
from lmdeploy_vico.adapter.server.request import parse_request
from lmdeploy_vico.stage.jobs import routing_groups
from lmdeploy_vico.vision.tiling import Tiling

TEXT = {'type': 'text', 'text': 'x'}
IMAGE = {'type': 'image_url', 'image_url': {'url': 'x'}}
VIDEO = {'type': 'video_url', 'video_url': {'url': 'x', 'num_frames': 8}}


def user(*content):
    return {'role': 'user', 'content': list(content)}


def parsed(*messages, media_io_kwargs=None, mm_processor_kwargs=None, compression='auto', session_len=6400):
    rules = Rules(Tiling(1, 12), 40, compression, session_len)
    return parse_request(messages, media_io_kwargs, mm_processor_kwargs, rules)


def compression(mm_processor_kwargs, default='auto'):
    return parsed(user(IMAGE), mm_processor_kwargs=mm_processor_kwargs, compression=default).compression


def test_conversation():
    messages = [
        {'role': 'system', 'content': 'a'},
        user(IMAGE, TEXT, VIDEO),
        {'role': 'assistant', 'content': None, 'tool_calls': [1]},
        {'role': 'assistant', 'tool_calls': [2]},
        {'role': 'assistant', 'content': [TEXT, TEXT]},
        user(),
        {'role': 'tool', 'content': [IMAGE], 'name': 'me'},
    ]
    request = parsed(*messages)
    assert [message.sent for message in request.messages] == messages
    assert [message.content for message in request.messages if not message.items] == ['a', '', '', ()]
    assert [type(item) for item in request.items] == [ImageItem, TextItem, VideoItem, TextItem, TextItem, ImageItem]
    assert [(item.source, item.message) for item in request.media] == [('x', 1), ('x', 1), ('x', 6)]


@pytest.mark.parametrize('content', [5, {'type': 'text'}, True, None])
def test_content_that_is_none(content):
    with pytest.raises(ValueError, match='content of a message must be a string or a list of items, not '):
        parsed({'role': 'user', 'content': content}, user(IMAGE))


def test_compression_of_the_request():
    assert compression(None) == 'auto'
    assert compression({}, default=0.5) == 0.5
    assert compression({'image': None, 'video': {}}, default='all') == 'all'
    assert compression({'image': {'compression': None}}, default='all') == 'all'
    assert compression({'image': {'compression': 0.25}}) == 0.25


def test_tile_limit_of_the_request():
    request = parsed(user(IMAGE, VIDEO), mm_processor_kwargs={'max_dynamic_patch': 3})
    assert [item.most_tiles for item in request.media] == [4, 8]


@pytest.mark.parametrize(
    'value, message',
    [
        ({'compression': 'all'}, '"compression" belongs under "image"'),
        ({'video': {'compression': 'all'}}, 'mm_processor_kwargs has no "video"'),
        ({'image': 'none'}, r'mm_processor_kwargs\["image"\] must be an object'),
        ({'image': {'compression': 'most'}}, r'mm_processor_kwargs\["image"\]\["compression"\] must be "auto"'),
        ({'image': {'compresion': 'all'}}, 'has the key "compression" only, not \'compresion\''),
        ({'images': {}}, 'mm_processor_kwargs has the keys "image" and "max_dynamic_patch", not \'images\''),
        ({'min_dynamic_patch': 1}, 'mm_processor_kwargs has the keys'),
        ({'max_dynamic_patch': 41}, r'\["max_dynamic_patch"\] must be an integer from 1 to 40, not 41'),
        ('all', "mm_processor_kwargs must be an object, not 'all'"),
    ],
)
@pytest.mark.parametrize('content', [[IMAGE], [TEXT]])
def test_bad_options_of_the_request(content, value, message):
    with pytest.raises(ValueError, match=message):
        parsed(user(*content), mm_processor_kwargs=value)


@pytest.mark.parametrize(
    'value, message',
    [
        (5, 'media_io_kwargs must be an object, not 5'),
        ({'images': {}}, 'media_io_kwargs has the keys "image" and "video", not \'images\''),
        ({'image': 'x'}, r'media_io_kwargs\["image"\] must be an object, not \'x\''),
        ({'image': {'rgba_background_color': [0, 0, 0]}}, r'\["image"\] has no keys, \'rgba_background_color\' among'),
        ({'video': 3}, r'media_io_kwargs\["video"\] must be an object, not 3'),
        ({'video': {'backend': 'x'}}, 'has the keys "num_frames" and "fps", not \'backend\''),
        ({'video': {'fps': -1}}, r'\["fps"\] must be a number above 0'),
    ],
)
@pytest.mark.parametrize('content', [[VIDEO], [IMAGE], [TEXT]])
def test_bad_media_options(content, value, message):
    with pytest.raises(ValueError, match=message):
        parsed(user(*content), media_io_kwargs=value)


def test_media_options_that_say_nothing():
    for nothing in (None, {}, {'image': None, 'video': None}, {'image': {}, 'video': {}}):
        assert parsed(user(VIDEO), media_io_kwargs=nothing).media[0].options == {'num_frames': 8}


# --- messages --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'message, said',
    [
        (5, 'A message must be an object with a string "role" and a "content", not 5'),
        ({'content': 'x'}, 'with a string "role"'),
        ({'role': 3, 'content': 'x'}, 'with a string "role"'),
        ({'role': 'observer', 'content': 'x'}, "one of system, developer, assistant, user, tool, not 'observer'"),
        ({'role': 'user'}, 'content of a message must be a string or a list of items, not None'),
        ({'role': 'system', 'content': None}, 'content of a message must be'),
        ({'role': 'user', 'content': 'x', 'images': ['iVBOR']}, "'images' is not a key of a message"),
        ({'role': 'user', 'content': [{'type': 'text'}]}, 'must have a string "text"'),
        ({'role': 'user', 'content': [{'type': 'text', 'text': [5]}]}, 'must have a string "text"'),
        ({'role': 'user', 'content': 'ab\ud83d'}, r"'\\ud83d' at character 2, which is half of a surrogate pair"),
        ({'role': 'user', 'content': [{'type': 'text', 'text': '\udc00'}]}, 'half of a surrogate pair'),
    ],
)
def test_messages_that_are_none(message, said):
    with pytest.raises(ValueError, match=said):
        parsed(message)


def test_no_messages():
    with pytest.raises(ValueError, match='messages must have at least one message'):
        parsed()


def test_messages_without_images_have_one_text_each():
    messages = [
        {'role': 'developer', 'content': [TEXT, {'type': 'input_text', 'text': 'y'}]},
        user({'type': 'text', 'text': '中文 🙂'}),
        {'role': 'assistant', 'content': [{'type': 'refusal', 'refusal': 'No.'}], 'name': 'me'},
        {'role': 'assistant', 'tool_calls': [1]},
        {'role': 'assistant', 'content': None, 'refusal': 'No!'},
        user(),
    ]
    request = parsed(*messages)
    assert not request.media
    assert request.texts() == [
        {'role': 'system', 'content': 'x\ny'},
        {'role': 'user', 'content': '中文 🙂'},
        {'role': 'assistant', 'content': 'No.', 'name': 'me'},
        {'role': 'assistant', 'content': '', 'tool_calls': [1]},
        {'role': 'assistant', 'content': 'No!', 'refusal': 'No!'},
        {'role': 'user', 'content': ''},
    ]


def test_thoughts_go_where_templates_look_for_them():
    def thought(**message):
        [found] = parsed({'role': 'assistant', **message}).texts()
        return found['reasoning_content'], found['content']

    part = {'type': 'thinking', 'thinking': 'b', 'signature': 's'}
    assert thought(content=[part, TEXT]) == ('b', 'x')
    assert thought(content=[{'type': 'reasoning', 'reasoning': 'c'}, part]) == ('c\nb', '')
    assert thought(content=[part], reasoning_content='a') == ('a\nb', '')
    for message in (user(part), {'role': 'assistant', 'content': [{'type': 'thinking'}]}):
        with pytest.raises(ValueError, match="of type 'thinking' is a text in an assistant message"):
            parsed(message)


def test_ids_stand_for_a_text_where_there_is_no_template():
    ids = user({'type': 'text', 'text': [5, 6]}, IMAGE)
    assert parse_request([ids], None, None, Rules(Tiling(1, 12), 40), raw=True).ids == [5, 6]
    with pytest.raises(ValueError, match='must have a string "text"'):
        parse_request([ids], None, None, Rules(Tiling(1, 12), 40))
    second = user(TEXT, {'type': 'text', 'text': [5, 6]})
    with pytest.raises(ValueError, match='must have a string "text"'):
        parse_request([second], None, None, Rules(Tiling(1, 12), 40), raw=True)


# --- limits ----------------------------------------------------------------------------------------------------------


def few(*content, **limits):
    return parse_request([user(*content)], None, None, Rules(Tiling(1, 12), 40, session_len=6400, **limits))


def test_images_and_videos_of_a_prompt():
    few(IMAGE, IMAGE, VIDEO, max_images=2, max_videos=1)
    with pytest.raises(ValueError, match=r'has 2 images; this server takes 1 \(option max_images\)'):
        few(IMAGE, IMAGE, VIDEO, max_images=1)
    with pytest.raises(ValueError, match=r'has 1 videos; this server takes 0 \(option max_videos\)'):
        few(IMAGE, VIDEO, max_videos=0)


def test_tiles_of_a_prompt():
    assert few(IMAGE, IMAGE, max_prompt_tiles=6).most_tiles() == 6  # no place is held for what cannot be answered
    assert len(decoded(few(IMAGE, IMAGE, max_prompt_tiles=6), (896, 448)).images) == 2
    with pytest.raises(ValueError, match=r'at least 6 tiles; this server takes 5 in a prompt \(option max_prompt_t'):
        decoded(few(IMAGE, IMAGE, max_prompt_tiles=5), (896, 448))
    with pytest.raises(ValueError, match='at least 3 tiles; this server takes 2'):
        few(IMAGE, IMAGE, VIDEO, max_prompt_tiles=2).most_tiles()


def test_the_salt_is_that_of_every_image():
    request = parse_request([user(IMAGE, VIDEO)], None, None, Rules(Tiling(1, 12), 40), salt='mine')
    assert [job.salt for job in decoded(request, (8, 8)).images] == ['mine'] * 2


# --- how much it is --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'content, most',
    [
        ([IMAGE, TEXT, IMAGE], 26),
        ([VIDEO, IMAGE, {'type': 'image', 'image': 'x', 'max_dynamic_patch': 3}], 8 + 13 + 4),
        ([TEXT], 0),
        ([], 0),
        ([IMAGE] * 50, 101),  # one more than could be answered
    ],
)
def test_estimate(content, most):
    assert parsed(user(*content)).most_tiles() == most


def test_estimate_without_a_session_length():
    video = {'type': 'video', 'video': 'x', 'num_frames': 500}
    assert parsed(user(video, IMAGE), session_len=None).most_tiles() == 513


def test_more_images_than_fit_whatever_they_show():
    assert parsed(user(*[IMAGE] * 99)).most_tiles()
    with pytest.raises(ValueError, match=r'at least 6400 visual tokens, more than the model context length \(6400\)'):
        parsed(user(*[IMAGE] * 100)).most_tiles()


def decoded(request, size):
    picture = Image.new('RGB', size)
    return request.decoded(
        [item.jobs([picture] if isinstance(item, VideoItem) else picture, 0) for item in request.media]
    )


def test_decoded_images_in_order():
    request = parsed(user(IMAGE, VIDEO, IMAGE))
    pictures = [Image.new('RGB', (8, 8)) for _ in range(4)]
    first, video, last = request.media
    jobs = [first.jobs(pictures[0], 0), video.jobs(pictures[1:3], 1), last.jobs(pictures[3], 2)]
    found = request.decoded(jobs)
    assert [job.image for job in found.images] == pictures and [len(of_item) for of_item in found.jobs] == [1, 2, 1]
    assert (found.messages, found.compression) == (request.messages, request.compression)
    assert not request.images


@pytest.mark.parametrize('value, least', [('auto', 64), ('all', 64), ('none', 256), (0, 256), (0.5, 64)])
def test_decoded_images_that_cannot_fit(value, least):
    def tiles(session_len):
        request = parsed(user(IMAGE, IMAGE), mm_processor_kwargs=asked, session_len=session_len)
        return len(decoded(request, (896, 448)).images)

    asked = {'image': {'compression': value}}
    assert tiles(6 * least + 1) == 2  # of three tiles each
    with pytest.raises(ValueError, match=f'at least {6 * least} visual tokens, more than the model context length'):
        tiles(6 * least)


def test_an_images_own_compression_counts():
    own = {'type': 'image_url', 'image_url': {'url': 'x', 'compression': 'none'}}
    with pytest.raises(ValueError, match=f'at least {3 * 256 + 3 * 64} visual tokens'):
        decoded(parsed(user(own, IMAGE), session_len=900), (896, 448))


def groups(scope, *content, asked='auto'):
    """Which jobs of a prompt are routed together, and by what."""
    rules = Rules(Tiling(1, 12), 40, session_len=6400, routing_scope=scope)
    request = parse_request([user(*content)], None, {'image': {'compression': asked}}, rules)
    picture = Image.new('RGB', (896, 448))
    jobs = [
        item.jobs([picture] * 2 if isinstance(item, VideoItem) else picture, number)
        for number, item in enumerate(request.media)
    ]
    return routing_groups(request.decoded(jobs).pictures, request.compression)


def test_images_are_routed_by_themselves_where_the_server_says_so():
    own = {'type': 'image_url', 'image_url': {'url': 'x', 'compression': 'none'}}
    content = IMAGE, VIDEO, own, IMAGE
    assert groups('prompt', *content) == [([0, 1, 2, 4], 'auto'), ([3], 'none')]
    assert groups('image', *content) == [([0], 'auto'), ([1, 2], 'auto'), ([3], 'none'), ([4], 'auto')]
    assert groups('image', IMAGE, IMAGE, asked=0.5) == [([0], 0.5), ([1], 0.5)]
