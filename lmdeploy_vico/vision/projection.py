"""Projection: patch tokens of tiles and the routing decision in, visual tokens out."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from lmdeploy_vico.config import TOKENS_COMPRESSED, TOKENS_FULL
from lmdeploy_vico.kernels.pack import pack
from lmdeploy_vico.vision.arena import ResultMemory
from lmdeploy_vico.vision.batches import TileFeatures
from lmdeploy_vico.vision.model.tower import VisionTower

PROJECTED_BATCHES = 8  # whose rows are shuffled together: more fills projector batches better and takes more memory


@dataclass(frozen=True)
class VisualTokens:
    """The visual tokens of one image.

    Attributes:
        embeddings: ``[sum(tile_tokens), H]`` on the CPU, in the encoder's dtype unless another was asked for; tiles row
            by row, then thumbnail.
        tile_tokens: 64 or 256 for each tile.
        scores: the router's p[0] of each tile.
    """

    embeddings: torch.Tensor
    tile_tokens: list[int]
    scores: list[float]


class Projection:
    """Projects encoded tiles, computing for each only the branch that it is routed to.

    The projectors run on batches of one fixed number of tiles, padded if need be, so that a tile's visual tokens do not
    depend on other tiles.

    Attributes:
        memory: lends pinned memory for visual tokens; None for ordinary memory.
        stream: what projects on a CUDA device. Prompts are projected while the next batch is being encoded, and go
            first, since nothing else holds up their requests. None on a CPU.

    Args:
        tower: whose projectors these are.
        width: of the language model, H.
        tile_batch: tiles of a projector's batch.
    """

    def __init__(self, tower: VisionTower, width: int, tile_batch: int) -> None:
        self._tower, self._width, self._tile_batch = tower, width, tile_batch
        weight = next(tower.parameters())
        self._device, self._dtype = weight.device, weight.dtype
        self.memory: ResultMemory | None = None
        self.stream = torch.cuda.Stream(self._device, priority=-1) if self._device.type == 'cuda' else None

    def warm_up(self, tile: torch.Tensor) -> None:
        """Project the largest groups there are, so that no prompt waits for kernels or device memory.

        Rows are made for whole projector batches of either kind, at most one more than the tiles would fill. Each
        division into batches is tried: PyTorch's memory for one may not have room for another.

        Args:
            tile: patch tokens ``[1024, D]`` of any tile.
        """
        tiles = PROJECTED_BATCHES * self._tile_batch
        for full in range(tiles, -1, -1):
            if full % self._tile_batch in (0, 1):
                self.by_tile([tile] * tiles, torch.arange(tiles) >= full)

    def by_image(
        self, features: TileFeatures, counts: Sequence[int], compressed: torch.Tensor, dtype: torch.dtype
    ) -> list[VisualTokens]:
        """The visual tokens of each image of a prompt.

        Args:
            features: of all tiles, image after image.
            counts: tiles of each image.
            compressed: bool ``[sum(counts)]`` on the CPU.
            dtype: of the embeddings. What float16 cannot hold is brought to its largest.
        """
        embeddings = self._embeddings(features.patches, compressed, dtype)
        return split_by_image(embeddings, features.scores, counts, compressed)

    def by_tile(self, patches: Sequence[torch.Tensor], compressed: torch.Tensor) -> list[torch.Tensor]:
        """The visual tokens of each tile, ``[64 or 256, H]`` in the tower's dtype.

        Args:
            patches: ``[1024, D]`` for each of n tiles, as in TileFeatures.
            compressed: bool ``[n]`` on the CPU.
        """
        return list(self._embeddings(patches, compressed, self._dtype).split(tokens_of(compressed)))

    @torch.inference_mode()
    def _embeddings(
        self, patches: Sequence[torch.Tensor], compressed: torch.Tensor, dtype: torch.dtype
    ) -> torch.Tensor:
        """The visual tokens of all tiles, one tile after another, on the CPU."""
        step = PROJECTED_BATCHES * self._tile_batch
        starts = range(0, len(patches), step)
        groups = (
            self._project_group(patches[start : start + step], compressed[start : start + step], dtype)
            for start in starts
        )
        if self.stream is None:
            return next(groups) if len(starts) == 1 else torch.cat(list(groups))
        count = sum(tokens_of(compressed))
        lent = None if self.memory is None else self.memory.rows(count, dtype)
        rows = torch.empty(count, self._width, dtype=dtype) if lent is None else lent
        row = 0
        with torch.cuda.stream(self.stream):
            try:
                for packed in groups:
                    rows[row : row + len(packed)].copy_(packed, non_blocking=True)
                    row += len(packed)
            finally:
                # Also after a failure: copies from the tiles' memory and to the rows' must have ended before either is
                # given back.
                self.stream.synchronize()
        return rows

    def _project_group(
        self, patches: Sequence[torch.Tensor], compressed: torch.Tensor, dtype: torch.dtype
    ) -> torch.Tensor:
        """The same of at most PROJECTED_BATCHES batches, on the device."""
        on_device = torch.empty(len(patches), *patches[0].shape, dtype=self._dtype, device=self._device)
        for place, tile in zip(on_device, patches, strict=True):
            place.copy_(tile, non_blocking=True)
        tiles = self._project(on_device, compressed, dtype)
        ends = list(accumulate(len(tokens) for tokens in tiles))
        packed = torch.empty(ends[-1], self._width, dtype=dtype, device=self._device)
        pack(packed, tiles, [0, *ends[:-1]])
        return packed

    def _project(self, patches: torch.Tensor, compressed: torch.Tensor, dtype: torch.dtype) -> list[torch.Tensor]:
        """The visual tokens of each tile, on the device, with values that can be cast to ``dtype``."""
        kinds = compressed.tolist()
        number = sum(kinds)
        room = self._room(len(kinds) - number), self._room(number)
        shuffled = self._tower.shuffle(patches, compressed.to(self._device, non_blocking=True), room)
        full_tiles = self._run_projector(shuffled.full, False, dtype)
        compressed_tiles = self._run_projector(shuffled.compressed, True, dtype)
        return [next(compressed_tiles if kind else full_tiles) for kind in kinds]

    def _room(self, tiles: int) -> int:
        """The tiles of as many whole batches as hold ``tiles``."""
        return -(-tiles // self._tile_batch) * self._tile_batch

    def _run_projector(self, rows: torch.Tensor, compressed: bool, dtype: torch.dtype) -> Iterator[torch.Tensor]:
        """Project rows of one kind in batches of one fixed shape; yield the visual tokens tile by tile."""
        tokens = TOKENS_COMPRESSED if compressed else TOKENS_FULL
        for start in range(0, len(rows), self._tile_batch * tokens):
            batch = rows[start : start + self._tile_batch * tokens]
            yield from saturate(self._tower.project(batch, compressed), dtype).split(tokens)


def split_by_image(
    embeddings: torch.Tensor, scores: torch.Tensor, counts: Sequence[int], compressed: torch.Tensor
) -> list[VisualTokens]:
    """The visual tokens of each image of a prompt, which share the memory of ``embeddings``.

    Args:
        embeddings: ``[sum of the tiles' tokens, H]``, one tile after another.
        scores: of all tiles.
        counts: tiles of each image.
        compressed: bool ``[sum(counts)]`` on the CPU.
    """
    tile_tokens = tokens_of(compressed)
    results, tile, row = [], 0, 0
    for count in counts:
        image = slice(tile, tile + count)
        rows = sum(tile_tokens[image])
        results.append(VisualTokens(embeddings[row : row + rows], tile_tokens[image], scores[image].tolist()))
        tile, row = tile + count, row + rows
    return results


def tokens_of(compressed: torch.Tensor) -> list[int]:
    """The number of visual tokens of each tile, from bool ``[n]``."""
    return [TOKENS_COMPRESSED if kind else TOKENS_FULL for kind in compressed.tolist()]


def saturate(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Bring values beyond the ends of ``dtype`` to them, in place: as infinities they would end a language engine.

    Only float16 has ends that activations come near.
    """
    if dtype != torch.float16:
        return values
    # The largest value of both types: bfloat16 would round that of float16 up, to where float16 has infinity.
    largest = torch.tensor(torch.finfo(dtype).max, dtype=values.dtype)
    if largest.item() > torch.finfo(dtype).max:
        largest = torch.nextafter(largest, torch.zeros_like(largest))
    return values.clamp_(-largest.item(), largest.item())
