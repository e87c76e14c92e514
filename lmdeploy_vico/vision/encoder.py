"""VisionEncoder: images of a prompt in, routed visual tokens out."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from lmdeploy_vico.config import TOKENS_COMPRESSED, TOKENS_FULL, VicoConfig
from lmdeploy_vico.kernels.implementation import implementation
from lmdeploy_vico.kernels.pack import pack
from lmdeploy_vico.vision.routing import Compression, parse_compression, route
from lmdeploy_vico.vision.tiling import TILE_SHAPE, cut_tiles, tile_count
from lmdeploy_vico.vision.tower import VisionTower
from lmdeploy_vico.vision.weights import Checkpoint

# Tiles per device batch, by ViT width: enough to fill the device, small enough that padding one tile is cheap. On a
# CPU a single tile already keeps every core busy.
CUDA_TILE_BATCH = ((1024, 8), (3200, 2))
CPU_TILE_BATCH = 1
PROJECTED_BATCHES = 8  # whose rows are shuffled together: more fills projector batches better and takes more memory


@dataclass(frozen=True)
class VisualTokens:
    """The visual tokens of one image.

    Attributes:
        embeddings: ``[sum(tile_tokens), H]`` in the encoder's dtype, on its device; tiles row by row, then thumbnail.
        tile_tokens: 64 or 256 for each tile.
        scores: the router's p[0] of each tile.
    """

    embeddings: torch.Tensor
    tile_tokens: list[int]
    scores: list[float]


@dataclass(frozen=True)
class TileFeatures:
    """ViT-level results of tiles: ``patches`` ``[n, 1024, D]`` and float32 ``scores`` ``[n]``, on the device."""

    patches: torch.Tensor
    scores: torch.Tensor


class VisionEncoder:
    """Encodes and routes tiles in device batches of one fixed size.

    A matrix product may differ in its last bits between shapes, so every batch has the same number of tiles, padded
    with black ones: a tile's score and embeddings then depend on its pixels alone, not on its neighbours.
    """

    def __init__(self, tower: VisionTower, config: VicoConfig, tile_batch: int | None = None) -> None:
        self.tower = tower
        self.config = config
        weight = next(tower.parameters())
        self.device, self.dtype = weight.device, weight.dtype
        self.tile_batch = tile_batch or default_tile_batch(config, self.device)

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
            dtype: by default bfloat16 on CUDA; always float32 on a CPU, where bfloat16 is both slow and coarse.
            tile_batch: tiles per device batch; by default chosen for the ViT's width and the device.

        Raises:
            UnsupportedCheckpointError: not a ViCO checkpoint, or tensors are missing or misshapen (all are named).
        """
        config = VicoConfig.from_pretrained(path)
        return cls.load(Checkpoint(path), config, device, dtype, tile_batch)

    @classmethod
    def load(
        cls,
        checkpoint: Checkpoint,
        config: VicoConfig,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        tile_batch: int | None = None,
    ) -> 'VisionEncoder':
        """As :meth:`from_pretrained`, of a checkpoint and config that have been read already."""
        device = torch.device(device or ('cuda' if torch.cuda.is_available() else 'cpu'))
        implementation(device)  # says which kernels run, or refuses before anything is loaded
        dtype = torch.float32 if device.type == 'cpu' else dtype or torch.bfloat16
        # Memory on the device is taken once, in the final dtype, and only for a checkpoint that is complete.
        with torch.device('meta'):
            tower = VisionTower(config).to(dtype)
        checkpoint.require({name: tuple(value.shape) for name, value in tower.named_parameters()})
        tower.to_empty(device=device)
        checkpoint.load_into(tower)
        tower.requires_grad_(False).eval()
        with torch.inference_mode():
            tower.prepare()
        return cls(tower, config, tile_batch)

    def warm_up(self) -> None:
        """Encode two black tiles, one for each projector, so that no prompt waits for kernels to be compiled."""
        self.encode_tiles([np.zeros((2, *TILE_SHAPE), np.uint8)], 0.5)

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

    def encode_tiles(
        self,
        tiles: Sequence[np.ndarray],
        compression: Compression = 'auto',
        image_compression: Sequence[Compression | None] | None = None,
    ) -> list[VisualTokens]:
        """Encode and route the tiled images of **one prompt**.

        Args:
            tiles: uint8 ``[n_i, 448, 448, 3]`` for each image.
            compression: for all images without a value of their own, routed together.
            image_compression: a value for each image, or None; an image with a value is routed by itself.

        Raises:
            ValueError: an unknown compression, or tiles of a wrong shape.
        """
        if not tiles:
            return []
        compression = parse_compression(compression)
        features = self.features(np.concatenate(tiles))
        return self.visual_tokens(features, [len(image) for image in tiles], compression, image_compression)

    @torch.inference_mode()
    def visual_tokens(
        self,
        features: TileFeatures,
        counts: Sequence[int],
        compression: Compression = 'auto',
        image_compression: Sequence[Compression | None] | None = None,
    ) -> list[VisualTokens]:
        """Route and project the encoded tiles of **one prompt**, ``counts`` of them for each image.

        The rest as in :meth:`encode_tiles`, which has parsed ``compression``.
        """
        scores = features.scores.cpu()
        own = list(image_compression or [None] * len(counts))
        compressed = self.route_prompt(scores, counts, compression, own)
        return self._pack(features, scores, compressed, counts)

    @torch.inference_mode()
    def features(self, tiles: np.ndarray) -> TileFeatures:
        """Encode and score uint8 tiles ``[n, 448, 448, 3]`` in fixed batches."""
        if tiles.shape[1:] != TILE_SHAPE or tiles.dtype != np.uint8:
            raise ValueError(f'tiles: expected uint8 {["n", *TILE_SHAPE]}, not {tiles.dtype} {list(tiles.shape)}')
        patches, scores = [], []
        for start in range(0, len(tiles), self.tile_batch):
            batch = torch.from_numpy(tiles[start : start + self.tile_batch]).to(self.device, non_blocking=True)
            batch_patches, batch_scores = self.tower.encode(_pad(batch, self.tile_batch))
            patches.append(batch_patches[: len(batch)])
            scores.append(batch_scores[: len(batch)])
        return TileFeatures(torch.cat(patches), torch.cat(scores))

    def route_prompt(
        self,
        scores: torch.Tensor,
        counts: Sequence[int],
        compression: Compression,
        image_compression: Sequence[Compression | None],
    ) -> torch.Tensor:
        """Which tiles of a prompt are compressed: bool ``[sum(counts)]``, from scores of the same shape."""
        config = self.config
        compressed = torch.zeros(scores.shape, dtype=torch.bool)
        owner = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
        groups = [([i for i, own in enumerate(image_compression) if own is None], compression)]
        groups += [([i], parse_compression(own)) for i, own in enumerate(image_compression) if own is not None]
        for members, value in groups:
            chosen = torch.isin(owner, torch.tensor(members, dtype=owner.dtype))
            compressed[chosen] = route(scores[chosen], value, config.relative_threshold, config.absolute_threshold)
        return compressed

    @torch.inference_mode()
    def project(self, features: TileFeatures, compressed: torch.Tensor) -> list[torch.Tensor]:
        """Visual tokens of each tile, ``[64 or 256, H]``, computing for each only the branch it is routed to.

        Args:
            features: of n tiles.
            compressed: bool ``[n]`` on the CPU.
        """
        outputs: list[torch.Tensor] = []
        step = PROJECTED_BATCHES * self.tile_batch
        for start in range(0, len(compressed), step):
            outputs += self._project(features.patches[start : start + step], compressed[start : start + step])
        return outputs

    def _project(self, patches: torch.Tensor, compressed: torch.Tensor) -> list[torch.Tensor]:
        kinds = compressed.tolist()
        number = sum(kinds)
        full_room, hard_room = (_round_up(count, self.tile_batch) for count in (len(kinds) - number, number))
        on_device = compressed.to(self.device, non_blocking=True)
        shuffled = self.tower.shuffle(patches, on_device, (full_room, hard_room))
        full = self._visual_tokens(shuffled.full, compressed=False)
        hard = self._visual_tokens(shuffled.compressed, compressed=True)
        return [next(hard if kind else full) for kind in kinds]

    def _visual_tokens(self, rows: torch.Tensor, compressed: bool) -> Iterator[torch.Tensor]:
        """Tile by tile, projected in batches of one fixed shape."""
        tokens = TOKENS_COMPRESSED if compressed else TOKENS_FULL
        for start in range(0, len(rows), self.tile_batch * tokens):
            batch = rows[start : start + self.tile_batch * tokens]
            yield from self.tower.project(batch, compressed).split(tokens)

    def _pack(
        self, features: TileFeatures, scores: torch.Tensor, compressed: torch.Tensor, counts: Sequence[int]
    ) -> list[VisualTokens]:
        tiles = self.project(features, compressed)
        ends = list(accumulate(len(tokens) for tokens in tiles))
        embeddings = pack(tiles[0].new_empty(ends[-1], tiles[0].shape[1]), tiles, [0, *ends[:-1]])
        results, start = [], 0
        for count in counts:
            image = slice(start, start + count)
            tile_tokens = [TOKENS_COMPRESSED if hard else TOKENS_FULL for hard in compressed[image].tolist()]
            begin = ends[start] - tile_tokens[0]
            results.append(
                VisualTokens(embeddings[begin : begin + sum(tile_tokens)], tile_tokens, scores[image].tolist())
            )
            start += count
        return results


def default_tile_batch(config: VicoConfig, device: torch.device) -> int:
    """Tiles per device batch for a ViT of this width: one size per checkpoint and device type."""
    if device.type == 'cpu':
        return CPU_TILE_BATCH
    return next((batch for width, batch in CUDA_TILE_BATCH if config.vision.hidden_size <= width), 1)


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _pad(batch: torch.Tensor, size: int) -> torch.Tensor:
    if len(batch) == size:
        return batch
    return torch.cat([batch, batch.new_zeros(size - len(batch), *batch.shape[1:])])
