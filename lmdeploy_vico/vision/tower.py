"""The whole vision side of a ViCO model as one module, named like the checkpoint."""

import torch
from torch import nn

from lmdeploy_vico.config import VicoConfig
from lmdeploy_vico.vision.intern_vit import InternVisionModel
from lmdeploy_vico.vision.projector import (
    COMPRESSED_RATIO,
    FULL_RATIO,
    compressed_projector,
    full_projector,
    project,
)
from lmdeploy_vico.vision.router import AttentionPooling, Gating


class VisionTower(nn.Module):
    """ViT, router and both projectors; every method works on a fixed batch of whole tiles."""

    def __init__(self, config: VicoConfig) -> None:
        super().__init__()
        vit_width, llm_width = config.vision.hidden_size, config.llm_hidden_size
        self.vision_model = InternVisionModel(config.vision)
        self.pooling_before_gating = AttentionPooling(vit_width)
        self.gating = Gating(vit_width)
        self.mlp1 = full_projector(vit_width, llm_width)
        self.mlp2 = compressed_projector(vit_width, llm_width)

    def prepare(self) -> None:
        """Compute what depends on the weights alone; call once they are in place."""
        self.vision_model.embeddings.prepare()
        self.pooling_before_gating.prepare()

    def encode(self, tiles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode and score tiles.

        Args:
            tiles: uint8 RGB ``[B, 448, 448, 3]``.

        Returns:
            Patch tokens ``[B, 1024, D]`` in the parameters' dtype, and scores ``[B]`` in float32: the router's
            probability that a tile can be compressed.
        """
        patches = self.vision_model(tiles)[:, 1:]  # without the class token
        return patches, self.gating(self.pooling_before_gating(patches))[:, 0]

    def project(self, patches: torch.Tensor, compressed: bool) -> torch.Tensor:
        """Visual tokens of tiles routed alike: ``[B, 1024, D]`` to ``[B, 64 or 256, H]``."""
        if compressed:
            return project(self.mlp2, patches, COMPRESSED_RATIO)
        return project(self.mlp1, patches, FULL_RATIO)
