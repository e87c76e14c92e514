"""The vision stage's metrics, which appear on LMDeploy's own ``/metrics``.

The prefix is ``vico:`` because LMDeploy unregisters every collector with "lmdeploy" in its name.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from prometheus_client import Counter, Gauge, Histogram

from lmdeploy_vico.config import TOKENS_COMPRESSED, TOKENS_FULL

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
TILES = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Declared:
    """A metric, as the documents list it.

    Attributes:
        name: of its series, without labels.
        labels: its labels, each with its values.
        meaning: what /metrics says, a sentence.
    """

    name: str
    labels: Mapping[str, Sequence[str]]
    meaning: str


class StageMetrics:
    """The collectors. Get them from :func:`stage_metrics`: a process can register each only once.

    Attributes:
        declared: all of them, in words.
    """

    def __init__(self) -> None:
        self.declared: list[Declared] = []
        self.tiles = self._counter(
            'vico:tiles',
            f'Tiles given to the language model: full ({TOKENS_FULL} visual tokens) or compressed '
            f'({TOKENS_COMPRESSED}).',
            resolution=('full', 'compressed'),
        )
        self.visual_tokens = self._counter('vico:visual_tokens', 'Visual tokens given to the language model.')
        self.visual_tokens_saved = self._counter(
            'vico:visual_tokens_saved',
            f'Visual tokens saved by compression, compared with {TOKENS_FULL} for every tile.',
        )
        self.pressed_prompts = self._counter(
            'vico:pressure_prompts',
            'Prompts of which more was compressed because the language model was overloaded (pressure_compression).',
        )
        self.pressed_tiles = self._counter('vico:pressure_compressed_tiles', 'Tiles that were compressed for it.')
        self.queue_wait = self._histogram(
            'vico:encoder_queue_wait_seconds',
            'Time from the arrival of a prompt until a device takes its first tile.',
            SECONDS,
        )
        self.decode = self._histogram(
            'vico:encoder_decode_seconds', 'Time to fetch and decode one image or video.', SECONDS
        )
        self.preprocess = self._histogram(
            'vico:encoder_preprocess_seconds', 'Time to resize and cut one image.', SECONDS
        )
        self.model_forward = self._histogram(
            'vico:encoder_model_forward_seconds',
            'Time a device takes to encode and score one batch: ViT and router.',
            SECONDS,
        )
        self.tiles_per_batch = self._histogram(
            'vico:encoder_tiles_per_batch', 'Tiles in a device batch, not counting padding.', TILES
        )
        self.cache_hits = self._counter(
            'vico:embedding_cache_hits', 'Tiles not encoded again: cached, or being encoded for another prompt.'
        )
        self.cache_misses = self._counter('vico:embedding_cache_misses', 'Tiles that had to be encoded.')
        self.cache_evictions = self._counter(
            'vico:embedding_cache_evictions', 'Tiles dropped from the cache for others.'
        )
        self.pinned_overflows = self._counter(
            'vico:pinned_memory_overflows',
            'Results copied more slowly because the pinned host memory was full. If there are many of tiles, raise '
            'cache_bytes.',
            results=('tiles', 'prompts'),
        )
        self.remote_encoders = self._gauge(
            'vico:remote_encoders', 'Encoders elsewhere that take tiles of this server now.'
        )
        self.remote_losses = self._counter(
            'vico:remote_encoders_lost', 'Encoders elsewhere that have ended, or no longer answered.'
        )
        self.remote_bytes = self._counter(
            'vico:remote_encoder_bytes',
            'Bytes of tiles and visual tokens exchanged with encoders elsewhere.',
            direction=('sent', 'received'),
        )
        self.cache_bytes = self._gauge(
            'vico:embedding_cache_current_bytes', 'Bytes of host memory that cached tiles use.'
        )

    def _counter(self, name: str, meaning: str, **labels: Sequence[str]) -> Counter:
        """Register a counter with at most one label, whose ``labels`` give its values.

        Its series are there from the start: a rate over one that appears with its first event misses that event.
        """
        self.declared.append(Declared(f'{name}_total', labels, meaning))
        counter = Counter(name, meaning, list(labels))
        for values in labels.values():
            for value in values:
                counter.labels(value)
        return counter

    def _gauge(self, name: str, meaning: str) -> Gauge:
        self.declared.append(Declared(name, {}, meaning))
        return Gauge(name, meaning)

    def _histogram(self, name: str, meaning: str, buckets: Sequence[float]) -> Histogram:
        self.declared.append(Declared(name, {}, meaning))
        return Histogram(name, meaning, buckets=buckets)

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
