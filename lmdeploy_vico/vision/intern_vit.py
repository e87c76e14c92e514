"""InternViT: the vision transformer, in its 300M (LayerNorm) and 6B (RMSNorm, normalised q and k) variants."""

import torch
import torch.nn.functional as F
from torch import nn

from lmdeploy_vico.config import GRID, IMAGE_MEAN, IMAGE_STD, PATCH_SIZE, InternViTConfig


class InternVisionModel(nn.Module):
    """uint8 tiles in, patch tokens out. Parameter names are those of the checkpoint below ``vision_model.``"""

    def __init__(self, config: InternViTConfig) -> None:
        super().__init__()
        self.embeddings = _Embeddings(config.hidden_size)
        self.encoder = _Encoder(config)

    def forward(self, tiles: torch.Tensor) -> torch.Tensor:
        """Encode whole tiles.

        Args:
            tiles: uint8 RGB ``[B, 448, 448, 3]``.

        Returns:
            ``[B, 1025, D]`` in the parameters' dtype: the class token, then 32 x 32 patch tokens row by row. There is
            no final norm.
        """
        hidden = self.embeddings(tiles)
        for layer in self.encoder.layers:
            hidden = layer(hidden)
        return hidden


class _Encoder(nn.Module):
    def __init__(self, config: InternViTConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Block(config) for _ in range(config.num_hidden_layers))


class _Embeddings(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.class_embedding = nn.Parameter(torch.empty(1, 1, width))
        self.position_embedding = nn.Parameter(torch.empty(1, GRID * GRID + 1, width))
        self.patch_embedding = nn.Conv2d(3, width, kernel_size=PATCH_SIZE, stride=PATCH_SIZE)

    def prepare(self) -> None:
        """Put the constants on the parameters' device, in float32 whatever the parameters' dtype."""
        device = self.position_embedding.device
        self._mean, self._std = torch.tensor(IMAGE_MEAN, device=device), torch.tensor(IMAGE_STD, device=device)

    def forward(self, tiles: torch.Tensor) -> torch.Tensor:
        pixels = (tiles.float() / 255 - self._mean) / self._std
        # The patches do not overlap: the convolution is a matrix product over [3, 14, 14] patches.
        patches = pixels.reshape(-1, GRID, PATCH_SIZE, GRID, PATCH_SIZE, 3).permute(0, 1, 3, 5, 2, 4)
        patches = patches.reshape(-1, GRID * GRID, 3 * PATCH_SIZE * PATCH_SIZE)
        weight = self.patch_embedding.weight.flatten(1)
        tokens = F.linear(patches.to(weight.dtype), weight, self.patch_embedding.bias)
        tokens = torch.cat([self.class_embedding.expand(len(tokens), -1, -1), tokens], dim=1)
        return tokens + self.position_embedding


class _Block(nn.Module):
    """Pre-norm transformer block with layer scale."""

    def __init__(self, config: InternViTConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.attn = _Attention(config)
        self.mlp = _MLP(width, config.intermediate_size)
        self.norm1 = _norm(config)
        self.norm2 = _norm(config)
        self.ls1 = nn.Parameter(torch.empty(width))
        self.ls2 = nn.Parameter(torch.empty(width))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = hidden + self.attn(self.norm1(hidden)) * self.ls1
        return hidden + self.mlp(self.norm2(hidden)) * self.ls2


class _Attention(nn.Module):
    def __init__(self, config: InternViTConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.heads = config.num_attention_heads
        self.qkv = nn.Linear(width, 3 * width, bias=config.qkv_bias)
        self.proj = nn.Linear(width, width)
        self.qk_normalization = config.qk_normalization
        if config.qk_normalization:
            # Over the full width, before the heads are split.
            self.q_norm = nn.RMSNorm(width, eps=config.layer_norm_eps)
            self.k_norm = nn.RMSNorm(width, eps=config.layer_norm_eps)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        batch, tokens, width = hidden.shape
        query, key, value = self.qkv(hidden).chunk(3, dim=-1)
        if self.qk_normalization:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key, value = (part.view(batch, tokens, self.heads, -1).transpose(1, 2) for part in (query, key, value))
        attended = F.scaled_dot_product_attention(query, key, value)
        return self.proj(attended.transpose(1, 2).reshape(batch, tokens, width))


class _MLP(nn.Module):
    def __init__(self, width: int, intermediate: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, intermediate)
        self.fc2 = nn.Linear(intermediate, width)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(hidden)))


def _norm(config: InternViTConfig) -> nn.Module:
    if config.norm_type == 'rms_norm':
        return nn.RMSNorm(config.hidden_size, eps=config.layer_norm_eps)
    return nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
