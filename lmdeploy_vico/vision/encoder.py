"""VisionEncoder: images of a prompt in, routed visual tokens out."""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from lmdeploy_vico.checkpoints.files import Checkpoint, Weights
from lmdeploy_vico.choices import NO_SPEEDUPS, Compression, Speedups, parse_compression
from lmdeploy_vico.config import TOKENS_COMPRESSED, TOKENS_FULL, VicoConfig
from lmdeploy_vico.kernels.implementation import implementation
from lmdeploy_vico.kernels.pack import pack
from lmdeploy_vico.vision.arena import ResultMemory
from lmdeploy_vico.vision.batches import CudaBatches, RunningBatch, TileFeatures, make_batches
from lmdeploy_vico.vision.model.speedups import require_speedups
from lmdeploy_vico.vision.model.tower import VisionTower
from lmdeploy_vico.vision.routing import route
from lmdeploy_vico.vision.tiling import TILE_SHAPE, cut_tiles, tile_count

# Tiles per device batch, by ViT width: enough to fill the device, small enough that padding one tile is cheap. On a
# CPU a single tile already keeps every core busy.
CUDA_TILE_BATCH = ((1024, 8), (3200, 2))
CPU_TILE_BATCH = 1
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


# Images of a prompt, by their indices, that are routed together, and what they are routed by.
RoutingGroup = tuple[Sequence[int], Compression]


class VisionEncoder:
    """Encodes and routes tiles in device batches of one fixed size.

    A matrix product may differ in its last bits between shapes, so every batch has the same number of tiles, padded
    if need be: a tile's score and embeddings then depend on its pixels alone, not on its neighbours.
    """

    def __init__(
        self, tower: VisionTower, config: VicoConfig, tile_batch: int | None = None, graph: bool = True
    ) -> None:
        self.tower = tower
        self.config = config
        weight = next(tower.parameters())
        self.device, self.dtype = weight.device, weight.dtype
        self.tile_batch = tile_batch or default_tile_batch(config, self.device)
        self._threads = torch.get_num_threads()
        self._batches = make_batches(tower, self.tile_batch, self.device, graph)
        # Prompts are projected while the next batch is being encoded, and go first: their requests wait for that alone.
        self._projecting = torch.cuda.Stream(self.device, priority=-1) if self.device.type == 'cuda' else None
        self._memory: ResultMemory | None = None

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        tile_batch: int | None = None,
    ) -> 'VisionEncoder':
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
    ) -> 'VisionEncoder':
        """As :meth:`from_pretrained`, of a checkpoint and config that have been read already.

        Without ``graph``, kernels are launched one by one on a CUDA device. Raises UnsupportedSpeedupError where one of
        the ViT's ``speedups`` cannot run.
        """
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

    def use_memory(self, memory: ResultMemory | None) -> None:
        """Leave results in pinned memory that is lent, as far as it goes; None for ordinary memory of their own."""
        self._memory = memory
        if isinstance(self._batches, CudaBatches):
            self._batches.memory = memory

    def enter_thread(self) -> None:
        """To be called in a thread that is going to use this encoder.

        On a CUDA device it warms up, since some of what CUDA's libraries take belongs to a thread. On a CPU it takes as
        many threads as the one that made the encoder: PyTorch keeps their number for each thread, a new one may have
        been given another by somebody else in the process, and sums depend on it in their last bits.
        """
        if self.device.type == 'cuda':
            self.warm_up()
        else:
            torch.set_num_threads(self._threads)

    def warm_up(self) -> None:
        """Project the largest groups there are, so that no prompt waits for kernels or device memory.

        Rows are made for whole projector batches of either kind, at most one more than the tiles would fill. Each
        division into batches is tried: PyTorch's memory for one may not have room for another.
        """
        tiles = PROJECTED_BATCHES * self.tile_batch
        features = self.features(np.zeros((1, *TILE_SHAPE), np.uint8))
        for full in range(tiles, -1, -1):
            if full % self.tile_batch in (0, 1):
                self.project(features.patches * tiles, torch.arange(tiles) >= full)

    def usable(self) -> bool:
        """Whether the device still answers: after some errors a CUDA device never does again in the same process."""
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

    def encode(self, images: Sequence[Image.Image], compression: Compression = 'auto') -> list[VisualTokens]:
        """Encode and route the images of **one prompt**; see :meth:`encode_tiles`."""
        return self.encode_tiles([self.cut(image) for image in images], compression)

    def cut(self, image: Image.Image, max_tiles: int | None = None) -> np.ndarray:
        """Tiles ``[n, 448, 448, 3]`` of an image, as the checkpoint's config says unless ``max_tiles`` is given."""
        return cut_tiles(image, *self._tiling(max_tiles))

    def tile_count(self, size: tuple[int, int], max_tiles: int | None = None) -> int:
        """How many tiles :meth:`cut` makes of an image of this (width, height)."""
        width, height = size
        return tile_count(width, height, *self._tiling(max_tiles))

    def _tiling(self, max_tiles: int | None) -> tuple[int, int, bool]:
        config = self.config
        return config.min_tiles, config.max_tiles if max_tiles is None else max_tiles, config.use_thumbnail

    def encode_tiles(self, tiles: Sequence[np.ndarray], compression: Compression = 'auto') -> list[VisualTokens]:
        """Encode and route the tiled images of **one prompt**, uint8 ``[n_i, 448, 448, 3]`` each.

        Raises:
            ValueError: an unknown compression, or tiles of a wrong shape.
        """
        if not tiles:
            return []
        groups = [(range(len(tiles)), parse_compression(compression))]
        return self.visual_tokens(self.features(np.concatenate(tiles)), [len(image) for image in tiles], groups)

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
        compressed = self.route_prompt(features.scores, counts, groups)
        embeddings = self._project_prompt(features.patches, compressed, dtype or self.dtype)
        tile_tokens = [TOKENS_COMPRESSED if hard else TOKENS_FULL for hard in compressed.tolist()]
        results, tile, row = [], 0, 0
        for count in counts:
            image = slice(tile, tile + count)
            rows = sum(tile_tokens[image])
            results.append(
                VisualTokens(embeddings[row : row + rows], tile_tokens[image], features.scores[image].tolist())
            )
            tile, row = tile + count, row + rows
        return results

    def route_prompt(self, scores: torch.Tensor, counts: Sequence[int], groups: Sequence[RoutingGroup]) -> torch.Tensor:
        """Which tiles of a prompt are compressed: bool ``[sum(counts)]``, from scores of the same shape."""
        config = self.config
        compressed = torch.zeros(scores.shape, dtype=torch.bool)
        owner = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
        for images, compression in groups:
            chosen = torch.isin(owner, torch.tensor(list(images), dtype=owner.dtype))
            compressed[chosen] = route(
                scores[chosen], compression, config.relative_threshold, config.absolute_threshold
            )
        return compressed

    def project(self, patches: Sequence[torch.Tensor], compressed: torch.Tensor) -> list[torch.Tensor]:
        """Visual tokens of each tile, ``[64 or 256, H]``, computing for each only the branch it is routed to.

        Args:
            patches: ``[1024, D]`` for each of n tiles, as in :class:`TileFeatures`.
            compressed: bool ``[n]`` on the CPU.
        """
        tokens = [TOKENS_COMPRESSED if hard else TOKENS_FULL for hard in compressed.tolist()]
        return list(self._project_prompt(patches, compressed, self.dtype).split(tokens))

    @torch.inference_mode()
    def _project_prompt(
        self, patches: Sequence[torch.Tensor], compressed: torch.Tensor, dtype: torch.dtype
    ) -> torch.Tensor:
        """The visual tokens of all tiles after another, on the CPU."""
        step = PROJECTED_BATCHES * self.tile_batch
        starts = range(0, len(patches), step)
        groups = (
            self._project_group(patches[start : start + step], compressed[start : start + step], dtype)
            for start in starts
        )
        if self._projecting is None:
            return next(groups) if len(starts) == 1 else torch.cat(list(groups))
        number = int(compressed.sum())
        count = number * TOKENS_COMPRESSED + (len(compressed) - number) * TOKENS_FULL
        lent = None if self._memory is None else self._memory.rows(count, dtype)
        rows = torch.empty(count, self.config.llm_hidden_size, dtype=dtype) if lent is None else lent
        row = 0
        with torch.cuda.stream(self._projecting):
            try:
                for packed in groups:
                    rows[row : row + len(packed)].copy_(packed, non_blocking=True)
                    row += len(packed)
            finally:
                # Also after a failure: copies from the tiles' memory and to the rows' must have ended before either is
                # given back.
                self._projecting.synchronize()
        return rows

    def _project_group(
        self, patches: Sequence[torch.Tensor], compressed: torch.Tensor, dtype: torch.dtype
    ) -> torch.Tensor:
        """The same of at most PROJECTED_BATCHES device batches, on the device."""
        on_device = torch.empty(len(patches), *patches[0].shape, dtype=self.dtype, device=self.device)
        for place, tile in zip(on_device, patches, strict=True):
            place.copy_(tile, non_blocking=True)
        tiles = self._project(on_device, compressed, dtype)
        ends = list(accumulate(len(tokens) for tokens in tiles))
        packed = torch.empty(ends[-1], self.config.llm_hidden_size, dtype=dtype, device=self.device)
        pack(packed, tiles, [0, *ends[:-1]])
        return packed

    def _project(self, patches: torch.Tensor, compressed: torch.Tensor, dtype: torch.dtype) -> list[torch.Tensor]:
        kinds = compressed.tolist()
        number = sum(kinds)
        full_room, hard_room = (_round_up(count, self.tile_batch) for count in (len(kinds) - number, number))
        on_device = compressed.to(self.device, non_blocking=True)
        shuffled = self.tower.shuffle(patches, on_device, (full_room, hard_room))
        full = self._visual_tokens(shuffled.full, False, dtype)
        hard = self._visual_tokens(shuffled.compressed, True, dtype)
        return [next(hard if kind else full) for kind in kinds]

    def _visual_tokens(self, rows: torch.Tensor, compressed: bool, dtype: torch.dtype) -> Iterator[torch.Tensor]:
        """Tile by tile, projected in batches of one fixed shape, with values that can be cast to ``dtype``."""
        tokens = TOKENS_COMPRESSED if compressed else TOKENS_FULL
        for start in range(0, len(rows), self.tile_batch * tokens):
            batch = rows[start : start + self.tile_batch * tokens]
            yield from saturate(self.tower.project(batch, compressed), dtype).split(tokens)


def default_tile_batch(config: VicoConfig, device: torch.device) -> int:
    """Tiles per device batch for a ViT of this width: one size per checkpoint and device type."""
    if device.type == 'cpu':
        return CPU_TILE_BATCH
    return next((batch for width, batch in CUDA_TILE_BATCH if config.vision.hidden_size <= width), 1)


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def default_dtype(device: torch.device) -> torch.dtype:
    """What a ViT runs in on a device: float32 on a CPU, bfloat16 on a CUDA device that has it, else float16.

    InternViT-6B's activations exceed what float16 can hold, so that it is taken only where there is nothing else:
    below compute capability 8.0.
    """
    if device.type == 'cpu':
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16


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
