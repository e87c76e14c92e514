"""What a request says about its images and videos, checked: everything a client controls passes through here."""

from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from lmdeploy_vico.adapter.server.synthetic import KEY as SYNTHETIC_KEY
from lmdeploy_vico.adapter.server.synthetic import synthetic_image
from lmdeploy_vico.choices import Compression, parse_compression
from lmdeploy_vico.config import TOKENS_COMPRESSED
from lmdeploy_vico.stage.stage import ImageJob

# OpenAI's `detail`, as LMDeploy reads it for InternVL; "auto" means the checkpoint's.
DETAIL_TILES = {'low': 6, 'medium': 12, 'high': 24}
IMAGE_TYPES = ('image', 'image_url', 'image_data')
VIDEO_TYPES = ('video', 'video_url')
IMAGE_KEYS = {'type', 'data', 'detail', 'max_dynamic_patch', 'compression'}
VIDEO_KEYS = {'type', 'data', 'video_metadata', 'num_frames', 'compression'}
MEDIA_ROLES = ('user', 'tool')


def check_texts(messages: Sequence[Mapping[str, Any]]) -> None:
    """Raise ValueError if a content item of type "text" has no text."""
    for message in messages:
        for item in message['content'] if isinstance(message['content'], list) else []:
            if item['type'] == 'text' and not isinstance(item.get('text'), str):
                raise ValueError('A content item of type "text" must have a string "text".')


def check_kind(kind: Any) -> None:
    """Raise ValueError unless ``kind`` is a type of content items that this model takes."""
    if kind not in ('text', *IMAGE_TYPES, *VIDEO_TYPES):
        raise ValueError(f'Content items of type {kind!r} are not supported; text, image_url and video_url are.')


def media_jobs(
    messages: Sequence[Mapping[str, Any]], max_tiles: int, synthetic: bool = False
) -> tuple[list[ImageJob], list[int]]:
    """The images of a request in order, the frames of its videos among them, with what each item asks for.

    Args:
        messages: as our MediaParser hands them over, every image item being ``{'type': 'image', 'data': picture,
            **params}``, every video ``{'type': 'video', 'data': pictures, 'video_metadata': ..., **params}``.
        max_tiles: the server's limit on the tiles of one image.
        synthetic: whether image items may ask for visual tokens that are made up.

    Returns:
        The images, and the number of frames of each video.

    Raises:
        ValueError: an item is malformed; the message becomes the body of a 400.
    """
    jobs: list[ImageJob] = []
    videos: list[int] = []
    for message in messages:
        if not isinstance(message['content'], list):
            continue
        for item in message['content']:
            kind = item.get('type') if isinstance(item, Mapping) else None
            if kind == 'text':
                continue
            check_kind(kind)
            if message['role'] not in MEDIA_ROLES:
                raise ValueError(
                    f'Images and videos are accepted in user and tool messages, not in {message["role"]!r} messages.'
                )
            if kind in IMAGE_TYPES:
                jobs.append(_image_job(item, max_tiles, synthetic))
            else:
                frames = _frame_jobs(item, routed_with=len(videos))
                videos.append(len(frames))
                jobs += frames
    return jobs, videos


def video_options(
    item: Mapping[str, Any], media_io_kwargs: Mapping[str, Any], session_len: int | None
) -> tuple[dict[str, Any], int | None]:
    """How a video item is to be decoded, checked before it is.

    Args:
        item: as the client sent it. Its own ``num_frames`` comes before that of the request.
        media_io_kwargs: the request's, with ``num_frames`` and ``fps`` under ``"video"``.
        session_len: never more frames are decoded than show that the video cannot fit, which bounds the memory.

    Returns:
        The arguments of LMDeploy's loader, and the ``num_frames`` that the client asked for, None if it did not.

    Raises:
        ValueError: an option is malformed, or a sequence of frames is too long for ``session_len``.
    """
    options = media_io_kwargs.get('video') or {}
    if not isinstance(options, Mapping):
        raise ValueError(f'media_io_kwargs["video"] must be an object, not {options!r}.')
    unknown = sorted(options.keys() - {'num_frames', 'fps'}, key=str)
    if unknown:
        raise ValueError(f'media_io_kwargs["video"] has the keys "num_frames" and "fps", not {unknown[0]!r}.')
    asked = _num_frames(options.get('num_frames'), 'media_io_kwargs["video"]["num_frames"]')
    fps = options.get('fps')
    if fps is not None and (isinstance(fps, bool) or not isinstance(fps, int | float) or not 0 < fps < float('inf')):
        raise ValueError(f'media_io_kwargs["video"]["fps"] must be a number above 0, not {fps!r}.')
    asked = _num_frames(parameters(item).get('num_frames'), 'video_url["num_frames"]') or asked
    sequence = jpeg_frames(item)
    checked = {} if fps is None else {'fps': fps}
    if asked is not None:
        checked['num_frames'] = asked
    if session_len is not None:
        too_many = session_len // TOKENS_COMPRESSED + 1
        if sequence >= too_many:
            raise ValueError(
                f'The video has {sequence} frames and at least {sequence * TOKENS_COMPRESSED} visual tokens, more than '
                f'the model context length ({session_len}) allows.'
            )
        if asked is not None:
            checked['num_frames'] = min(asked, too_many) if asked > 0 else too_many
    return checked, asked


def parameters(item: Mapping[str, Any]) -> Mapping[str, Any]:
    """Where a client's image or video item has its keys: beside the url, or, if that stands alone, in the item."""
    own = item.get(item['type'])
    return own if isinstance(own, Mapping) else item


def jpeg_frames(item: Mapping[str, Any]) -> int:
    """How many frames a video item brings as a sequence of JPEGs, all of which LMDeploy decodes; 0 for another video.

    Raises:
        ValueError: it has no url.
    """
    url = _video_url(item.get(item['type']))
    # A data URL has a comma before its data, and a sequence one between its frames.
    return url.count(',') if url[:5].lower() == 'data:' and url.count(',') > 1 else 0


def _video_url(value: Any) -> str:
    sources = (value.get('url'), value.get('data')) if isinstance(value, Mapping) else (value,)
    url = next((source for source in sources if isinstance(source, str) and source), None)
    if url is None:
        raise ValueError('A video item must have a string "url": an HTTP, file or base64 data URL.')
    return url


def _num_frames(value: Any, name: str) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not (value == -1 or value > 0):
        raise ValueError(f'{name} must be a positive integer, or -1 for all frames, not {value!r}.')
    return value


def prompt_compression(mm_processor_kwargs: Mapping[str, Any] | None, default: Compression) -> Compression:
    """The compression a request asks for with ``mm_processor_kwargs={"image": {"compression": ...}}``.

    Raises:
        ValueError: not an object, or not an accepted value.
    """
    if (mm_processor_kwargs or {}).get('video'):
        raise ValueError(
            'mm_processor_kwargs has no "video": {"image": {"compression": ...}} holds for the frames of videos too, '
            'and a video item has a "compression" of its own.'
        )
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


def _image_job(item: Mapping[str, Any], max_tiles: int, synthetic: bool) -> ImageJob:
    image = item.get('data')
    if not isinstance(image, Image.Image):
        # LMDeploy lets the keys of a client's item replace its own: a "data" beside "url" arrives here undecoded.
        raise ValueError('An image item must have either "url" or "data", not both, and no "type" of its own.')
    if synthetic and SYNTHETIC_KEY in item:
        return synthetic_image(item, max_tiles)
    unknown = sorted(item.keys() - IMAGE_KEYS)
    if unknown:
        raise ValueError(
            f'{unknown[0]!r} is not a key of an image item; url, detail, max_dynamic_patch, compression are.'
        )
    compression = item.get('compression')
    return ImageJob(
        image=image,
        max_tiles=tile_limit(item, max_tiles),
        compression=None if compression is None else parse_compression(compression, 'image_url["compression"]'),
    )


def _frame_jobs(item: Mapping[str, Any], routed_with: int) -> list[ImageJob]:
    """A video's frames, one tile each; those of a video with a compression of its own are routed together."""
    frames = item.get('data')
    if not isinstance(frames, list) or not frames or not all(isinstance(frame, Image.Image) for frame in frames):
        raise ValueError('A video item must have either "url" or "data", not both, and no "type" of its own.')
    unknown = sorted(item.keys() - VIDEO_KEYS)
    if unknown:
        raise ValueError(f'{unknown[0]!r} is not a key of a video item; url, num_frames, compression are.')
    compression = item.get('compression')
    if compression is None:
        return [ImageJob(image=frame, max_tiles=1) for frame in frames]
    compression = parse_compression(compression, 'video_url["compression"]')
    return [ImageJob(image=frame, max_tiles=1, compression=compression, routed_with=routed_with) for frame in frames]


def tile_limit(item: Mapping[str, Any], max_tiles: int) -> int | None:
    """The most tiles that an image item asks for, thumbnail not counted; None if it says nothing. Raises ValueError."""
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
