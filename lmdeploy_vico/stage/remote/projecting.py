"""Projects a prompt whose features lie with several encoders, some of which may be gone."""

from collections.abc import Iterator, Sequence
from itertools import accumulate

import numpy as np
import torch

from lmdeploy_vico.stage.errors import EncoderGoneError
from lmdeploy_vico.stage.remote.channel import Answer
from lmdeploy_vico.stage.remote.encoder import Encoders, RemoteEncoder
from lmdeploy_vico.stage.tiles import Elsewhere, Tile
from lmdeploy_vico.vision.projection import tokens_of


class _Gathering:
    """The visual tokens of a prompt, filled tile by tile as they arrive.

    Args:
        tiles: of the prompt, in its order.
        compressed: whether each gets 64 tokens.
        dtype, width: of the tokens.
    """

    def __init__(self, tiles: Sequence[Tile], compressed: Sequence[bool], dtype: torch.dtype, width: int) -> None:
        self.tiles, self.compressed, self.dtype = tiles, compressed, dtype
        self._tokens = tokens_of(torch.tensor(compressed))
        self._ends = list(accumulate(self._tokens))
        self.rows = torch.empty(self._ends[-1], width, dtype=dtype)
        self._bytes = self.rows.view(torch.uint8).numpy()

    def of(self, indices: Sequence[int]) -> tuple[list[Tile], list[bool]]:
        """The tiles at these places, and whether each is compressed."""
        return [self.tiles[index] for index in indices], [self.compressed[index] for index in indices]

    def receive(self, encoder: RemoteEncoder, indices: Sequence[int], answer: Answer) -> list[int]:
        """Wait for the tokens of the tiles at these places; return the places of those that have to be sent again."""
        try:
            projected = encoder.received(answer)
        except EncoderGoneError:
            return list(indices)
        lost, row = [indices[index] for index in projected.lost], 0
        for index in indices:
            if index not in lost:
                count = self._tokens[index]
                np.copyto(self._bytes[self._ends[index] - count : self._ends[index]], projected.rows[row : row + count])
                row += count
        return lost


def project(
    encoders: Encoders, tiles: Sequence[Tile], compressed: torch.Tensor, dtype: torch.dtype, width: int
) -> torch.Tensor:
    """Return the visual tokens of a prompt, ``[sum of the tiles' tokens, width]``, each of which comes back once.

    First each encoder is asked for those of the tiles whose features it has, all at the same time. Tiles that it has
    dropped, and those of encoders that are gone, are then sent once more, in device batches, to whoever is there.

    Args:
        encoders: those that are there.
        tiles: of the prompt, encoded, with their pixels.
        compressed: bool ``[n]`` on the CPU.
        dtype, width: of the tokens.

    Raises:
        EncoderGoneError: no encoder is left.
    """
    gathering = _Gathering(tiles, compressed.tolist(), dtype, width)
    asked: list[tuple[RemoteEncoder, list[int], Answer]] = []
    lost: list[int] = []
    for incarnation, indices in _by_place(tiles).items():
        encoder = encoders.get(incarnation)
        try:
            if encoder is None:
                raise EncoderGoneError
            asked.append((encoder, indices, encoder.project(*gathering.of(indices), dtype)))
        except EncoderGoneError:
            lost += indices
    for encoder, indices, answer in asked:
        lost += gathering.receive(encoder, indices, answer)
    while lost:
        lost = list(_send_again(encoders, gathering, lost))
    return gathering.rows


def _send_again(encoders: Encoders, gathering: _Gathering, lost: list[int]) -> Iterator[int]:
    """Send tiles once more, in device batches, to all encoders in turn; yield the places of those lost again."""
    sent: list[tuple[RemoteEncoder, list[int], Answer]] = []
    while lost:
        encoder = encoders.any()
        indices, rest = lost[: encoder.tile_batch], lost[encoder.tile_batch :]
        try:
            sent.append((encoder, indices, encoder.encode_and_project(*gathering.of(indices), gathering.dtype)))
        except EncoderGoneError:
            continue
        lost = rest
    for encoder, indices, answer in sent:
        again = gathering.receive(encoder, indices, answer)
        for index in set(indices) - set(again):
            place = gathering.tiles[index].patches
            assert isinstance(place, Elsewhere)
            place.incarnation = encoder.incarnation  # also where the stage's cache remembers it
        yield from again


def _by_place(tiles: Sequence[Tile]) -> dict[str, list[int]]:
    """The places of tiles in the prompt, by the incarnation of the encoder that has their features."""
    places: dict[str, list[int]] = {}
    for index, tile in enumerate(tiles):
        assert isinstance(tile.patches, Elsewhere)
        places.setdefault(tile.patches.incarnation, []).append(index)
    return places
