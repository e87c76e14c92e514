"""Prompts of the reference: text and pictures in order, and how a conversation becomes one."""

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

DETAIL_TILES = {'low': 6, 'medium': 12, 'high': 24}


@dataclass(frozen=True)
class Picture:
    """An image in a prompt; ``wrapped`` is in ``<img>`` and ``</img>``.

    Its own ``compression`` routes it by itself, or together with the other pictures of the same ``video``.
    """

    image: Image.Image
    compression: str | float | None = None
    max_tiles: int | None = None
    wrapped: bool = True
    video: int | None = None


Segment = str | Image.Image | Picture


def chat_segments(messages: Sequence[dict]) -> list[Segment]:
    """Render OpenAI-style messages as LMDeploy does for a tiny checkpoint: ChatML, no default system prompt.

    Images are given as PIL objects, ``{'type': 'image_url', 'image_url': {'url': image, ...}}`` or ``{'type': 'image',
    'image': image}``, with the keys ``detail``, ``max_dynamic_patch`` and ``compression`` beside them. In a prompt with
    an image, each is followed by a newline and texts are joined by nothing; in one without, the texts of a message are
    joined by newlines. A last message of the assistant's is left open, to be continued.

    A video is given as its frames, ``{'type': 'video_url', 'video_url': {'frames': [image, ...], ...}}``, with the key
    ``compression`` beside them. Each frame is one tile, announced as ``Frame1: `` and so on.
    """
    with_images = any(
        item['type'] != 'text' for m in messages if isinstance(m['content'], list) for item in m['content']
    )
    segments: list[Segment] = []
    videos = 0
    for i, message in enumerate(messages):
        segments.append(f'<|im_start|>{message["role"]}\n')
        content = message['content'] or ''
        if isinstance(content, str):
            segments.append(content)
        elif not with_images:
            segments.append('\n'.join(item['text'] for item in content))
        else:
            for item in content:
                if item['type'] == 'text':
                    segments.append(item['text'])
                elif item['type'] == 'video_url':
                    segments += _video(item['video_url'], videos)
                    videos += 1
                else:
                    segments += [_picture(item), '\n']
        if message['role'] != 'assistant' or i + 1 < len(messages):
            segments.append('<|im_end|>\n')
    if messages[-1]['role'] != 'assistant':
        segments.append('<|im_start|>assistant\n')
    return _merge(segments)


def _picture(item: dict) -> Picture:
    value = item[item['type']]
    options = dict(value) if isinstance(value, dict) else {k: v for k, v in item.items() if k != item['type']}
    image = (options.get('url') or options.get('data')) if isinstance(value, dict) else value
    limit = options.get('max_dynamic_patch')
    if not isinstance(limit, int):
        limit = DETAIL_TILES.get(options.get('detail', ''))
    return Picture(image, options.get('compression'), limit)


def _video(value: dict, number: int) -> list[Segment]:
    segments: list[Segment] = []
    for i, frame in enumerate(value['frames']):
        segments += [f'Frame{i + 1}: ', Picture(frame, value.get('compression'), max_tiles=1, video=number), '\n']
    return segments


def _merge(segments: Sequence[Segment]) -> list[Segment]:
    """Join neighbouring texts: a tokenizer may merge characters across a boundary that is none in the prompt."""
    merged: list[Segment] = []
    for segment in segments:
        if isinstance(segment, str) and merged and isinstance(merged[-1], str):
            merged[-1] += segment
        elif segment != '':
            merged.append(segment)
    return merged
