"""Samples: a record's conversation as token ids, and its images as tiles, exactly as a server would make them."""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lmdeploy_vico.config import TOKENS_FULL, VicoConfig
from lmdeploy_vico.media.decoding.pictures import Header, Picture
from lmdeploy_vico.media.errors import MediaError
from lmdeploy_vico.media.options import PictureOptions
from lmdeploy_vico.training.data.conversation import render
from lmdeploy_vico.training.data.records import DataError, Record, Records
from lmdeploy_vico.vision.tiling import TILE_SHAPE, Grid, Tiling, cut_grid


@dataclass(frozen=True)
class Span:
    """Token ids between two cuts; see :class:`~lmdeploy_vico.training.data.conversation.Piece`."""

    ids: list[int]
    response: bool
    image: bool


@dataclass(frozen=True)
class Sample:
    """A record that is ready to be laid out.

    Attributes:
        place: the record's.
        spans: the token ids; where a span says so, an image follows it.
        tiles: uint8 ``[T, 448, 448, 3]`` of all images, one after another.
        counts: tiles of each image.
    """

    place: str
    spans: list[Span]
    tiles: np.ndarray
    counts: list[int]


class Samples:
    """Makes samples of records.

    Args:
        records: where they come from.
        tokenizer: the checkpoint's, of ``transformers``.
        config: the checkpoint's, which says how images are cut.
        max_tiles: of a sample.
        max_length: tokens of a sample with all tiles at 256.
    """

    def __init__(self, records: Records, tokenizer: Any, config: VicoConfig, max_tiles: int, max_length: int) -> None:
        self.records = records
        self._tokenizer = tokenizer
        self._tiling = Tiling.of(config)
        self._max_tiles, self._max_length = max_tiles, max_length

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Sample:
        """Read, decode and cut; raises DataError with the sample's file and line."""
        record = self.records[index]
        pictures = [_picture(path, record) for path in record.images]
        grids = self._grids([picture.size for picture in pictures], record)
        spans = self._spans(record, sum(grid.tiles for grid in grids))
        images = zip(record.images, pictures, grids, strict=True)
        tiles = [cut_grid(_decoded(path, picture, record), grid) for path, picture, grid in images]
        together = np.concatenate(tiles) if tiles else np.empty((0, *TILE_SHAPE), np.uint8)
        return Sample(record.place, spans, together, [grid.tiles for grid in grids])

    def tiles_of(self, index: int) -> int:
        """Check a sample and return its number of tiles; raises as ``[index]`` does.

        Of its images only the headers are read, so damaged pixels are not found.
        """
        record = self.records[index]
        grids = self._grids([_size(path, record) for path in record.images], record)
        tiles = sum(grid.tiles for grid in grids)
        self._spans(record, tiles)
        return tiles

    def _grids(self, sizes: Sequence[tuple[int, int]], record: Record) -> list[Grid]:
        grids = [self._tiling.grid(size) for size in sizes]
        tiles = sum(grid.tiles for grid in grids)
        if tiles > self._max_tiles:
            raise DataError(f'{record.place}: the images have {tiles} tiles, and at most {self._max_tiles} are taken.')
        return grids

    def _spans(self, record: Record, tiles: int) -> list[Span]:
        pieces = render(self._tokenizer, record.turns, record.place)
        spans = [
            Span(self._tokenizer.encode(piece.text, add_special_tokens=False), piece.response, piece.image)
            for piece in pieces
        ]
        length = sum(len(span.ids) for span in spans) + tiles * TOKENS_FULL
        if length > self._max_length:
            raise DataError(
                f'{record.place}: the sample has {length} tokens, {tiles * TOKENS_FULL} of them visual, and at most '
                f'{self._max_length} are taken.'
            )
        return spans


@contextmanager
def _reading(path: Path, record: Record) -> Iterator[None]:
    """Say of an image that cannot be read whose it is."""
    try:
        yield
    except (OSError, MediaError) as error:
        raise DataError(f'{record.place}: the image {path} cannot be read: {error}') from error


def _size(path: Path, record: Record) -> tuple[int, int]:
    """Width and height of the upright picture."""
    with _reading(path, record), path.open('rb') as file:
        return Header(file, PictureOptions()).size


def _picture(path: Path, record: Record) -> Picture:
    with _reading(path, record):
        return Picture(path.read_bytes(), PictureOptions())


def _decoded(path: Path, picture: Picture, record: Record) -> Image.Image:
    """The RGB picture, upright and on white, decoded by what decodes a server's pictures."""
    width, height = picture.size
    with tempfile.TemporaryFile() as file:
        with _reading(path, record):
            picture.write(file.fileno())
        file.seek(0)
        return Image.frombuffer('RGB', (width, height), file.read(), 'raw', 'RGB', 0, 1)
