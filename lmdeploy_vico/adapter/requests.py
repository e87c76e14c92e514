"""What a request says about its images, checked: everything a client controls passes through here."""

from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from lmdeploy_vico.stage.stage import ImageJob
from lmdeploy_vico.vision.routing import Compression, parse_compression

# OpenAI's `detail`, as LMDeploy reads it for InternVL; "auto" means the checkpoint's.
DETAIL_TILES = {'low': 6, 'medium': 12, 'high': 24}
IMAGE_TYPES = ('image', 'image_url', 'image_data')
ITEM_KEYS = {'type', 'data', 'detail', 'max_dynamic_patch', 'compression'}
IMAGE_ROLES = ('user', 'tool')


def check_texts(messages: Sequence[Mapping[str, Any]]) -> None:
    """Raise ValueError if a content item of type "text" has no text."""
    for message in messages:
        for item in message['content'] if isinstance(message['content'], list) else []:
            if item['type'] == 'text' and not isinstance(item.get('text'), str):
                raise ValueError('A content item of type "text" must have a string "text".')


def image_jobs(messages: Sequence[Mapping[str, Any]], max_tiles: int) -> list[ImageJob]:
    """The images of a request in order, with what each item asks for.

    Args:
        messages: as LMDeploy hands them over, every image item being ``{'type': 'image', 'data': picture, **params}``.
        max_tiles: the server's limit on the tiles of one image.

    Raises:
        ValueError: an item is malformed; the message becomes the body of a 400.
    """
    jobs = []
    for message in messages:
        if not isinstance(message['content'], list):
            continue
        for item in message['content']:
            kind = item.get('type') if isinstance(item, Mapping) else None
            if kind == 'text':
                continue
            if kind not in IMAGE_TYPES:
                raise ValueError(f'Content items of type {kind!r} are not supported; text and image_url are.')
            if message['role'] not in IMAGE_ROLES:
                raise ValueError(f'Images are accepted in user and tool messages, not in {message["role"]!r} messages.')
            jobs.append(_image_job(item, max_tiles))
    return jobs


def prompt_compression(mm_processor_kwargs: Mapping[str, Any] | None, default: Compression) -> Compression:
    """The compression a request asks for with ``mm_processor_kwargs={"image": {"compression": ...}}``.

    Raises:
        ValueError: not an object, or not an accepted value.
    """
    if 'compression' in (mm_processor_kwargs or {}):
        raise ValueError('mm_processor_kwargs: "compression" belongs under "image": {"image": {"compression": ...}}.')
    section = (mm_processor_kwargs or {}).get('image')
    if section is None:
        return default
    if not isinstance(section, Mapping):
        raise ValueError(f'mm_processor_kwargs["image"] must be an object, not {section!r}.')
    unknown = [key for key in section if key != 'compression']
    if unknown:
        raise ValueError(f'mm_processor_kwargs["image"] has the key "compression" only, not {unknown[0]!r}.')
    if section.get('compression') is None:
        return default
    return parse_compression(section['compression'], 'mm_processor_kwargs["image"]["compression"]')


def _image_job(item: Mapping[str, Any], max_tiles: int) -> ImageJob:
    image = item.get('data')
    if not isinstance(image, Image.Image):
        # LMDeploy lets the keys of a client's item replace its own: a "data" beside "url" arrives here undecoded.
        raise ValueError('An image item must have either "url" or "data", not both, and no "type" of its own.')
    unknown = sorted(item.keys() - ITEM_KEYS)
    if unknown:
        raise ValueError(
            f'{unknown[0]!r} is not a key of an image item; url, detail, max_dynamic_patch, compression are.'
        )
    compression = item.get('compression')
    return ImageJob(
        image=image,
        max_tiles=_tile_limit(item, max_tiles),
        compression=None if compression is None else parse_compression(compression, 'image_url["compression"]'),
    )


def _tile_limit(item: Mapping[str, Any], max_tiles: int) -> int | None:
    limit = item.get('max_dynamic_patch')
    if limit is None:
        detail = item.get('detail')
        if detail in (None, 'auto'):
            return None
        if detail not in list(DETAIL_TILES):
            raise ValueError(f'detail must be "auto", "low", "medium" or "high", not {detail!r}.')
        return min(DETAIL_TILES[detail], max_tiles)
    if isinstance(limit, bool) or not isinstance(limit, int) or not 1 <= limit <= max_tiles:
        raise ValueError(f'max_dynamic_patch must be an integer from 1 to {max_tiles}, not {limit!r}.')
    return limit
