"""What the vision stage tells Prometheus, on LMDeploy's own ``/metrics``.

The prefix is ``vico:`` because LMDeploy unregisters every collector with "lmdeploy" in its name.
"""

from collections.abc import Sequence
from functools import cache

from prometheus_client import Counter, Gauge, Histogram

from lmdeploy_vico.config import TOKENS_COMPRESSED, TOKENS_FULL

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
TILES = (1, 2, 4, 8, 16, 32, 64)


class StageMetrics:
    """The collectors; create through :func:`stage_metrics`, since a process can register each but once."""

    def __init__(self) -> None:
        self.tiles = Counter(
            'vico:tiles', 'Tiles given to the language model, by the resolution they were routed to.', ['resolution']
        )
        self.visual_tokens = Counter('vico:visual_tokens', 'Visual tokens given to the language model.')
        self.visual_tokens_saved = Counter(
            'vico:visual_tokens_saved', f'Visual tokens that routing saved against {TOKENS_FULL} for every tile.'
        )
        self.queue_wait = Histogram(
            'vico:encoder_queue_wait_seconds', 'From the arrival of a prompt to its first tile on the device.',
            buckets=SECONDS,
        )  # fmt: skip
        self.decode = Histogram(
            'vico:encoder_decode_seconds', 'Fetching and decoding one image or video, in its thread.', buckets=SECONDS
        )
        self.preprocess = Histogram(
            'vico:encoder_preprocess_seconds', 'Resizing and cutting one image, in its thread.', buckets=SECONDS
        )
        self.model_forward = Histogram(
            'vico:encoder_model_forward_seconds', 'Encoding and scoring one device batch, on the device.',
            buckets=SECONDS,
        )  # fmt: skip
        self.tiles_per_batch = Histogram(
            'vico:encoder_tiles_per_batch', 'Tiles of a device batch, padding not counted.', buckets=TILES
        )
        self.cache_hits = Counter(
            'vico:embedding_cache_hits', 'Tiles that need not be encoded, being kept or on their way already.'
        )
        self.cache_misses = Counter('vico:embedding_cache_misses', 'Tiles that were neither.')
        self.cache_evictions = Counter('vico:embedding_cache_evictions', 'Tiles dropped for want of room.')
        self.pinned_overflows = Counter(
            'vico:pinned_memory_overflows',
            'Tiles and prompts whose results found no room in the pinned host memory, and are copied more slowly.',
            ['results'],
        )
        self.cache_bytes = Gauge('vico:embedding_cache_current_bytes', 'Host memory of the tiles that are kept.')

    def count_tiles(self, tile_tokens: Sequence[int]) -> None:
        """Count the tiles of an image by the visual tokens each became."""
        low = sum(tokens == TOKENS_COMPRESSED for tokens in tile_tokens)
        self.tiles.labels('low').inc(low)
        self.tiles.labels('high').inc(len(tile_tokens) - low)
        self.visual_tokens.inc(sum(tile_tokens))
        self.visual_tokens_saved.inc(low * (TOKENS_FULL - TOKENS_COMPRESSED))


@cache
def stage_metrics() -> StageMetrics:
    """The process's collectors; nothing is registered where no ViCO checkpoint is served."""
    return StageMetrics()
