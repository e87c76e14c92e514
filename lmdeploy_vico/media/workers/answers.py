"""What a process that decodes answers, checked: what it decodes may have taken it over."""

import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from PIL import Image

from lmdeploy_vico.media.workers.channel import ProtocolError, require_sealed

CHANNELS = 3  # bytes of a pixel
LARGEST = 2**31 - 1  # of a side; no decoder has larger ones
LONGEST_ERROR = 1000  # characters


@dataclass(frozen=True)
class Header:
    """What is going to be decoded.

    Attributes:
        width, height: in pixels.
        count: of the pictures.
        memory: bytes that decoding them takes.
    """

    width: int
    height: int
    count: int
    memory: int


def header(message: Mapping[str, Any], most: int) -> Header:
    """Read the first answer.

    Args:
        message: the answer.
        most: how many pictures have been asked for.

    Raises:
        ProtocolError: it is no such answer.
    """
    size = message.get('size')
    if not isinstance(size, list) or len(size) != 2:
        raise ProtocolError('a header has no size')
    width, height = (_integer(side, LARGEST) for side in size)
    return Header(width, height, count(message, most), _integer(message.get('memory'), LARGEST**2))


def count(message: Mapping[str, Any], most: int) -> int:
    """How many pictures there are, at least one; raises ProtocolError if they are more than ``most``."""
    return _integer(message.get('count'), most)


def sentence(message: Mapping[str, Any]) -> str:
    """Why a file cannot be decoded, for the client; raises ProtocolError if that is no sentence."""
    error = message['error']
    if not isinstance(error, str) or len(error) > LONGEST_ERROR:
        raise ProtocolError('an error is no sentence')
    return error


def _integer(value: object, most: int) -> int:
    if type(value) is not int or not 0 < value <= most:
        raise ProtocolError(f'a number is not one of 1 to {most}')
    return value


def images(file: int, width: int, height: int, count: int) -> list[Image.Image]:
    """Read pictures.

    Args:
        file: a descriptor of their RGB bytes ``[count, height, width, 3]``.
        width, height: of each, in pixels.
        count: how many there are.

    Raises:
        ProtocolError: it is not memory of that size, or could still be changed.
    """
    size = width * height * CHANNELS
    require_sealed(file, count * size)
    with mmap.mmap(file, count * size, prot=mmap.PROT_READ) as memory, memoryview(memory) as view:
        return [_image(view[index * size : (index + 1) * size], width, height) for index in range(count)]


def _image(pixels: memoryview, width: int, height: int) -> Image.Image:
    with pixels:
        return Image.frombytes('RGB', (width, height), pixels)
