"""A stand-in for the vision side on one device: it costs next to nothing, and its results depend on pixels alone.

It has the real shapes in patches and tokens, but narrow rows. Two tiles that differ in a pixel have other features, so
that a stage that mixes up tiles, images or prompts gives other tokens than :meth:`StandInEncoder.encode`.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from lmdeploy_vico.choices import parse_compression
from lmdeploy_vico.config import GRID, TOKENS_COMPRESSED, TOKENS_FULL, InternViTConfig, VicoConfig
from lmdeploy_vico.stage.jobs import ImageJob
from lmdeploy_vico.vision.batches import RunningBatch, TileFeatures
from lmdeploy_vico.vision.projection import VisualTokens
from lmdeploy_vico.vision.routing import route
from lmdeploy_vico.vision.tile_encoder import TileEncoder
from lmdeploy_vico.vision.tiling import TILE_SHAPE, Tiling, cut_grid

D, H = 4, 8  # widths of patch tokens and of visual tokens
TILING = Tiling(1, 3)  # few tiles: most of what a test costs is the cutting
CONFIG = VicoConfig(
    vision=InternViTConfig(
        hidden_size=D, num_hidden_layers=1, num_attention_heads=1, intermediate_size=D, norm_type='layer_norm',
        qk_normalization=False, qkv_bias=True, layer_norm_eps=1e-6,
    ),
    llm_hidden_size=H, relative_threshold=0.5, absolute_threshold=0.25, max_tiles=3,
)  # fmt: skip
RAMP = torch.linspace(0.5, 1.5, GRID * GRID)[:, None]  # tells the places of a tile apart


def job(image: Image.Image, max_tiles: int = TILING.max_tiles, **options: object) -> ImageJob:
    """What a request for this image becomes."""
    return ImageJob(image, Tiling(1, max_tiles).grid(image.size), **options)


def cut(image: Image.Image) -> np.ndarray:
    """The tiles of :func:`job`."""
    return cut_grid(image, TILING.grid(image.size))


def features_of(tile: np.ndarray, width: int = D) -> tuple[torch.Tensor, float]:
    """Patch tokens ``[1024, width]`` and a score in [0, 1) of a tile, derived from its pixels."""
    assert tile.shape == TILE_SHAPE and tile.dtype == np.uint8
    words = tile.reshape(-1).view(np.uint64)
    sums = f'{words.sum()} {np.bitwise_xor.reduce(words)}'  # of all pixels, and fast
    digest = hashlib.sha512(sums.encode()).digest()
    vector = torch.frombuffer(bytearray(digest), dtype=torch.uint8)[:width] / 256
    return RAMP * vector, digest[0] / 256


class StandInEncoder:
    """A DeviceEncoder of the stand-in kind.

    Args:
        tile_batch: tiles of a device batch.
    """

    device, dtype, config, copies_results = torch.device('cpu'), torch.float32, CONFIG, False

    def __init__(self, tile_batch: int = 1) -> None:
        self.tile_batch = tile_batch

    def enter_thread(self) -> None:
        pass

    def use_memory(self, memory: object) -> None:
        assert memory is None

    def usable(self) -> bool:
        return True

    def start(self, tiles: Sequence[np.ndarray]) -> RunningBatch:
        assert 0 < len(tiles) <= self.tile_batch
        patches, scores = zip(*map(features_of, tiles), strict=True)
        return RunningBatch(TileFeatures(list(patches), torch.tensor(scores)), 0.001)

    def visual_tokens(self, features, counts, groups, dtype) -> list[VisualTokens]:
        assert sum(counts) == len(features.patches) == len(features.scores)
        owner = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
        compressed = torch.zeros(len(owner), dtype=torch.bool)
        for images, compression in groups:
            its = torch.isin(owner, torch.tensor(list(images)))
            compressed[its] = route(
                features.scores[its], compression, CONFIG.relative_threshold, CONFIG.absolute_threshold
            )
        tokens = self.project_all(features.patches, compressed.tolist())
        results, tile = [], 0
        for count in counts:
            its = slice(tile, tile := tile + count)
            embeddings = torch.cat(tokens[its]).to(dtype)
            results.append(VisualTokens(embeddings, [len(rows) for rows in tokens[its]], features.scores[its].tolist()))
        return results

    def project_all(self, patches: Sequence[torch.Tensor], compressed: Sequence[bool]) -> list[torch.Tensor]:
        return [self.project(*tile) for tile in zip(patches, compressed, strict=True)]

    def project(self, patches: torch.Tensor, compressed: bool) -> torch.Tensor:
        """Visual tokens ``[64 or 256, H]`` of a tile."""
        rows = patches.view(TOKENS_COMPRESSED if compressed else TOKENS_FULL, -1)
        return rows[:, :H] + rows[:, -H:] + compressed

    def encode(self, images: Sequence[Image.Image], compression: object = 'auto') -> list[VisualTokens]:
        """The visual tokens of a prompt that is alone."""
        tiles = [cut(image) for image in images]
        patches, scores = zip(*map(features_of, np.concatenate(tiles)), strict=True)
        groups = [(range(len(images)), parse_compression(compression))]
        features = TileFeatures(list(patches), torch.tensor(scores))
        return StandInEncoder.visual_tokens(self, features, [len(image) for image in tiles], groups, self.dtype)


def with_cheap_tower(encoder: TileEncoder) -> TileEncoder:
    """Give a real encoder patch tokens and scores of the stand-in kind; batches and projectors stay real."""

    def encode(tiles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        width = encoder.config.vision.hidden_size
        patches, scores = zip(*(features_of(tile.numpy(), width) for tile in tiles), strict=True)
        return torch.stack(patches).to(encoder.dtype), torch.tensor(scores)

    encoder.tower.encode = encode
    return encoder
