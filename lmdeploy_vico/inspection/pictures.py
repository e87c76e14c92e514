"""Reads the pictures that are to be shown, as a server would."""

import asyncio
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from lmdeploy_vico.inspection import InspectionError
from lmdeploy_vico.media.decoder import MediaDecoder
from lmdeploy_vico.media.errors import MediaError
from lmdeploy_vico.media.options import PictureOptions
from lmdeploy_vico.wording import shown

SUFFIXES = {'.avif', '.bmp', '.gif', '.jpeg', '.jpg', '.png', '.ppm', '.tif', '.tiff', '.webp'}


def find(paths: Sequence[Path]) -> list[Path]:
    """The files that are named, and for a folder all pictures under it, in alphabetical order.

    Raises:
        InspectionError: there is no such file, or a folder has no pictures.
    """
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            found += _under(path)
        elif path.is_file():
            found.append(path)
        else:
            raise InspectionError(f'{path}: there is no such picture.')
    return found


def find_by_kind(folder: Path) -> list[tuple[str, Path]]:
    """All pictures under a folder, each with its kind: the folder inside that it is in, or ``.`` for this one itself.

    Raises:
        InspectionError: it is no folder, or there are no pictures.
    """
    if not folder.is_dir():
        raise InspectionError(f'{folder} is not a folder.')
    return [(parts[0] if len(parts := file.relative_to(folder).parts) > 1 else '.', file) for file in _under(folder)]


def _under(folder: Path) -> list[Path]:
    """The files under a folder, at any depth, whose names end as pictures' do."""
    files = sorted(file for file in folder.rglob('*') if file.suffix.lower() in SUFFIXES and file.is_file())
    if not files:
        raise InspectionError(f'{folder} is a folder without pictures ({", ".join(sorted(SUFFIXES))}).')
    return files


class PictureReader:
    """Decodes pictures as a server does, in a process of its own: upright, on white. A context manager."""

    def __enter__(self) -> 'PictureReader':
        self._decoder = MediaDecoder(1)
        return self

    def __exit__(self, *error: object) -> None:
        self._decoder.close()

    def read(self, path: Path) -> Image.Image:
        """Decode a file; raises :class:`InspectionError` where it cannot be read or is no picture."""
        try:
            data = path.read_bytes()
        except OSError as error:
            raise InspectionError(f'{path} cannot be read: {error.strerror or shown(str(error))}') from error
        return self.decode(str(path), data)

    def decode(self, name: str, data: bytes) -> Image.Image:
        """Decode the bytes of a picture; raises :class:`InspectionError`, which begins with its name."""
        try:
            return asyncio.run(self._decoder.picture(data, PictureOptions()))
        except MediaError as error:
            raise InspectionError(f'{name}: {error}') from error
