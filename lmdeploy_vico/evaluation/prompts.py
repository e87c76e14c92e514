"""From a question to the body of a chat request."""

import base64
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lmdeploy_vico.evaluation.data import Question
from lmdeploy_vico.evaluation.rules.rule import Rule

# The first characters of a picture's base64, by its media type.
TYPES = {'iVBOR': 'image/png', '/9j/': 'image/jpeg', 'UklGR': 'image/webp', 'R0lGO': 'image/gif', 'Qk': 'image/bmp'}


@dataclass(frozen=True)
class Asking:
    """How questions are asked.

    Attributes:
        model: its name at the server.
        max_tokens: of an answer.
        max_tiles: the most tiles of a picture; None leaves it to the server.
        frames: taken of a video.
        subtitles: whether those of a video are shown.
        instruction: ends every question; None takes that of the rule.
    """

    model: str
    max_tokens: int = 64
    max_tiles: int | None = None
    frames: int = 64
    subtitles: bool = False
    instruction: str | None = None


def body(question: Question, rule: Rule, compression: Any, asking: Asking) -> dict[str, Any]:
    """The body of the request that asks ``question`` at a compression."""
    content = [_picture(data, asking.max_tiles) for data in question.pictures]
    if question.video is not None:
        url = f'data:video/mp4;base64,{base64.b64encode(question.video.read_bytes()).decode()}'
        content.append({'type': 'video_url', 'video_url': {'url': url, 'num_frames': asking.frames}})
    content.append({'type': 'text', 'text': text(question, rule, asking)})
    return {
        'model': asking.model,
        'messages': [{'role': 'user', 'content': content}],
        'max_tokens': asking.max_tokens,
        'temperature': 0,
        'mm_processor_kwargs': {'image': {'compression': compression}},
    }


def digest(question: Question, rule: Rule, asking: Asking) -> str:
    """A digest of what a question says and shows, whatever the compression, by which its answers are known again.

    Of a video only the name of its file counts.
    """
    found = hashlib.sha256(text(question, rule, asking).encode())
    for picture in question.pictures:
        found.update(b'\0' + picture.encode())
    if question.video is not None:
        found.update(b'\0' + question.video.name.encode())
    return found.hexdigest()


def text(question: Question, rule: Rule, asking: Asking) -> str:
    """What is asked in words: subtitles, hint, question, choices and the form of the answer."""
    lines = []
    if asking.subtitles and question.subtitles:
        lines.append(f'Subtitles of the video:\n{question.subtitles}')
    if question.hint:
        lines.append(f'Hint: {question.hint}')
    lines.append(question.text)
    lines += [f'{letter}. {choice}' for letter, choice in (question.choices or {}).items()]
    lines.append(rule.instruction if asking.instruction is None else asking.instruction)
    return '\n'.join(line for line in lines if line)


def _picture(data: str, max_tiles: int | None) -> dict[str, Any]:
    kind = next((kind for start, kind in TYPES.items() if data.startswith(start)), 'image/jpeg')
    image: Mapping[str, Any] = {'url': f'data:{kind};base64,{data}'}
    return {'type': 'image_url', 'image_url': {**image, **({'max_dynamic_patch': max_tiles} if max_tiles else {})}}
