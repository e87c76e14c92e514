"""Where an image or video is: in a URL itself, at a host, or in a file of this machine."""

import os
import re
import stat
import urllib.parse
from dataclasses import dataclass
from pathlib import Path
from urllib.request import url2pathname

import pybase64

from lmdeploy_vico.media.errors import MediaError

JPEG_SEQUENCE = 'video/jpeg'
# The same for whatever is there: nothing is to be learnt about this host's files.
NO_FILE = 'The URL of an image or video must be an http, https or data URL.'
_MIME = re.compile(r'[\w.+-]+/[\w.+-]+')


@dataclass(frozen=True)
class DataUrl:
    """A data URL (RFC 2397), not decoded yet.

    Attributes:
        media_type: in lower case; empty where there is none.
        base64: whether the data is in base64; else it is percent-encoded.
        data: what follows the comma.
    """

    media_type: str
    base64: bool
    data: str

    def decode(self, limit: int) -> bytes:
        """The data.

        Raises:
            MediaError: it is not what it says, or has more than ``limit`` bytes.
        """
        if not self.base64:
            _require_size(len(self.data) // 3, limit)
            data = urllib.parse.unquote_to_bytes(self.data)
            _require_size(len(data), limit)
            return data
        return decode_base64(self.data, limit)

    def decode_parts(self, limit: int) -> list[bytes]:
        """The files of a sequence: ``data:video/jpeg;base64,<file>,<file>,...``; see :meth:`decode`."""
        return [decode_base64(part, limit) for part in self.data.split(',')]


def is_data_url(url: str) -> bool:
    """Whether it is one: a scheme has no case."""
    return url[:5].lower() == 'data:'


def is_web_url(url: str) -> bool:
    """Whether something has to be fetched."""
    return url[:7].lower() == 'http://' or url[:8].lower() == 'https://'


def parse_data_url(url: str) -> DataUrl:
    """Take a data URL apart: ``data:[<media type>][;<parameter>=<value>]...[;base64],<data>``.

    Raises:
        MediaError: there is no data.
    """
    head, comma, data = url[5:].partition(',')
    if not comma or not data:
        raise MediaError('Invalid data URL: it must be data:<media type>;base64,<data>.')
    media_type, *parameters = (part.strip().lower() for part in head.lstrip('/').split(';'))
    if media_type and not _MIME.fullmatch(media_type):
        raise MediaError('Invalid data URL: what stands before the data must be <media type>;base64.')
    return DataUrl(media_type, 'base64' in parameters, data)


def decode_base64(text: str, limit: int) -> bytes:
    """Decode base64, of either alphabet, with line breaks and without padding too.

    Raises:
        MediaError: it is none, or has more than ``limit`` bytes.
    """
    _require_size(len(text) // 12 * 3, limit)  # each character may be written with three
    if '%' in text:
        text = urllib.parse.unquote(text)
    if '\n' in text or '\r' in text or '\t' in text:
        text = re.sub(r'[\r\n\t]', '', text)
    text = text.strip(' ')
    if ' ' in text:
        raise MediaError('The base64 of a data URL has spaces: a "+" was probably sent as one; write it as %2B.')
    alphabet = b'-_' if '-' in text or '_' in text else None
    if alphabet and ('+' in text or '/' in text):
        raise MediaError('The base64 of a data URL mixes two alphabets: "+" and "/" with "-" and "_".')
    text = text.rstrip('=')
    try:
        data = pybase64.b64decode(text + '=' * (-len(text) % 4), altchars=alphabet, validate=True)
    except ValueError:  # binascii.Error is one, and so is what a character beyond ASCII raises
        raise MediaError('The base64 of a data URL is damaged or truncated: it cannot be decoded.') from None
    _require_size(len(data), limit)
    return data


def read_file(url: str, root: Path | None, limit: int) -> bytes:
    """Read a file that a ``file:`` URL or a path names.

    Args:
        root: files below it may be read; None for all.
        limit: bytes.

    Raises:
        MediaError: with the same sentence whatever is there, unless the file may be read and is too large.
    """
    try:
        path = _path(url).resolve(strict=True)
        if root is not None and not path.is_relative_to(root):
            raise MediaError(NO_FILE)
        # A pipe would wait for somebody to write; a link could have been put there since.
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW)
    except (OSError, ValueError, RuntimeError):
        raise MediaError(NO_FILE) from None
    try:
        there = os.fstat(file)
        if not stat.S_ISREG(there.st_mode):
            raise MediaError(NO_FILE)
        _require_size(there.st_size, limit)
        with os.fdopen(file, 'rb', closefd=False) as stream:
            data = stream.read(limit + 1)
    finally:
        os.close(file)
    _require_size(len(data), limit)
    return data


def _path(url: str) -> Path:
    if url[:5].lower() != 'file:':
        return Path(url)
    parts = urllib.parse.urlsplit(url)
    return Path(url2pathname(parts.netloc.removeprefix('localhost') + parts.path))


def _require_size(size: int, limit: int) -> None:
    if size > limit:
        raise too_large(limit)


def too_large(limit: int) -> MediaError:
    """The error of an image or video in a file with more bytes than are accepted."""
    return MediaError(f'An image or video has a file of more than {limit} bytes (option max_media_bytes).')
