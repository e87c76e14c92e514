"""Reads the pictures that are to be shown, as a server would."""

import asyncio
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image

from lmdeploy_vico.inspection import InspectionError
from lmdeploy_vico.media.decoder import MediaDecoder
from lmdeploy_vico.media.errors import MediaError
from lmdeploy_vico.media.options import PictureOptions
from lmdeploy_vico.wording import shown

SUFFIXES = {'.avif', '.bmp', '.gif', '.jpeg', '.jpg', '.png', '.ppm', '.tif', '.tiff', '.webp'}


def find(paths: Sequence[Path]) -> list[Path]:
    """The files that are named, and for a folder those in it whose names end as pictures' do, in alphabetical order.

    Raises:
        InspectionError: there is no such file, or a folder has no pictures.
    """
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            pictures = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES)
            if not pictures:
                raise InspectionError(f'{path} is a folder without pictures ({", ".join(sorted(SUFFIXES))}).')
            found += pictures
        elif path.is_file():
            found.append(path)
        else:
            raise InspectionError(f'{path}: there is no such picture.')
    return found


def read(paths: Sequence[Path]) -> Iterator[Image.Image]:
    """Decode pictures one after another, in a process of its own: upright, on white, within a server's bounds of time.

    Raises:
        InspectionError: a file cannot be read, or is no picture.
    """
    decoder = MediaDecoder(1)
    try:
        for path in paths:
            try:
                yield asyncio.run(decoder.picture(path.read_bytes(), PictureOptions()))
            except MediaError as error:
                raise InspectionError(f'{path}: {error}') from error
            except OSError as error:
                raise InspectionError(f'{path} cannot be read: {error.strerror or shown(str(error))}') from error
    finally:
        decoder.close()
