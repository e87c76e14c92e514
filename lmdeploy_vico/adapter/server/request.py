"""A request as its client sent it, parsed once: what everything after reads of it.

LMDeploy hands its messages from step to step without looking at them. From the first step on, a :class:`VicoRequest`
takes their place.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from lmdeploy_vico.adapter.server.items import Item, MediaItem, Rules, SyntheticItem, TextItem, parse_item
from lmdeploy_vico.adapter.server.synthetic import KEY as SYNTHETIC_KEY
from lmdeploy_vico.adapter.server.synthetic import SyntheticImage
from lmdeploy_vico.choices import Compression, parse_compression
from lmdeploy_vico.config import TOKENS_COMPRESSED, TOKENS_FULL
from lmdeploy_vico.stage.jobs import ImageJob

Job = ImageJob | SyntheticImage


@dataclass(frozen=True)
class Message:
    """A message of a conversation.

    Attributes:
        sent: as the client sent it.
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
    """A request with images or videos.

    Attributes:
        messages: its conversation.
        compression: for all images and videos that have none of their own.
        session_len: the model's context length in tokens; None if it is not known.
        jobs: of each image and video, in order, what it is encoded from; empty until they are decoded.
    """

    messages: tuple[Message, ...]
    compression: Compression
    session_len: int | None
    jobs: tuple[Sequence[Job], ...] = ()

    @cached_property
    def items(self) -> tuple[Item, ...]:
        """The items of all messages."""
        return tuple(item for message in self.messages for item in message.items)

    @cached_property
    def media(self) -> tuple[MediaItem, ...]:
        """The images and videos of all messages."""
        return tuple(item for item in self.items if not isinstance(item, TextItem))

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
            ValueError: the images alone, as far compressed as they may be, exceed the session.
        """
        request = replace(self, jobs=tuple(jobs))
        request._require_room(sum(_least_tokens(job, self.compression) for job in request.images))
        return request

    def most_tiles(self) -> int:
        """Estimate how many tiles the request will have at most, before anything is decoded.

        It is never more than shows that the request is too large: a place is not held for what cannot be answered.

        Raises:
            ValueError: there are more images and videos than fit the session, whatever they show.
        """
        self._require_room(len(self.media) * TOKENS_COMPRESSED)
        most = sum(item.most_tiles for item in self.media)
        return most if self.session_len is None else min(most, self.session_len // TOKENS_COMPRESSED + 1)

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
) -> VicoRequest:
    """Check everything that a client says about its images and videos.

    Args:
        messages: as the client sent them.
        media_io_kwargs: the request's; options for videos are under "video".
        mm_processor_kwargs: the request's; its compression is under "image".
        rules: the server's.

    Raises:
        ValueError: something is malformed; the text becomes the body of a 400.
    """
    media_io_kwargs = media_io_kwargs or {}
    if not isinstance(media_io_kwargs, Mapping):
        raise ValueError(f'media_io_kwargs must be an object, not {media_io_kwargs!r}.')
    request = VicoRequest(
        tuple(_message(index, message, media_io_kwargs, rules) for index, message in enumerate(messages)),
        _prompt_compression(mm_processor_kwargs or {}, rules.compression),
        rules.session_len,
    )
    synthetic = [isinstance(item, SyntheticItem) for item in request.media]
    if any(synthetic) and not all(synthetic):
        raise ValueError(f'A request has either images with "{SYNTHETIC_KEY}" or without, not both.')
    return request


def _message(index: int, sent: Mapping[str, Any], media_io_kwargs: Mapping[str, Any], rules: Rules) -> Message:
    content = sent.get('content')
    if content is None or isinstance(content, str):
        return Message(sent, content or '')
    if not isinstance(content, list):
        raise ValueError(f'The content of a message must be a string or a list of items, not {content!r}.')
    role = sent.get('role')
    return Message(sent, tuple(parse_item(item, index, role, media_io_kwargs, rules) for item in content))


def _prompt_compression(mm_processor_kwargs: Mapping[str, Any], default: Compression) -> Compression:
    """The compression that ``mm_processor_kwargs={"image": {"compression": ...}}`` asks for."""
    if mm_processor_kwargs.get('video'):
        raise ValueError(
            'mm_processor_kwargs has no "video": {"image": {"compression": ...}} holds for the frames of videos too, '
            'and a video item has a "compression" of its own.'
        )
    if 'compression' in mm_processor_kwargs:
        raise ValueError('mm_processor_kwargs: "compression" belongs under "image": {"image": {"compression": ...}}.')
    section = mm_processor_kwargs.get('image')
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


def _least_tokens(job: Job, compression: Compression) -> int:
    """The fewest visual tokens that an image can have."""
    if isinstance(job, SyntheticImage):
        return sum(job.tile_tokens)
    wanted = compression if job.compression is None else job.compression
    return job.grid.tiles * (TOKENS_FULL if wanted in ('none', 0.0) else TOKENS_COMPRESSED)
