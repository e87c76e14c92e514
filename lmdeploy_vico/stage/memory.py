"""The pinned host memory of a stage, for the features of tiles and for the visual tokens of prompts."""

import logging
from collections.abc import Sequence
from contextlib import suppress

import torch

from lmdeploy_vico.config import GRID, TOKENS_FULL
from lmdeploy_vico.stage.metrics import stage_metrics
from lmdeploy_vico.stage.tiles import Elsewhere, TileCache
from lmdeploy_vico.stage.workers.protocol import DeviceEncoder
from lmdeploy_vico.vision.arena import PinnedArena
from lmdeploy_vico.vision.projection import PROJECTED_BATCHES

logger = logging.getLogger(__name__)

STARTED_BATCHES = 2  # on a device: one is started before the last has been waited for
WAITING_TILES = 64  # encoded tiles of prompts that wait for their other tiles
GROUPS_OF_ROWS = 2  # the largest, for each device: one is projected while earlier ones are handed on
REMEDIES = {
    'tiles': 'a larger cache_bytes makes room',
    'prompts': 'prompts become ready faster than they are handed to the language model',
}


class StageMemory:
    """Lends pinned memory to all devices of a stage: a :class:`~lmdeploy_vico.vision.arena.ResultMemory`.

    All of it is taken once. For tiles that is ``cache_bytes``, and an estimate of the tiles in flight. A tile's memory
    is free again when nothing refers to it: not the cache, no prompt, and no batch whose copy to it may be pending.

    When all memory for tiles is lent, cached tiles that no prompt holds are dropped. If that does not make room, the
    results go to ordinary memory and are not cached: a stage never takes more memory than this and what its prompts
    hold. Such results are counted, and a warning is logged once.

    Args:
        encoders: those of the stage that copy results from a device.
        output_dtype: of visual tokens.
        cache: keeps tiles that have been encoded.
    """

    def __init__(self, encoders: Sequence[DeviceEncoder], output_dtype: torch.dtype, cache: TileCache) -> None:
        encoder = encoders[0]
        device = encoder.device
        assert isinstance(device, torch.device)  # results of encoders elsewhere are not copied from a device here
        self._shape, self._dtype = (GRID * GRID, encoder.config.vision.hidden_size), encoder.dtype
        self._width = encoder.config.llm_hidden_size
        self._cache, self._overflows, self._reported = cache, stage_metrics().pinned_overflows, set[str]()
        batches = sum(one.tile_batch for one in encoders)
        tile = GRID * GRID * self._shape[1] * self._dtype.itemsize
        tiles = cache.capacity // tile + STARTED_BATCHES * batches + WAITING_TILES
        self._tiles = PinnedArena(tiles, tile, device, 'tiles')
        rows = TOKENS_FULL * self._width * output_dtype.itemsize
        try:
            self._rows = PinnedArena(GROUPS_OF_ROWS * PROJECTED_BATCHES * batches, rows, device, 'prompts')
        except Exception:
            self._tiles.close()
            raise

    def tiles(self, count: int) -> list[torch.Tensor | None]:
        """Lend memory for the features of ``count`` tiles; None for each that finds no room."""
        lent = [self._tile() for _ in range(count)]
        self._count('tiles', sum(place is None for place in lent))
        return lent

    def _tile(self) -> torch.Tensor | None:
        while (place := self._tiles.take(self._shape, self._dtype)) is None and self._cache.evict():
            pass
        return place

    def rows(self, count: int, dtype: torch.dtype) -> torch.Tensor | None:
        """Lend memory ``[count, H]`` for the visual tokens of a prompt, or return None if there is no room."""
        lent = self._rows.take((count, self._width), dtype)
        self._count('prompts', lent is None)
        return lent

    def may_keep(self, patches: torch.Tensor | Elsewhere) -> bool:
        """Return whether a tile's features may be cached: those that lie in this memory may."""
        return isinstance(patches, torch.Tensor) and self._tiles.owns(patches)

    def close(self) -> None:
        """Lend nothing more, and return every block of which no piece is lent to the host.

        Call this after the cache has been cleared. A block with a piece that is still in use, as by visual tokens that
        were handed on, is left to PyTorch, which reuses it for what is pinned next.
        """
        self._tiles.close()
        self._rows.close()
        # PyTorch keeps free pinned memory unless told otherwise. Its older versions lack this function
        # (AttributeError), and it fails when a device no longer answers (RuntimeError).
        with suppress(AttributeError, RuntimeError):
            torch.accelerator.empty_host_cache()

    def _count(self, results: str, number: int) -> None:
        if not number:
            return
        self._overflows.labels(results).inc(number)
        if results not in self._reported:
            self._reported.add(results)
            logger.warning(
                'the pinned host memory for %s is all in use; further results are copied more slowly, by way of '
                'ordinary memory (counted in vico:pinned_memory_overflows_total): %s',
                *(results, REMEDIES[results]),
            )
