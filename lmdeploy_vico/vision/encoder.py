"""VisionEncoder: images of a prompt in, routed visual tokens out."""

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from lmdeploy_vico.choices import Compression
from lmdeploy_vico.config import VicoConfig
from lmdeploy_vico.vision.projection import VisualTokens
from lmdeploy_vico.vision.tile_encoder import TileEncoder
from lmdeploy_vico.vision.tiling import Tiling, cut_grid


class VisionEncoder:
    """The vision side of a ViCO checkpoint on one device, for one prompt at a time.

    Attributes:
        config: the checkpoint's.

    Args:
        tiles: the encoder that this one cuts images for.
    """

    def __init__(self, tiles: TileEncoder) -> None:
        self.config: VicoConfig = tiles.config
        self._tiles = tiles
        self._tiling = Tiling.of(tiles.config)

    @classmethod
    def from_pretrained(
        cls, path: str | Path, device: str | torch.device | None = None, dtype: torch.dtype | None = None
    ) -> 'VisionEncoder':
        """Load a ViCO checkpoint's vision side.

        Args:
            path: checkpoint directory with ``config.json`` and safetensors shards.
            device: by default the current CUDA device, or the CPU without one.
            dtype: by default bfloat16, or float16 on a CUDA device without bfloat16; always float32 on a CPU.

        Raises:
            UnsupportedCheckpointError: not a ViCO checkpoint, or tensors are missing or misshapen (all are named).
        """
        return cls(TileEncoder.from_pretrained(path, device, dtype))

    def encode(self, images: Sequence[Image.Image], compression: Compression = 'auto') -> list[VisualTokens]:
        """Encode and route the images of **one prompt**: the same image may be compressed otherwise beside others.

        Args:
            images: in any mode; each is cut as the checkpoint's config says.
            compression: ``"auto"``, ``"none"``, ``"all"``, or the share of tiles to compress, from 0 to 1.

        Returns:
            One result an image.

        Raises:
            ValueError: an unknown compression.
        """
        tiles = [cut_grid(image, self._tiling.grid(image.size)) for image in images]
        return self._tiles.encode_tiles(tiles, compression)
