"""The forms in which a part of a message may come: those whose meaning is certain. Any other is refused.

OpenAI has one form of a picture for chat and another for responses. Hugging Face's chat templates, Anthropic's API and
LMDeploy have their own.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from PIL import Image

from lmdeploy_vico.wording import shown

Kind: TypeAlias = Literal['text', 'thought', 'image', 'video']
Params: TypeAlias = dict[str, Any]

# Where a text stands, by the type of the part. Thoughts belong to the history, not to a message's text.
TEXTS = {'text': 'text', 'input_text': 'text', 'output_text': 'text', 'refusal': 'refusal'}
THOUGHTS = {'thinking': 'thinking', 'reasoning': 'reasoning'}
IMAGES = ('image_url', 'image', 'image_data')
VIDEOS = ('video_url', 'video')
# Keys that bring pictures and videos elsewhere. Where such a key is not read, it must not be overlooked either.
MEDIA_KEYS = frozenset(
    f'{medium}{suffix}'
    for medium in ('image', 'video')
    for suffix in ('', 's', '_url', '_urls', '_data', '_pil', '_embeds', '_bytes', '_base64')
) | {'input_image', 'multi_modal_data', 'multi_modal_uuids', 'pixel_values'}
# Hints for other servers. They say nothing about what is shown: a cache's life, and the format that the data names too.
IGNORED = ('cache_control', 'format')


@dataclass(frozen=True)
class Part:
    """A part of a message, whatever its form was.

    Attributes:
        kind: what it is.
        value: the text (of a /generate request, its token ids), or where the image or video is; None if only its
            "uuid" says so.
        params: the other keys of an image or video.
    """

    kind: Kind
    value: Any
    params: Mapping[str, Any]


def read_part(sent: Any) -> Part:
    """Understand a part of a message.

    Raises:
        ValueError: it has none of the known forms; the text becomes the body of a 400.
    """
    if not isinstance(sent, Mapping):
        raise ValueError(f'A content item must be an object with a "type", not {shown(sent)}.')
    kind = sent.get('type')
    if isinstance(kind, str):
        for texts, name in ((TEXTS, 'text'), (THOUGHTS, 'thought')):
            if kind in texts:
                return _text(sent, name, texts[kind])
        if kind in _READERS:
            return _READERS[kind](sent)
    raise _unknown(kind)


def _unknown(kind: Any) -> ValueError:
    if kind is None:
        return ValueError('A content item must have a "type": "text", "image_url" or "video_url".')
    return ValueError(f'Content items of type {shown(kind)} are not supported; text, image_url and video_url are.')


def _text(sent: Mapping[str, Any], kind: Any, key: str) -> Part:
    forgotten = [name for name in sent if name in MEDIA_KEYS and sent[name] is not None]
    if forgotten:
        raise ValueError(
            f'A content item of type {shown(sent["type"])} has no {shown(forgotten[0])}: send an image as an item of '
            'its own, {"type": "image_url", "image_url": {"url": ...}}.'
        )
    return Part(kind, sent.get(key), {})


def _image(sent: Mapping[str, Any]) -> Part:
    if sent['type'] == 'image' and isinstance(sent.get('source'), Mapping):
        if sent.get('image') is not None or sent.get('url') is not None:
            raise not_one_source('image')
        others = {key: value for key, value in sent.items() if key not in ('type', 'source', 'image', 'url')}
        return Part('image', anthropic_url(sent['source']), _wanted(others))
    return _media(sent, 'image', sent['type'])


def _video(sent: Mapping[str, Any]) -> Part:
    return _media(sent, 'video', sent['type'])


def _input_image(sent: Mapping[str, Any]) -> Part:
    """OpenAI's form for responses. Some clients put its URL into an object, as in chat."""
    if sent.get('file_id') is not None:
        raise ValueError('This server keeps no files: send the image as "image_url", not as "file_id".')
    return _media({key: value for key, value in sent.items() if key != 'file_id'}, 'image', 'image_url')


def _file(sent: Mapping[str, Any]) -> Part:
    """A picture as a file: ``{"type": "file", "file": {"file_data": ...}}``, or "input_file" with the keys in it."""
    inner = sent.get('file') if sent['type'] == 'file' else sent
    data = inner.get('file_data') if isinstance(inner, Mapping) else None
    if not isinstance(inner, Mapping) or not isinstance(data, str) or data[:11].lower() != 'data:image/':
        raise ValueError(
            'A file is accepted if it is a picture: "file_data" must be a data URL, data:image/...;base64,... '
            'Send a picture by its URL as image_url, and the contents of a document as text or as pictures.'
        )
    known = ('type', 'file', 'file_data', 'filename')
    return Part('image', data, _wanted({key: value for key, value in inner.items() if key not in known}))


_READERS: Mapping[str, Callable[[Mapping[str, Any]], Part]] = {
    **dict.fromkeys(IMAGES, _image),
    **dict.fromkeys(VIDEOS, _video),
    'input_image': _input_image,
    'file': _file,
    'input_file': _file,
}


def _media(sent: Mapping[str, Any], kind: Kind, name: str) -> Part:
    """Read an image or video whose URL is under ``name``: alone, or in an object with other keys.

    The other keys may also stand beside ``name``, as vLLM's "uuid" does.
    """
    own = sent.get(name)
    beside = _wanted({key: value for key, value in sent.items() if key not in ('type', name)})
    if isinstance(own, Mapping):
        inner = _wanted(own)
        twice = [key for key in inner if key in beside]
        if twice:
            raise ValueError(f'{shown(twice[0])} stands in the item and in its {shown(name)}; one of them is enough.')
    else:
        inner = {} if own is None else {'url': own}
    params = {**beside, **inner}
    # {"type": "image", "url": ...} is Hugging Face's form. Beside a url of any other form it would be a second one.
    if 'url' in beside and (name not in ('image', 'video') or own is not None):
        raise not_one_source(kind)
    url, data = params.pop('url', None), params.pop('data', None)
    if isinstance(url, str) and not url:
        url = None
    if 'type' in params or (url is not None and data is not None):
        raise not_one_source(kind)
    if data is not None and not isinstance(data, Image.Image):
        raise ValueError('"data" is for the decoded pictures of a pipeline. Send an encoded one as the data URL "url".')
    return Part(kind, data if url is None else url, params)


def _wanted(params: Mapping[str, Any]) -> Params:
    """The keys that say something: null says as much as no key at all."""
    return {key: value for key, value in params.items() if key not in IGNORED and value is not None}


def not_one_source(kind: str) -> ValueError:
    """The error for an image or video that says in two ways, or in none, where it is."""
    name = 'An image' if kind == 'image' else 'A video'
    return ValueError(f'{name} item must have either "url" or "data", not both, and no "type" of its own.')


def anthropic_url(source: Any) -> str:
    """The URL of an image in the form of Anthropic's API.

    Args:
        source: the value of "source" in an image block.

    Raises:
        ValueError: it is not a base64 or a url source.
    """
    kind = source.get('type') if isinstance(source, Mapping) else None
    if kind == 'url':
        url = source.get('url')
        if isinstance(url, str) and url:
            return url
    elif kind == 'base64':
        data, media_type = source.get('data'), source.get('media_type', 'image/jpeg')
        if isinstance(data, str) and data and isinstance(media_type, str):
            return f'data:{media_type};base64,{data}'
    raise ValueError(
        'The "source" of an image must be {"type": "base64", "media_type": "image/...", "data": ...} or '
        f'{{"type": "url", "url": ...}}, not {shown(source)}; this server keeps no files.'
    )
