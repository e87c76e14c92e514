"""The content items of a client's messages: each is checked and typed once, before anything is fetched or decoded."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from PIL import Image

from lmdeploy_vico.adapter.server.forms.parts import Part, not_one_source, read_part
from lmdeploy_vico.adapter.server.synthetic import KEY as SYNTHETIC_KEY
from lmdeploy_vico.adapter.server.synthetic import SyntheticImage, synthetic_image
from lmdeploy_vico.choices import Compression, parse_compression
from lmdeploy_vico.config import TOKENS_COMPRESSED
from lmdeploy_vico.stage.jobs import ImageJob
from lmdeploy_vico.vision.tiling import Grid, Tiling
from lmdeploy_vico.wording import shown

# OpenAI's `detail`, as LMDeploy reads it for InternVL; "auto" means the checkpoint's.
DETAIL_TILES = {'low': 6, 'medium': 12, 'high': 24}
ORIGINAL = 'original'  # as many tiles as the server allows
IMAGE_KEYS = ('detail', 'max_dynamic_patch', 'compression', 'uuid')
VIDEO_KEYS = ('num_frames', 'compression', 'uuid')
LONGEST_UUID = 256  # characters
MEDIA_ROLES = ('user', 'tool')
DEFAULT_FRAMES = 32  # what LMDeploy takes of a video unless a request says otherwise
FRAME = Grid(columns=1, rows=1, thumbnail=False)


@dataclass(frozen=True)
class Rules:
    """What the checkpoint and the server's options say about requests.

    Attributes:
        tiling: how an image is cut that asks for nothing.
        max_tiles: the most tiles that an image may ask for, thumbnail not counted.
        compression: of a prompt that asks for none.
        session_len: the model's context length in tokens; None if it is not known.
        synthetic: whether an image item may ask for visual tokens that are made up.
        media_ids: whether an item may have a "uuid" in the place of its url.
        max_images, max_videos, max_prompt_tiles: the most of each in a prompt; None for any number.
        routing_scope: ``prompt``, or ``image`` to route every image and video by itself.
    """

    tiling: Tiling
    max_tiles: int
    compression: Compression = 'auto'
    session_len: int | None = None
    synthetic: bool = False
    media_ids: bool = False
    max_images: int | None = None
    max_videos: int | None = None
    max_prompt_tiles: int | None = None
    routing_scope: str = 'prompt'


@dataclass(frozen=True)
class TextItem:
    """A text item. A /generate request brings its token ids in the place of the text."""

    text: Any

    @property
    def is_ids(self) -> bool:
        """Whether it has a list in the place of a text."""
        return isinstance(self.text, list)

    @property
    def string(self) -> str:
        """The text; raises ValueError if it is none."""
        if not isinstance(self.text, str):
            raise ValueError('A content item of type "text" must have a string "text".')
        return self.text


@dataclass(frozen=True)
class ThoughtItem:
    """What an assistant thought before it answered. Chat templates decide whether they show it."""

    text: str


@dataclass(frozen=True)
class ImageItem:
    """An image that is still to be fetched and decoded.

    Attributes:
        message: the number of its message, which LMDeploy's error messages name.
        source: its URL, or a picture that a pipeline's caller decoded; None for what has been sent as ``uuid`` before.
        tiling: how it is cut.
        compression: None to be routed by the prompt's compression, together with the prompt's other such images.
        uuid: the client's name for its bytes, if it gave one.
    """

    message: int
    source: str | Image.Image | None
    tiling: Tiling
    compression: Compression | None = None
    uuid: str | None = None

    @property
    def most_tiles(self) -> int:
        """The most tiles that it can have, which is what a place is held for before its size is known."""
        return self.tiling.most

    def jobs(self, decoded: Any, number: int, grid: Grid | None = None) -> list[ImageJob]:
        """Choose the grid for the decoded picture.

        Args:
            decoded: the picture.
            number: of the item in its prompt; not used.
            grid: the one that has been chosen already, by the picture's size alone.

        Raises:
            ValueError: it is no picture.
        """
        del number
        if not isinstance(decoded, Image.Image):
            raise not_one_source('image')
        return [ImageJob(decoded, grid or self.tiling.grid(decoded.size), self.compression)]


@dataclass(frozen=True)
class SyntheticItem:
    """An image item that asks for made-up visual tokens. The image beside it is decoded, but not used."""

    message: int
    source: str | Image.Image | None
    image: SyntheticImage

    @property
    def most_tiles(self) -> int:
        """The number of tiles it stands for."""
        return self.image.tiles

    def jobs(self, decoded: Any, number: int) -> list[SyntheticImage]:
        """The synthetic image, whatever has been decoded."""
        del decoded, number
        return [self.image]


@dataclass(frozen=True)
class VideoItem:
    """A video that is still to be fetched and decoded.

    Attributes:
        message: the number of its message, which LMDeploy's error messages name.
        source: its URL; None for what has been sent as ``uuid`` before.
        options: the arguments of LMDeploy's loader. It never decodes many more frames than fit the session.
        num_frames: what the client asked for: a number of frames, -1 for all, or None if it did not ask.
        jpegs: the number of frames of a sequence of JPEGs, all of which LMDeploy decodes; 0 for any other video.
        compression: None to be routed by the prompt's compression, together with the prompt's other such images.
        uuid: the client's name for its bytes, if it gave one.
    """

    message: int
    source: str | None
    options: Mapping[str, Any]
    num_frames: int | None = None
    jpegs: int = 0
    compression: Compression | None = None
    uuid: str | None = None

    @property
    def most_tiles(self) -> int:
        """The most frames that it can have: each is one tile."""
        frames = int(self.options.get('num_frames', DEFAULT_FRAMES))
        if not self.jpegs:
            return frames
        return self.jpegs if self.num_frames is None else min(self.jpegs, frames)

    def jobs(self, decoded: Sequence[Image.Image], number: int) -> list[ImageJob]:
        """Make an image of one tile of each decoded frame.

        Args:
            decoded: the frames.
            number: of the item in its prompt. Frames of a video with a compression of its own are routed together.
        """
        routed_with = None if self.compression is None else number
        return [ImageJob(frame, FRAME, self.compression, routed_with) for frame in decoded]


MediaItem: TypeAlias = ImageItem | SyntheticItem | VideoItem
Item: TypeAlias = TextItem | ThoughtItem | MediaItem


def parse_item(
    sent: Any, message: int, role: Any, video_options: Mapping[str, Any], rules: Rules, limit: int | None = None
) -> Item:
    """Check a content item of a client's message.

    Args:
        sent: the item.
        message: the number of its message.
        role: of its message.
        video_options: the request's; see :func:`parse_media_io_kwargs`.
        rules: the server's.
        limit: the most tiles of an image that does not say itself, thumbnail not counted; None for the checkpoint's.

    Raises:
        ValueError: the item is malformed; the text becomes the body of a 400.
    """
    part = read_part(sent)
    if part.kind == 'text':
        return TextItem(part.value)
    if part.kind == 'thought':
        if role != 'assistant' or not isinstance(part.value, str):
            raise ValueError(f'An item of type {shown(sent["type"])} is a text in an assistant message.')
        return ThoughtItem(part.value)
    if role not in MEDIA_ROLES:
        raise ValueError(f'Images and videos are accepted in user and tool messages, not in {shown(role)} messages.')
    if part.kind == 'video':
        return _video(message, part, video_options, rules)
    return _image(message, part, rules, limit)


def _image(message: int, part: Part, rules: Rules, limit: int | None) -> ImageItem | SyntheticItem:
    params = dict(part.params)
    uuid = _uuid(params, part.value, rules)
    if not isinstance(part.value, str | Image.Image) and not (part.value is None and uuid is not None):
        raise ValueError(
            'An image item must have a string "url", an HTTP or base64 data URL: {"type": "image_url", "image_url": '
            '{"url": ...}}.'
        )
    if rules.synthetic and SYNTHETIC_KEY in params:
        return SyntheticItem(message, part.value, synthetic_image(params, rules.max_tiles))
    _require_known(params, IMAGE_KEYS, 'an image')
    own = _tile_limit(params, rules.max_tiles)
    limit = limit if own is None and params.get('detail') is None else own
    tiling = rules.tiling if limit is None else replace(rules.tiling, max_tiles=limit)
    return ImageItem(message, part.value, tiling, _compression(params, 'image_url'), uuid)


def _require_known(params: Mapping[str, Any], known: Sequence[str], name: str) -> None:
    unknown = sorted(params.keys() - set(known), key=str)
    if unknown:
        raise ValueError(f'{shown(unknown[0])} is not a key of {name} item; url, {", ".join(known)} are.')


def _uuid(params: dict[str, Any], source: Any, rules: Rules) -> str | None:
    """Take the id out of an item's keys by which the client names its bytes, now and later."""
    uuid = params.pop('uuid', None)
    if uuid is None:
        return None
    if not isinstance(uuid, str) or not 0 < len(uuid) <= LONGEST_UUID:
        raise ValueError(f'uuid must be a string of 1 to {LONGEST_UUID} characters, not {shown(uuid)}.')
    if isinstance(source, Image.Image):
        raise ValueError('A "uuid" names the bytes of a url; a decoded picture has none.')
    if source is None and not rules.media_ids:
        raise ValueError('This server keeps no images and videos by their "uuid": send the "url" too.')
    return uuid


def parse_tile_limit(limit: Any, max_tiles: int, name: str = 'max_dynamic_patch') -> int:
    """The number of tiles that a client asks for, thumbnail not counted.

    Raises:
        ValueError: naming ``name`` and what is accepted.
    """
    if isinstance(limit, bool) or not isinstance(limit, int) or not 1 <= limit <= max_tiles:
        raise ValueError(f'{name} must be an integer from 1 to {max_tiles}, not {shown(limit)}.')
    return limit


def _tile_limit(params: Mapping[str, Any], max_tiles: int) -> int | None:
    """The most tiles that an image item asks for, thumbnail not counted; None if it does not ask."""
    limit = params.get('max_dynamic_patch')
    if limit is not None:
        return parse_tile_limit(limit, max_tiles)
    detail = params.get('detail')
    if detail in (None, 'auto'):
        return None
    if detail == ORIGINAL:
        return max_tiles
    if detail not in list(DETAIL_TILES):
        raise ValueError(f'detail must be "auto", "low", "medium", "high" or "{ORIGINAL}", not {shown(detail)}.')
    return min(DETAIL_TILES[detail], max_tiles)


def _compression(params: Mapping[str, Any], kind: str) -> Compression | None:
    value = params.get('compression')
    return None if value is None else parse_compression(value, f'{kind}["compression"]')


def _video(message: int, part: Part, video_options: Mapping[str, Any], rules: Rules) -> VideoItem:
    params, source = dict(part.params), part.value
    uuid = _uuid(params, source, rules)
    _require_known(params, VIDEO_KEYS, 'a video')
    own = _num_frames(params.get('num_frames'), 'video_url["num_frames"]')
    options = {**video_options} if own is None else {**video_options, 'num_frames': own}
    asked = options.get('num_frames')
    if not isinstance(source, str) and not (source is None and uuid is not None):
        raise ValueError('A video item must have a string "url": an HTTP, file or base64 data URL.')
    jpegs = _jpegs(source or '')
    if rules.session_len is not None:
        too_many = rules.session_len // TOKENS_COMPRESSED + 1
        if jpegs >= too_many:
            raise ValueError(
                f'The video has {jpegs} frames and at least {jpegs * TOKENS_COMPRESSED} visual tokens, more than '
                f'the model context length ({rules.session_len}) allows.'
            )
        if asked is not None:
            # One frame more than can fit shows that the video is too long. No more are decoded: it bounds the memory.
            options['num_frames'] = min(asked, too_many) if asked > 0 else too_many
    compression = _compression(params, 'video_url')
    return VideoItem(message, source, options, asked, jpegs, compression, uuid)


def _jpegs(source: str) -> int:
    """The number of frames of a sequence of JPEGs; 0 for any other video."""
    # A data URL has a comma before its data, and a sequence of JPEGs one between its frames.
    return source.count(',') if source[:5].lower() == 'data:' and source.count(',') > 1 else 0


def parse_media_io_kwargs(media_io_kwargs: Any) -> dict[str, Any]:
    """Check a request's ``media_io_kwargs``, whether it has videos or not.

    Returns:
        What it asks for all videos that do not say themselves: ``num_frames`` and ``fps``, where it has them.

    Raises:
        ValueError: something is malformed; the text becomes the body of a 400.
    """
    if media_io_kwargs is None:
        return {}
    if not isinstance(media_io_kwargs, Mapping):
        raise ValueError(f'media_io_kwargs must be an object, not {shown(media_io_kwargs)}.')
    for key, value in media_io_kwargs.items():
        if key not in ('image', 'video'):
            raise ValueError(f'media_io_kwargs has the keys "image" and "video", not {shown(key)}.')
        if value is not None and not isinstance(value, Mapping):
            raise ValueError(f'media_io_kwargs["{key}"] must be an object, not {shown(value)}.')
    for key in media_io_kwargs.get('image') or ():
        raise ValueError(
            f'media_io_kwargs["image"] has no keys, {shown(key)} among them; compression and tiles of an image are '
            'keys of its item.'
        )
    return _video_options(media_io_kwargs.get('video') or {})


def _video_options(asked: Mapping[str, Any]) -> dict[str, Any]:
    unknown = sorted(asked.keys() - {'num_frames', 'fps'}, key=str)
    if unknown:
        raise ValueError(f'media_io_kwargs["video"] has the keys "num_frames" and "fps", not {shown(unknown[0])}.')
    num_frames = _num_frames(asked.get('num_frames'), 'media_io_kwargs["video"]["num_frames"]')
    fps = asked.get('fps')
    if fps is not None and (isinstance(fps, bool) or not isinstance(fps, int | float) or not 0 < fps < float('inf')):
        raise ValueError(f'media_io_kwargs["video"]["fps"] must be a number above 0, not {shown(fps)}.')
    options = {'num_frames': num_frames, 'fps': fps}
    return {name: value for name, value in options.items() if value is not None}


def _num_frames(value: Any, name: str) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not (value == -1 or value > 0):
        raise ValueError(f'{name} must be a positive integer, or -1 for all frames, not {shown(value)}.')
    return value
