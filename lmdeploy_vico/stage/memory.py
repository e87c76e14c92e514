"""The pinned host memory of a stage: for the features of tiles, and for visual tokens on their way to their prompts."""

import logging
from collections.abc import Sequence
from contextlib import suppress

import torch

from lmdeploy_vico.config import GRID, TOKENS_FULL
from lmdeploy_vico.stage.metrics import stage_metrics
from lmdeploy_vico.stage.tiles import TileCache
from lmdeploy_vico.vision.arena import PinnedArena
from lmdeploy_vico.vision.encoder import PROJECTED_BATCHES, VisionEncoder

logger = logging.getLogger(__name__)

STARTED_BATCHES = 2  # of a device: one is started before the last is waited for
WAITING_TILES = 64  # encoded, of prompts that wait for their other tiles
GROUPS_OF_ROWS = 2  # for each device, of the largest: one is projected while earlier ones are being handed over
REMEDIES = {
    'tiles': 'a larger cache_bytes makes room',
    'prompts': 'they become ready faster than they are handed to the language model',
}


class StageMemory:
    """Lends pinned memory to all devices of a stage: a :class:`~lmdeploy_vico.vision.arena.ResultMemory`.

    All of it is taken once. For tiles that is ``cache_bytes`` and what is in flight, an estimate. A tile's memory comes
    back when nobody has it any more: neither the cache nor a prompt, nor the batch whose copy to it may be pending.
    When it is all lent, kept tiles that no prompt holds go first. What then finds no room is counted, and a log line
    says so once; it goes to ordinary memory, and is not kept: so what a stage takes is bounded by this, and by what
    its prompts hold.

    Args:
        encoders: of the stage.
        output_dtype: of visual tokens.
        cache: keeps tiles that have been encoded.
    """

    def __init__(self, encoders: Sequence[VisionEncoder], output_dtype: torch.dtype, cache: TileCache) -> None:
        encoder = encoders[0]
        self._shape, self._dtype = (GRID * GRID, encoder.config.vision.hidden_size), encoder.dtype
        self._width = encoder.config.llm_hidden_size
        self._cache, self._overflows, self._reported = cache, stage_metrics().pinned_overflows, set[str]()
        batches = sum(one.tile_batch for one in encoders)
        tile = GRID * GRID * self._shape[1] * self._dtype.itemsize
        tiles = cache.capacity // tile + STARTED_BATCHES * batches + WAITING_TILES
        self._tiles = PinnedArena(tiles, tile, encoder.device, 'tiles')
        rows = TOKENS_FULL * self._width * output_dtype.itemsize
        self._rows = PinnedArena(GROUPS_OF_ROWS * PROJECTED_BATCHES * batches, rows, encoder.device, 'prompts')

    def tiles(self, count: int) -> list[torch.Tensor | None]:
        """Memory for the features of ``count`` tiles, None for those that find no room."""
        lent = [self._tile() for _ in range(count)]
        self._count('tiles', sum(place is None for place in lent))
        return lent

    def _tile(self) -> torch.Tensor | None:
        while (place := self._tiles.take(self._shape, self._dtype)) is None and self._cache.evict():
            pass
        return place

    def rows(self, count: int, dtype: torch.dtype) -> torch.Tensor | None:
        """Memory ``[count, H]`` for the visual tokens of a prompt, or None if they find no room."""
        lent = self._rows.take((count, self._width), dtype)
        self._count('prompts', lent is None)
        return lent

    def may_keep(self, patches: torch.Tensor) -> bool:
        """Whether a tile's features lie in memory that is there for such as are kept."""
        return self._tiles.owns(patches)

    def close(self) -> None:
        """Lend nothing more, and give the host back the blocks of which no piece is lent.

        To be called when the cache has been cleared. A block with a piece that somebody still has, visual tokens that
        were handed on, is left to PyTorch, which keeps it for what is pinned next.
        """
        self._tiles.close()
        self._rows.close()
        # PyTorch keeps pinned memory that is free. Older versions have no such function; a device may have failed for
        # good.
        with suppress(AttributeError, RuntimeError):
            torch.accelerator.empty_host_cache()

    def _count(self, results: str, number: int) -> None:
        if not number:
            return
        self._overflows.labels(results).inc(number)
        if results not in self._reported:
            self._reported.add(results)
            logger.warning(
                'the pinned host memory for %s is all in use, and what finds no room is copied more slowly, by way of '
                'ordinary memory (counted in vico:pinned_memory_overflows_total): %s',
                *(results, REMEDIES[results]),
            )
