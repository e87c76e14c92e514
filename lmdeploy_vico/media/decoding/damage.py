"""What is read of files without decoding them; above all, whether one that is damaged lacks any pixels."""

import io
import os
import zlib
from collections.abc import Callable, Iterator
from typing import BinaryIO, TypeVar

T = TypeVar('T')

PNG_SIGNATURE = 8  # bytes
PIXEL_CHUNKS = {b'tRNS'}  # ancillary ones of which pixels are made

# Entropy-coded data to follow what is there: where blocks are missing, each makes other blocks of them.
_CONTINUATIONS = (bytes(512), b'\x55\xaa' * 256)
_END = b'\xff\xd9'
_SEQUENTIAL = {0xC0, 0xC1, 0xC9}
_PROGRESSIVE = {0xC2, 0xCA}
_LAST_COEFFICIENT = 63


def without_bad_ancillary_chunks(data: bytes) -> bytes | None:
    """A PNG without the chunks whose checksums are wrong and that no pixel is made of; None if it has none."""
    kept, end = [data[:PNG_SIGNATURE]], PNG_SIGNATURE
    for start, end, kind in _chunks(io.BytesIO(data)):
        ancillary = kind[:1].islower() and kind not in PIXEL_CHUNKS
        if not ancillary or zlib.crc32(data[start + 4 : end - 4]) == int.from_bytes(data[end - 4 : end], 'big'):
            kept.append(data[start:end])
    whole = b''.join(kept) + data[end:]
    return None if len(whole) == len(data) else whole


def png_exif(file: BinaryIO) -> bytes:
    """The EXIF data of a PNG, wherever in the file it stands; empty if it has none. Chunks are skipped, not read."""
    for start, end, kind in _chunks(file):
        if kind == b'eXIf':
            file.seek(start + 8)
            return file.read(end - start - 12)
    return b''


def _chunks(file: BinaryIO) -> Iterator[tuple[int, int, bytes]]:
    """Start, end and kind of the whole chunks of a PNG."""
    start, size = PNG_SIGNATURE, file.seek(0, os.SEEK_END)
    while start + 12 <= size:
        file.seek(start)
        length, kind = int.from_bytes(file.read(4), 'big'), file.read(4)
        end = start + 12 + length
        if end > size:
            return
        yield start, end, kind
        start = end


def jpeg_without_end(data: bytes, decode: Callable[[bytes], T], digest: Callable[[T], bytes]) -> T | None:
    """Decode a JPEG of which only the end is missing; None if pixels are missing too.

    Pixels are missing where they depend on what would follow: decoders fill them, and say nothing. One picture at a
    time is there: of the other one only its digest is kept.

    Args:
        data: the file.
        decode: the picture of a completed file; may raise OSError.
        digest: of a picture, the same for no other one.
    """
    if not _has_all_scans(data):
        return None
    first, second = _CONTINUATIONS
    expected = digest(decode(data + first + _END))
    picture = decode(data + second + _END)
    return picture if digest(picture) == expected else None


def _has_all_scans(data: bytes) -> bool:
    """Whether the scans that a JPEG has bring every coefficient of every component to its full precision."""
    components: dict[int, set[int]] = {}
    progressive = False
    for marker, segment in _segments(data):
        if marker in _SEQUENTIAL | _PROGRESSIVE:
            progressive = marker in _PROGRESSIVE
            components = {segment[6 + 3 * n]: set() for n in range(segment[5]) if 6 + 3 * n < len(segment)}
        elif marker == 0xDA and segment:
            count = segment[0]
            if len(segment) < 4 + 2 * count:
                return False
            first, last, precision = segment[1 + 2 * count :][:3]
            if not progressive:
                first, last, precision = 0, _LAST_COEFFICIENT, 0
            for n in range(count):
                if not precision & 0xF:  # nothing is left to be refined
                    components.setdefault(segment[1 + 2 * n], set()).update(range(first, last + 1))
    return bool(components) and all(len(there) > _LAST_COEFFICIENT for there in components.values())


def _segments(data: bytes) -> Iterator[tuple[int, bytes]]:
    """The markers of a JPEG that have a segment, with what it holds; entropy-coded data is skipped."""
    at = 2
    while True:
        at = data.find(b'\xff', at)
        if at < 0 or at + 4 > len(data):
            return
        marker = data[at + 1]
        if marker in (0x00, 0xFF, 0x01) or 0xD0 <= marker <= 0xD9:
            at += 1 if marker == 0xFF else 2
            continue
        length = int.from_bytes(data[at + 2 : at + 4], 'big')
        yield marker, data[at + 4 : at + 2 + length]
        at += 2 + max(length, 2)
