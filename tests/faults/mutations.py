"""Broken pictures, the same for the same seed: every format Pillow writes, mutated."""

import io
import random
import struct
from collections.abc import Callable, Iterator

from PIL import Image

MODES = ('RGB', 'L', '1', 'P', 'RGBA')  # what a format's writer is offered, the most usual first


def _flip_bits(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.randint(1, 32)):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _cut(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data))]


def _grow_a_number(data: bytes, rng: random.Random) -> bytes:
    """Put an extreme 32-bit number into the header, where sizes and offsets are."""
    at = rng.randrange(max(1, min(64, len(data) - 4)))
    number = rng.choice([0, 1, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF])
    return data[:at] + struct.pack(rng.choice(['<I', '>I']), number) + data[at + 4 :]


def _swap(data: bytes, rng: random.Random) -> bytes:
    """Exchange two neighbouring stretches."""
    first, middle, last = sorted(rng.randrange(len(data) + 1) for _ in range(3))
    return data[:first] + data[middle:last] + data[first:middle] + data[last:]


def _concatenate(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data))
    return data[:at] + data + data[at:]


MUTATIONS: tuple[Callable[[bytes, random.Random], bytes], ...] = (_flip_bits, _cut, _grow_a_number, _swap, _concatenate)


def originals(picture: Image.Image) -> dict[str, bytes]:
    """Return the picture in every format that this Pillow writes, by the format's name."""
    Image.init()
    written: dict[str, bytes] = {}
    for name in sorted(Image.SAVE):
        for mode in MODES:
            file = io.BytesIO()
            try:
                picture.convert(mode).save(file, name)
            except (
                OSError,
                ValueError,
                KeyError,
                AttributeError,
                RuntimeError,
            ):  # not in this mode
                continue
            if file.getvalue():
                written[name] = file.getvalue()
                break
    return written


def mutated(files: dict[str, bytes], count: int, seed: int) -> Iterator[tuple[str, bytes]]:
    """Yield ``count`` times what was done to which format, and the bytes, all formats and mutations in turn."""
    rng = random.Random(seed)
    names = sorted(files)
    for number in range(count):
        name = names[number % len(names)]
        mutate = MUTATIONS[number // len(names) % len(MUTATIONS)]
        yield f'{name} {mutate.__name__.strip("_")} #{number}', mutate(files[name], rng)
