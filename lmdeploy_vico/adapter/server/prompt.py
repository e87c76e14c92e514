"""From messages to a prompt of true length: where the images stand, the token ids, the embedding spans."""

import hashlib
import itertools
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from lmdeploy_vico.adapter.handover import PackedRows
from lmdeploy_vico.stage.jobs import EncodedImage

IMAGE_START, IMAGE_END = '<img>', '</img>'
IMAGE_CONTEXT = '<IMG_CONTEXT>'
# LMDeploy's convention for saying in the text where the images go.
IMAGE_PLACEHOLDER = '<IMAGE_TOKEN>'

Message = Mapping[str, Any]
Ids = list[int]


def render_chat(
    messages: Sequence[Message], render: Callable[[list[dict[str, Any]]], str | None], videos: Sequence[int] = ()
) -> list[str]:
    """Render a conversation and cut the text where its images, and the frames of its videos, stand.

    In the text handed to the chat template each image is a random mark, so that no text a user types, the image token
    included, can be taken for an image.

    Args:
        messages: with content lists of text, image and video items.
        render: the chat template.
        videos: the number of frames of each video.

    Returns:
        One piece of text more than there are images and frames.
    """
    mark = f'vico-{secrets.token_hex(16)}'
    image_text = f'{IMAGE_START}{mark}{IMAGE_END}'
    inline = _images_placed_in_text(messages)
    frames = iter(videos)
    flattened = []
    for message in messages:
        message = dict(message)
        message['content'] = _flatten(message, image_text, inline, frames)
        flattened.append(message)
    text = render(flattened)
    if text is None:
        raise ValueError('This server has no chat template, which messages need: start it with --chat-template.')
    pieces = text.split(mark)
    images = sum(_image_count(message['content']) for message in messages) + sum(videos)
    if len(pieces) != images + 1:
        raise ValueError(f'The chat template shows {len(pieces) - 1} of the {images} images.')
    return pieces


def render_raw(text: str, images: int) -> list[str]:
    """Cut a raw /generate prompt where its images go.

    That is at the placeholders or image tokens if there is one for each image; without any, after the text, as LMDeploy
    does for InternVL.

    Raises:
        ValueError: there are image marks, but not as many as images.
    """
    if text.count(IMAGE_PLACEHOLDER) == images:
        pieces = text.split(IMAGE_PLACEHOLDER)
        return [
            (IMAGE_END if i else '') + piece + (IMAGE_START if i < images else '') for i, piece in enumerate(pieces)
        ]
    marks = text.count(IMAGE_CONTEXT)
    if marks not in (0, images):
        raise ValueError(f'The prompt has {marks} {IMAGE_CONTEXT} marks for {images} images.')
    if marks:
        return text.split(IMAGE_CONTEXT)
    between = f'{IMAGE_END}\n{IMAGE_START}'
    return [text + IMAGE_START, *[between] * (images - 1), f'{IMAGE_END}\n']


def check_ids(ids: Sequence[Any], vocab_size: int) -> None:
    """Raise ValueError unless ``ids`` are token ids: the engine looks them up unchecked, and dies of any other."""
    for token in ids:
        if type(token) is not int or not 0 <= token < vocab_size:
            raise ValueError(f'input_ids must be integers from 0 to {vocab_size - 1}, not {token!r}.')


def split_ids(ids: Ids, image_token_id: int, images: int) -> list[Ids]:
    """Cut the token ids of a /generate request at its image tokens, each of which stands for one image.

    Raises:
        ValueError: there are not as many image tokens as images.
    """
    pieces: list[Ids] = [[]]
    for token in ids:
        if token == image_token_id:
            pieces.append([])
        else:
            pieces[-1].append(token)
    if len(pieces) != images + 1:
        raise ValueError(
            f'input_ids has {len(pieces) - 1} image tokens (id {image_token_id}) for {images} images; '
            'one is needed for each.'
        )
    return pieces


def assemble(
    pieces: Sequence[Ids], images: Sequence[EncodedImage], image_token_id: int, block_size: int
) -> tuple[Ids, list[dict[str, Any]]]:
    """Put the visual tokens between the pieces of text.

    Args:
        pieces: token ids before, between and after the images.
        images: what stands between them.
        image_token_id: stands at the visual tokens' positions, for LMDeploy's bookkeeping only.
        block_size: KV-cache block size in tokens.

    Returns:
        The prompt's ids at their true length, and its spans: dicts of ``embeddings`` (PackedRows of ``[end - start,
        H]``), ``start``, ``end`` and ``content_hash``.
    """
    ids = list(pieces[0])
    spans = []
    for image, piece in zip(images, pieces[1:], strict=True):
        spans += _spans(image, len(ids), block_size)
        ids += [image_token_id] * len(image.tokens.embeddings)
        ids += piece
    return ids, spans


def _spans(image: EncodedImage, start: int, block_size: int) -> list[dict[str, Any]]:
    """Cut an image's visual tokens where the prompt's KV blocks end.

    LMDeploy never ends a prefix-cache match inside a span, and then goes back to a block boundary: a span over several
    blocks would keep a repeated image from ever being matched.
    """
    end = start + len(image.tokens.embeddings)
    cuts = [start, *range(start - start % block_size + block_size, end, block_size), end]
    return [
        {
            'embeddings': PackedRows.of(image.tokens.embeddings[low - start : high - start]),
            'start': low,
            'end': high,
            'content_hash': _content_hash(image, low - start, high - start),
        }
        for low, high in itertools.pairwise(cuts)
    ]


def _content_hash(image: EncodedImage, low: int, high: int) -> str:
    """Name the visual tokens ``[low, high)`` by the tiles they come from, how those were routed, and which rows."""
    digest = hashlib.blake2b(str(image.tokens.embeddings.dtype).encode(), digest_size=16)
    tile_start = 0
    for tile, count in zip(image.digests, image.tokens.tile_tokens, strict=True):
        first, last = max(low, tile_start), min(high, tile_start + count)
        if first < last:
            digest.update(tile + f':{count}:{first - tile_start}:{last - tile_start};'.encode())
        tile_start += count
    return digest.hexdigest()


def _images_placed_in_text(messages: Sequence[Message]) -> bool:
    """Whether the text says where the images go: one placeholder for each, in the messages that carry images.

    LMDeploy has none for videos, which stand where their items do.
    """
    contents = [message['content'] for message in messages if isinstance(message['content'], list)]
    texts = [item['text'] for content in contents for item in content if item['type'] == 'text']
    images = sum(map(_image_count, contents))
    return images > 0 and sum(text.count(IMAGE_PLACEHOLDER) for text in texts) == images


def _image_count(content: Any) -> int:
    return sum(item['type'] not in ('text', 'video') for item in content) if isinstance(content, list) else 0


def _flatten(message: Message, image_text: str, inline: bool, frames: Iterator[int]) -> str:
    content = message['content']
    if content is None:
        return ''
    if isinstance(content, str):
        return content
    parts = []
    for item in content:
        if item['type'] == 'text':
            text = item['text']
            parts.append(text.replace(IMAGE_PLACEHOLDER, image_text) if inline else text)
        elif item['type'] == 'video':
            parts += [f'Frame{number}: {image_text}\n' for number in range(1, next(frames) + 1)]
        elif not inline:
            parts.append(image_text + '\n')
    # LMDeploy joins the parts of a message without images by line breaks, those of one with images by nothing.
    return ('' if message['role'] in ('user', 'tool') else '\n').join(parts)
