"""Where images stand in a prompt, and how their visual tokens are cut into spans."""

import itertools
import pickle

import pytest
import torch
from lmdeploy.model import BaseChatTemplate
from PIL import Image

from lmdeploy_vico.adapter.server.items import Rules, VideoItem
from lmdeploy_vico.adapter.server.prompt import assemble, check_ids, cut_at_images, render_raw, split_ids
from lmdeploy_vico.adapter.server.prompt import render_chat as render_request
from lmdeploy_vico.adapter.server.request import parse_request
from lmdeploy_vico.stage.jobs import EncodedImage
from lmdeploy_vico.vision.projection import VisualTokens
from lmdeploy_vico.vision.tiling import Tiling

IMAGE = 9  # token id
PICTURE = {'type': 'image_url', 'image_url': {'url': 'x'}}
VIDEO = {'type': 'video_url', 'video_url': {'url': 'x'}}
RULES = Rules(Tiling(1, 12), max_tiles=40)


def text(value):
    return {'type': 'text', 'text': value}


def user(*content):
    return {'role': 'user', 'content': list(content)}


def template(messages):
    return ''.join(f'[{message["role"]}]{message["content"]}' for message in messages)


def decoded(messages, videos=(), raw=False):
    """The request with these messages, decoded: one picture for each image, so many for each video."""
    request, frames = parse_request(messages, None, None, RULES, raw=raw), iter(videos)
    picture = Image.new('RGB', (8, 8))
    jobs = []
    for number, item in enumerate(request.media):
        pictures = [picture] * next(frames) if isinstance(item, VideoItem) else picture
        jobs.append(item.jobs(pictures, number))
    return request.decoded(jobs)


def render_chat(messages, render, videos=()):
    return render_request(decoded(messages, videos), render)


def encoded(*tile_tokens, name=b'image'):
    count = sum(tile_tokens)
    embeddings = torch.arange(count * 2, dtype=torch.float32).view(count, 2)
    digests = [name + bytes([index]) for index in range(len(tile_tokens))]
    return EncodedImage(VisualTokens(embeddings, list(tile_tokens), [0.5] * len(tile_tokens)), digests)


def test_images_stand_where_their_items_stand():
    messages = [user(text('a'), PICTURE, text('b'), PICTURE)]
    assert render_chat(messages, template) == ['[user]a<img>', '</img>\nb<img>', '</img>\n']


def test_conversation_with_images_in_the_history():
    messages = [
        {'role': 'system', 'content': 'be brief'},
        user(PICTURE, text('what?')),
        {'role': 'assistant', 'content': 'a cat'},
        user(text('and this?'), PICTURE),
    ]
    assert render_chat(messages, template) == [
        '[system]be brief[user]<img>',
        '</img>\nwhat?[assistant]a cat[user]and this?<img>',
        '</img>\n',
    ]


def test_a_typed_image_token_is_text():
    pieces = render_chat([user(text('say <IMG_CONTEXT> and </img>'), PICTURE)], template)
    assert pieces == ['[user]say <IMG_CONTEXT> and </img><img>', '</img>\n']


def test_placeholders_say_where_the_images_go():
    messages = [user(text('left <IMAGE_TOKEN> right <IMAGE_TOKEN>.'), PICTURE, PICTURE)]
    assert render_chat(messages, template) == ['[user]left <img>', '</img> right <img>', '</img>.']


def test_placeholders_that_do_not_match_the_images_are_text():
    pieces = render_chat([user(text('what is <IMAGE_TOKEN>?'), PICTURE, PICTURE)], template)
    assert pieces == ['[user]what is <IMAGE_TOKEN>?<img>', '</img>\n<img>', '</img>\n']


def test_the_frames_of_a_video_are_numbered():
    pieces = render_chat([user(text('a'), VIDEO, text('b'))], template, [3])
    assert pieces == ['[user]aFrame1: <img>', '</img>\nFrame2: <img>', '</img>\nFrame3: <img>', '</img>\nb']


def test_videos_and_images_in_several_turns():
    messages = [
        user(VIDEO, text('?'), PICTURE),
        {'role': 'assistant', 'content': 'ok'},
        user(VIDEO, VIDEO, text('!')),
    ]
    assert render_chat(messages, template, [2, 1, 1]) == [
        '[user]Frame1: <img>',
        '</img>\nFrame2: <img>',
        '</img>\n?<img>',
        '</img>\n[assistant]ok[user]Frame1: <img>',
        '</img>\nFrame1: <img>',
        '</img>\n!',
    ]


def test_placeholders_are_for_images_alone():
    messages = [user(VIDEO, text('see <IMAGE_TOKEN>.'), PICTURE)]
    assert render_chat(messages, template, [1]) == ['[user]Frame1: <img>', '</img>\nsee <img>', '</img>.']
    messages = [user(VIDEO, text('see <IMAGE_TOKEN>.'))]
    assert render_chat(messages, template, [1]) == ['[user]Frame1: <img>', '</img>\nsee <IMAGE_TOKEN>.']


def test_a_template_that_loses_frames():
    with pytest.raises(ValueError, match='The chat template shows 0 of the 5 images'):
        render_chat([user(VIDEO, PICTURE)], lambda messages: 'nothing', [4])


def test_content_none_and_lists_without_images():
    messages = [
        {'role': 'system', 'content': [text('a'), text('b')]},
        user(PICTURE),
        {'role': 'assistant', 'content': None},
    ]
    assert render_chat(messages, template) == ['[system]a\nb[user]<img>', '</img>\n[assistant]']


def test_no_chat_template():
    with pytest.raises(ValueError, match='--chat-template'):
        render_chat([user(PICTURE)], lambda messages: None)


def test_a_template_that_loses_images():
    with pytest.raises(ValueError, match='The chat template shows 0 of the 1 images'):
        render_chat([user(PICTURE)], lambda messages: 'nothing')


def test_a_text_that_is_none():
    for value in (None, 5, [5, 6]):
        with pytest.raises(ValueError, match='A content item of type "text" must have a string "text"'):
            render_chat([user(text(value), PICTURE)], template)


@pytest.mark.parametrize('ids', [['a'], [1.0], [True], [[1]], [-1], [100], [None]])
def test_ids_outside_the_vocabulary(ids):
    with pytest.raises(ValueError, match='input_ids must be integers from 0 to 99, not '):
        check_ids([5, *ids], 100)


@pytest.mark.parametrize(
    'prompt, images, expected',
    [
        ('look', 1, ['look<img>', '</img>\n']),
        ('look', 2, ['look<img>', '</img>\n<img>', '</img>\n']),
        ('<img><IMG_CONTEXT></img>?', 1, ['<img>', '</img>?']),
        ('a <IMAGE_TOKEN> b', 1, ['a <img>', '</img> b']),
    ],
)
def test_raw_prompts(prompt, images, expected):
    assert render_raw(prompt, images) == expected


def test_raw_prompt_with_too_many_marks():
    with pytest.raises(ValueError, match='2 <IMG_CONTEXT> marks for 1 images'):
        render_raw('<IMG_CONTEXT> <IMG_CONTEXT>', 1)


def test_ids_are_cut_at_the_image_tokens():
    assert split_ids([1, IMAGE, 2, IMAGE, IMAGE], IMAGE, 3) == [[1], [2], [], []]


@pytest.mark.parametrize('ids', [[1, 2], [IMAGE, 1, IMAGE]])
def test_ids_with_another_number_of_image_tokens(ids):
    with pytest.raises(ValueError, match=r'image tokens \(id 9\) for 1 images'):
        split_ids(ids, IMAGE, 1)


def cut(*content, raw=True):
    chat_template = BaseChatTemplate() if raw else object()
    return cut_at_images(decoded([user(*content)], [1], raw), chat_template, template, IMAGE, vocab_size=100)


def test_which_way_a_prompt_is_cut():
    assert cut(text('look'), PICTURE) == ['look<img>', '</img>\n']  # as /generate comes
    assert cut(text([1, IMAGE, 2]), PICTURE) == [[1], [2]]
    assert cut(text('look'), PICTURE, raw=False) == ['[user]look<img>', '</img>\n']


def test_token_ids_are_taken_from_generate_only():
    with pytest.raises(ValueError, match='must have a string "text"'):
        cut(text([1, IMAGE, 2]), PICTURE, raw=False)
    with pytest.raises(ValueError, match='input_ids must be integers from 0 to 99, not 100'):
        cut(text([100, IMAGE]), PICTURE)


def test_videos_in_raw_prompts():
    with pytest.raises(ValueError, match='Videos are accepted in chat messages only, not in raw prompts'):
        cut(text('look'), VIDEO)


@pytest.mark.parametrize('block_size', [16, 64, 128])
@pytest.mark.parametrize('before', [0, 1, 63, 64, 65, 130])
def test_spans_cover_the_image_and_end_at_block_boundaries(before, block_size):
    image = encoded(256, 64, 64)
    ids, spans = assemble([[1] * before, [2, 3]], [image], IMAGE, block_size)
    assert ids == [1] * before + [IMAGE] * 384 + [2, 3]
    assert spans[0].start == before and spans[-1].end == before + 384
    for left, right in itertools.pairwise(spans):
        assert left.end == right.start and right.start % block_size == 0
    assert all(0 < len(span) <= block_size for span in spans)
    assert torch.equal(torch.cat([span.embeddings.tensor() for span in spans]), image.tokens.embeddings)


def test_several_images():
    ids, spans = assemble([[1], [2], [3]], [encoded(64), encoded(256)], IMAGE, 64)
    assert ids == [1] + [IMAGE] * 64 + [2] + [IMAGE] * 256 + [3]
    assert sum(map(len, spans)) == 64 + 256


def test_spans_pickle_at_the_size_of_their_images():
    images = [encoded(*[256] * 13), encoded(64, 64)]
    _, spans = assemble([[1], [], []], images, IMAGE, 64)
    whole = sum(image.tokens.embeddings.nbytes for image in images)
    assert whole < len(pickle.dumps(spans)) < whole + 200 * len(spans)


def test_hashes_follow_the_content():
    def hashes(image, before=10):
        return [span.content_hash for span in assemble([[1] * before, []], [image], IMAGE, 64)[1]]

    base = hashes(encoded(256, 64))
    assert base == hashes(encoded(256, 64))
    assert len(set(base)) == len(base)
    assert not set(base) & set(hashes(encoded(256, 64, name=b'other')))
    # The second tile routed otherwise: only spans that touch it change.
    rerouted = hashes(encoded(256, 256))
    assert base[:4] == rerouted[:4] and base[4] != rerouted[4]
    # Cut elsewhere: other rows, other hashes.
    assert not set(base) & set(hashes(encoded(256, 64), before=11))
    as_bfloat16 = encoded(256, 64)
    as_bfloat16 = EncodedImage(
        VisualTokens(as_bfloat16.tokens.embeddings.bfloat16(), [256, 64], [0.5, 0.5]), as_bfloat16.digests
    )
    assert not set(base) & set(hashes(as_bfloat16))
