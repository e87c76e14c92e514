"""The prompts every serving test sends, and their form on the wire."""

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

Message = dict[str, Any]


def conversations(pictures: dict[str, Image.Image]) -> dict[str, list[Message]]:
    """Named conversations whose images are PIL objects."""
    coffee, page, chelsea, astronaut = (pictures[name] for name in ('coffee', 'page', 'chelsea', 'astronaut'))
    strip = pictures['text'].resize((2000, 60))
    column = pictures['rocket'].resize((40, 900))
    return {
        'one photograph': [_user('What is in this picture?', coffee)],
        'a scanned page': [_user(page, 'Transcribe the page.')],
        'image alone': [_user(chelsea)],
        'two images with text between': [_user('Compare ', chelsea, ' with ', page, ', briefly.')],
        'very wide': [_user(strip, 'Read the line.')],
        'very tall': [_user('Describe', column)],
        'few tiles': [_user('Look closely.', {'url': coffee, 'max_dynamic_patch': 2})],
        'a compression of its own': [_user('And?', {'url': page, 'compression': 'all'}, chelsea)],
        'text only': [{'role': 'user', 'content': 'Tell me about lighthouses.'}],
        'text only, two turns': [
            {'role': 'system', 'content': 'You answer in one word.'},
            {'role': 'user', 'content': 'Hello!'},
            {'role': 'assistant', 'content': 'Hi.'},
            {'role': 'user', 'content': 'And now?'},
        ],
        'images in the history': [
            {'role': 'system', 'content': 'You are terse.'},
            _user(coffee, 'What is this?'),
            {'role': 'assistant', 'content': 'A cup of coffee.'},
            _user('And this?', page),
        ],
        'the image token typed': [_user('What does <IMG_CONTEXT> mean, and </img>?', astronaut)],
    }


def _user(*parts: Any) -> Message:
    content = []
    for part in parts:
        if isinstance(part, str):
            content.append({'type': 'text', 'text': part})
        else:
            content.append({'type': 'image_url', 'image_url': part if isinstance(part, dict) else {'url': part}})
    return {'role': 'user', 'content': content}


def data_url(image: Image.Image, kind: str = 'PNG') -> str:
    """A lossless data URL."""
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return f'data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}'


def video_url(file: Path | str) -> str:
    """A data URL of a video file; what is a URL already stays as it is."""
    if isinstance(file, str):
        return file
    return f'data:video/mp4;base64,{base64.b64encode(file.read_bytes()).decode()}'


def on_the_wire(messages: Sequence[Message]) -> list[Message]:
    """The same messages with data URLs in place of PIL images and of video files."""
    wired = []
    for message in messages:
        content = message['content']
        if isinstance(content, list):
            content = [_wire_item(item) for item in content]
        wired.append({**message, 'content': content})
    return wired


def _wire_item(item: dict[str, Any]) -> dict[str, Any]:
    if item['type'] == 'text':
        return item
    if item['type'] == 'video_url':
        value = {key: entry for key, entry in item['video_url'].items() if key != 'frames'}
        return {'type': 'video_url', 'video_url': {**value, 'url': video_url(value['url'])}}
    value = item['image_url']
    return {'type': 'image_url', 'image_url': {**value, 'url': data_url(value['url'])}}
