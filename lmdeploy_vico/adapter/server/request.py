"""A request as its client sent it, parsed once: what everything after reads of it.

LMDeploy hands its messages from step to step without looking at them. From the first step on, a :class:`VicoRequest`
takes their place.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from lmdeploy_vico.adapter.server.forms.parts import MEDIA_KEYS
from lmdeploy_vico.adapter.server.items import (
    MEDIA_ROLES,
    ImageItem,
    Item,
    MediaItem,
    Rules,
    SyntheticItem,
    TextItem,
    ThoughtItem,
    VideoItem,
    parse_item,
    parse_media_io_kwargs,
    parse_tile_limit,
)
from lmdeploy_vico.adapter.server.synthetic import KEY as SYNTHETIC_KEY
from lmdeploy_vico.adapter.server.synthetic import SyntheticImage, under_pressure
from lmdeploy_vico.choices import Compression, parse_compression
from lmdeploy_vico.config import TOKENS_COMPRESSED, TOKENS_FULL
from lmdeploy_vico.stage.jobs import ImageJob
from lmdeploy_vico.wording import shown

Job = ImageJob | SyntheticImage
# OpenAI renamed "system" to "developer"; chat templates know the former only.
SYSTEM_ROLES = ('system', 'developer')
ROLES = (*SYSTEM_ROLES, 'assistant', *MEDIA_ROLES)


@dataclass(frozen=True)
class Message:
    """A message of a conversation.

    Attributes:
        sent: as the client sent it, but with a role that chat templates know.
        content: its text, or its items.
    """

    sent: Mapping[str, Any]
    content: str | tuple[Item, ...]

    @property
    def items(self) -> tuple[Item, ...]:
        """Its items; none if its content is text."""
        return () if isinstance(self.content, str) else self.content


@dataclass(frozen=True)
class VicoRequest:
    """A request whose messages may have images and videos.

    Attributes:
        messages: its conversation.
        compression: for all images and videos that have none of their own.
        session_len: the model's context length in tokens; None if it is not known.
        max_tiles: the most tiles of all its images and videos together; None for any number.
        salt: keeps its images apart from equal ones of requests with another salt, wherever they are kept.
        jobs: of each image and video, in order, what it is encoded from; empty until they are decoded.
    """

    messages: tuple[Message, ...]
    compression: Compression
    session_len: int | None
    max_tiles: int | None = None
    salt: str = ''
    jobs: tuple[Sequence[Job], ...] = ()

    @cached_property
    def items(self) -> tuple[Item, ...]:
        """The items of all messages."""
        return tuple(item for message in self.messages for item in message.items)

    @cached_property
    def media(self) -> tuple[MediaItem, ...]:
        """The images and videos of all messages."""
        return tuple(item for item in self.items if not isinstance(item, TextItem | ThoughtItem))

    @property
    def characters(self) -> int:
        """Of all its texts."""
        plain = sum(len(message.content) for message in self.messages if isinstance(message.content, str))
        return plain + sum(len(item.text) for item in self.items if isinstance(item, TextItem) and not item.is_ids)

    @property
    def ids(self) -> list[Any] | None:
        """The token ids of a /generate request, which stand where a text would; None if it has none."""
        first = next(iter(self.items), None)
        return first.text if isinstance(first, TextItem) and first.is_ids else None

    def texts(self) -> list[dict[str, Any]]:
        """The messages of a request without images and videos, each with one text."""
        return [
            {
                **message.sent,
                'content': message.content
                if isinstance(message.content, str)
                else '\n'.join(item.string for item in message.items if isinstance(item, TextItem)),
            }
            for message in self.messages
        ]

    @cached_property
    def images(self) -> list[Job]:
        """What has been decoded, in order: the images, and among them the frames of the videos."""
        return [job for jobs in self.jobs for job in jobs]

    @property
    def pictures(self) -> list[ImageJob]:
        """The images that are encoded: all of them, or none if they are synthetic."""
        return [job for job in self.images if isinstance(job, ImageJob)]

    @property
    def synthetic(self) -> list[SyntheticImage]:
        """The images whose visual tokens are made up: all of them, or none."""
        return [job for job in self.images if isinstance(job, SyntheticImage)]

    def decoded(self, jobs: Sequence[Sequence[Job]]) -> 'VicoRequest':
        """The same request with its images and videos decoded.

        Raises:
            ValueError: the images have too many tiles, or alone, as far compressed as they may be, exceed the session.
        """
        request = replace(self, jobs=tuple([replace(job, salt=self.salt) for job in of_item] for of_item in jobs))
        request._require_few(sum(job.tiles for job in request.images))
        request._require_room(sum(_least_tokens(job, self.compression) for job in request.images))
        return request

    def most_tiles(self) -> int:
        """Estimate how many tiles the request will have at most, before anything is decoded.

        It is never more than shows that the request is too large: a place is not held for what cannot be answered.

        Raises:
            ValueError: there are more images and videos than fit the session, whatever they show.
        """
        self._require_few(len(self.media))
        self._require_room(len(self.media) * TOKENS_COMPRESSED)
        most = [sum(item.most_tiles for item in self.media)]
        if self.session_len is not None:
            most.append(self.session_len // TOKENS_COMPRESSED + 1)
        if self.max_tiles is not None:
            most.append(self.max_tiles)
        return min(most)

    def _require_few(self, tiles: int) -> None:
        if self.max_tiles is not None and tiles > self.max_tiles:
            raise ValueError(
                f'The images and video frames have at least {tiles} tiles; this server takes {self.max_tiles} in a '
                'prompt (option max_prompt_tiles). Send fewer or smaller ones, or give them a lower "detail".'
            )

    def _require_room(self, least: int) -> None:
        if self.session_len is not None and least >= self.session_len:
            raise ValueError(
                f'The images and video frames have at least {least} visual tokens, more than the model context length '
                f'({self.session_len}) allows. Send fewer or smaller ones, or serve with a larger --session-len.'
            )


def parse_request(
    messages: Sequence[Mapping[str, Any]],
    media_io_kwargs: Mapping[str, Any] | None,
    mm_processor_kwargs: Mapping[str, Any] | None,
    rules: Rules,
    *,
    raw: bool = False,
    salt: str = '',
) -> VicoRequest:
    """Check everything that a client says in its messages and about its images and videos.

    Args:
        messages: as the client sent them.
        media_io_kwargs: the request's; options for videos are under "video".
        mm_processor_kwargs: the request's; its compression is under "image".
        rules: the server's.
        raw: whether no chat template is used: then the first text may be token ids, as /generate passes them on.
        salt: the request's ``cache_salt``.

    Raises:
        ValueError: something is malformed; the text becomes the body of a 400.
    """
    video_options = parse_media_io_kwargs(media_io_kwargs)
    compression, limit = parse_processor_kwargs(mm_processor_kwargs, rules)

    def parse(index: int, sent: Any) -> Message:
        role, content = _role_and_content(sent)
        if role in SYSTEM_ROLES:
            sent = {**sent, 'role': SYSTEM_ROLES[0]}
        if isinstance(content, str):
            return Message(sent, content)
        items = tuple(parse_item(item, index, role, video_options, rules, limit) for item in content)
        if rules.routing_scope == 'image':
            items = tuple(_by_itself(item, compression) for item in items)
        for item in items:
            if isinstance(item, TextItem) and not (raw and index == 0 and item is items[0] and item.is_ids):
                require_text(item.string)
        return _with_thoughts(Message(sent, items))

    if not messages:
        raise ValueError('messages must have at least one message.')
    parsed = tuple(parse(index, message) for index, message in enumerate(messages))
    request = VicoRequest(parsed, compression, rules.session_len, rules.max_prompt_tiles, salt)
    _require_allowed(request, rules)
    return request


def _by_itself(item: Item, compression: Compression) -> Item:
    """An image or video with a compression of its own, by which it is routed alone; anything else as it is."""
    if isinstance(item, ImageItem | VideoItem) and item.compression is None:
        return replace(item, compression=compression)
    return item


def require_text(text: str) -> None:
    """Raise ValueError if a text is not Unicode: JSON can write half a character, which no tokenizer reads."""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            half = text[error.start]
            raise ValueError(
                f'A text has {half!a} at character {error.start}, which is half of a surrogate pair and no character.'
            ) from None


def _role_and_content(sent: Any) -> tuple[str, str | list[Any]]:
    """The role and the content of a message; raises ValueError if it has none."""
    role = sent.get('role') if isinstance(sent, Mapping) else None
    if not isinstance(role, str):
        raise ValueError(f'A message must be an object with a string "role" and a "content", not {shown(sent)}.')
    if role not in ROLES:
        raise ValueError(f'The role of a message must be one of {", ".join(ROLES)}, not {shown(role)}.')
    forgotten = [key for key in sent if key in MEDIA_KEYS and sent[key] is not None]
    if forgotten:
        raise ValueError(
            f'{shown(forgotten[0])} is not a key of a message: send images and videos as items of its "content", '
            '{"type": "image_url", "image_url": {"url": ...}}.'
        )
    content = sent.get('content')
    if content is None and role == 'assistant':
        content = sent.get('refusal') or ''  # OpenAI's answers have one or the other
    if not isinstance(content, str | list):
        raise ValueError(f'The content of a message must be a string or a list of items, not {shown(content)}.')
    if isinstance(content, str):
        require_text(content)
    return role, content


def _with_thoughts(message: Message) -> Message:
    """Move what an assistant thought from its items to where chat templates look for it."""
    thoughts = [item.text for item in message.items if isinstance(item, ThoughtItem)]
    if not thoughts:
        return message
    before = message.sent.get('reasoning_content')
    texts = [before, *thoughts] if isinstance(before, str) and before else thoughts
    items = tuple(item for item in message.items if not isinstance(item, ThoughtItem))
    return Message({**message.sent, 'reasoning_content': '\n'.join(texts)}, items)


def _require_allowed(request: VicoRequest, rules: Rules) -> None:
    """Raise ValueError unless a prompt may have so many images and videos, and these together."""
    videos = sum(isinstance(item, VideoItem) for item in request.media)
    for name, count, most in (
        ('images', len(request.media) - videos, rules.max_images),
        ('videos', videos, rules.max_videos),
    ):
        if most is not None and count > most:
            raise ValueError(f'The prompt has {count} {name}; this server takes {most} (option max_{name}).')
    synthetic = [isinstance(item, SyntheticItem) for item in request.media]
    if any(synthetic) and not all(synthetic):
        raise ValueError(f'A request has either images with "{SYNTHETIC_KEY}" or without, not both.')


def parse_processor_kwargs(mm_processor_kwargs: Any, rules: Rules) -> tuple[Compression, int | None]:
    """Check a request's ``mm_processor_kwargs``, whether it has images or not.

    Returns:
        The compression of ``{"image": {"compression": ...}}``, and the most tiles of an image by ``max_dynamic_patch``,
        where vLLM has it too; None if the request does not say.

    Raises:
        ValueError: something is malformed; the text becomes the body of a 400.
    """
    asked = mm_processor_kwargs
    if asked is None:
        return rules.compression, None
    if not isinstance(asked, Mapping):
        raise ValueError(f'mm_processor_kwargs must be an object, not {shown(asked)}.')
    if asked.get('video'):
        raise ValueError(
            'mm_processor_kwargs has no "video": {"image": {"compression": ...}} holds for the frames of videos too, '
            'and a video item has a "compression" of its own.'
        )
    if 'compression' in asked:
        raise ValueError('mm_processor_kwargs: "compression" belongs under "image": {"image": {"compression": ...}}.')
    unknown = [key for key in asked if key not in ('image', 'video', 'max_dynamic_patch')]
    if unknown:
        raise ValueError(f'mm_processor_kwargs has the keys "image" and "max_dynamic_patch", not {shown(unknown[0])}.')
    limit = asked.get('max_dynamic_patch')
    if limit is not None:
        limit = parse_tile_limit(limit, rules.max_tiles, 'mm_processor_kwargs["max_dynamic_patch"]')
    return _prompt_compression(asked.get('image'), rules.compression), limit


def _prompt_compression(section: Any, default: Compression) -> Compression:
    if section is None:
        return default
    if not isinstance(section, Mapping):
        raise ValueError(f'mm_processor_kwargs["image"] must be an object, not {shown(section)}.')
    unknown = [key for key in section if key != 'compression']
    if unknown:
        raise ValueError(f'mm_processor_kwargs["image"] has the key "compression" only, not {shown(unknown[0])}.')
    if section.get('compression') is None:
        return default
    return parse_compression(section['compression'], 'mm_processor_kwargs["image"]["compression"]')


def _least_tokens(job: Job, compression: Compression) -> int:
    """The fewest visual tokens that an image can have."""
    if isinstance(job, SyntheticImage):
        return sum(under_pressure(job, compression).tile_tokens)
    wanted = compression if job.compression is None else job.compression
    return job.tiles * (TOKENS_FULL if wanted in ('none', 0.0) else TOKENS_COMPRESSED)
