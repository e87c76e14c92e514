"""Vision sides of published sizes with random weights: speed does not depend on the values."""

from typing import Any

import torch
from torch import nn

from lmdeploy_vico.checkpoints.initialisation import DummyWeights
from lmdeploy_vico.checkpoints.random import configuration
from lmdeploy_vico.config import VicoConfig
from lmdeploy_vico.vision.tile_encoder import TileEncoder

# Name: ViT width, layers, heads, MLP width, norm type, language model width.
SIZES = {
    'tiny': (64, 2, 4, 128, 'layer_norm', 128),
    '300M': (1024, 24, 16, 4096, 'layer_norm', 4096),
    '6B': (3200, 45, 25, 12800, 'rms_norm', 5120),
}


def config(like: str, layers: int | None = None) -> dict[str, Any]:
    """A checkpoint's config, as far as the vision side reads it; ``layers`` shortens the ViT."""
    width, depth, heads, mlp, norm, hidden = SIZES[like]
    size = configuration.Size(width, layers or depth, heads, mlp, hidden, *[0] * 8)
    vision = configuration.vision_config(size, norm)
    language = {'architectures': ['Qwen3ForCausalLM'], 'hidden_size': hidden}
    made = configuration.model_config(vision, {**language, 'eos_token_id': 0}, flash=True)
    return made | {'flash_absolute_threshold': 0.0}  # so that half of the tiles of any prompt are compressed


class RandomCheckpoint(DummyWeights):
    """Takes a checkpoint's place where the encoder is loaded.

    Args:
        keep: whether a copy of what was loaded is kept in ``tensors``, for another implementation to load.
    """

    def __init__(self, keep: bool = True) -> None:
        self._keep = keep
        self.tensors: dict[str, torch.Tensor] = {}

    def load_into(self, module: nn.Module) -> None:
        """Fill every parameter of ``module``."""
        super().load_into(module)
        if self._keep:
            self.tensors = {name: value.detach().clone() for name, value in module.named_parameters()}


def random_encoder(
    config: dict[str, Any], device: torch.device, keep: bool
) -> tuple[TileEncoder, dict[str, torch.Tensor]]:
    """A warm encoder for this config in the device's usual dtype, and a copy of its weights if they are kept."""
    checkpoint = RandomCheckpoint(keep=keep)
    encoder = TileEncoder.load(checkpoint, VicoConfig.from_dict(config), device=device)
    encoder.warm_up()
    return encoder, checkpoint.tensors
