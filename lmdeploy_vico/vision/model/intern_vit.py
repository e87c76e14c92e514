"""InternViT: the vision transformer, in its 300M (LayerNorm) and 6B (RMSNorm, normalised q and k) variants."""

from itertools import pairwise
from typing import cast

import torch
import torch.nn.functional as F
from torch import nn

from lmdeploy_vico.choices import NO_SPEEDUPS, Speedups
from lmdeploy_vico.config import GRID, IMAGE_MEAN, IMAGE_STD, PATCH_SIZE, InternViTConfig
from lmdeploy_vico.kernels.residual_norm import Normalised, norm, residual_norm
from lmdeploy_vico.vision.model.speedups import cudnn_attention

PATCH_VALUES = 3 * PATCH_SIZE * PATCH_SIZE
PADDED_PATCH_VALUES = -(-PATCH_VALUES // 8) * 8  # whose 16-bit rows begin at multiples of 16 bytes


class InternVisionModel(nn.Module):
    """uint8 tiles in, patch tokens out. Parameter names are those of the checkpoint below ``vision_model.``

    Args:
        config: its shape.
        speedups: what is computed in another way; with any of them there are no gradients.
    """

    def __init__(self, config: InternViTConfig, speedups: Speedups = NO_SPEEDUPS) -> None:
        super().__init__()
        self.speedups = speedups
        self.embeddings = _Embeddings(config.hidden_size)
        self.encoder = _Encoder(config)

    def freeze(self) -> None:
        """Compute what depends on the weights alone, and keep it; from then on they must not change."""
        self.requires_grad_(False)
        self.embeddings.freeze(self.speedups.padded_patches)

    def forward(self, tiles: torch.Tensor) -> torch.Tensor:
        """Encode whole tiles.

        Args:
            tiles: uint8 RGB ``[B, 448, 448, 3]``.

        Returns:
            ``[B, 1025, D]`` in the parameters' dtype: the class token, then 32 x 32 patch tokens row by row. There is
            no final norm.

        Raises:
            RuntimeError: a gradient is needed, and a speed-up is on.
        """
        self._refuse_gradients(*self.parameters())
        return self.blocks(self.embeddings(tiles, self.speedups.padded_patches))

    def _refuse_gradients(self, *operands: torch.Tensor) -> None:
        if self.speedups and torch.is_grad_enabled() and any(operand.requires_grad for operand in operands):
            raise RuntimeError(f'The ViT has no gradients with vit_speedups ({self.speedups}): train without them.')

    def blocks(self, hidden: torch.Tensor) -> torch.Tensor:
        """The blocks alone: embedded tokens ``[B, T, D]`` in, hidden states out; raises as :meth:`forward`."""
        self._refuse_gradients(hidden, *self.parameters())
        if self.speedups.residual_norm:
            return self._fused_blocks(hidden)
        for layer in self.encoder.layers:
            hidden = layer(hidden, self.speedups)
        return hidden

    def _fused_blocks(self, hidden: torch.Tensor) -> torch.Tensor:
        """The blocks with every residual and the norm that follows it, across blocks too, in one operation."""
        layers = cast(list[_Block], list(self.encoder.layers))
        normed = layers[0].norm1(hidden)
        for layer, following in pairwise(layers):
            hidden, delta = layer.attend(hidden, normed, self.speedups)
            hidden, normed = _add_and_norm(hidden, delta, layer.ls2, following.norm1)
        hidden, delta = layers[-1].attend(hidden, normed, self.speedups)
        return torch.addcmul(hidden, delta, layers[-1].ls2)  # no norm follows


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
        self._kept_statistics: tuple[torch.Tensor, torch.Tensor] | None = None
        self._kept_padding: torch.Tensor | None = None

    @torch.no_grad()
    def freeze(self, padded: bool) -> None:
        """Keep the constants on the parameters' device, and the weight padded, if it shall be."""
        self._kept_statistics = self._kept_padding = None
        self._kept_statistics = self.statistics()
        if padded:
            self._kept_padding = self._padded_weight()

    def statistics(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation ``[3]`` of pixels, in float32 whatever the parameters' dtype."""
        if self._kept_statistics is not None:
            return self._kept_statistics
        device = self.position_embedding.device
        return torch.tensor(IMAGE_MEAN, device=device), torch.tensor(IMAGE_STD, device=device)

    def _padded_weight(self) -> torch.Tensor:
        if self._kept_padding is not None:
            return self._kept_padding
        return F.pad(self.patch_embedding.weight.flatten(1), (0, PADDED_PATCH_VALUES - PATCH_VALUES))

    def forward(self, tiles: torch.Tensor, padded: bool) -> torch.Tensor:
        mean, std = self.statistics()
        pixels = (tiles.float() / 255 - mean) / std
        # The patches do not overlap: the convolution is a matrix product over [3, 14, 14] patches.
        patches = pixels.reshape(-1, GRID, PATCH_SIZE, GRID, PATCH_SIZE, 3).permute(0, 1, 3, 5, 2, 4)
        if padded:
            weight = self._padded_weight()
            rows = _padded_rows(patches, weight.dtype)
        else:
            weight = self.patch_embedding.weight.flatten(1)
            rows = patches.reshape(-1, GRID * GRID, PATCH_VALUES).to(weight.dtype)
        tokens = F.linear(rows, weight, self.patch_embedding.bias)
        tokens = torch.cat([self.class_embedding.expand(len(tokens), -1, -1), tokens], dim=1)
        return tokens + self.position_embedding


def _padded_rows(patches: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Patches ``[B, 32, 32, 3, 14, 14]``, any strides, as rows ``[B, 1024, 592]`` that end in zeros; one pass."""
    rows = patches.new_empty(len(patches), GRID, GRID, PADDED_PATCH_VALUES, dtype=dtype)
    rows[..., PATCH_VALUES:] = 0
    rows[..., :PATCH_VALUES].unflatten(-1, patches.shape[3:]).copy_(patches)
    return rows.flatten(1, 2)


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

    def forward(self, hidden: torch.Tensor, speedups: Speedups) -> torch.Tensor:
        hidden = hidden + self.attn(self.norm1(hidden), speedups) * self.ls1
        return hidden + self.mlp(self.norm2(hidden)) * self.ls2

    def attend(
        self, hidden: torch.Tensor, normed: torch.Tensor, speedups: Speedups
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The hidden states after the attention, given their norm; and what the MLP adds to them, not scaled yet."""
        hidden, normed = _add_and_norm(hidden, self.attn(normed, speedups), self.ls1, self.norm2)
        return hidden, self.mlp(normed)


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

    def forward(self, hidden: torch.Tensor, speedups: Speedups) -> torch.Tensor:
        batch, tokens, width = hidden.shape
        query, key, value = self.qkv(hidden).chunk(3, dim=-1)
        if self.qk_normalization and speedups.strided_qk_norm:
            query, key = _strided_norm(query, self.q_norm), _strided_norm(key, self.k_norm)
        elif self.qk_normalization:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key, value = (part.view(batch, tokens, self.heads, -1).transpose(1, 2) for part in (query, key, value))
        attend = cudnn_attention if speedups.cudnn_attention else F.scaled_dot_product_attention
        attended = attend(query, key, value)
        return self.proj(attended.transpose(1, 2).reshape(batch, tokens, width))


class _MLP(nn.Module):
    def __init__(self, width: int, intermediate: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, intermediate)
        self.fc2 = nn.Linear(intermediate, width)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(hidden)))


Norm = nn.LayerNorm | nn.RMSNorm


def _norm(config: InternViTConfig) -> Norm:
    if config.norm_type == 'rms_norm':
        return nn.RMSNorm(config.hidden_size, eps=config.layer_norm_eps)
    return nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)


def _add_and_norm(hidden: torch.Tensor, delta: torch.Tensor, scale: torch.Tensor, layer: Norm) -> Normalised:
    return residual_norm(hidden, delta, scale, *_affine(layer))


def _strided_norm(rows: torch.Tensor, layer: Norm) -> torch.Tensor:
    return norm(rows, *_affine(layer))


def _affine(layer: Norm) -> tuple[torch.Tensor, torch.Tensor | None, float]:
    """Weight, bias (None tells an RMSNorm) and eps, as the kernel takes them."""
    bias = layer.bias if isinstance(layer, nn.LayerNorm) else None
    assert layer.eps is not None
    return layer.weight, bias, layer.eps
