"""The cells of the table, how many tiles of each request are compressed, and the bodies of the requests."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from lmdeploy_vico.config import TOKENS_COMPRESSED, TOKENS_FULL

AUTO = 'auto'
IMAGE, LLM = 'image', 'llm'
# The plugin itself, on LMDeploy's PyTorch engine or on TurboMind; as a baseline, none is it without compression.
OURS, OURS_ON_TURBOMIND = 'none', 'turbomind'
SERVER_OF_ENGINE = {'pytorch': OURS, 'turbomind': OURS_ON_TURBOMIND}
FLASH, INTERNVL, TURBOMIND = 'lmdeploy-flash', 'lmdeploy-internvl', 'lmdeploy-turbomind'
BASELINES = (FLASH, INTERNVL, TURBOMIND)
LABELS = {
    OURS: 'lmdeploy-vico',
    OURS_ON_TURBOMIND: 'lmdeploy-vico on TurboMind',
    FLASH: 'LMDeploy flash mode (answers are wrong after the first token)',
    INTERNVL: 'LMDeploy without a router',
    TURBOMIND: 'LMDeploy on TurboMind (no router)',
}
LARGEST = Fraction(TOKENS_FULL - TOKENS_COMPRESSED, TOKENS_FULL)  # all tiles compressed
# Pixels of a picture for each tile's side: as a rule pictures are larger than their tiles and have to be resized.
PIXELS = 500
# A picture of one pixel: in llm mode the server takes the number of tiles from the item and looks at no pixel.
PIXEL = (
    'data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg=='
)


def parse_compression(text: str) -> float | str:
    """A share of the visual tokens to remove, 0 to 0.75, or ``auto``; raises ValueError."""
    if text == AUTO:
        return AUTO
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share <= LARGEST:
        raise ValueError(f'must be a share of the visual tokens from 0 to {float(LARGEST)}, or {AUTO}, not {text!r}')
    return share


@dataclass(frozen=True)
class Cell:
    """One row and column of the table.

    Attributes:
        mode: ``image`` or ``llm``.
        server: ``none`` for the plugin, ``turbomind`` for the plugin with that language engine, or a baseline.
        text_tokens: tokens of a request's text.
        compression: the share of visual tokens to remove, ``auto``, or None where the server cannot be told.
    """

    mode: str
    server: str
    text_tokens: int
    compression: float | str | None

    @property
    def is_ours(self) -> bool:
        """Return whether the plugin serves, whatever the language engine."""
        return self.server in SERVER_OF_ENGINE.values()

    @property
    def is_reference(self) -> bool:
        """Return whether the speed-ups of its mode, text and server are relative to this cell."""
        return self.is_ours and self.compression == 0

    @property
    def asked(self) -> str:
        """Return the compression in words; ``itself`` for a baseline, which cannot be told."""
        return f'{self.compression:.0%}' if isinstance(self.compression, float) else self.compression or 'itself'

    def __str__(self) -> str:
        server = LABELS[self.server].split(' (')[0]
        return f'{self.mode}, {server}, {self.text_tokens} text tokens, compression {self.asked}'


def cells(
    modes: Sequence[str],
    text_tokens: Sequence[int],
    compressions: Sequence[float | str],
    baselines: Sequence[str],
    ours: Sequence[str] = (OURS,),
) -> list[Cell]:
    """Return all cells to measure: always one without compression; ``auto`` and the baselines in image mode only.

    Args:
        modes, text_tokens, compressions, baselines: as the command line has them.
        ours: the plugin's own servers.
    """
    shares = sorted({0.0, *(c for c in compressions if isinstance(c, float))})
    made = []
    for mode in dict.fromkeys(modes):
        columns: list[float | str] = [*shares, AUTO] if AUTO in compressions and mode == IMAGE else [*shares]
        for text in dict.fromkeys(text_tokens):
            made += [Cell(mode, server, text, column) for server in ours for column in columns]
            made += [Cell(mode, name, text, None) for name in BASELINES if name in baselines and mode == IMAGE]
    return made


def compressed_tiles(share: float, tiles: int, index: int) -> int:
    """Return how many tiles of request ``index`` are compressed.

    A compressed tile has 64 visual tokens instead of 256, so removing a share of the visual tokens takes 4/3 of that
    share of the tiles. The sum over requests 0 to ``index`` is within half a tile of that, and two requests differ by
    at most one tile.
    """
    each = Fraction(repr(share)) * tiles / LARGEST
    return _round_half_up((index + 1) * each) - _round_half_up(index * each)


def _round_half_up(number: Fraction) -> int:
    return int(number + Fraction(1, 2))


def visual_tokens(tiles: int, compressed: int = 0) -> int:
    """Return the number of visual tokens of a request."""
    return tiles * TOKENS_FULL - compressed * (TOKENS_FULL - TOKENS_COMPRESSED)


@dataclass(frozen=True)
class Picture:
    """The pictures of a request that has the wanted number of tiles: ``count`` of them, each cut into the same grid."""

    count: int
    columns: int
    rows: int

    @classmethod
    def of_tiles(cls, tiles: int) -> 'Picture':
        """The squarest single picture with that many tiles, its thumbnail included; two of one tile for 2 tiles."""
        if tiles <= 2:  # a picture of one tile has no thumbnail
            return cls(tiles, 1, 1)
        grid = tiles - 1
        rows = max(rows for rows in range(1, grid + 1) if grid % rows == 0 and rows * rows <= grid)
        return cls(1, grid // rows, rows)

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return self.columns * PIXELS, self.rows * PIXELS


class Requests:
    """Makes the bodies of a cell's requests, each a function of its index.

    Args:
        model: the name that the server gave its model.
        tiles: tiles of a request.
        pictures: data URLs. Requests take them in order, and again from the first one after the last.
        texts: of every amount of text, one for each request.
        seed: of the synthetic embeddings in llm mode.
    """

    def __init__(
        self, model: str, tiles: int, pictures: Sequence[str], texts: dict[int, list[str]], seed: int = 0
    ) -> None:
        self._model, self._tiles, self._pictures, self._texts, self._seed = model, tiles, pictures, texts, seed
        self._picture = Picture.of_tiles(tiles)

    def compressed(self, cell: Cell, index: int) -> int | None:
        """Return how many tiles are compressed; None where the server decides."""
        return compressed_tiles(cell.compression, self._tiles, index) if isinstance(cell.compression, float) else None

    def body(self, cell: Cell, index: int, start: int = 0, text: str | None = None) -> bytes:
        """Return the JSON of request ``index``, with pictures counted from ``start`` on; ``text`` replaces its own."""
        compressed = self.compressed(cell, index)
        text = self._texts[cell.text_tokens][index] if text is None else text
        content = self._images(cell, start + index, compressed) + ([{'type': 'text', 'text': text}] if text else [])
        body: dict[str, Any] = {
            'model': self._model,
            'messages': [{'role': 'user', 'content': content}],
            'max_tokens': 1,
            'temperature': 0,
            'stream': True,
            'stream_options': {'include_usage': True},
        }
        if cell.mode == IMAGE and cell.compression is not None:
            value = AUTO if compressed is None else compressed / self._tiles
            body['mm_processor_kwargs'] = {'image': {'compression': value}}
        return json.dumps(body).encode()

    def _images(self, cell: Cell, index: int, compressed: int | None) -> list[dict[str, Any]]:
        if cell.mode == LLM:
            seed = self._seed * 10**6 + index
            synthetic = {'tiles': self._tiles, 'seed': seed}
            if compressed is not None:
                synthetic['compressed'] = compressed
            return [{'type': 'image_url', 'image_url': {'url': PIXEL, 'synthetic': synthetic}}]
        picture = self._picture
        grid = picture.columns * picture.rows
        places = range(index * picture.count, (index + 1) * picture.count)
        urls = [self._pictures[place % len(self._pictures)] for place in places]
        # Said to the server, as a picture of that size may also be cut into a larger grid of its shape.
        return [{'type': 'image_url', 'image_url': {'url': url, 'max_dynamic_patch': grid}} for url in urls]
