"""What a server says of itself at its start: short lines, one fact each."""

import logging
from collections.abc import Iterator, Sequence

from lmdeploy_vico.config import VicoConfig
from lmdeploy_vico.host_memory import GIB
from lmdeploy_vico.options import Options
from lmdeploy_vico.vision.tile_encoder import TileEncoder

PRESSURE = (
    'pressure_compression: up to %g of the tiles of a request are compressed besides while the language model is busy',
    'pressure_compression %g breaks batch independence: an answer then depends on what else is served',
    'pressure_compression %g does nothing for 503s of the tile queue: every tile is encoded before it is routed',
)

logger = logging.getLogger(__name__)


def log_settings(config: VicoConfig, options: Options, encoders: Sequence[TileEncoder], limited: bool) -> None:
    """Log how a server encodes, prepares and compresses; see :func:`settings`."""
    for name, value in settings(config, options, encoders, limited):
        logger.info('%s: %s', name, value)
    if options.pressure_compression and limited:
        for line in PRESSURE:
            logger.warning(line, options.pressure_compression)


def settings(
    config: VicoConfig, options: Options, encoders: Sequence[TileEncoder], limited: bool
) -> Iterator[tuple[str, str]]:
    """Name what was chosen, fact by fact.

    Args:
        config: of the checkpoint, with the server's limits.
        options: the server's.
        encoders: on devices of this machine; none where images are encoded elsewhere.
        limited: whether queue and memory have limits: those of a server, not of a pipeline.
    """
    if encoders:
        yield 'vision side', f'on {_places(encoders)}'
        yield 'vision data type', str(encoders[0].dtype).removeprefix('torch.')
        yield 'tile batch', str(encoders[0].tile_batch)
    else:
        yield 'vision side', f'elsewhere, encoders of {options.vision_device}'
    yield 'decoding', f'{options.decode_processes} processes'
    yield 'cutting tiles', f'{options.preprocess_threads} threads'
    yield 'tile queue', f'at most {options.max_queued_tiles} tiles' if limited else 'no limit'
    yield 'memory for what clients send', f'{options.max_decoded_bytes / GIB:.1f} GiB' if limited else 'no limit'
    yield 'tile cache', f'{options.cache_bytes / GIB:.1f} GiB'
    yield 'tiles of an image', f'at most {options.max_tiles}'
    yield 'compression', str(options.compression)
    yield 'thresholds of auto', f'quantile {config.relative_threshold:g}, score {config.absolute_threshold:g}'
    yield 'routing scope', options.routing_scope


def _places(encoders: Sequence[TileEncoder]) -> str:
    """The devices, each with what the vision side takes of it, or together those of which it takes the same."""
    devices: dict[str, list[str]] = {}
    for encoder in encoders:
        devices.setdefault(encoder.memory(), []).append(str(encoder.device))
    return ', '.join(
        f'{", ".join(names)} ({memory}{" each" if len(names) > 1 else ""})' for memory, names in devices.items()
    )
