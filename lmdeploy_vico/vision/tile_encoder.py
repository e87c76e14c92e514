"""TileEncoder: tiles in, features or visual tokens out, on one device."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from lmdeploy_vico.checkpoints.files import Checkpoint, Weights
from lmdeploy_vico.choices import NO_SPEEDUPS, Compression, Speedups, parse_compression
from lmdeploy_vico.config import VicoConfig
from lmdeploy_vico.kernels.implementation import implementation, use
from lmdeploy_vico.vision.arena import ResultMemory
from lmdeploy_vico.vision.batches import CudaBatches, RunningBatch, TileFeatures, make_batches
from lmdeploy_vico.vision.model.speedups import require_speedups
from lmdeploy_vico.vision.model.tower import VisionTower
from lmdeploy_vico.vision.projection import Projection, VisualTokens
from lmdeploy_vico.vision.routing import RoutingGroup, route_prompt
from lmdeploy_vico.vision.tiling import TILE_SHAPE, tile_digests

# Tiles per device batch, by ViT width: enough to fill the device, small enough that padding one tile is cheap. On a
# CPU a single tile already keeps every core busy.
CUDA_TILE_BATCH = ((1024, 8), (3200, 2))
CPU_TILE_BATCH = 1


class TileEncoder:
    """Encodes, scores and projects tiles on one device, in batches of one fixed size.

    A matrix product may differ in its last bits between shapes, so every batch has the same number of tiles, padded
    if need be: a tile's score and embeddings then depend on its pixels alone, not on its neighbours.

    Attributes:
        tower: frozen, on its device.
        config: the checkpoint's.
        device, dtype: the tower's.
        tile_batch: tiles of a device batch.
        projection: from features to visual tokens.

    Args:
        tower: see above.
        config: see above.
        tile_batch: by default :func:`default_tile_batch`.
        graph: whether a CUDA graph is captured; without, kernels are launched one by one.
    """

    def __init__(
        self, tower: VisionTower, config: VicoConfig, tile_batch: int | None = None, graph: bool = True
    ) -> None:
        self.tower = tower
        self.config = config
        weight = next(tower.parameters())
        self.device, self.dtype = weight.device, weight.dtype
        self.tile_batch = tile_batch or default_tile_batch(config, self.device)
        self.projection = Projection(tower, config.llm_hidden_size, self.tile_batch)
        self._threads = torch.get_num_threads()
        self._batches = make_batches(tower, self.tile_batch, self.device, graph)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        tile_batch: int | None = None,
    ) -> 'TileEncoder':
        """Load a ViCO checkpoint's vision side.

        Args:
            path: checkpoint directory with ``config.json`` and safetensors shards.
            device: by default the current CUDA device, or the CPU without one.
            dtype: by default :func:`default_dtype`; always float32 on a CPU, where bfloat16 is both slow and coarse.
            tile_batch: tiles per device batch; by default chosen for the ViT's width and the device.

        Raises:
            UnsupportedCheckpointError: not a ViCO checkpoint, or tensors are missing or misshapen (all are named).
        """
        config = VicoConfig.from_pretrained(path)
        return cls.load(Checkpoint(path), config, device, dtype, tile_batch)

    @classmethod
    def load(
        cls,
        checkpoint: Weights,
        config: VicoConfig,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        tile_batch: int | None = None,
        graph: bool = True,
        speedups: Speedups = NO_SPEEDUPS,
        kernels: str | None = None,
    ) -> 'TileEncoder':
        """As :meth:`from_pretrained`, of a checkpoint and config that have been read already.

        Without ``graph``, kernels are launched one by one on a CUDA device. Raises UnsupportedSpeedupError where one of
        the ViT's ``speedups`` cannot run. ``kernels`` overrides the implementation of the kernels in this process.
        """
        if kernels is not None:
            use(kernels)
        device = torch.device(device or ('cuda' if torch.cuda.is_available() else 'cpu'))
        implementation(device)  # says which kernels run, or refuses before anything is loaded
        dtype = default_dtype(device) if dtype is None or device.type == 'cpu' else dtype
        require_speedups(speedups, config.vision, device, dtype)
        # Memory on the device is taken once, in the final dtype, and only for a checkpoint that is complete.
        with torch.device('meta'):
            tower = VisionTower(config, speedups).to(dtype)
        checkpoint.require({name: tuple(value.shape) for name, value in tower.named_parameters()})
        tower.to_empty(device=device)
        checkpoint.load_into(tower)
        tower.freeze()
        return cls(tower, config, tile_batch, graph)

    @property
    def copies_results(self) -> bool:
        """Whether results have to be copied from a device, for which pinned memory is best."""
        return isinstance(self._batches, CudaBatches)

    @property
    def kernels(self) -> str:
        """The implementation of the kernels on its device."""
        return implementation(self.device)

    def use_memory(self, memory: ResultMemory | None) -> None:
        """Leave results in pinned memory that is lent, as far as it goes; None for ordinary memory of their own."""
        self.projection.memory = memory
        if isinstance(self._batches, CudaBatches):
            self._batches.memory = memory

    def enter_thread(self) -> None:
        """Get ready for a thread; call it in each thread that is going to use this encoder.

        On a CUDA device it warms up, since some of what CUDA's libraries take belongs to a thread. On a CPU it takes as
        many threads as the one that made the encoder: PyTorch keeps their number for each thread, a new one may have
        been given another by somebody else in the process, and sums depend on it in their last bits.
        """
        if self.device.type == 'cuda':
            self.warm_up()
        else:
            torch.set_num_threads(self._threads)

    def warm_up(self) -> None:
        """Encode a batch and project the largest groups, so that no prompt waits for kernels or device memory."""
        features = self.features(np.zeros((1, *TILE_SHAPE), np.uint8))
        self.projection.warm_up(features.patches[0])

    def usable(self) -> bool:
        """Return whether the device still answers: after some errors a CUDA device never does again in a process."""
        if self.device.type != 'cuda':
            return True
        for _ in range(2):  # the first answer may be what has failed before
            with suppress(Exception):
                torch.cuda.synchronize(self.device)
                return True
        return False

    def memory(self) -> str:
        """What the vision side takes of its device now, in words."""
        if self.device.type == 'cuda':
            return f'{torch.cuda.memory_reserved(self.device) / 2**30:.2f} GiB of device memory'
        return f'{sum(weight.nbytes for weight in self.tower.parameters()) / 2**30:.2f} GiB of weights'

    def encode_tiles(self, tiles: Sequence[np.ndarray], compression: Compression = 'auto') -> list[VisualTokens]:
        """Encode and route the tiled images of **one prompt**, uint8 ``[n_i, 448, 448, 3]`` each.

        Raises:
            ValueError: an unknown compression, or tiles of a wrong shape.
        """
        if not tiles:
            return []
        groups = [(range(len(tiles)), parse_compression(compression))]
        together = np.concatenate(tiles)
        features = replace(self.features(together), digests=tile_digests(together))
        return self.visual_tokens(features, [len(image) for image in tiles], groups)

    def features(self, tiles: np.ndarray) -> TileFeatures:
        """Encode and score uint8 tiles ``[n, 448, 448, 3]`` in fixed batches."""
        if tiles.shape[1:] != TILE_SHAPE or tiles.dtype != np.uint8:
            raise ValueError(f'tiles: expected uint8 {["n", *TILE_SHAPE]}, not {tiles.dtype} {list(tiles.shape)}')
        starts = range(0, len(tiles), self.tile_batch)
        batches = [self.start(list(tiles[start : start + self.tile_batch])).wait() for start in starts]
        patches = [row for batch in batches for row in batch.patches]
        return TileFeatures(patches, torch.cat([batch.scores for batch in batches]))

    @torch.inference_mode()
    def start(self, tiles: Sequence[np.ndarray]) -> RunningBatch:
        """Begin to encode and score at most ``tile_batch`` uint8 tiles ``[448, 448, 3]`` as one device batch.

        On a CUDA device this returns at once; a batch has to be waited for before the next but one is started.
        """
        return self._batches.start(tiles)

    def visual_tokens(
        self,
        features: TileFeatures,
        counts: Sequence[int],
        groups: Sequence[RoutingGroup],
        dtype: torch.dtype | None = None,
    ) -> list[VisualTokens]:
        """Route and project the encoded tiles of **one prompt**.

        Args:
            features: of all tiles, image after image.
            counts: tiles of each image.
            groups: which images are routed together; each image stands in one of them.
            dtype: of the embeddings; by default the encoder's. What float16 cannot hold is brought to its largest.
        """
        config = self.config
        thresholds = config.relative_threshold, config.absolute_threshold
        compressed = route_prompt(features.scores, features.digests, counts, groups, *thresholds)
        return self.projection.by_image(features, counts, compressed, dtype or self.dtype)


def default_tile_batch(config: VicoConfig, device: torch.device) -> int:
    """Tiles per device batch for a ViT of this width: one size per checkpoint and device type."""
    if device.type == 'cpu':
        return CPU_TILE_BATCH
    return next((batch for width, batch in CUDA_TILE_BATCH if config.vision.hidden_size <= width), 1)


def default_dtype(device: torch.device) -> torch.dtype:
    """What a ViT runs in on a device: float32 on a CPU, bfloat16 on a CUDA device that has it, else float16.

    InternViT-6B's activations exceed what float16 can hold, so that it is taken only where there is nothing else:
    below compute capability 8.0.
    """
    if device.type == 'cpu':
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16
