"""Decodes one picture. Runs in a process of its own, which may be ended at any time."""

import hashlib
import io
import os
import warnings
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError

from lmdeploy_vico.media.decoding.damage import jpeg_without_end, png_exif, without_bad_ancillary_chunks
from lmdeploy_vico.media.decoding.formats import image_format
from lmdeploy_vico.media.errors import MediaError
from lmdeploy_vico.media.options import PictureOptions

START = 64  # bytes by which a format is known
STRIP = 1 << 18  # pixels that are converted at a time
# Bytes of a pixel while it is decoded: four as decoded, four more where it is turned, three as RGB.
DECODING = 11
# Where decoders themselves take more beside the four: progressive JPEGs eight of coefficients, libwebp two canvases and
# a copy, libavif planes of up to twelve bits.
DECODING_MORE = {'JPEG': 13, 'WEBP': 18, 'AVIF': 16}
DEEP = {'I;16', 'I;16L', 'I;16B', 'I;16N'}
# Formats whose 16-bit grey Pillow reads as 32-bit integers.
DEEP_AS_INTEGERS = {'PNG', 'PPM'}
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
LYING = {5, 6, 7, 8}  # those that exchange width and height


class Header:
    """What the header of a picture says: nothing is decoded, and of most formats nothing else is read.

    Pillow reads WebP and AVIF as a whole.

    Args:
        file: the picture, which stays open as long as something is asked.
        options: how it is to be shown.

    Raises:
        MediaError: it is not a picture that can be read, or its header is damaged.

    Attributes:
        size: width and height as they will be decoded: upright, if that is asked for.
    """

    def __init__(self, file: BinaryIO, options: PictureOptions) -> None:
        self._file, self._options = file, options
        self._format = image_format(file.read(START))
        self._image = _open(file, self._format)
        orientation = self._orientation() if options.upright else 1
        self._turn = TURNS.get(orientation)
        width, height = self._image.size
        self.size = (height, width) if orientation in LYING else (width, height)
        if self._deep() is None:
            raise MediaError(
                f'A picture with values of 32 bits (mode {self._image.mode}) cannot be shown: send 8 or 16 bits.'
            )

    def _orientation(self) -> int:
        if self._format == 'TIFF':
            return 1  # Pillow turns them
        if self._format == 'PNG':  # Pillow would decode it first, as there may be one at its end
            self._image.info.setdefault('exif', png_exif(self._file))
        try:
            return int(self._image.getexif().get(ExifTags.Base.Orientation, 1))
        except Exception:
            return 1  # it is not of the pixels

    def _deep(self) -> bool | None:
        """Whether grey values have 16 bits; None where they have more, or are no integers."""
        if self._image.mode in DEEP:
            return True
        if self._image.mode == 'I' and self._format in DEEP_AS_INTEGERS:
            return True
        return None if self._image.mode in ('I', 'F') else False


class Picture(Header):
    """A picture whose header has been read.

    Args:
        data: the file.
        options: how it is to be shown.

    Raises:
        MediaError: it is not a picture that can be read, or its header is damaged.

    Attributes:
        memory: bytes that it is going to take, besides the file.
    """

    def __init__(self, data: bytes, options: PictureOptions) -> None:
        super().__init__(io.BytesIO(data), options)
        self._data = data
        width, height = self.size
        # A JPEG may have to be completed, which takes a copy of it.
        completed = len(data) if self._format == 'JPEG' else 0
        self.memory = width * height * DECODING_MORE.get(self._format, DECODING) + completed

    def write(self, file: int) -> None:
        """Decode, and write the RGB bytes ``[height, width, 3]`` to a file descriptor.

        Raises:
            MediaError: the file is damaged.
        """
        image = self._whole()
        if self._turn is not None:
            image = image.transpose(self._turn)
        for strip in _strips(image):
            _write_all(file, self._rgb(strip).tobytes())

    def _whole(self) -> Image.Image:
        """The decoded picture; of a damaged file that lacks no pixels too."""
        try:
            self._image.load()
            return self._image
        except MemoryError:
            raise MediaError('The image is too large to be decoded: the memory does not suffice.') from None
        except Exception as error:  # decoders raise whatever their arithmetic makes of damaged bytes
            damaged = _damaged(error)
        # Outside of the block, whose error refers to what the decoder holds.
        image = self._completed()
        if image is None:
            raise damaged
        return image

    def _completed(self) -> Image.Image | None:
        if self._format != 'JPEG':
            return None
        self._image.close()  # its pixels make room for others; its mode is still asked for
        try:
            return jpeg_without_end(self._data, lambda data: _load(_open(io.BytesIO(data), self._format)), _digest)
        except Exception:
            return None

    def _rgb(self, strip: Image.Image) -> Image.Image:
        if self._deep():
            # 257 of 65535 are one of 255.
            values = np.asarray(strip).astype(np.uint32).clip(0, 0xFFFF)
            return Image.fromarray(((values * 255 + 0x7FFF) // 0xFFFF).astype(np.uint8)).convert('RGB')
        if self._options.on_white and strip.has_transparency_data:
            strip = strip.convert('RGBA')
            white = Image.new('RGBA', strip.size, 'white')
            return Image.alpha_composite(white, strip).convert('RGB')
        return strip.convert('RGB')


def _open(file: BinaryIO, name: str) -> ImageFile.ImageFile:
    warnings.simplefilter('ignore')  # Pillow's, of things that are wrong with a client's file
    try:
        return _image(file, name)
    except UnidentifiedImageError:
        repaired = without_bad_ancillary_chunks(_all_of(file)) if name == 'PNG' else None
        if repaired is not None:
            try:
                return _image(io.BytesIO(repaired), name)
            except UnidentifiedImageError:
                pass
        raise MediaError(f'The image is damaged or truncated: its {name} header cannot be read.') from None
    except Image.DecompressionBombError:
        raise MediaError('The image is too large: it has more pixels than any that is decoded.') from None
    except MemoryError:
        raise MediaError('The image is too large to be decoded: the memory does not suffice.') from None
    except Exception as error:
        raise _damaged(error) from None


def _all_of(file: BinaryIO) -> bytes:
    file.seek(0)
    return file.read()


def _image(file: BinaryIO, name: str) -> ImageFile.ImageFile:
    image = Image.open(file, formats=[name])
    assert isinstance(image, ImageFile.ImageFile)
    return image


def _load(image: Image.Image) -> Image.Image:
    image.load()
    return image


def _digest(image: Image.Image) -> bytes:
    """Of its pixels."""
    digest = hashlib.sha256()
    for strip in _strips(image):
        digest.update(strip.tobytes())
    return digest.digest()


def _damaged(error: BaseException) -> MediaError:
    detail = str(error) if isinstance(error, OSError) else type(error).__name__
    return MediaError(f'The image is damaged or truncated: {detail[:200]}')


def _strips(image: Image.Image) -> Iterator[Image.Image]:
    """The picture from top to bottom, in parts that are small enough to be converted."""
    width, height = image.size
    rows = max(1, STRIP // width)
    for top in range(0, height, rows):
        yield image.crop((0, top, width, min(height, top + rows)))


def _write_all(file: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(file, view) :]
