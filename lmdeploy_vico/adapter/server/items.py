"""The content items of a client's messages: each is checked and typed once, before anything is fetched or decoded."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from PIL import Image

from lmdeploy_vico.adapter.server.synthetic import KEY as SYNTHETIC_KEY
from lmdeploy_vico.adapter.server.synthetic import SyntheticImage, synthetic_image
from lmdeploy_vico.choices import Compression, parse_compression
from lmdeploy_vico.config import TOKENS_COMPRESSED
from lmdeploy_vico.stage.jobs import ImageJob
from lmdeploy_vico.vision.tiling import Grid, Tiling

# OpenAI's `detail`, as LMDeploy reads it for InternVL; "auto" means the checkpoint's.
DETAIL_TILES = {'low': 6, 'medium': 12, 'high': 24}
IMAGE_TYPES = ('image', 'image_url', 'image_data')
VIDEO_TYPES = ('video', 'video_url')
IMAGE_KEYS = {'detail', 'max_dynamic_patch', 'compression'}
VIDEO_KEYS = {'num_frames', 'compression'}
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
    """

    tiling: Tiling
    max_tiles: int
    compression: Compression = 'auto'
    session_len: int | None = None
    synthetic: bool = False


@dataclass(frozen=True)
class TextItem:
    """A text item. A /generate request brings its token ids in the place of the text."""

    text: Any

    @property
    def string(self) -> str:
        """The text; raises ValueError if it is none."""
        if not isinstance(self.text, str):
            raise ValueError('A content item of type "text" must have a string "text".')
        return self.text


@dataclass(frozen=True)
class ImageItem:
    """An image that is still to be fetched and decoded.

    Attributes:
        sent: the item as the client sent it.
        message: the number of its message, which LMDeploy's error messages name.
        source: its URL, or a picture that a pipeline's caller decoded.
        tiling: how it is cut.
        compression: None to be routed by the prompt's compression, together with the prompt's other such images.
    """

    sent: Mapping[str, Any]
    message: int
    source: str | Image.Image
    tiling: Tiling
    compression: Compression | None = None

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
            raise _not_one_source(IMAGE_TYPES[0])
        return [ImageJob(decoded, grid or self.tiling.grid(decoded.size), self.compression)]


@dataclass(frozen=True)
class SyntheticItem:
    """An image item that asks for made-up visual tokens. The image beside it is decoded, but not used."""

    sent: Mapping[str, Any]
    message: int
    source: str | Image.Image
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
        sent: the item as the client sent it.
        message: the number of its message, which LMDeploy's error messages name.
        source: its URL.
        options: the arguments of LMDeploy's loader. It never decodes many more frames than fit the session.
        num_frames: what the client asked for: a number of frames, -1 for all, or None if it did not ask.
        jpegs: the number of frames of a sequence of JPEGs, all of which LMDeploy decodes; 0 for any other video.
        compression: None to be routed by the prompt's compression, together with the prompt's other such images.
    """

    sent: Mapping[str, Any]
    message: int
    source: str
    options: Mapping[str, Any]
    num_frames: int | None = None
    jpegs: int = 0
    compression: Compression | None = None

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
Item: TypeAlias = TextItem | MediaItem


def parse_item(sent: Any, message: int, role: Any, media_io_kwargs: Mapping[str, Any], rules: Rules) -> Item:
    """Check a content item of a client's message.

    Args:
        sent: the item.
        message: the number of its message.
        role: of its message.
        media_io_kwargs: the request's.
        rules: the server's.

    Raises:
        ValueError: the item is malformed; the text becomes the body of a 400.
    """
    if not isinstance(sent, Mapping):
        raise ValueError(f'A content item must be an object with a "type", not {sent!r}.')
    kind = sent.get('type')
    _check_kind(kind)
    if kind == 'text':
        return TextItem(sent.get('text'))
    if role not in MEDIA_ROLES:
        raise ValueError(f'Images and videos are accepted in user and tool messages, not in {role!r} messages.')
    source, params = _source_and_params(sent)
    own_type = params.pop('type', kind)
    _check_kind(own_type)
    if own_type == 'text':
        return TextItem(params.get('text'))
    if 'data' in params or (own_type in IMAGE_TYPES) != (kind in IMAGE_TYPES):
        raise _not_one_source(own_type)
    if kind in VIDEO_TYPES:
        return _video(sent, message, source, params, media_io_kwargs, rules)
    if rules.synthetic and SYNTHETIC_KEY in params:
        return SyntheticItem(sent, message, source, synthetic_image(params, rules.max_tiles))
    return _image(sent, message, source, params, rules)


def _check_kind(kind: Any) -> None:
    if kind not in ('text', *IMAGE_TYPES, *VIDEO_TYPES):
        raise ValueError(f'Content items of type {kind!r} are not supported; text, image_url and video_url are.')


def _source_and_params(sent: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Where an image or video is, and the item's other keys, as LMDeploy reads both.

    They are beside the url, or, where the url stands alone, in the item itself.
    """
    kind = sent['type']
    own = sent.get(kind)
    if not isinstance(own, Mapping):
        return own, {key: value for key, value in sent.items() if key not in ('type', kind)}
    params = dict(own)
    url = params.pop('url', None)
    return (params.pop('data', None) if url is None or (isinstance(url, str) and not url) else url), params


def _not_one_source(kind: str) -> ValueError:
    name = 'An image' if kind in IMAGE_TYPES else 'A video'
    return ValueError(f'{name} item must have either "url" or "data", not both, and no "type" of its own.')


def _image(sent: Mapping[str, Any], message: int, source: Any, params: Mapping[str, Any], rules: Rules) -> ImageItem:
    unknown = sorted(params.keys() - IMAGE_KEYS)
    if unknown:
        raise ValueError(
            f'{unknown[0]!r} is not a key of an image item; url, detail, max_dynamic_patch, compression are.'
        )
    limit = _tile_limit(params, rules.max_tiles)
    tiling = rules.tiling if limit is None else replace(rules.tiling, max_tiles=limit)
    return ImageItem(sent, message, source, tiling, _compression(params, 'image_url'))


def _tile_limit(params: Mapping[str, Any], max_tiles: int) -> int | None:
    """The most tiles that an image item asks for, thumbnail not counted; None if it does not ask."""
    limit = params.get('max_dynamic_patch')
    if limit is None:
        detail = params.get('detail')
        if detail in (None, 'auto'):
            return None
        if detail not in list(DETAIL_TILES):
            raise ValueError(f'detail must be "auto", "low", "medium" or "high", not {detail!r}.')
        return min(DETAIL_TILES[detail], max_tiles)
    if isinstance(limit, bool) or not isinstance(limit, int) or not 1 <= limit <= max_tiles:
        raise ValueError(f'max_dynamic_patch must be an integer from 1 to {max_tiles}, not {limit!r}.')
    return limit


def _compression(params: Mapping[str, Any], kind: str) -> Compression | None:
    value = params.get('compression')
    return None if value is None else parse_compression(value, f'{kind}["compression"]')


def _video(
    sent: Mapping[str, Any],
    message: int,
    source: Any,
    params: Mapping[str, Any],
    media_io_kwargs: Mapping[str, Any],
    rules: Rules,
) -> VideoItem:
    unknown = sorted(params.keys() - VIDEO_KEYS)
    if unknown:
        raise ValueError(f'{unknown[0]!r} is not a key of a video item; url, num_frames, compression are.')
    options, asked = _video_options(params, media_io_kwargs)
    if not isinstance(source, str):
        raise ValueError('A video item must have a string "url": an HTTP, file or base64 data URL.')
    # A data URL has a comma before its data, and a sequence of JPEGs one between its frames.
    jpegs = source.count(',') if source[:5].lower() == 'data:' and source.count(',') > 1 else 0
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
    return VideoItem(sent, message, source, options, asked, jpegs, _compression(params, 'video_url'))


def _video_options(params: Mapping[str, Any], media_io_kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], int | None]:
    """What is asked for a video: by its item, or else by the request.

    Returns:
        The arguments of LMDeploy's loader, and the ``num_frames`` that the client asked for, None if it did not.
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
    asked = _num_frames(params.get('num_frames'), 'video_url["num_frames"]') or asked
    checked = {} if fps is None else {'fps': fps}
    return checked if asked is None else {**checked, 'num_frames': asked}, asked


def _num_frames(value: Any, name: str) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not (value == -1 or value > 0):
        raise ValueError(f'{name} must be a positive integer, or -1 for all frames, not {value!r}.')
    return value
