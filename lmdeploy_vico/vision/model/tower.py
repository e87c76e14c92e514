"""The whole vision side of a ViCO model as one module, named like the checkpoint."""

import torch
from torch import nn

from lmdeploy_vico.choices import NO_SPEEDUPS, Speedups
from lmdeploy_vico.config import VicoConfig
from lmdeploy_vico.kernels.pixel_shuffle import Shuffled
from lmdeploy_vico.vision.model.intern_vit import InternVisionModel
from lmdeploy_vico.vision.model.projector import compressed_projector, full_projector, shuffle
from lmdeploy_vico.vision.model.router import AttentionPooling, Gating


class VisionTower(nn.Module):
    """ViT, router and both projectors; every method works on a batch of whole tiles.

    As it is made, everything is computed from the weights as they are, and gradients flow through all of it in plain
    torch. :meth:`freeze` is for serving.
    """

    def __init__(self, config: VicoConfig, speedups: Speedups = NO_SPEEDUPS) -> None:
        super().__init__()
        vit_width, llm_width = config.vision.hidden_size, config.llm_hidden_size
        self.vision_model = InternVisionModel(config.vision, speedups)
        self.pooling_before_gating = AttentionPooling(vit_width)
        self.gating = Gating(vit_width)
        self.mlp1 = full_projector(vit_width, llm_width)
        self.mlp2 = compressed_projector(vit_width, llm_width)

    def freeze(self) -> None:
        """Compute what depends on the weights alone, and keep it; call once they are in place.

        From then on the weights must not change. None of them requires a gradient, and the router refuses to compute
        one.
        """
        self.requires_grad_(False).eval()
        self.vision_model.freeze()
        self.pooling_before_gating.freeze()
        self.gating.freeze()

    def encode(self, tiles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode and score tiles.

        Args:
            tiles: uint8 RGB ``[B, 448, 448, 3]``.

        Returns:
            Patch tokens ``[B, 1024, D]`` in the parameters' dtype, and scores ``[B]`` in float32: the router's
            probability that a tile can be compressed.
        """
        patches = self.patches(tiles)
        return patches, torch.softmax(self.logits(patches), dim=-1)[:, 0]

    def patches(self, tiles: torch.Tensor) -> torch.Tensor:
        """Patch tokens ``[B, 1024, D]`` of uint8 tiles, in the parameters' dtype, without the class token."""
        patches: torch.Tensor = self.vision_model(tiles)[:, 1:]
        return patches

    def logits(self, patches: torch.Tensor) -> torch.Tensor:
        """The router's float32 logits ``[B, 2]`` of patch tokens ``[B, 1024, D]``; the first one's class: compress."""
        return self.gating.logits(self.pooling_before_gating(patches))

    def shuffle(self, patches: torch.Tensor, compressed: torch.Tensor, room: tuple[int, int]) -> Shuffled:
        """Prepare tiles for the projectors they are routed to.

        Args:
            patches: ``[B, 1024, D]``.
            compressed: bool ``[B]`` on the same device.
            room: for how many (full, compressed) tiles there shall be rows.

        Returns:
            Full rows ``[room * 256, 4 * D]`` and compressed rows ``[room * 64, 16 * D]``; those beyond the tiles there
            are hold nothing of use.
        """
        return shuffle(patches, compressed, self.mlp1, self.mlp2, room)

    def project(self, rows: torch.Tensor, compressed: bool) -> torch.Tensor:
        """Visual tokens ``[n, H]`` of rows of :meth:`shuffle`, all of one kind."""
        mlp = self.mlp2 if compressed else self.mlp1
        return mlp[1:](rows)
