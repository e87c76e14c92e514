"""The vision stage's metrics, which appear on LMDeploy's own ``/metrics``.

The prefix is ``vico:`` because LMDeploy unregisters every collector with "lmdeploy" in its name.
"""

from collections.abc import Sequence
from functools import cache

from prometheus_client import Counter, Gauge, Histogram

from lmdeploy_vico.config import TOKENS_COMPRESSED, TOKENS_FULL

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
TILES = (1, 2, 4, 8, 16, 32, 64)


class StageMetrics:
    """The collectors. Get them from :func:`stage_metrics`: a process can register each only once."""

    def __init__(self) -> None:
        self.tiles = Counter(
            'vico:tiles',
            f'Tiles passed to the language model: full ({TOKENS_FULL} tokens) or compressed ({TOKENS_COMPRESSED}).',
            ['resolution'],
        )
        self.visual_tokens = Counter('vico:visual_tokens', 'Visual tokens passed to the language model.')
        self.visual_tokens_saved = Counter(
            'vico:visual_tokens_saved', f'Visual tokens saved by routing, compared with {TOKENS_FULL} for every tile.'
        )
        self.queue_wait = Histogram(
            'vico:encoder_queue_wait_seconds',
            'Time from the arrival of a prompt until a device takes its first tile.',
            buckets=SECONDS,
        )
        self.decode = Histogram(
            'vico:encoder_decode_seconds', 'Time to fetch and decode one image or video.', buckets=SECONDS
        )
        self.preprocess = Histogram(
            'vico:encoder_preprocess_seconds', 'Time to resize and cut one image.', buckets=SECONDS
        )
        self.model_forward = Histogram(
            'vico:encoder_model_forward_seconds', 'Time a device takes to encode and score one batch.', buckets=SECONDS
        )
        self.tiles_per_batch = Histogram(
            'vico:encoder_tiles_per_batch', 'Tiles in a device batch, not counting padding.', buckets=TILES
        )
        self.cache_hits = Counter(
            'vico:embedding_cache_hits', 'Tiles not encoded again: cached, or in use by another prompt.'
        )
        self.cache_misses = Counter('vico:embedding_cache_misses', 'Tiles to encode: neither cached nor in use.')
        self.cache_evictions = Counter('vico:embedding_cache_evictions', 'Tiles dropped from the cache for others.')
        self.pinned_overflows = Counter(
            'vico:pinned_memory_overflows',
            'Results copied more slowly because the pinned host memory was full, by kind: tiles or prompts.',
            ['results'],
        )
        # Series that are there from the start: a rate over one that appears with its first event misses that event.
        for resolution in ('full', 'compressed'):
            self.tiles.labels(resolution)
        for results in ('tiles', 'prompts'):
            self.pinned_overflows.labels(results)
        self.remote_encoders = Gauge('vico:remote_encoders', 'Encoders elsewhere that take tiles of this server now.')
        self.remote_losses = Counter(
            'vico:remote_encoders_lost', 'Encoders elsewhere that have ended, or no longer answered.'
        )
        self.remote_bytes = Counter(
            'vico:remote_encoder_bytes',
            'Bytes of tiles and visual tokens exchanged with encoders elsewhere, by direction: sent or received.',
            ['direction'],
        )
        self.cache_bytes = Gauge('vico:embedding_cache_current_bytes', 'Bytes of host memory that cached tiles use.')

    def count_tiles(self, tile_tokens: Sequence[int]) -> None:
        """Count an image's tiles and visual tokens.

        Args:
            tile_tokens: 64 or 256 for each tile.
        """
        compressed = sum(tokens == TOKENS_COMPRESSED for tokens in tile_tokens)
        self.tiles.labels('compressed').inc(compressed)
        self.tiles.labels('full').inc(len(tile_tokens) - compressed)
        self.visual_tokens.inc(sum(tile_tokens))
        self.visual_tokens_saved.inc(compressed * (TOKENS_FULL - TOKENS_COMPRESSED))


@cache
def stage_metrics() -> StageMetrics:
    """Return the collectors of this process, registering them when first called."""
    return StageMetrics()
