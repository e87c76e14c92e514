"""From messages to a prompt of true length: where the images stand, the token ids, the spans of visual tokens."""

import hashlib
import itertools
import secrets
from collections.abc import Callable, Sequence
from typing import Any

from lmdeploy.model import BaseChatTemplate

from lmdeploy_vico.adapter.handover import PackedRows, Span
from lmdeploy_vico.adapter.server.items import MEDIA_ROLES, ImageItem, SyntheticItem, TextItem, VideoItem
from lmdeploy_vico.adapter.server.request import Message, VicoRequest
from lmdeploy_vico.stage.jobs import EncodedImage
from lmdeploy_vico.wording import shown

IMAGE_START, IMAGE_END = '<img>', '</img>'
IMAGE_CONTEXT = '<IMG_CONTEXT>'
# LMDeploy's convention for saying in the text where the images go.
IMAGE_PLACEHOLDER = '<IMAGE_TOKEN>'

Ids = list[int]
Render = Callable[[list[dict[str, Any]]], str | None]


def cut_at_images(
    request: VicoRequest, chat_template: Any, render: Render, image_token_id: int, vocab_size: int
) -> list[str] | list[Ids]:
    """Cut a request's prompt where its images, and the frames of its videos, stand.

    Args:
        request: decoded.
        chat_template: LMDeploy's; for /generate it passes one that does nothing.
        render: renders messages with the template, as the request asks.
        image_token_id: stands for an image in the token ids of a /generate request.
        vocab_size: of the language model.

    Returns:
        Pieces of text, or of the token ids of a /generate request: one more than there are images and frames.

    Raises:
        ValueError: the prompt does not fit its images, or a text is none.
    """
    raw = type(chat_template) is BaseChatTemplate
    if raw and any(isinstance(item, VideoItem) for item in request.media):
        raise ValueError('Videos are accepted in chat messages only, not in raw prompts.')
    if request.ids is not None:
        check_ids(request.ids, vocab_size)
        return split_ids(request.ids, image_token_id, len(request.images))
    if raw and len(request.messages) == 1:
        return render_raw(''.join(_texts(request)), len(request.images))
    return render_chat(request, render)


def render_chat(request: VicoRequest, render: Render) -> list[str]:
    """Render a conversation and cut the text where its images, and the frames of its videos, stand.

    In the text handed to the chat template each image is a random mark, so that no text a user types, the image token
    included, can be taken for an image.

    Returns:
        One piece of text more than there are images and frames.
    """
    mark = f'vico-{secrets.token_hex(16)}'
    image_text = f'{IMAGE_START}{mark}{IMAGE_END}'
    # One placeholder for each image says where the images go. LMDeploy has none for videos.
    images = sum(isinstance(item, ImageItem | SyntheticItem) for item in request.media)
    placed = 0 < images == sum(text.count(IMAGE_PLACEHOLDER) for text in _texts(request))
    frames = iter([len(jobs) for jobs in request.jobs])

    def flatten(message: Message) -> str:
        if isinstance(message.content, str):
            return message.content
        parts = []
        for item in message.content:
            if isinstance(item, TextItem):
                parts.append(item.string.replace(IMAGE_PLACEHOLDER, image_text) if placed else item.string)
                continue
            count = next(frames)
            if isinstance(item, VideoItem):
                parts += [f'Frame{number}: {image_text}\n' for number in range(1, count + 1)]
            elif not placed:
                parts.append(image_text + '\n')
        # LMDeploy joins the parts of a message without images by line breaks, those of one with images by nothing.
        return ('' if message.sent['role'] in MEDIA_ROLES else '\n').join(parts)

    text = render([{**message.sent, 'content': flatten(message)} for message in request.messages])
    if text is None:
        raise ValueError('This server has no chat template, which messages need: start it with --chat-template.')
    pieces = text.split(mark)
    if len(pieces) != len(request.images) + 1:
        raise ValueError(f'The chat template shows {len(pieces) - 1} of the {len(request.images)} images.')
    return pieces


def _texts(request: VicoRequest) -> list[str]:
    return [item.string for item in request.items if isinstance(item, TextItem)]


def render_raw(text: str, images: int) -> list[str]:
    """Cut a raw /generate prompt where its images go.

    They go where the placeholders or image tokens are, if there is one for each image. Without any they go after the
    text, as LMDeploy does for InternVL.

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
    """Raise ValueError unless ``ids`` are token ids: the engine looks them up unchecked, and any other kills it."""
    for token in ids:
        if type(token) is not int or not 0 <= token < vocab_size:
            raise ValueError(f'input_ids must be integers from 0 to {vocab_size - 1}, not {shown(token)}.')


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
) -> tuple[Ids, list[Span]]:
    """Put the visual tokens between the pieces of text.

    Args:
        pieces: token ids before, between and after the images.
        images: what stands between them.
        image_token_id: stands at the visual tokens' positions, for LMDeploy's bookkeeping only.
        block_size: KV-cache block size in tokens.

    Returns:
        The prompt's ids at their true length, and the spans of its visual tokens.
    """
    ids, starts = place(pieces, images, image_token_id)
    spans = [span for image, start in zip(images, starts, strict=True) for span in _spans(image, start, block_size)]
    return ids, spans


def place(pieces: Sequence[Ids], images: Sequence[EncodedImage], image_token_id: int) -> tuple[Ids, list[int]]:
    """Return a prompt's ids at their true length, and where the visual tokens of each image begin.

    Args:
        pieces, images, image_token_id: as for :func:`assemble`.
    """
    ids, starts = list(pieces[0]), []
    for image, piece in zip(images, pieces[1:], strict=True):
        starts.append(len(ids))
        ids += [image_token_id] * len(image.tokens.embeddings)
        ids += piece
    return ids, starts


def _spans(image: EncodedImage, start: int, block_size: int) -> list[Span]:
    """Cut an image's visual tokens where the prompt's KV blocks end.

    LMDeploy never ends a prefix-cache match inside a span, and then goes back to a block boundary: a span over several
    blocks would keep a repeated image from ever being matched.
    """
    end = start + len(image.tokens.embeddings)
    cuts = [start, *range(start - start % block_size + block_size, end, block_size), end]
    return [
        Span(
            embeddings=PackedRows.of(image.tokens.embeddings[low - start : high - start]),
            start=low,
            end=high,
            content_hash=_content_hash(image, low - start, high - start),
        )
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
